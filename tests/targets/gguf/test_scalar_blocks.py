"""Byte layouts of the scalar types of ggml, against gguf's own reader."""

import gguf
import numpy as np
import pytest
import torch

from halfbyte.grids.quantized import Quantized
from halfbyte.targets.gguf.scalar_blocks import SCALAR_LAYOUTS

EVERY = sorted(SCALAR_LAYOUTS)
AMBIGUOUS = {"TQ1_0"}  # 243 of 256 bytes are written


def random_bytes(name, rows=6, blocks=3, seed=0):
    """Any bytes, but for fp16 numbers that are infinite or none."""
    layout = SCALAR_LAYOUTS[name]
    raw = torch.randint(
        0, 256, (rows, blocks * layout.size_bytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    q = layout.unpack(raw, layout.grid)
    halves = {
        key: value.nan_to_num(0.5, 0.25, -0.25) for key, value in q.params.items() if value.dtype == torch.float16
    }
    return layout.pack(q._replace(params=q.params | halves))


def theirs(name, raw):
    return torch.from_numpy(gguf.dequantize(raw.numpy(), gguf.GGMLQuantizationType[name]))


@pytest.mark.parametrize("name", EVERY)
def test_blocks_are_as_long_as_ggml_says(name):
    layout = SCALAR_LAYOUTS[name]
    assert (layout.block, layout.size_bytes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    assert layout.grid.bits((6, 512)) == layout.size_bytes * 8 / layout.block


@pytest.mark.parametrize("name", EVERY)
def test_any_bytes_decode_as_gguf_decodes_them(name):
    for seed in range(4):
        raw, layout = random_bytes(name, seed=seed), SCALAR_LAYOUTS[name]
        assert np.array_equal(layout.unpack(raw, layout.grid).decode().numpy(), theirs(name, raw).numpy())


@pytest.mark.parametrize("name", EVERY)
def test_packing_is_the_inverse_of_unpacking(name):
    layout = SCALAR_LAYOUTS[name]
    raw = torch.randint(
        0, 256, (5, 2 * layout.size_bytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(9)
    )
    q = layout.unpack(raw, layout.grid)
    if name not in AMBIGUOUS:
        assert torch.equal(layout.pack(q), raw)
    again = layout.unpack(layout.pack(q), layout.grid)
    assert torch.equal(again.codes, q.codes)
    assert all(
        torch.equal(again.params[key].view(torch.uint8), value.view(torch.uint8)) for key, value in q.params.items()
    )


@pytest.mark.parametrize("name", EVERY)
def test_fitted_weights_come_back_bit_for_bit(name):
    layout = SCALAR_LAYOUTS[name]
    w = (torch.randn(512, 7, generator=torch.Generator().manual_seed(1)) * 0.02).T
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        params = layout.grid.fit(w.to(dtype), None)
        q = Quantized(layout.grid, layout.grid.encode(w.to(dtype), params), params)
        raw = layout.pack(q)
        assert raw.shape == (7, 512 // layout.block * layout.size_bytes)
        assert layout.unpack(raw, layout.grid).equal(q)
        assert torch.equal(theirs(name, raw), q.decode())
