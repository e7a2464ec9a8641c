"""Byte layouts of the tables and lattices of ggml, against gguf's own reader."""

import gguf
import numpy as np
import pytest
import torch

from halfbyte.grids.quantized import Quantized
from halfbyte.targets.gguf.lattice_blocks import LATTICE_LAYOUTS

EVERY = sorted(LATTICE_LAYOUTS)
WRITTEN = [name for name in EVERY if not name.startswith("IQ1")]


def random_bytes(name, rows=6, blocks=5, seed=0):
    layout = LATTICE_LAYOUTS[name]
    return torch.randint(
        0, 256, (rows, blocks * layout.size_bytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def theirs(name, raw):
    with np.errstate(all="ignore"):  # some random fp16 scales are infinite or none
        return torch.from_numpy(gguf.dequantize(raw.numpy(), gguf.GGMLQuantizationType[name]))


@pytest.mark.parametrize("name", EVERY)
def test_blocks_are_as_long_as_ggml_says(name):
    layout = LATTICE_LAYOUTS[name]
    assert (layout.block, layout.size_bytes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    assert layout.grid.bits((6, 512)) == layout.size_bytes * 8 / layout.block


@pytest.mark.parametrize("name", EVERY)
def test_any_bytes_decode_as_gguf_decodes_them(name):
    for seed in range(4):
        raw, layout = random_bytes(name, seed=seed), LATTICE_LAYOUTS[name]
        ours, expected = layout.unpack(raw, layout.grid).decode(), theirs(name, raw)
        known = ~expected.isnan()
        assert torch.equal(ours[known], expected[known])
        assert ours[~known].isnan().all()


@pytest.mark.parametrize("name", EVERY)
def test_any_bytes_are_packed_as_they_were(name):
    raw, layout = random_bytes(name), LATTICE_LAYOUTS[name]
    assert torch.equal(layout.pack(layout.unpack(raw, layout.grid)), raw)


@pytest.mark.parametrize("name", WRITTEN)
def test_encoded_weights_survive_the_file(name):
    layout = LATTICE_LAYOUTS[name]
    w = torch.randn(7, 768, generator=torch.Generator().manual_seed(3)) * 0.02
    params = layout.grid.fit(w, None)
    q = Quantized(layout.grid, layout.grid.encode(w, params), params)
    raw = layout.pack(q)
    assert raw.shape == (7, 768 // layout.block * layout.size_bytes)
    assert layout.unpack(raw, layout.grid).equal(q)
    assert torch.equal(q.decode(), theirs(name, raw))


@pytest.mark.parametrize("name", WRITTEN)
def test_rows_can_be_put_in_another_order(name):
    layout, order = LATTICE_LAYOUTS[name], torch.tensor([3, 0, 2, 1])
    w = torch.randn(4, 512, generator=torch.Generator().manual_seed(4))
    params = layout.grid.fit(w, None)
    q = Quantized(layout.grid, layout.grid.encode(w, params), params)
    moved = q._replace(codes=q.codes[order], params={key: value[order] for key, value in q.params.items()})
    assert torch.equal(moved.decode(), q.decode()[order])
    assert torch.equal(layout.pack(moved), layout.pack(q)[order])
