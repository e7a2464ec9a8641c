"""Values that nobody takes for real ones, in place of those that are not known yet."""

import torch
from torch import Tensor


def poison(b: Tensor) -> Tensor:
    """A tensor of the same kind whose values nobody takes for real ones."""
    if b.dtype == torch.bool:
        return torch.full_like(b, 255, dtype=torch.uint8, device="cpu").view(torch.bool)
    value = (
        float("nan")
        if b.is_floating_point() or b.is_complex()
        else torch.iinfo(b.dtype).min or torch.iinfo(b.dtype).max
    )
    return torch.full_like(b, value, device="cpu")


def is_poisoned(b: Tensor) -> bool:
    """Whether a tensor still holds values of `poison`."""
    if b.dtype == torch.bool:
        return bool((b.view(torch.uint8) == 255).any())
    if b.is_floating_point() or b.is_complex():
        return bool(b.isnan().any())
    return bool((b == (torch.iinfo(b.dtype).min or torch.iinfo(b.dtype).max)).any())
