"""A scalar format is levels and scales and nothing else: made-up ones go the whole way."""

import subprocess
import sys

import pytest
import torch
from weights import by_reference, correlated, importance, lost, normal, solve

from halfbyte.grids.quantized import Quantized, select_rows, split_rows
from halfbyte.grids.scalar import ScalarGrid, integers
from halfbyte.kernels.levels import E2M3, NF4, Even, Table
from halfbyte.kernels.scales import BF16, FP16, FP32, Byte, Microscale, Scales, UnderGlobal
from halfbyte.solvers.gptq import gptq
from halfbyte.solvers.nearest import nearest

STEPS = (0, -2, -1, 1, 2, 3)
EIGHT = Table("eight", (-12, -7, -4, -1, 1, 4, 7, 12), 0.5, 12)
MADE_UP = [
    ScalarGrid("eight levels, E4M3 scales", EIGHT, Scales(16, Byte("e4m3", STEPS))),
    ScalarGrid("eight levels, fp32 scale per row", EIGHT, Scales("channel", FP32)),
    ScalarGrid("eight levels, one scale", EIGHT, Scales("tensor", BF16)),
    ScalarGrid("fp6 with channel scales", E2M3, Scales("channel", FP16)),
    ScalarGrid("fp6 under a global", E2M3, Scales(32, UnderGlobal())),
    ScalarGrid("integers under powers of two", Even(8), Scales(32, Microscale())),
    ScalarGrid("integers under a global", Even(4), Scales(16, UnderGlobal())),
    ScalarGrid("quantiles in blocks of 128 x 128", NF4, Scales("block", BF16)),
    ScalarGrid("quantiles under bf16", NF4, Scales(64, BF16)),
]


@pytest.mark.parametrize("grid", MADE_UP, ids=str)
def test_a_format_that_no_line_of_code_knows_is_fitted_solved_and_parted(grid):
    w, statistics = normal(150), correlated()
    plain, found = solve(grid, w, search=False), solve(grid, w)
    assert lost(w, found) <= 1.001 * lost(w, plain) < 0.2 * w.double().square().sum()
    assert lost(w, solve(grid, w, importance()), importance()) < 1.001 * lost(w, plain, importance())
    q = gptq(w, grid, statistics)
    assert statistics.error(w, q.decode()) < 0.8 * statistics.error(w, nearest(w, grid, statistics).decode())
    assert torch.equal(by_reference(grid.decode, q.codes, q.params), q.decode())
    assert int(q.codes.max()) < 1 << grid.levels.bits
    assert grid.levels.bits < grid.bits(q.shape) < grid.levels.bits + 1.1
    if q.params.keys() <= grid.row_params(q.shape):
        parts = split_rows(q, [100, 50])
        assert torch.equal(torch.cat([part.decode() for part in parts]), q.decode())


ONE_LINE = """
from halfbyte import formats
formats.SCALARS["fp6-e2m3-g16"] = formats.ScalarFormat("e2m3", 16, "ggml-e4m3")
"""
QUANTIZED = """
from halfbyte import cli, demo
cli.main(["quantize", str(demo.MODEL), "-o", "never", "--grid", "fp6-e2m3-g16", "--method", "nearest"])
"""
FITTED = """
import torch
from halfbyte import grids
w = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
grid = grids.parse("fp6-e2m3-g16")
params = grid.fit(w, None)
print(grid, grid.bits(w.shape), (grid.decode(grid.encode(w, params), params) - w).norm() / w.norm())
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, whose table has the line before anything else is imported."""
    return subprocess.run([sys.executable, "-c", ONE_LINE + code], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_scalar_format_is_one_line():
    name, bits, error = run(FITTED).stdout.replace("tensor(", "").replace(")", "").split()
    assert (name, float(bits)) == ("fp6-e2m3-g16", 6.5)
    assert 0 < float(error) < 0.03


@pytest.mark.slow
def test_the_command_line_knows_it_by_that_line():
    refused = run(QUANTIZED)
    assert refused.returncode == 2
    assert "compressed-tensors has no format for fp6-e2m3-g16" in refused.stderr


def test_codes_may_be_wider_than_a_byte_and_several_for_a_vector():
    codes = torch.randint(0, 4096, (6, 64, 2), dtype=torch.int16)
    q = Quantized(integers(4, "channel"), codes, {"scale": torch.rand(6, 1)}, size=(6, 512))
    assert q.shape == (6, 512)
    assert [part.shape for part in split_rows(q, [4, 2])] == [(4, 512), (2, 512)]
    assert torch.equal(select_rows(q, torch.tensor([5, 0])).codes, codes[[5, 0]])
