"""What multiplies by the matrices of a block: every product is seen, whatever code makes it, and may be given another
operand.

Products are known by the memory that they read, so no architecture has to say where its linears are.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from halfbyte.errors import BadCheckpoint
from halfbyte.grids.activations import ActivationQuant
from halfbyte.models.weight import Weight

Report = Callable[[list["Matrix"], Tensor], Tensor | None]
"""Sees what some matrices read, and may return what they are to read instead."""


@dataclass(frozen=True)
class Matrix:
    """A matrix of a block that something is multiplied by: one to quantize, or another, such as a router."""

    tensor: str
    expert: int | None
    weight: Weight | None
    """None: not to be quantized."""


class MatmulCapture(TorchFunctionMode):
    """Reports each product of a tensor with a matrix of the block, with a part of one, or with several at once, and has
    it read what the report returns."""

    def __init__(self, matrices: Iterable[tuple[Matrix, Tensor]], report: Report):
        """Of matrices, each with its view."""
        super().__init__()
        self.report = report
        self.owners: dict[int, list[tuple[int, int, Matrix, bool]]] = {}
        self.alive: list[Tensor] = []
        """Casts of matrices, kept so that no address is used twice."""
        for matrix, view in matrices:
            start, end = _extent(view)
            row_major = (view.stride(-1) == 1) != (matrix.weight is not None and matrix.weight.transposed)
            self.owners.setdefault(view.untyped_storage().data_ptr(), []).append((start, end, matrix, row_major))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is functional.linear:
            args = (self._see(args[0], args[1], is_linear=True), *args[1:])
        elif func in (torch.addmm, torch.Tensor.addmm):
            args = (args[0], self._see(args[1], args[2], is_linear=False), *args[2:])
        elif func in PRODUCTS:
            args = (self._see(args[0], args[1], is_linear=False), *args[1:])
        result = func(*args, **(kwargs or {}))
        if func in CASTS:
            self._follow(args[0], result)
        return result

    def _follow(self, tensor: Tensor, cast: Tensor) -> None:
        """A copy in another dtype stands for the same matrices: many routers multiply by theirs in 32 bits."""
        owners = self.owners.get(tensor.untyped_storage().data_ptr())
        if (
            owners
            and cast.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()
            and cast.stride() == tensor.stride()
        ):
            shift = int(cast.storage_offset()) - int(tensor.storage_offset())
            moved = [(first + shift, last + shift, m, row_major) for first, last, m, row_major in owners]
            self.owners[cast.untyped_storage().data_ptr()] = moved
            self.alive.append(cast)

    def _see(self, x: Tensor, operand: Tensor, is_linear: bool) -> Tensor:
        """What the product is to read."""
        owners = self.owners.get(operand.untyped_storage().data_ptr())
        if owners is None:
            return x
        if operand.dim() == 3:  # a product over all experts at once
            read = [self._see(x[number], operand[number], is_linear) for number in range(operand.shape[0])]
            return (
                x
                if all(part.data_ptr() == x[number].data_ptr() for number, part in enumerate(read))
                else torch.stack(read)
            )
        start, end = _extent(operand)
        read = [(m, row_major) for first, last, m, row_major in owners if first < end and start < last]
        for matrix, row_major in read:
            if matrix.weight and row_major != (is_linear == (operand.stride(-1) == 1)):
                raise BadCheckpoint(
                    f"'{matrix.tensor}' lies transposed to what halfbyte thinks; its family needs a row in "
                    "models/roles.py (TRANSPOSED)"
                )
        instead = self.report([m for m, _ in read], x) if read else None
        return x if instead is None else instead


class GradientCapture(MatmulCapture):
    """Reports the gradients at what products with matrices to quantize return, once these are known."""

    def __init__(self, matrices: Iterable[tuple[Matrix, Tensor]], report: Callable[[Weight, Tensor], None]):
        """`report` is told of a weight and gradients at its outputs, [tokens, out]."""
        super().__init__(matrices, lambda matrices, x: None)
        self.report_gradient = report

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs)
        if func is functional.linear:
            self._hook(args[1], result, 0)
        elif func in (torch.addmm, torch.Tensor.addmm):
            self._hook(args[2], result, 1)
        elif func in PRODUCTS:
            self._hook(args[1], result, 1)
        return result

    def _hook(self, operand: Tensor, result: Tensor, out: int) -> None:
        """`out`: the operand's dimension of out-features."""
        owners = self.owners.get(operand.untyped_storage().data_ptr())
        if owners is None or not result.requires_grad:
            return
        if operand.dim() == 3:
            starts = [(int(part.storage_offset()), _extent(part), (number,)) for number, part in enumerate(operand)]
        else:
            starts = [(int(operand.storage_offset()), _extent(operand), ())]
        step, within = operand.stride(out - 2), operand.shape[out - 2]
        for offset, (start, end), at in starts:
            for first, last, matrix, _ in owners:
                weight = matrix.weight
                if weight is None or first >= end or start >= last:
                    continue
                column, beside = divmod(first - offset, step)
                rows = weight.shape[0]
                if not beside and 0 <= column <= within - rows:
                    result.register_hook(partial(self._tell, weight, (*at, ..., slice(column, column + rows))))

    def _tell(self, weight: Weight, part: tuple, gradient: Tensor) -> None:
        self.report_gradient(weight, gradient[part].detach().flatten(0, -2))


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0], None


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """What is rounded; gradients pass as if nothing were."""
    return _StraightThrough.apply(x, rounded.detach()) if x.requires_grad else rounded  # pyright: ignore[reportReturnType]


def rounding(views: Mapping[Weight, Tensor], inputs: Mapping[Weight, ActivationQuant]) -> MatmulCapture:
    """While this lasts, what these weights are multiplied by is rounded so."""

    def read(matrices: list[Matrix], x: Tensor) -> Tensor:
        return straight_through(x, next(inputs[m.weight] for m in matrices if m.weight).round(x))

    matrices = ((Matrix(w.tensor, w.expert, w), v if w.expert is None else v[w.expert]) for w, v in views.items())
    return MatmulCapture(matrices, read)


def _extent(view: Tensor) -> tuple[int, int]:
    """First and last element of its storage that a view may touch, the last exclusive."""
    start = int(view.storage_offset())
    return start, start + 1 + sum((int(n) - 1) * int(s) for n, s in zip(view.shape, view.stride(), strict=True))


PRODUCTS = {
    torch.matmul,
    torch.mm,
    torch.bmm,
    torch.Tensor.matmul,
    torch.Tensor.mm,
    torch.Tensor.bmm,
    torch.Tensor.__matmul__,
}
CASTS = {torch.Tensor.float, torch.Tensor.to, torch.Tensor.type}
