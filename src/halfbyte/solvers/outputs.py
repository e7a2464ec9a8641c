"""What is remembered of the gradients at the outputs of a linear: what errors there cost what the model predicts.

The second derivative of the KL divergence with respect to a weight is taken for the product of two Hessians, one of
inputs, sum of x x^T over tokens (`Statistics`), and one of outputs, sum of g g^T, g the gradient at the outputs
(Martens and Grosse, 1503.05671; Tseng et al., 2505.22988). Then rows are no longer independent: what some of them miss,
the others can make up for, as columns do in GPTQ.
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from halfbyte.solvers.statistics import NotPositive

DAMPING = 0.05
WIDEST = 512
"""Out-features that know of each other; a Hessian of all of them would take more memory than the model."""
STEPS = 16
"""In how many steps rows are rounded: one in so many at a time, since it is neighbours that depend on one another."""


class RowStep(NamedTuple):
    """Rows that are rounded together, and what they make up for of those that were rounded before."""

    rows: Int64[Tensor, " rows"]
    couplings: Sequence[tuple[Int64[Tensor, " done"], Float32[Tensor, "mine done"]]]
    """Of runs of these rows, one after the other: which rows count, and by how much."""

    def owed(self, errors: Float[Tensor, "out in"]) -> Float32[Tensor, "rows in"]:
        """What is to be added to these rows, given what those before have missed."""
        parts = [coupling.to(errors.dtype) @ errors[done] for done, coupling in self.couplings]
        return torch.cat(parts).float()


class OutputHessian:
    """Sum of g g^T over tokens, in diagonal blocks of at most WIDEST out-features."""

    def __init__(self, blocks: Sequence[Float32[Tensor, "width width"]], tokens: int = 0):
        self.blocks, self.tokens = list(blocks), tokens

    @classmethod
    def empty(cls, out: int, device: torch.device | str = "cpu") -> "OutputHessian":
        """One that has seen nothing."""
        return cls([torch.zeros(width, width, device=device) for width in widths(out)])

    def add(self, gradient: Float[Tensor, "tokens out"]) -> None:
        """See the gradients of some tokens."""
        self.tokens += len(gradient)
        for block, g in zip(self.blocks, gradient.float().split([len(b) for b in self.blocks], 1), strict=True):
            block.addmm_(g.T, g)

    def divided(self, rows: Float32[Tensor, " out"]) -> "OutputHessian":
        """That of a weight whose rows are multiplied by this, and its outputs with them."""
        parts = rows.split([len(block) for block in self.blocks])
        blocks = [
            block / part.to(block.device)[:, None] / part.to(block.device)
            for block, part in zip(self.blocks, parts, strict=True)
        ]
        return OutputHessian(blocks, self.tokens)

    @staticmethod
    def joined(parts: Sequence["OutputHessian"]) -> "OutputHessian":
        """That of matrices one below the other."""
        return OutputHessian([block for part in parts for block in part.blocks], min(part.tokens for part in parts))

    def steps(self, device: torch.device) -> list[RowStep]:
        """In the order in which rows are rounded. Raises NotPositive for gradients that are no finite numbers."""
        starts = accumulate([0, *map(len, self.blocks[:-1])])
        orders, factors = [], []
        for start, block in zip(starts, self.blocks, strict=True):
            order = torch.arange(len(block), device=device)
            order = torch.cat([order[number::STEPS] for number in range(STEPS)])
            orders.append(order + start)
            factors.append(_factor(block.to(device)[order][:, order]))
        return [_step(number, orders, factors) for number in reversed(range(STEPS))]


def widths(out: int) -> list[int]:
    """Of the blocks for so many out-features, about the same for all."""
    count = -(-out // WIDEST)
    return [out * (n + 1) // count - out * n // count for n in range(count)]


def size_bytes(out: int) -> int:
    """What one takes in memory."""
    return sum(4 * width**2 for width in widths(out))


def _factor(hessian: Float32[Tensor, "width width"]) -> Float32[Tensor, "width width"]:
    """L of L L^T, lower triangular, damped; the more, the worse that goes."""
    mean = hessian.diagonal().mean().item()
    for damping in (DAMPING, 10 * DAMPING, 100 * DAMPING):
        damped = hessian.clone()
        damped.diagonal().add_(damping * mean or 1.0)  # of outputs that nothing depends on, any errors are as good
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed and torch.isfinite(lower.diagonal()).all():
            return lower
    raise NotPositive


def _step(number: int, orders: Iterable[Tensor], factors: Iterable[Tensor]) -> RowStep:
    """One of STEPS. With the Hessian factored as L L^T, rows R owe L[R, R]^-T L[done, R]^T of the errors of those that
    are done."""
    rows, couplings = [], []
    for order, lower in zip(orders, factors, strict=True):
        width = len(order)
        first, last = (sum(len(range(n, width, STEPS)) for n in range(count)) for count in (number, number + 1))
        rows.append(order[first:last])
        mine, below = lower[first:last, first:last], lower[last:, first:last]
        couplings.append((order[last:], torch.linalg.solve_triangular(mine.T, below.T, upper=True)))
    return RowStep(torch.cat(rows), couplings)
