"""Products whose factors have few bits: of codes, as engines multiply them, and of activations in 16 bits."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float32, Int8, Int32, Shaped
from torch import Tensor
from torch.nn import functional

from halfbyte.devices import kind_of

EXACT = 1 << 10
"""Products of two int8 that float32 adds exactly, in any order: none is beyond 2^14, and no sum of them beyond 2^24."""


def int8_product(x: Int8[Tensor, "rows in"], w: Int8[Tensor, "out in"]) -> Int32[Tensor, "rows out"]:
    """x w^T, exactly.

    On CPUs without VNNI torch._int_mm adds pairs of products in 16 bits, which saturate: of random numbers every sum
    was wrong, by up to a fifth of the largest. So float32 multiplies there. On CUDA torch wants more than 16 rows, and
    multiples of 8 in-features and out-features: zeros fill up what is missing.
    """
    if not kind_of(x.device).multiplies_int8:
        sums = torch.zeros(len(x), len(w), dtype=torch.int32, device=x.device)
        for a, b in zip(x.split(EXACT, 1), w.split(EXACT, 1), strict=True):
            sums += (a.float() @ b.float().T).int()
        return sums
    (rows, width), out = x.shape, len(w)
    x = functional.pad(x, (0, -width % 8, 0, max(0, 17 - rows)))
    w = functional.pad(w, (0, -width % 8, 0, -out % 8))
    return torch._int_mm(x, w.T)[:rows, :out]


def float8_product(x: Shaped[Tensor, "rows in"], w: Shaped[Tensor, "out in"]) -> Float32[Tensor, "rows out"]:
    """x w^T of floats of 8 bits, for devices that multiply these, of which not both may be E5M2.

    torch wants multiples of 16 in-features and out-features. Scales are left to the caller: of scales by token and by
    row torch asks more of the GPU and of the type that comes out (ScaledBlas.cpp).
    """
    out, width = w.shape
    x, w = (
        functional.pad(value.view(torch.uint8), (0, -width % 16, 0, more)).view(value.dtype)
        for value, more in ((x, 0), (w, -out % 16))
    )
    one = torch.ones((), device=x.device)
    return torch._scaled_mm(x, w.T, scale_a=one, scale_b=one, out_dtype=torch.float32)[:, :out]


@contextmanager
def eleven_bits(device: torch.device) -> Iterator[None]:
    """While this lasts, float32 products may be those of units that take eleven bits of each factor (TF32): all that
    bfloat16 and float16 have, so that theirs are exact, and sums are float32 as before."""
    if not kind_of(device).has_tf32:
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
