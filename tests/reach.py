"""What rounding can make of a product with rounded inputs, on any processor.

Rounding to a grid is monotone: what another order of operations, each of them rounded, makes of an input lies between
what is made of a slightly smaller one and of a slightly larger one. Both are the same but where an input, or a block's
scale, is about in the middle between two numbers of its grid.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from halfbyte.grids.activations import ActivationGrid

HALF_ULP = torch.finfo(torch.float32).eps / 2
NUDGE = 8 * HALF_ULP
"""At most four operations in float32 lie before a number is rounded to its grid, here and there."""


def reach(x: Tensor, grid: ActivationGrid, stored: Mapping[str, Tensor], spanned: float = 1) -> tuple[Tensor, Tensor]:
    """The least and the greatest that inputs may become, where scales are `spanned` times ours.

    Only the division of the range that is spanned is in x's precision, and all else in float32.
    """
    half_ulp, x = torch.finfo(x.dtype).eps / 2, x.float()
    made = []
    for by in (-half_ulp - NUDGE, half_ulp + NUDGE):
        for seen in (x + by * x, x + by * x.abs()):
            params = dict(grid.params(seen, stored))
            if spanned != 1:
                params["scale"] = params["scale"] * spanned
            # A quotient and a zero point, both below 256, are added in float32.
            beside = params["scale"] * 256 * HALF_ULP if "zero" in params else 0
            made += [grid.round(x + sign * (NUDGE * x.abs() + beside), params).double() for sign in (-1, 1)]
    return torch.stack(made).amin(0), torch.stack(made).amax(0)


def require_product(
    made: Tensor, w: Tensor, x: Tensor, grid: ActivationGrid, stored: Mapping[str, Tensor], spanned: float = 1
) -> None:
    """That `made` is rounded inputs times `w`: sums in float32 in any order, factors and the result in x's
    precision."""
    (low, high), w, half_ulp = reach(x, grid, stored, spanned), w.double(), torch.finfo(x.dtype).eps / 2
    middle, apart = (low + high) / 2 @ w.T, (high - low) / 2 @ w.abs().T
    rounded = ((x.shape[-1] + 4) * HALF_ULP + half_ulp) * torch.maximum(low.abs(), high.abs()) @ w.abs().T
    assert ((made.double() - middle).abs() <= apart + rounded + half_ulp * middle.abs()).all()
