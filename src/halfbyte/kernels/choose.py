"""Which implementation of an operation runs: the only place that asks where tensors lie.

An operation is a function in torch, its reference, which runs on every device. `@faster_on_cpu("table")` says that the
module `halfbyte.kernels.cpu.table` has a function of the same name that does the same for tensors in the memory of a
CPU.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
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


def faster_on_cpu(module: str) -> Callable[[Operation], Operation]:
    """The function is the reference of an operation; its first tensor says where it runs.

    A twin that returns NotImplemented knows no faster way for these operands.
    """

    def choosing(reference: Operation) -> Operation:
        @wraps(reference)
        def operation(*args: Any) -> Any:
            if _Choice.kernels == "fast" and _on_cpu(args):
                # Only now: numba takes half a second to import.
                twin = getattr(import_module(f"halfbyte.kernels.cpu.{module}"), reference.__name__)
                if (result := twin(*args)) is not NotImplemented:
                    return result
            return reference(*args)

        return cast(Operation, operation)

    return choosing


def has_compiled(device: str | torch.device) -> bool:
    """Whether there are compiled operations for tensors there; what packs and unpacks bits is compiled too."""
    return kind_of(device).is_host


def _on_cpu(args: tuple[object, ...]) -> bool:
    return has_compiled(next(a for a in args if isinstance(a, Tensor)).device)
