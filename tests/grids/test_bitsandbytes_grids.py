"""NF4, FP4 and LLM.int8(): the bytes of bitsandbytes where its rule is followed, less error where a scale is
searched."""

import pytest
import torch
from weights import by_reference, correlated, importance, lost, normal, rounded_in_any_order, solve

from halfbyte import grids
from halfbyte.errors import BadRequest, Unsupported
from halfbyte.grids.scalar import LLM_INT8, TABLES
from halfbyte.kernels.levels import values_of
from halfbyte.kernels.scales import dynamic_map
from halfbyte.solvers.gptq import gptq
from halfbyte.solvers.nearest import nearest

bitsandbytes = pytest.importorskip(
    "bitsandbytes", reason="bitsandbytes is the oracle: pip install -c constraints.txt bitsandbytes"
)
functional, rules = bitsandbytes.functional, bitsandbytes.backends.default.ops

NAMES = ["nf4-g64", "fp4-g64", "nf4-g32", "nf4-g256", "fp4-g128", "nf4-g64-double", "fp4-g32-double"]
SHAPES = {"rows of whole blocks": (64, 512), "blocks that span rows": (160, 80), "a last block cut short": (270, 37)}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@pytest.fixture(autouse=True, scope="module")
def uncompiled():
    """What bitsandbytes compiles anew for each shape runs as it is written."""
    with torch.compiler.set_stance("force_eager"):
        yield


def theirs(grid, w):
    """Codes and state, by bitsandbytes' own quantizer."""
    raw, state = functional.quantize_4bit(
        w.contiguous(), blocksize=grid.granularity, quant_type=grid.levels.name, compress_statistics=grid.nested
    )
    return torch.stack([raw.flatten() >> 4, raw.flatten() & 15], 1).flatten()[: w.numel()].view(w.shape), raw, state


@shapes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", [name for name in NAMES if "double" not in name])
def test_without_a_search_the_codes_and_scales_are_those_of_bitsandbytes(name, dtype, shape):
    grid, w = grids.parse(name), normal(*shape).to(dtype)
    codes, _, state = theirs(grid, w)
    params = grid.fit(w, None, search=False)
    assert torch.equal(params["scale"].flatten(), state.absmax)
    assert torch.equal(grid.encode(w, params), codes)


@pytest.mark.parametrize("name", ["nf4-g64-double", "fp4-g32-double"])
def test_without_a_search_scales_are_quantized_as_bitsandbytes_does(name):
    grid, w = grids.parse(name), normal(512, 512)
    _, _, state = theirs(grid, w)
    params = grid.fit(w, None, search=False)
    assert torch.equal(params["offset"][0], state.offset)
    assert torch.equal(params["nested"], state.state2.absmax)
    plain = w.view(-1, grid.granularity).abs().amax(1) - state.offset
    # Its rule as it is written in torch, which it runs on numbers of 64 bits; its compiled one
    # takes a neighbour for one scale in a thousand.
    by_rule, _ = torch.ops.bitsandbytes.quantize_blockwise.default(plain.double(), state.state2.code, 256)
    assert (params["scale"].flatten() == by_rule).float().mean() > 0.9999
    assert (params["scale"].flatten() == state.absmax).float().mean() > 0.995
    assert lost(w, solve(grid, w, search=False)) < 1.001 * lost(w, functional.dequantize_4bit(*theirs(grid, w)[1:]))


@shapes
@pytest.mark.parametrize("name", NAMES)
def test_any_bytes_decode_to_what_bitsandbytes_makes_of_them(name, shape):
    grid, w = grids.parse(name), normal(*shape)
    _, raw, state = theirs(grid, w)
    some = torch.Generator().manual_seed(1)
    raw = torch.randint(256, raw.shape, dtype=torch.uint8, generator=some)
    params = {"scale": state.absmax.view(1 if shape[1] % grid.granularity else shape[0], -1)}
    if grid.nested:
        state.absmax = torch.randint(256, state.absmax.shape, dtype=torch.uint8, generator=some)
        params = {
            "scale": state.absmax.view(params["scale"].shape),
            "nested": state.state2.absmax,
            "offset": state.offset.view(1),
        }
    codes = torch.stack([raw.flatten() >> 4, raw.flatten() & 15], 1).flatten()[: w.numel()].view(shape)
    if (
        shape[1] % grid.granularity
    ):  # its compiled code for CPUs begins a new block with every row, as nothing else does: its rule in torch
        absmax = (
            functional.dequantize_blockwise(state.absmax, state.state2) + state.offset if grid.nested else state.absmax
        )
        expected = rules._dequantize_4bit_compute(
            raw.flatten(), absmax, state.code, grid.granularity, shape, torch.float32
        ).view(shape)
    else:
        expected = functional.dequantize_4bit(raw, state)
    assert torch.equal(grid.decode(codes, params), expected)


def test_the_tables_are_those_of_bitsandbytes():
    assert torch.equal(dynamic_map(), functional.create_dynamic_map())
    for kind, table in TABLES.items():
        assert torch.equal(values_of(table) * table.unit, functional.get_4bit_type(kind, device="cpu"))


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("name", [*NAMES, "nf4-g4096"])
def test_a_search_loses_a_tenth_less_than_bitsandbytes(name, weighted):
    grid, w, h = grids.parse(name), normal(), importance() if weighted else None
    assert lost(w, solve(grid, w, h), h) < 0.91 * lost(w, functional.dequantize_4bit(*theirs(grid, w)[1:]), h)


@shapes
@pytest.mark.parametrize("name", NAMES)
def test_every_weight_gets_the_level_nearest_to_it(name, shape):
    grid, w = grids.parse(name), normal(*shape)
    params = grid.fit(w, None)
    scales = grid.scales.storage.load(params).flatten().repeat_interleave(grid.granularity)[: w.numel()].view(shape)
    least = (w[..., None] - scales[..., None] * (values_of(grid.levels) * grid.levels.unit)).abs().amin(-1)
    assert torch.allclose((w - grid.decode(grid.encode(w, params), params)).abs(), least, atol=1e-8)


@shapes
@pytest.mark.parametrize("weighted", ["plain", "by in-feature", "by weight"])
@pytest.mark.parametrize("name", NAMES)
def test_the_compiled_search_is_the_reference(name, weighted, shape):
    grid, w = grids.parse(name), normal(*shape)
    h = {"plain": None, "by in-feature": importance(shape[1]), "by weight": w.abs() + 0.01}[weighted]
    params, reference = grid.fit(w, h), by_reference(grid.fit, w, h)
    ours, theirs = (grid.scales.storage.load(p).flatten() for p in (params, reference))
    assert torch.isclose(ours, theirs, rtol=1e-4).float().mean() > 0.95  # sums are taken in another order
    codes = grid.encode(w, params)
    assert torch.equal(codes, by_reference(grid.encode, w, params))
    assert torch.equal(grid.decode(codes, params), by_reference(grid.decode, codes, params))


@shapes
@pytest.mark.parametrize("name", NAMES)
def test_columns_rounded_in_any_order_get_the_reference_codes(name, shape):
    grid, w = grids.parse(name), normal(*shape)
    compiled, reference = rounded_in_any_order(grid, w, 30)
    assert (compiled == reference).float().mean() > 0.99  # products are added with fused rounding


@shapes
@pytest.mark.parametrize("name", [*NAMES, "llm-int8"])
def test_gptq_lowers_the_error_of_the_output_wherever_blocks_lie(name, shape):
    statistics = correlated(shape[1])
    w, grid = normal(*shape), grids.parse(name)
    assert statistics.error(w, gptq(w, grid, statistics).decode()) < 0.8 * statistics.error(
        w, nearest(w, grid, statistics).decode()
    )


def test_rows_of_eight_bits_are_those_of_llm_int8():
    grid, w = LLM_INT8, normal().half()
    w[5] = 0
    codes, stats, _ = functional.int8_vectorwise_quant(w)
    params = grid.fit(w, None, search=False)
    assert torch.equal(params["scale"][:, 0], stats)
    assert torch.equal(grid.encode(w, params)[w.any(1)], (codes.int() + 128).to(torch.uint8)[w.any(1)])
    some = torch.randint(-128, 128, w.shape, dtype=torch.int8, generator=torch.Generator().manual_seed(4))
    assert torch.equal(
        grid.decode((some.int() + 128).to(torch.uint8), params), functional.int8_vectorwise_dequant(some, stats)
    )
    assert lost(w, solve(grid, w)) < lost(w, functional.int8_vectorwise_dequant(codes, stats))


def test_names_that_no_block_has_are_refused_with_what_would_work():
    with pytest.raises(BadRequest, match="4096"):
        grids.parse("nf4-g48")
    assert grids.parse("nf4") == grids.parse("nf4-g64")
    assert str(grids.parse("fp4-g256-double")) == "fp4-g256-double"


def test_a_block_far_larger_than_the_matrix_is_refused():
    with pytest.raises(Unsupported, match="smaller blocks"):
        grids.parse("nf4-g4096").fit(torch.zeros(2, 64), None)
