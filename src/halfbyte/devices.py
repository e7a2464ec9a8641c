"""What computes: the kinds of devices, what each can do, and which one is meant. Nobody else asks what kind one is."""

import ctypes
import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.errors import BadRequest

if TYPE_CHECKING:
    import torch

AUTO = "auto"


def _free_bytes(device: "torch.device") -> int:
    return _module(device.type).mem_get_info(device)[0]


def _peak_bytes(device: "torch.device") -> int | None:
    """None where torch does not tell (MPS)."""
    peak = getattr(_module(device.type), "max_memory_allocated", None)
    return peak(device) if peak else None


def peak_of_process() -> int | None:
    """The most of the system's memory that this process has had; None where the system does not say (macOS)."""
    if sys.platform != "linux":
        import psutil  # which `halfbyte --help` need not wait for

        return getattr(psutil.Process().memory_info(), "peak_wset", None)
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


def _available_bytes(_: "torch.device") -> int:
    """Of this machine: what programs can have without others being put out, within what the system lets this process
    have."""
    import psutil

    limits = [limit - used for limit, used in map(_of_group, CGROUPS) if limit is not None]
    return max(0, min([psutil.virtual_memory().available, *limits]))


def _of_group(names: tuple[str, str, str]) -> tuple[int | None, int]:
    """The limit of a control group, if there is one, and what its processes hold that cannot be dropped."""
    home, limit, used = names
    try:
        limit_text = Path(home, limit).read_text(encoding="ascii").strip()
        taken = int(Path(home, used).read_text(encoding="ascii"))
        files = dict(line.split() for line in Path(home, "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return None, 0
    dropped = int(files.get("inactive_file", files.get("total_inactive_file", 0)))
    return (int(limit_text) if limit_text.isdigit() else None), taken - dropped


CGROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)
"""Where Linux says what a container may have: version 2, and version 1."""


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
    has_tf32: bool = False
    """Whether units that take eleven bits of each factor multiply float32 where torch is asked for that."""
    kernels: str = ""
    """The sub-package of halfbyte.kernels that has faster twins of operations for it."""
    free_bytes: Callable[["torch.device"], int] = _free_bytes
    """Bytes of its memory that nothing has taken."""
    peak_bytes: Callable[["torch.device"], int | None] = _peak_bytes
    """The most of its memory that this process has had at a time."""


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            "cpu",
            is_host=True,
            is_numbered=False,
            kernels="cpu",
            free_bytes=_available_bytes,
            peak_bytes=lambda _: peak_of_process(),
        ),
        Kind("cuda", pins=True, multiplies_int8=True, has_tf32=True, kernels="gpu"),
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


def require_name(name: str) -> str:
    """Raise BadRequest for what is no name of a device, before torch is imported."""
    name = str(name)  # of a torch.device too
    if not NAME.fullmatch(name):
        raise BadRequest(
            f"'{name}' is no device; name one of {AUTO}, {', '.join(KINDS)}, or a GPU by its number, such as cuda:1"
        )
    return name


def device_named(device: str = AUTO) -> "torch.device":
    """The device that is meant. Raises BadRequest for one that is not here: nothing falls back to another in
    silence."""
    device = require_name(device)
    name, _, number = device.partition(":")
    if device != AUTO and KINDS[name].is_host:
        return _device(name)
    present = {gpu: count for gpu in GPUS if (count := _count(gpu))}
    if device == AUTO:
        name = next(iter(present), "cpu")
    elif name not in present:
        here = ", ".join(present) or "the CPU alone"
        raise BadRequest(
            f"there is no device {device} here, or this build of torch does not use it; there is {here} (--device auto)"
        )
    if number and int(number) >= present[name]:
        raise BadRequest(f"there is no device {device}; there are {name}:0 to {name}:{present[name] - 1}")
    return _device(f"{name}:{number or _current(name)}" if KINDS[name].is_numbered else name)


def title(device: "torch.device") -> str:
    """As reports have it: cuda:0 (NVIDIA H100)."""
    if not kind_of(device).is_numbered:
        return str(device)
    return f"{device} ({_module(device.type).get_device_name(device)})"


def entered(device: "torch.device") -> AbstractContextManager:
    """While this lasts, it is the one that a GPU's kernels start on."""
    return nullcontext() if kind_of(device).is_host else _module(device.type).device(device)


@cache
def multiprocessors(device: "torch.device") -> int:
    """Of a GPU; what runs a GPU's kernels without one has one."""
    return 1 if kind_of(device).is_host else _module(device.type).get_device_properties(device).multi_processor_count


@cache
def has_capability(device: "torch.device", *least: int) -> bool:
    """Whether it is a GPU that Triton has kernels for, of this compute capability or a later one."""
    return kind_of(device).kernels == "gpu" and _module(device.type).get_device_capability(device) >= least


def multiplies_float8(device: "torch.device") -> bool:
    """Whether torch._scaled_mm multiplies E4M3 as files have it: AMD's first GPUs for it have a number of another
    bias."""
    import torch

    return torch.version.hip is None and has_capability(device, 8, 9)


def forget_peak(device: "torch.device") -> None:
    """From now on, a GPU's `peak_bytes` are of what comes."""
    if reset := getattr(_module(device.type), "reset_peak_memory_stats", None):
        reset(device)


def wait(device: "torch.device") -> None:
    """Until it has done all that it was given."""
    if not kind_of(device).is_host:
        _module(device.type).synchronize()


HELD_BYTES = 200 << 20
"""What the C library may hold between two blocks: every page that goes back is filled with zeros when it is asked for
again."""


def release(device: "torch.device", beyond: int = 0) -> None:
    """Give memory back that is held and not used: torch's of a GPU; the C library's of the system's, where it is more
    than so many bytes."""
    if not kind_of(device).is_host:
        _module(device.type).empty_cache()
    elif (trim := _trim()) and _held_bytes() > beyond:
        trim(0)


class _Heap(ctypes.Structure):
    """What glibc's mallinfo2 returns: ten numbers, of which `fordblks` are the bytes that are free."""

    _fields_ = [("others", ctypes.c_size_t * 8), ("fordblks", ctypes.c_size_t), ("keepcost", ctypes.c_size_t)]


def _held_bytes() -> float:
    """In the heap of the C library and not used; infinite where it does not say."""
    tell = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if tell is None:
        return float("inf")
    tell.restype = _Heap
    return tell().fordblks


@cache
def _trim() -> "Callable[[int], int] | None":
    """glibc keeps what was freed in small pieces, and each thread its own: of a large block, hundreds of megabytes."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


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
