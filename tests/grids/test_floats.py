"""Small floats: every bit as other libraries have it, and scales that lose less than the plain ones."""

import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from weights import by_reference, heavy_tailed, importance, lost, normal, solve

from halfbyte.containers.compressed.container import CompressedTensors, layout_of
from halfbyte.containers.fp8 import FP8
from halfbyte.errors import BadRequest
from halfbyte.grids import parse
from halfbyte.grids.quantized import Quantized
from halfbyte.grids.scalar import NVFP4, SCALAR_GRIDS, is_float
from halfbyte.kernels import scalar
from halfbyte.kernels.levels import FLOATS
from halfbyte.kernels.scales import FP32, Scales

DTYPES = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
}
FLOAT_GRIDS = [name for name, grid in SCALAR_GRIDS.items() if is_float(grid)]
SEARCHED = [name for name in FLOAT_GRIDS if not name.startswith("mx")]


@pytest.mark.parametrize("name", DTYPES)
def test_codes_are_those_of_ml_dtypes_ties_and_signed_zeros_too(name):
    element = FLOATS[name]
    every = np.arange(1 << element.bits, dtype=np.uint8).view(DTYPES[name]).astype(np.float32)
    decoded = element.value(torch.arange(1 << element.bits).to(torch.uint8)).numpy()
    finite = np.isfinite(every)
    assert np.array_equal(decoded[finite], every[finite])
    assert not np.isfinite(decoded[~finite]).any()
    levels = torch.from_numpy(np.unique(every[finite]))
    ties = (levels[1:] + levels[:-1]) / 2
    spread = torch.randn(20000, generator=torch.Generator().manual_seed(0)).clamp(-3, 3) / 3
    x = torch.cat([levels, ties, spread * element.top, spread * levels[levels > 0][0] * 20, torch.tensor([0.0, -0.0])])
    x = torch.cat([x, -x]).clamp(-element.top, element.top)
    theirs = x.numpy().astype(DTYPES[name]).view(np.uint8)
    assert np.array_equal(element.nearest(x).numpy(), theirs)
    one = {"scale": torch.ones(1, 1)}
    assert np.array_equal(scalar.encode(element, Scales("channel", FP32), x[None], one)[0].numpy(), theirs)


@pytest.mark.parametrize(("name", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_codes_are_those_of_torch_and_the_largest_weights_are_never_infinite(name, dtype):
    element, x = FLOATS[name], normal(200, std=50.0)
    assert torch.equal(element.nearest(x), x.to(dtype).view(torch.uint8))
    assert torch.equal(
        element.value(element.nearest(torch.tensor([1e30, -1e30]))), torch.tensor([element.top, -element.top])
    )


@pytest.mark.parametrize("name", FLOAT_GRIDS)
def test_names_come_back(name):
    assert str(parse(name)) == name
    if name.startswith("fp8"):
        assert str(parse(f"{name}-bf16")) == f"{name}-bf16"


def theirs_plain(name: str, w: torch.Tensor) -> dict[str, torch.Tensor]:
    """What compressed-tensors makes of these weights by itself: min-max scales, then its own rounding and packing."""
    grid = CompressedTensors().resolve(parse(name), torch.float32) if name.startswith("fp8") else parse(name)
    layout = layout_of(grid)
    scheme = QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(**layout.arguments(grid)), format=layout.format
    )
    group = {"fp8-e4m3-channel": w.shape[1], "nvfp4": 16}.get(name, 32)
    state = {"weight": w.clone()}
    if name == "fp8-e4m3-tensor":
        low, high = w.amin(), w.amax()
    elif name == "fp8-e4m3-block":
        blocks = w.unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
        low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    else:
        low, high = w.unflatten(1, (-1, group)).amin(-1), w.unflatten(1, (-1, group)).amax(-1)
    if name == "nvfp4":
        state["weight_global_scale"] = generate_gparam(w.amin(), w.amax())
    state["weight_scale"], _ = calculate_qparams(
        low, high, scheme.weights, global_scale=state.get("weight_global_scale")
    )
    return BaseCompressor.get_value_from_registry(layout.format).compress(state, scheme)


PLAIN = ["fp8-e4m3-tensor", "fp8-e4m3-channel", "fp8-e4m3-block", "mxfp8-e4m3", "mxfp6-e2m3", "nvfp4"]


@pytest.mark.parametrize("name", PLAIN)
def test_minmax_writes_the_bytes_of_compressed_tensors(name):
    grid, w = parse(name), normal(256)
    w *= torch.logspace(-2, 1, 256)[:, None]
    params = grid.fit(w, None, search=False)
    ours, theirs = CompressedTensors().pack(Quantized(grid, grid.encode(w, params), params)), theirs_plain(name, w)
    assert ours.keys() <= theirs.keys()
    for key, tensor in ours.items():
        assert torch.equal(tensor.view(torch.uint8), theirs[key].view(torch.uint8)), key


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "imatrix"])
@pytest.mark.parametrize("name", SEARCHED)
def test_search_loses_less_than_minmax(name, weighted):
    w, h = normal(200), importance() if weighted else None
    plain, found = lost(w, solve(SCALAR_GRIDS[name], w, search=False), h), lost(w, solve(SCALAR_GRIDS[name], w, h), h)
    bound = 0.8 if name == "nvfp4" else 0.97 if name.endswith("channel") else 1.0
    assert found < bound * plain


@pytest.mark.parametrize(
    ("name", "every_byte"), [("nvfp4", range(1, 127)), ("ggml-nvfp4", range(1, 127)), ("mxfp4", range(96, 140))]
)
def test_search_finds_what_all_scales_would(name, every_byte):
    """Trying every byte that a group's scale can be, next to nothing is won."""
    grid, w = SCALAR_GRIDS[name], heavy_tailed(16)

    def squared_errors(params):
        missed = w - grid.decode(grid.encode(w, params), params)
        return missed.square().unflatten(1, (-1, grid.granularity)).sum(-1)

    found = grid.fit(w, None)
    each = [squared_errors({**found, "scale": torch.full_like(found["scale"], byte)}) for byte in every_byte]
    assert squared_errors(found).sum() <= 1.001 * torch.stack(each).amin(0).sum()


def of_each_weight(grid, params, shape):
    """The scale of each weight."""
    scale, size = grid.scales.per_row(grid.scales.storage.load(params), *shape)
    return scale.repeat_interleave(size or shape[1], 1)[:, : shape[1]]


@pytest.mark.parametrize("name", FLOAT_GRIDS)
def test_every_weight_gets_the_number_nearest_to_it(name):
    grid, w = SCALAR_GRIDS[name], normal(150)
    params = grid.fit(w, None)
    codes = grid.encode(w, params)
    scales = of_each_weight(grid, params, w.shape)
    numbers = grid.levels.value(torch.arange(1 << grid.levels.bits).to(torch.uint8))
    numbers = numbers[numbers.isfinite()].unique()
    least = torch.stack([(w - n * scales).abs() for n in numbers]).amin(0)
    assert torch.allclose((w - grid.decode(codes, params)).abs(), least, atol=1e-7)


@pytest.mark.parametrize("weighted", ["not", "in-features", "weights"])
@pytest.mark.parametrize("name", FLOAT_GRIDS)
def test_the_compiled_code_is_the_reference(name, weighted):
    grid, w = SCALAR_GRIDS[name], normal(150)
    h = {"not": None, "in-features": importance(), "weights": importance() * torch.rand(150, 1)}[weighted]
    params, reference = grid.fit(w, h), by_reference(grid.fit, w, h)
    ours, theirs = (lost(w, grid.decode(grid.encode(w, p), p), h) for p in (params, reference))
    assert ours == pytest.approx(theirs, rel=1e-3)  # sums are taken in another order
    codes = grid.encode(w, params)
    assert torch.equal(codes, by_reference(grid.encode, w, params))
    assert torch.equal(grid.decode(codes, params), by_reference(grid.decode, codes, params))


def test_a_width_that_is_no_multiple_is_refused_with_what_would_work():
    with pytest.raises(BadRequest, match="multiples of 32"):
        SCALAR_GRIDS["mxfp8-e4m3"].fit(torch.zeros(2, 100), None)


def test_matrices_of_a_layer_share_the_divisor_of_nvfp4():
    """Engines fuse q, k and v, and take one divisor for all."""
    divisors = {NVFP4.fit(normal(200, std=s), None)["divisor"].item() for s in (0.002, 0.02, 0.2)}
    assert len(divisors) == 1


def test_the_blocks_of_deepseek_are_those_of_transformers():
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    grid, w = parse("fp8-e4m3-block"), normal(256)
    params = grid.fit(w, None)
    q = Quantized(grid, grid.encode(w, params), params)
    tensors = FP8().pack(q)
    theirs = Fp8Dequantize(None)._dequantize_one(tensors["weight"], tensors["weight_scale_inv"], torch.float32)
    assert torch.equal(theirs, q.decode())
