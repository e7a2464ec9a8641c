"""Inputs are rounded as engines round them: bitsandbytes' kernels, compressed-tensors' own quantization, PyTorch's
casts."""

import bitsandbytes.functional as bnb
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

from halfbyte.containers.compressed.inputs import input_arguments, input_grid
from halfbyte.errors import HalfbyteError
from halfbyte.grids.activations import ACTIVATION_GRIDS, OBSERVERS, ActivationQuant, ActivationStats, parse


def tokens(outliers: bool = True) -> torch.Tensor:
    x = torch.randn(3, 40, 256, generator=torch.Generator().manual_seed(0))
    x[..., 7] *= 30 if outliers else 1
    return x


def seen(x: torch.Tensor) -> ActivationStats:
    rows = x.flatten(0, -2)
    return ActivationStats(rows.amin(0), rows.amax(0), rows)


def fitted(name: str, x: torch.Tensor, how: str = "max") -> ActivationQuant:
    grid = parse(name)
    return ActivationQuant(grid, grid.fit(seen(x), how))


@pytest.mark.parametrize("name", ACTIVATION_GRIDS)
def test_a_name_is_read_as_it_is_written_and_so_is_a_config(name):
    grid = parse(name)
    assert str(grid) == name
    if name != "llm-int8":
        QuantizationArgs.model_validate(input_arguments(grid))
        assert input_grid(input_arguments(grid)) == grid


def test_int8_of_a_token_is_that_of_bitsandbytes():
    x = tokens().half()
    theirs, scale, _ = bnb.int8_vectorwise_quant(x.flatten(0, 1))
    grid = parse("int8-token")
    ours = grid.codes(x.flatten(0, 1), grid.params(x.flatten(0, 1), {}))
    assert (ours == theirs).float().mean() > 0.999  # of ties, some are no ties after their division
    assert torch.allclose(grid.params(x.flatten(0, 1), {})["scale"][:, 0] * 127, scale)


def test_columns_of_outliers_stay_as_bitsandbytes_keeps_them():
    x = tokens().half().flatten(0, 1)
    theirs, scale, columns = bnb.int8_vectorwise_quant(x, threshold=6.0)
    expected = theirs.float() * scale[:, None] / 127
    expected[:, columns.long()] = x[:, columns.long()].float()
    assert columns.tolist() == [7]
    assert torch.isclose(fitted("llm-int8", x).round(x.float()), expected, atol=1e-6).float().mean() > 0.999


@pytest.mark.parametrize("name", ["fp8-e4m3-token", "fp8-e4m3-tensor", "fp8-e4m3-g128", "mxfp8-e4m3"])
def test_scales_that_engines_find_are_those_of_compressed_tensors(name):
    x = tokens()
    args = QuantizationArgs.model_validate(input_arguments(parse(name)))
    scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Linear(1, 1))
    theirs = fake_quantize(x, scale.float() if scale.dtype != torch.uint8 else scale, zero, args)
    close = torch.isclose(fitted(name, x).round(x), theirs, rtol=1e-6)
    assert close.float().mean() > 0.999  # their division by a scale may round to the other side of a tie


@pytest.mark.parametrize("name", ["int8-static", "int8-static-asym", "int4-static", "fp8-e4m3-static"])
@pytest.mark.parametrize("how", OBSERVERS)
def test_stored_scales_round_as_compressed_tensors_rounds_by_them(name, how):
    x = tokens()
    inputs = fitted(name, x, how)
    args = QuantizationArgs.model_validate(input_arguments(inputs.grid))
    zero = inputs.params.get("zero", torch.zeros(1)).to(torch.int8)
    assert torch.allclose(inputs.round(x), fake_quantize(x, inputs.params["scale"], zero, args), atol=1e-6)
    assert torch.equal(
        inputs.params["scale"].bfloat16().float(), inputs.params["scale"]
    )  # whatever precision a reader keeps it in


def test_a_range_may_leave_outliers_out():
    x = tokens(outliers=False)
    x[0, 0, 0] = 100
    error = {how: (fitted("int4-static", x, how).round(x) - x).square().mean().item() for how in OBSERVERS}
    assert error["mse"] < error["max"]
    assert error["percentile"] < error["max"]
    low, high = (parse("int4-static").limits(fitted("int4-static", x, how).params) for how in ("max", "percentile"))
    assert low[1] > 100 > high[1]


@pytest.mark.parametrize("name", ACTIVATION_GRIDS)
def test_rounding_is_finite_and_close_whatever_is_read(name):
    for x in (tokens(), torch.zeros(1, 2, 256), torch.full((1, 2, 256), 1e-30), tokens().bfloat16(), tokens()[:, :0]):
        rounded = fitted(name, tokens()).round(x)
        assert rounded.dtype == x.dtype
        assert rounded.isfinite().all()
    x = tokens(outliers=False)
    worst = 0.6 if name.startswith("int4") else 0.2 if "fp4" in name else 0.05
    assert (fitted(name, x).round(x) - x).norm() < worst * x.norm()


def test_nvfp4_inputs_have_e4m3_scales_under_the_stored_divisor():
    x = tokens(outliers=False).flatten(0, 1)
    inputs = fitted("nvfp4", x)
    divisor = 448 * 6 / x.abs().max()
    assert torch.allclose(inputs.params["divisor"], divisor)
    scale = (divisor * x.view(-1, 16).abs().amax(1) / 6).to(torch.float8_e4m3fn).float() / divisor
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    found = inputs.round(x).view(-1, 16).abs() / scale[:, None]
    assert torch.allclose(found, levels[(found[..., None] - levels).abs().argmin(-1)], atol=1e-4)


@pytest.mark.parametrize("name", ["int8", "int9-token", "fp8-e4m3", "fp8-e4m3-token-asym", "int8-channel", "fp4-token"])
def test_an_unknown_name_is_refused_with_those_there_are(name):
    with pytest.raises(HalfbyteError, match="round inputs"):
        parse(name)
