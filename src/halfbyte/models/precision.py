"""Numbers of tensors: whether they are any, and whether another precision has them."""

import torch
from torch import Tensor

from halfbyte.errors import BadCheckpoint, Unsupported
from halfbyte.formats import DTYPES

COARSEST, CHECKED = 2**-8, 1 << 18
"""Relative error that a tensor in 16 bits may have, that of BF16, over rows of so many numbers in all."""
DTYPE_NAMES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPES}


def require_finite(name: str, w: Tensor) -> None:
    """Raise BadCheckpoint for NaN or Inf: one reduction finds them all, since both survive a sum (and an overflow of
    the sum is looked into)."""
    if w.is_floating_point() and not torch.isfinite(
        (w if w.dtype.itemsize > 1 else w.float()).sum()
    ):  # torch has no sum of floats of 8 bits
        bad = int((~torch.isfinite(w.float())).sum())
        if bad:
            raise BadCheckpoint(
                f"tensor '{name}' holds {bad} NaN or Inf values; no method can round it (mend it, or --skip it with "
                "a method that needs no calibration)"
            )


def cast(name: str, value: Tensor, dtype: torch.dtype, instead: str) -> Tensor:
    """A tensor in another precision. Raises Unsupported where that has no such numbers: large ones would become Inf, or
    small ones 0."""
    if value.dtype == dtype or not value.is_floating_point():
        return value.to(dtype)
    narrow = value.to(dtype)
    if dtype == torch.float16 and value.numel():
        rows = value.reshape(-1, value.shape[-1]) if value.dim() else value.view(1, 1)
        some = slice(0, len(rows), max(1, value.numel() // CHECKED))
        exact, rounded = (w.reshape(rows.shape)[some].double() for w in (value, narrow))
        overflows = not torch.isfinite(narrow.sum(dtype=torch.float32)) and torch.isfinite(value.float().abs().amax())
        if overflows or (rounded - exact).norm() > COARSEST * exact.norm():
            low, high = (w.item() for w in value.float().abs().aminmax())
            raise Unsupported(
                f"'{name}' holds numbers from {low:.3g} to {high:.3g}, and F16 only those from 6e-08 to "
                f"65504; {instead}"
            )
    return narrow
