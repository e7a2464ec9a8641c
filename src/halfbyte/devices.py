"""Which device computes: a GPU where there is one, unless another is asked for."""

import re
from typing import TYPE_CHECKING

from halfbyte.errors import BadRequest

if TYPE_CHECKING:
    import torch

AUTO = "auto"
KINDS = ("cuda", "xpu", "mps")
"""Of GPUs, in the order in which `auto` looks for one."""
NAME = re.compile(rf"{AUTO}|cpu|mps|(cuda|xpu)(:\d+)?")


def require_name(words: str) -> str:
    """Raise BadRequest for what is no name of a device, before torch is imported."""
    words = str(words)  # of a torch.device too
    if not NAME.fullmatch(words):
        raise BadRequest(
            f"'{words}' is no device; name one of {AUTO}, cpu, {', '.join(KINDS)}, or a GPU by its number, "
            "such as cuda:1"
        )
    return words


def device_named(words: str = AUTO) -> "torch.device":
    """The device that is meant. Raises BadRequest for one that is not here: nothing falls back to another in
    silence."""
    words = require_name(words)
    if words == "cpu":
        return _device("cpu")
    present = {kind: count for kind in KINDS if (count := _count(kind))}
    if words == AUTO:
        kind = next(iter(present), "cpu")
        return _device(kind if kind in ("cpu", "mps") else f"{kind}:{_current(kind)}")
    kind, _, number = words.partition(":")
    if kind not in present:
        here = ", ".join(present) or "the CPU alone"
        raise BadRequest(
            f"there is no device {words} here, or this build of torch does not use it; there is {here} (--device auto)"
        )
    if number and int(number) >= present[kind]:
        raise BadRequest(f"there is no device {words}; there are {kind}:0 to {kind}:{present[kind] - 1}")
    return _device(words if kind == "mps" else f"{kind}:{number or _current(kind)}")


def title(device: "torch.device") -> str:
    """As reports have it: cuda:0 (NVIDIA H100)."""
    if device.type not in ("cuda", "xpu"):
        return str(device)
    import torch

    return f"{device} ({torch.get_device_module(device).get_device_name(device)})"


def _device(name: str) -> "torch.device":
    import torch  # seconds, which wrong words need not wait for

    return torch.device(name)


def _count(kind: str) -> int:
    """How many devices of a kind there are."""
    import torch

    module = getattr(torch, kind, None)
    if module is None or (kind == "mps" and not torch.backends.mps.is_available()):
        return 0
    return int(module.device_count())


def _current(kind: str) -> int:
    import torch

    return int(torch.get_device_module(kind).current_device())
