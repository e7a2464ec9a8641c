"""What is remembered of the inputs of a linear: one statistic for every solver and transform.

The Hessian of the squared output error with respect to a row of the weight is X^T X (Frantar et al., 2210.17323); its
diagonal is the importance that AWQ, imatrix-weighted rounding and clipping searches use.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from halfbyte.grids.activations import ActivationStats
from halfbyte.kernels.products import eleven_bits

DAMPING = 0.01
FEWEST_TOKENS = 32
"""An expert that fewer calibration tokens reach is rounded to nearest, and nothing is learned of it."""
SAMPLED = 32
"""One token in so many is kept whole, for ranges of activations and their errors."""
STRIPES, STRIPE = 8, 512
ERROR_PRODUCTS = 1 << 31
"""Multiplications that an error estimate may cost: 512 rows of a 2048-wide matrix, or 32 rows of an 8192-wide one."""


class Statistics:
    """Sum of x x^T over the tokens that a linear has read. What is asked of it comes on the device that computes."""

    def __init__(self, width: int, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.tokens = 0
        self._sum = torch.zeros(width, width, device=device)
        self._whole = True
        self.drift: Tensor | None = None
        """Sum of (x' - x) x^T, where x' is what the linear reads in the unquantized model; None if that was not run."""
        self._factor: tuple[Tensor, Tensor, Tensor] | None = None
        self._step = 0
        self._low, self._high = (torch.full((width,), end, device=device) for end in (torch.inf, -torch.inf))
        self._rows: list[Tensor] = []

    def add(self, x: Float[Tensor, "... width"], original: Float[Tensor, "... width"] | None = None) -> None:
        """Accumulate in float32: inputs of 16 bits have exact products, and sums of thousands need the rest.

        Only the lower triangle is kept up, in stripes: about half of the arithmetic of a full product.
        """
        few_bits = eleven_bits(x.device) if x.dtype.itemsize == 2 else nullcontext()
        x = x.reshape(-1, x.shape[-1]).float()
        if original is not None:
            self.drift = torch.zeros_like(self._sum) if self.drift is None else self.drift
            self.drift.addmm_((original.reshape(x.shape).float() - x).T, x)
        self.tokens += x.shape[0]
        self._whole = False
        self._low, self._high = torch.minimum(self._low, x.amin(0)), torch.maximum(self._high, x.amax(0))
        self._rows.append(x[::SAMPLED].to(torch.bfloat16))
        with few_bits:
            for first, last in self._stripes():
                self._sum[first:last, :last].addmm_(x[:, first:last].T, x[:, :last])

    def __iadd__(self, other: "Statistics") -> "Statistics":
        """Add what another has seen of the same inputs, as if it came after what this has seen.

        Sums of floats depend on their order in the last bits. So whoever shares samples out to several workers merges
        their statistics in the order of the samples, whichever is ready first: the same parts in the same order give
        the same bytes. These are not the bytes of one statistic that has seen all samples, but for the number of
        tokens, the ranges and the tokens kept whole, which are.
        """
        self._sum += other._sum.to(self._sum.device)
        self._whole = self._whole and other._whole
        if other.drift is not None:
            drift = other.drift.to(self._sum.device)
            self.drift = drift.clone() if self.drift is None else self.drift.add_(drift)
        self.tokens += other.tokens
        self._low = torch.minimum(self._low, other._low.to(self._low.device))
        self._high = torch.maximum(self._high, other._high.to(self._high.device))
        self._rows += [rows.to(self._sum.device) for rows in other._rows]
        self._factor = None
        return self

    def leave_device(self) -> None:
        """Wait in the host's memory from now on, and see no more tokens."""
        self._factor = None
        self._sum, self._low, self._high = (tensor.cpu() for tensor in (self._sum, self._low, self._high))
        self.drift = None if self.drift is None else self.drift.cpu()
        self._rows = [rows.cpu() for rows in self._rows]

    @staticmethod
    def size_bytes(width: int, drift: bool = False) -> int:
        """What one takes in memory, but for the tokens that are kept whole."""
        return 4 * width * width * (2 if drift else 1)

    def _stripes(self) -> list[tuple[int, int]]:
        size = max(256, -(-self.width // STRIPES))
        return [(first, min(first + size, self.width)) for first in range(0, self.width, size)]

    @property
    def width(self) -> int:
        """In-features."""
        return self._sum.shape[0]

    @property
    def hessian(self) -> Float32[Tensor, "width width"]:
        """Sum of x x^T, both triangles."""
        if not self._whole:
            for first, last in self._stripes():
                self._sum[:first, first:last] = self._sum[first:last, :first].T
            self._whole = True
        return self._sum.to(self.device)

    @property
    def activation_stats(self) -> ActivationStats:
        """What x ranges over, and every SAMPLED-th token."""
        return self._stats(self._rows)

    def sample(self, count: int) -> ActivationStats:
        """The same with some `count` values of tokens, evenly spaced."""
        step = max(1, sum(map(len, self._rows)) * self.width // count)
        chosen, seen = [], 0
        for rows in self._rows:
            chosen.append(rows[-seen % step :: step])
            seen += len(rows)
        return self._stats(chosen)

    def _stats(self, rows: list[Tensor]) -> ActivationStats:
        return ActivationStats(*(part.to(self.device) for part in (self._low, self._high, torch.cat(rows).float())))

    @property
    def importance(self) -> Float32[Tensor, " width"]:
        """Mean of x^2 per in-feature."""
        return self._sum.diagonal().to(self.device) / max(self.tokens, 1)

    def divided(self, scale: Float32[Tensor, " width"]) -> Callable[[], None]:
        """What makes this the statistic of x / scale, and takes no memory any more: nothing is left half divided."""
        scale = scale.to(self._sum.device)
        low, high = self._low / scale, self._high / scale
        sampled = [(rows.float() / scale).to(rows.dtype) for rows in self._rows]

        def divide() -> None:
            for matrix in (self._sum, self.drift):
                if matrix is not None:
                    matrix.div_(scale).div_(scale[:, None])
            self._low, self._high, self._rows = low, high, sampled
            self._factor = None

        return divide

    def factor(self, step: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """(order, L, d): `order` lists in-features from the least to the most important, and the Hessian, damped and
        put in that order, is L diag(d)^2 L^T with L unit lower triangular. Rounding goes from the last row to the
        first.

        Damping is a hundredth of the mean of the diagonal, times ten as often as the factorisation fails.
        Raises NotPositive when even a damping of ten times the mean does not help.
        """
        if self._factor is None or self._step != step:
            self._factor, self._step = None, step
            hessian = self.hessian
            order = hessian.diagonal().view(-1, step).sum(1).argsort(stable=True)
            order = (order[:, None] * step + torch.arange(step, device=order.device)).reshape(-1)
            damping = DAMPING * hessian.diagonal().mean().item()
            for _ in range(4):
                # Column-major, as LAPACK has it, so that it is factored in place: the matrix may be a quarter of a
                # gigabyte.
                lower = _permuted(hessian, order).mT
                lower.diagonal().add_(damping)
                failed = torch.empty((), dtype=torch.int32, device=lower.device)
                torch.linalg.cholesky_ex(lower, out=(lower, failed))
                if not failed and torch.isfinite(lower.diagonal()).all():
                    diagonal = lower.diagonal().clone()
                    self._factor = (order, lower.div_(diagonal), diagonal)
                    return self._factor
                damping *= 10
            raise NotPositive
        return self._factor

    def conditional_variance(self, step: int = 1) -> Float32[Tensor, " width"]:
        """Variance of each in-feature given those that are rounded after it: what is left of its importance when they
        make up for it."""
        order, _, diagonal = self.factor(step)
        return torch.empty_like(diagonal).index_copy_(0, order, diagonal.square() / max(self.tokens, 1))

    def asymmetric_target(self, w: Float[Tensor, "out width"], share: float) -> Float32[Tensor, "out width"]:
        """w + share * w D H^-1, D the drift: the weight whose outputs on the inputs as they are come nearer to the
        outputs of `w` on the inputs as they were before anything was quantized (least squares, at a share of 1)."""
        if self.drift is None:
            return w.float()
        order, factor, diagonal = self.factor()
        y = (w.float() @ self.drift.to(self.device))[:, order].T
        y = torch.linalg.solve_triangular(factor, y, upper=False, unitriangular=True) / diagonal.square()[:, None]
        y = torch.linalg.solve_triangular(factor.T, y, upper=True, unitriangular=True)
        return w.float().index_add(1, order, y.T, alpha=share)

    def error(self, w: Float[Tensor, "out width"], rounded: Float32[Tensor, "out width"]) -> float:
        """Relative error of the output, ||X (W - R)^T|| / ||X W^T||, over evenly spaced rows where there are many."""
        rows = sample_rows(w.shape[0], ERROR_PRODUCTS // w.shape[1] ** 2)
        w = w[rows].float()
        delta = w - rounded[rows].float()
        hessian = self.hessian
        lost, all_of_it = ((m @ hessian) * m for m in (delta, w))
        return (lost.sum() / all_of_it.sum().clamp(min=1e-30)).clamp(min=0).sqrt().item()


class Diagonal(NamedTuple):
    """What an importance matrix tells of the inputs of a linear: enough for `nearest`."""

    importance: Float32[Tensor, " width"]


def _permuted(matrix: Tensor, order: Tensor) -> Tensor:
    """matrix[order][:, order], without a second matrix in between."""
    permuted = torch.empty_like(matrix)
    for rows, chosen in zip(permuted.split(STRIPE), order.split(STRIPE), strict=True):
        torch.index_select(matrix.index_select(0, chosen), 1, order, out=rows)
    return permuted


def sample_rows(count: int, budget: int) -> slice:
    """Evenly spaced rows, at most about `budget` and at least 32."""
    return slice(0, count, max(1, count // max(budget, 32)))


class NotPositive(ArithmeticError):
    """A Hessian that no damping makes positive definite: inputs that overflow or are not finite."""
