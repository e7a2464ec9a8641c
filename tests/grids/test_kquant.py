"""K-quants: as good as llama.cpp's own encoder or better, and whole whatever the weights are."""

import ggml
import gguf
import numpy as np
import pytest
import torch
from weights import by_reference, edges, heavy_tailed, importance, lost, normal, one_by_one, trained

from halfbyte.errors import BadRequest, UnknownName
from halfbyte.grids.kquant import KQUANTS, KQuant
from halfbyte.grids.quantized import Quantized
from halfbyte.kernels import choose
from halfbyte.targets.gguf.scalar_blocks import SCALAR_LAYOUTS

NAMES = list(KQUANTS)
WIDTH = 512
NOISE = 1e-6  # of the energy of the weights: what float32 sums cannot tell apart


EDGES = edges()


def solve(grid, w, h=None, search=True):
    params = grid.fit(w, h, search)
    return Quantized(grid, grid.encode(w, params), params)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "imatrix"])
@pytest.mark.parametrize("name", NAMES)
def test_errors_are_below_those_of_llama_cpp(name, weighted):
    h = importance() if weighted else None
    for w in (normal(), heavy_tailed(), trained()):
        assert lost(w, solve(KQUANTS[name], w, h).decode(), h) < 0.98 * lost(w, ggml.encode(name, w, h), h)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("data", EDGES)
def test_the_accelerated_search_is_the_reference(name, data):
    grid = KQUANTS[name]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        w = EDGES[data].to(dtype)
        for h in (None, importance() + 0.01):
            losses = []
            for kernels in ("fast", "reference"):
                with choose.using(kernels):
                    params = grid.fit(w, h)
                    codes = grid.encode(w, params)
                assert torch.equal(by_reference(grid.encode, w, params), codes)
                losses.append(lost(w, grid.decode(codes, params), h))
            # Sums in another order choose another candidate where two are as good as one. In groups of a few weights
            # that many grids fit exactly, the choice is chance, and decides d for the groups beside them.
            chance = 0.15 if data in ("sparse", "outlier") else 0.02
            assert abs(losses[0] - losses[1]) <= chance * losses[1] + NOISE * lost(w, torch.zeros_like(w), h)
    quick, reference = grid.fit(EDGES[data], None, False), by_reference(grid.fit, EDGES[data], None, False)
    assert all(torch.equal(ours, reference[key]) for key, ours in quick.items())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("data", EDGES)
def test_a_search_loses_no_more_than_min_max(name, data):
    w = EDGES[data]
    searched, spanned = (lost(w, solve(KQUANTS[name], w, search=search).decode()) for search in (True, False))
    assert searched <= spanned * 1.001 + NOISE * lost(w, torch.zeros_like(w))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("data", EDGES)
def test_what_is_written_is_finite_and_reads_back_bit_for_bit(name, data):
    grid, layout = KQUANTS[name], SCALAR_LAYOUTS[name.upper()]
    for factor in (1.0, 1e-9, 1e-30, 1e6, 1e30):
        w = EDGES[data] * factor
        for search in (True, False):
            for h in (None, importance()):
                q = solve(grid, w, h, search)
                assert int(q.codes.max()) <= grid.top
                assert all(torch.isfinite(value.float()).all() for value in q.params.values())
                assert all(value.shape[0] == w.shape[0] for value in q.params.values())
                theirs = gguf.dequantize(layout.pack(q).numpy(), gguf.GGMLQuantizationType[name.upper()])
                assert np.array_equal(q.decode().numpy(), theirs)
                assert torch.isfinite(q.decode()).all()


@pytest.mark.parametrize("name", NAMES)
def test_small_weights_stay_as_precise_as_fp16_lets_them(name):
    """Scales of small weights fall among the subnormal numbers of fp16; the search knows."""
    w = normal()
    relative = [lost(w * factor, solve(KQUANTS[name], w * factor).decode()) / factor**2 for factor in (1.0, 2.0**-7)]
    assert relative[1] < 1.1 * relative[0]


@pytest.mark.parametrize("name", NAMES)
def test_weights_that_no_input_reaches_keep_their_size(name):
    grid, w = KQUANTS[name], normal()
    dead = importance()
    dead[:256] = 0
    for h in (torch.zeros(WIDTH), dead):
        assert lost(w[:, :256], solve(grid, w, h).decode()[:, :256]) < 1.2 * lost(
            w[:, :256], solve(grid, w).decode()[:, :256]
        )


@pytest.mark.parametrize("name", NAMES)
def test_columns_round_one_by_one_as_all_at_once(name):
    grid, w = KQUANTS[name], EDGES["outlier"]
    whole = solve(grid, w)
    assert torch.equal(one_by_one(grid, w, whole.params), whole.codes)


@pytest.mark.parametrize("name", ["tq1_0", "tq2_0"])
def test_ternary_weights_are_kept_as_they_are(name):
    w = torch.randint(-1, 2, (16, WIDTH), generator=torch.Generator().manual_seed(6)) * 0.03125
    assert torch.equal(solve(KQUANTS[name], w).decode(), w)


def test_names():
    assert [str(KQuant.parse(name)) for name in NAMES] == NAMES
    assert KQuant.parse("q4_k").bits((8, 512)) == 4.5
    with pytest.raises(UnknownName, match="q4_k"):
        KQuant.parse("q4_m")


def test_rows_that_blocks_do_not_divide_are_refused():
    with pytest.raises(BadRequest, match="q4_k packs blocks of 256 in-features, which do not divide a row of 96"):
        KQUANTS["q4_k"].fit(normal(4, 96), None)
