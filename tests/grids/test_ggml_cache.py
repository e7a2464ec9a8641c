"""llama.cpp's KV caches: blocks as gguf packs them, rotated as llama.cpp rotates heads, and the same loss as in
llama.cpp itself."""

from functools import reduce
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

import halfbyte
from halfbyte import demo
from halfbyte.grids.kv import KVGrid
from halfbyte.models import calibrate
from halfbyte.models.checkpoint import Checkpoint

NAMES = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
MODEL = Path(demo.__file__).parent / "model"


def packed(x: np.ndarray, name: str) -> np.ndarray:
    kind = gguf.GGMLQuantizationType[name.upper()]
    return gguf.quants.dequantize(gguf.quants.quantize(x, kind), kind)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_hold_what_gguf_holds(name):
    x = torch.randn(2, 3, 50, 32, generator=torch.Generator().manual_seed(0)) * 3  # heads too narrow to be rotated
    x[0, 0, 0] = 0
    grid = KVGrid.parse(name)
    assert str(grid) == name
    for part in (grid.key, grid.value):
        assert np.array_equal(part.round(x, {}).numpy().reshape(-1, 32), packed(x.numpy().reshape(-1, 32), name))


@pytest.mark.parametrize(("width", "keys", "values"), [(64, 64, 64), (128, 128, 64), (192, 64, 64), (256, 256, 64)])
def test_heads_are_rotated_before_they_are_rounded(width, keys, values):
    x = torch.randn(50, width, generator=torch.Generator().manual_seed(0))
    grid = KVGrid.parse("q4_0")
    for part, size in ((grid.key, keys), (grid.value, values)):
        rotation = reduce(np.kron, [np.array([[1, 1], [1, -1]]) / 2**0.5] * (size.bit_length() - 1))
        heads = x.double().numpy().reshape(-1, size)
        turned, ours = (
            (rows @ rotation).reshape(-1, 32) for rows in (heads, part.round(x, {}).double().numpy().reshape(-1, size))
        )
        theirs = packed(turned.astype(np.float32), "q4_0").astype(np.float64)
        apart, step = np.abs(ours - theirs), np.abs(turned).max(-1, keepdims=True) / 8
        # Sums of float32 differ with the processor: by so much at most. A scale in the middle between two numbers of
        # fp16 may become either, and so may a value in the middle between two steps. (Rotated back, one such value
        # moves its whole head.)
        slack = size * 2.0**-24 * np.abs(heads).sum(-1).max() / size**0.5
        same = apart <= 2.0**-10 * np.abs(theirs) + slack
        halfway = (np.abs(apart - step) <= 2.0**-7 * step) & (
            np.abs(2 * turned - ours - theirs) <= 2.0**-7 * step + 2 * slack
        )
        assert (same | halfway).all()


@pytest.mark.slow
def test_llama_cpp_loses_as_much_with_such_a_cache(tmp_path):
    """The divergence of llama.cpp from itself. It rounds queries to q8_0 too, and permutes a Llama's heads."""
    from targets.gguf import llamacpp

    halfbyte.quantize(MODEL, tmp_path / "out.gguf", grid="F16")
    tokens = calibrate.evaluation(Checkpoint(MODEL), str(demo.HELDOUT), 256, 3, "none").tokens

    def log_probabilities(kind: int) -> torch.Tensor:
        return torch.stack([llamacpp.logits(tmp_path / "out.gguf", row.tolist(), kind) for row in tokens]).log_softmax(
            -1
        )

    exact = log_probabilities(gguf.GGMLQuantizationType.F32)
    for name in ("q4_0", "q4_1"):
        theirs = log_probabilities(gguf.GGMLQuantizationType[name.upper()])
        lost = float((exact.exp() * (exact - theirs)).sum(-1)[:, :-1].mean())
        ours = halfbyte.evaluate([MODEL], MODEL, length=256, windows=3, kv=[name], convention="papers")["models"][0][
            "kl"
        ]
        assert ours == pytest.approx(lost, rel=0.1)
