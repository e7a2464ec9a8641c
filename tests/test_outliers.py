"""Outlier channels, such as large models have: the twin is the same model, and what rounds it without care loses what
care keeps."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import halfbyte
from halfbyte import demo
from outliers import twin

WINDOWS = 4
CALIBRATION = {"samples": 16}
PER_TENSOR = "int8-tensor/int8-static"


@pytest.fixture(scope="module")
def outliers(tmp_path_factory):
    return twin(demo.MODEL, tmp_path_factory.mktemp("twin") / "twin")


@pytest.fixture(scope="module")
def kl(outliers, tmp_path_factory):
    """KL to the model itself of a method and a grid, on the model or its twin; each is quantized once."""
    done: dict[tuple, float] = {}

    def measure(method: str, grid: str, of=outliers, **recipe) -> float:
        key = (method, grid, of, *sorted(recipe.items()))
        if key not in done:
            out = tmp_path_factory.mktemp("out") / "model"
            halfbyte.quantize(of, out, method=method, grid=grid, calibration=CALIBRATION, **recipe)
            done[key] = halfbyte.evaluate([out], demo.MODEL, windows=WINDOWS, foreign=of != demo.MODEL)["models"][0][
                "kl"
            ]
        return done[key]

    return measure


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_twin_computes_what_the_model_does(outliers, dtype):
    tokens = torch.randint(0, 4096, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        own, other = (
            AutoModelForCausalLM.from_pretrained(m, dtype=dtype)(tokens).logits for m in (demo.MODEL, outliers)
        )
    assert torch.equal(own, other)


def test_the_twin_has_channels_30_to_100_times_as_large_as_they_were(outliers):
    before, after = (AutoModelForCausalLM.from_pretrained(m).state_dict() for m in (demo.MODEL, outliers))
    norms = [name for name in before if "layernorm" in name]
    assert len(norms) == 12
    for name in norms:
        ratio = after[name] / before[name]
        assert 1 <= (ratio != 1).sum() <= 4
        assert set(ratio.tolist()) <= {1, 32, 64}


@pytest.mark.slow
def test_awq_loses_less_than_half_of_what_nearest_loses(kl):
    assert kl("awq", "int4-g128") < kl("nearest", "int4-g128") / 2


@pytest.mark.slow
def test_plain_w8a8_per_tensor_is_ruined(kl):
    assert kl("nearest", PER_TENSOR) > 20 * kl("nearest", PER_TENSOR, demo.MODEL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "recipe"), [("smoothquant", {}), ("smoothquant", {"alpha": 0.5}), ("smoothquant+gptq", {})]
)
def test_smoothquant_brings_back_what_is_lost(kl, method, recipe):
    lost = kl("nearest", PER_TENSOR) - kl("nearest", PER_TENSOR, demo.MODEL)
    assert kl("nearest", PER_TENSOR) - kl(method, PER_TENSOR, **recipe) > 0.95 * lost


@pytest.mark.slow
def test_a_searched_strength_is_better_than_a_fixed_one(kl):
    assert kl("smoothquant", PER_TENSOR) < 0.8 * kl("smoothquant", PER_TENSOR, alpha=0.5)
