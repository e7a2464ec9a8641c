"""Which implementation of an operation runs: the only place that asks where tensors lie.

An operation is a function in torch, its reference, which runs on every device. `@faster(cpu="table")` says that the
module `halfbyte.kernels.cpu.table` has a function of the same name that does the same for tensors in the memory of a
CPU; `gpu=`, that one of `halfbyte.kernels.gpu` does for those of a GPU, where Triton is installed
and has a C compiler.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from sysconfig import get_paths
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor

from halfbyte.devices import kind_of

Operation = TypeVar("Operation", bound=Callable[..., Any])
Kernels = Literal["fast", "reference"]


class _Choice:
    """What `using` has chosen, in all threads."""

    kernels: Kernels = "fast"


@contextmanager
def using(kernels: Kernels) -> Iterator[None]:
    """Run every operation as its torch reference, on whatever device; or as fast as is known, which is the default."""
    before, _Choice.kernels = _Choice.kernels, kernels
    try:
        yield
    finally:
        _Choice.kernels = before


def faster(**modules: str) -> Callable[[Operation], Operation]:
    """The function is the reference of an operation; its first tensor says where it runs. `modules`: in which one of
    each sub-package its twin is.

    A twin that returns NotImplemented knows no faster way for these operands.
    """

    def choosing(reference: Operation) -> Operation:
        @wraps(reference)
        def operation(*args: Any) -> Any:
            kernels = _kernels_of(next(arg for arg in args if isinstance(arg, Tensor)).device)
            if _Choice.kernels == "fast" and kernels in modules and _is_there(kernels):
                twin = _twin(f"halfbyte.kernels.{kernels}.{modules[kernels]}", reference.__name__)
                if (result := twin(*args)) is not NotImplemented:
                    return result
            return reference(*args)

        return cast(Operation, operation)

    return choosing


@cache
def _kernels_of(device: torch.device) -> str:
    """Asked of every operation, some of which take microseconds."""
    return kind_of(device).kernels


@cache
def _twin(module: str, name: str) -> Callable[..., Any]:
    """Imported when it is needed: numba takes half a second."""
    return getattr(import_module(module), name)


@cache
def _is_there(kernels: str) -> bool:
    """Builds of torch for GPUs bring Triton along, but those for Windows do not; and Triton compiles what starts its
    kernels, for which it needs a C compiler and Python's headers."""
    if kernels != "gpu":
        return True
    compiles = (which("gcc") or which("clang")) and Path(get_paths()["include"], "Python.h").exists()
    return bool(compiles) and find_spec("triton") is not None
