"""What holds for every grid, whatever its numbers are and however its scales lie."""

import os
import subprocess
import sys

import pytest
import torch
from weights import correlated, importance, lost, normal, rounded_in_any_order, solve

from halfbyte.grids import parse
from halfbyte.grids.kquant import KQUANTS
from halfbyte.grids.lattice import LATTICE_GRIDS
from halfbyte.grids.scalar import SCALAR_GRIDS
from halfbyte.solvers.gptq import gptq
from halfbyte.solvers.nearest import nearest

INTEGERS = ["int2-g32", "int4-g128", "int4-g128-asym", "int8-channel", "int8-tensor", "llm-int8"]
ABSMAX = ["nf4-g64", "fp4-g64", "nf4-g256", "nf4-g64-double", "fp4-g32-double"]
LATTICES = [name for name in LATTICE_GRIDS if not name.startswith("iq1")]  # which are read, not written
SCALAR = [
    *INTEGERS,
    *KQUANTS,
    *(name for name in SCALAR_GRIDS if not name.startswith(("int", "nf4", "fp4", "llm"))),
    *ABSMAX,
]
EVERY = [*SCALAR, *LATTICES]
SEARCHED = (*KQUANTS, *LATTICES)
"""Whose searches take the longest."""


@pytest.mark.parametrize("name", EVERY)
def test_columns_rounded_in_any_order_get_the_reference_codes(name):
    compiled, reference = rounded_in_any_order(parse(name), normal(150), 48)
    # Next to a border they may differ: products are added with fused rounding.
    assert (compiled == reference).float().mean() > 0.99


@pytest.mark.parametrize("name", EVERY)
def test_gptq_lowers_the_error_of_the_output(name):
    w, grid, statistics = normal(), parse(name), correlated()
    assert statistics.error(w, gptq(w, grid, statistics).decode()) < 0.8 * statistics.error(
        w, nearest(w, grid, statistics).decode()
    )


@pytest.mark.parametrize("name", EVERY)
def test_bfloat16_and_transposed_weights_are_read_as_they_are(name):
    grid, w = parse(name), normal(16).bfloat16()
    back = solve(grid, w)
    assert torch.equal(back, solve(grid, w.float()))
    assert torch.equal(back, solve(grid, w.T.contiguous().T))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SEARCHED else name for name in EVERY]
)
def test_odd_weights_are_kept(name):
    grid, w = parse(name), normal(8)
    zeros = w.clone()
    zeros[3], zeros[:, 32:96] = 0, 0
    for odd in (
        zeros,
        torch.full((4, 512), 0.013),
        torch.full((4, 512), -0.013),
        w.abs() + 0.01,
        w * torch.logspace(-1, 2, 8)[:, None],
        w.half(),
        w * 1000,
    ):
        back = solve(grid, odd)
        assert back.isfinite().all()
        assert lost(odd, back) < (0.02 if grid.bits(odd.shape) > 4 else 0.25) * odd.double().square().sum()
    assert solve(grid, torch.full((1, 512), 1e-30)).abs().max() < 1e-3


@pytest.mark.parametrize("search", [False, True], ids=["min-max", "search"])
@pytest.mark.parametrize("name", EVERY)
def test_whatever_the_weights_and_their_importance_numbers_come_back(name, search):
    grid, w = parse(name), normal(8)
    assert not solve(grid, torch.zeros(4, 512), search=search).any()
    assert solve(grid, w, torch.zeros(512), search).isfinite().all()
    # bitsandbytes adds scales up, or multiplies them by 127
    for size in (1e35 if name in (*ABSMAX, "llm-int8") else 3e38, 1e-38):
        assert solve(grid, torch.full((1, 512), size), search=search).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_in_however_many_threads_the_fit_is_the_same(name):
    grid, w, threads = parse(name), normal(64, 1024, seed=1), torch.get_num_threads()
    h = importance(1024) * (1 + w.abs())
    try:
        torch.set_num_threads(1)
        alone = grid.fit(w, h)
        torch.set_num_threads(2)
        assert all(torch.equal(p, alone[key]) for key, p in grid.fit(w, h).items())
    finally:
        torch.set_num_threads(threads)


FITS = """
import hashlib
import sys

from weights import importance, normal

from halfbyte.grids import parse

w = normal(1024, 1024)
for name in sys.argv[1:]:
    params = parse(name).fit(w, importance(1024))
    print(name, *(hashlib.sha256(p.numpy().tobytes()).hexdigest() for p in params.values()))
"""


@pytest.mark.slow
def test_the_fit_is_the_same_whether_compiled_now_or_before(tmp_path):
    own_cache = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.path.dirname(__file__)}
    command = [sys.executable, "-c", FITS, "iq4_nl", "iq4_xs"]
    compiled, loaded = (
        subprocess.run(command, env=own_cache, capture_output=True, text=True, check=True).stdout for _ in range(2)
    )
    assert compiled == loaded != ""
