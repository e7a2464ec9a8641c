"""What computes: the kinds of devices, what each can do, and which one is meant. Nobody else asks what kind one is."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from halfbyte.errors import BadRequest

if TYPE_CHECKING:
    import torch

AUTO = "auto"


def _free_bytes(device: "torch.device") -> int:
    return _module(device.type).mem_get_info(device)[0]


def _recommended_bytes(device: "torch.device") -> int:
    """Of a GPU that shares the system's memory."""
    module = _module(device.type)
    return module.recommended_max_memory() - module.current_allocated_memory()


@dataclass(frozen=True)
class Kind:
    """What torch calls a kind of device, and what it can do."""

    name: str
    is_host: bool = False
    """Whether it is the CPU: files are read into its memory, and compiled kernels run on it."""
    is_numbered: bool = True
    """Whether there may be several, each with a name of its own."""
    pins: bool = False
    """Whether copies from pinned memory go on while it computes."""
    multiplies_int8: bool = False
    """Whether torch._int_mm is exact and fast on it."""
    free_bytes: Callable[["torch.device"], int] = _free_bytes
    """Bytes of its memory that nothing has taken."""


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("cpu", is_host=True, is_numbered=False),
        Kind("cuda", pins=True, multiplies_int8=True),
        Kind("xpu"),
        Kind("mps", is_numbered=False, free_bytes=_recommended_bytes),
    )
}
"""GPUs in the order in which `auto` looks for one."""
GPUS = tuple(name for name, kind in KINDS.items() if not kind.is_host)
NAME = re.compile("|".join((AUTO, *(rf"{name}(:\d+)?" if kind.is_numbered else name for name, kind in KINDS.items()))))


def kind_of(device: "torch.device | str") -> Kind:
    """What a device can do; of a kind that is in no table (meta), nothing."""
    name = str(device).partition(":")[0]
    return KINDS.get(name, Kind(name))


def require_name(words: str) -> str:
    """Raise BadRequest for what is no name of a device, before torch is imported."""
    words = str(words)  # of a torch.device too
    if not NAME.fullmatch(words):
        raise BadRequest(
            f"'{words}' is no device; name one of {AUTO}, {', '.join(KINDS)}, or a GPU by its number, such as cuda:1"
        )
    return words


def device_named(words: str = AUTO) -> "torch.device":
    """The device that is meant. Raises BadRequest for one that is not here: nothing falls back to another in
    silence."""
    words = require_name(words)
    name, _, number = words.partition(":")
    if words != AUTO and KINDS[name].is_host:
        return _device(name)
    present = {gpu: count for gpu in GPUS if (count := _count(gpu))}
    if words == AUTO:
        name = next(iter(present), "cpu")
    elif name not in present:
        here = ", ".join(present) or "the CPU alone"
        raise BadRequest(
            f"there is no device {words} here, or this build of torch does not use it; there is {here} (--device auto)"
        )
    if number and int(number) >= present[name]:
        raise BadRequest(f"there is no device {words}; there are {name}:0 to {name}:{present[name] - 1}")
    return _device(f"{name}:{number or _current(name)}" if KINDS[name].is_numbered else name)


def title(device: "torch.device") -> str:
    """As reports have it: cuda:0 (NVIDIA H100)."""
    if not kind_of(device).is_numbered:
        return str(device)
    return f"{device} ({_module(device.type).get_device_name(device)})"


def release(device: "torch.device") -> None:
    """Give memory back that torch holds of a GPU and does not use."""
    if not kind_of(device).is_host:
        _module(device.type).empty_cache()


def _device(name: str) -> "torch.device":
    import torch  # seconds, which wrong words need not wait for

    return torch.device(name)


def _module(kind: str):
    """What torch knows of a kind of device."""
    import torch

    return torch.get_device_module(kind)


def _count(kind: str) -> int:
    """How many devices of a kind there are."""
    import torch

    module = getattr(torch, kind, None)  # which older versions lack of some kinds
    return int(module.device_count()) if module else 0


def _current(kind: str) -> int:
    return int(_module(kind).current_device())
