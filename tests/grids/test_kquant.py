"""K-quants: as good as llama.cpp's own encoder or better, and whole whatever the weights are."""

import ctypes
import importlib.util
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import halfbyte
from halfbyte.containers.gguf.scalar_blocks import SCALAR_LAYOUTS
from halfbyte.errors import BadRequest, UnknownName
from halfbyte.grids import kquant_numba, kquant_search
from halfbyte.grids.grid import Quantized
from halfbyte.grids.kquant import KQUANTS, KQuant
from halfbyte.solvers.gptq import gptq
from halfbyte.solvers.nearest import nearest
from halfbyte.solvers.statistics import Statistics

NAMES = list(KQUANTS)
WIDTH = 512
NOISE = 1e-6  # of the energy of the weights: what float32 sums cannot tell apart


def normal(rows=64, width=WIDTH, seed=0, std=0.02):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * std


def importance(width=WIDTH):
    return torch.rand(width, generator=torch.Generator().manual_seed(2)) ** 4 * 50


def trained():
    model = load_file(Path(halfbyte.__file__).parent / "demo" / "model" / "model.safetensors")
    return torch.cat([w.reshape(-1, WIDTH) for name, w in model.items() if name.endswith("proj.weight")])[::8].contiguous()


def edges():
    w = normal(24)
    zeros, outlier, constant = w.clone(), w.clone(), w.clone()
    zeros[3], zeros[:, 32:96] = 0, 0
    outlier[5, 40] = 9.0
    constant[2], constant[7] = 0.013, -0.013
    sparse = w * (torch.rand(w.shape, generator=torch.Generator().manual_seed(1)) < 0.05)
    return {
        "normal": w,
        "zeros": zeros,
        "all zero": torch.zeros_like(w),
        "outlier": outlier,
        "constant rows": constant,
        "positive": w.abs() + 0.01,
        "negative": -w.abs() - 0.01,
        "sparse": sparse,
        "laplace": w.sign() * w.abs() ** 2 * 30,
        "wide range": w * torch.logspace(-3, 2, w.shape[0])[:, None],
    }


EDGES = edges()


def solve(grid, w, h=None, search=True):
    params = grid.fit(w, h, search)
    return Quantized(grid, grid.encode(w, params), params)


def lost(w, decoded, h=None):
    square = (w.double() - decoded.double()).square()
    return (square if h is None else square * h).sum().item()


@pytest.fixture(scope="module")
def llama():
    """llama.cpp's encoder: (name, w, importance) -> decoded weights."""
    found = importlib.util.find_spec("llama_cpp")
    if found is None or found.origin is None:
        pytest.skip("llama-cpp-python is not installed, so there is no encoder of llama.cpp to compare with")
    library = ctypes.CDLL(str(Path(found.origin).parent / "lib" / "libggml-base.so"))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]

    def encode(name, w, h=None):
        kind = gguf.GGMLQuantizationType[name.upper()]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        source, raw = np.ascontiguousarray(w.float().numpy()), np.zeros((w.shape[0], w.shape[1] // block * size), np.uint8)
        weights = None if h is None else np.ascontiguousarray(h.numpy())
        library.ggml_quantize_chunk(kind.value, source.ctypes.data, raw.ctypes.data, 0, *w.shape, None if weights is None else weights.ctypes.data)
        return torch.from_numpy(gguf.dequantize(raw, kind))

    return encode


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "imatrix"])
@pytest.mark.parametrize("name", NAMES)
def test_errors_are_below_those_of_llama_cpp(name, weighted, llama):
    student = torch.distributions.StudentT(3.0).sample((64, WIDTH)) * 0.02
    h = importance() if weighted else None
    for w in (normal(), student, trained()):
        assert lost(w, solve(KQUANTS[name], w, h).decode(), h) < 0.98 * lost(w, llama(name, w, h), h)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("data", EDGES)
def test_the_accelerated_search_is_the_reference(name, data):
    grid = KQUANTS[name]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        w = EDGES[data].to(dtype)
        for h, effort in ((None, kquant_search.EFFORT[name]), (importance() + 0.01, kquant_search.EFFORT_WITH_IMPORTANCE[name])):
            losses = []
            for fit in (kquant_numba.fit, kquant_search.fit_reference):
                params = kquant_search.stored(grid, *fit(grid, w, h, effort))
                codes = kquant_search.encode_reference(grid, w, *grid.lines(params))
                assert torch.equal(grid.encode(w, params), codes)
                losses.append(lost(w, grid.decode(codes, params), h))
            # Sums in another order choose another candidate where two are as good as one. In groups of a few weights that many grids
            # fit exactly, the choice is chance, and decides d for the groups beside them.
            chance = 0.15 if data in ("sparse", "outlier") else 0.02
            assert abs(losses[0] - losses[1]) <= chance * losses[1] + NOISE * lost(w, torch.zeros_like(w), h)
    quick = [fit(grid, EDGES[data], None, kquant_search.MINMAX) for fit in (kquant_numba.fit, kquant_search.fit_reference)]
    assert all(torch.equal(ours, reference) for ours, reference in zip(*quick, strict=True))


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
        assert lost(w[:, :256], solve(grid, w, h).decode()[:, :256]) < 1.2 * lost(w[:, :256], solve(grid, w).decode()[:, :256])


@pytest.mark.parametrize("name", NAMES)
def test_columns_round_one_by_one_as_all_at_once(name):
    grid, w = KQUANTS[name], EDGES["outlier"]
    whole = solve(grid, w)
    columns = [grid.round(w[:, k : k + 1], whole.params, k) for k in range(WIDTH)]
    assert torch.equal(torch.cat([codes for codes, _ in columns], 1), whole.codes)
    assert torch.equal(torch.cat([values for _, values in columns], 1), whole.decode())


@pytest.mark.parametrize("name", NAMES)
def test_gptq_loses_less_than_rounding_to_nearest(name):
    grid, w = KQUANTS[name], normal(48)
    statistics = Statistics(WIDTH)
    generator = torch.Generator().manual_seed(3)
    statistics.add(torch.randn(2048, WIDTH, generator=generator) @ torch.randn(WIDTH, WIDTH, generator=generator) * torch.logspace(-1, 1, WIDTH))
    solved = gptq(w, grid, statistics)
    assert statistics.error(w, solved.decode()) < 0.95 * statistics.error(w, nearest(w, grid, statistics).decode())


@pytest.mark.parametrize("name", NAMES)
def test_columns_in_any_order_round_as_the_reference_does(name):
    grid, w = KQUANTS[name], normal(21)
    params = grid.fit(w, None)
    columns = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(4))[:64].tolist()
    coupling = torch.randn(64, 64, generator=torch.Generator().manual_seed(5)).tril(-1) * 0.1
    arguments = [(w[:, columns].clone(), w[:, columns].clone(), torch.zeros(21, 64), coupling, params, columns) for _ in range(2)]
    fast, slow = grid.round_block(*arguments[0]), grid.round_block_reference(*arguments[1])
    assert (fast != slow).float().mean() < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_a_transposed_matrix_is_fitted_like_its_copy(name):
    w = normal(32).T.contiguous().T
    assert solve(KQUANTS[name], w).equal(solve(KQUANTS[name], w.contiguous()))


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
