"""A walk is the model's own computation, or is refused by name."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import halfbyte
import tiny
from halfbyte.errors import BadCheckpoint, BrokenOutput, Unsupported
from halfbyte.evaluation.divergence import mean_and_error
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.report.numbers import require_finite
from models.every import EVERY, outputs
from models.families import FAMILIES
from models.test_every_family import walked


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return str(tiny.text(tmp_path_factory.mktemp("text") / "text.txt"))


def few(text):
    return {"source": text, "samples": 4, "length": 32}


def changed(folder, **changes):
    place = folder / "config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | changes))
    return folder


def with_tokenizer(folder):
    tiny.tokenizer(adds_bos=False).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


@pytest.fixture(scope="module")
def zamba(tmp_path_factory):
    return with_tokenizer(EVERY["zamba"].save(tmp_path_factory.mktemp("shared") / "model"))


def test_a_shared_block_is_quantized_once_and_runs_so_wherever_it_stands(zamba, text, tmp_path):
    report = halfbyte.quantize(
        zamba,
        tmp_path / "out",
        method="gptq",
        grid="int4-g32",
        to="compressed-tensors",
        engine="none",
        calibration=few(text),
    )
    assert any("shared_transf" in row["name"] for row in report["weights"])
    model = halfbyte.load(tmp_path / "out", torch.float32)
    layers = model.model.layers
    assert layers[3].shared_transf.feed_forward.up_proj is layers[1].shared_transf.feed_forward.up_proj
    torch.testing.assert_close(walked(Checkpoint.open(tmp_path / "out")), outputs(model), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(outputs(model), outputs(halfbyte.load(zamba, torch.float32)), rtol=1e-2)


@pytest.mark.parametrize("recipe", [{"method": "awq+gptq", "grid": "int4-g32"}, {"method": "gptq", "grid": "w8a8"}])
def test_what_suits_the_first_of_shared_blocks_alone_is_refused(zamba, text, tmp_path, recipe):
    with pytest.raises(Unsupported, match=r"shares weights between blocks.*--method gptq with a grid of weights alone"):
        halfbyte.quantize(
            zamba, tmp_path / "out", to="compressed-tensors", engine="none", calibration=few(text), **recipe
        )
    assert not list(tmp_path.iterdir())


def test_one_expert_that_is_missing_is_missed(tmp_path):
    folder = FAMILIES["mixtral"].save(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.2.w1.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for use in (lambda: halfbyte.load(folder), lambda: walked(Checkpoint.open(folder))):
        with pytest.raises(
            BadCheckpoint,
            match=r"lacks 1 tensor of 'mixtral', or parts of them, the first "
            r"'model\.layers\.1\.mlp\.experts\.gate_up_proj'",
        ):
            use()


def test_a_tensor_of_another_shape_is_not_spread_over_its_place(tmp_path):
    folder = tiny.make(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:1].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        BadCheckpoint, match=r"lacks 1 tensor of 'llama', or parts of them, the first 'model\.norm\.weight'"
    ):
        halfbyte.load(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"head_dim": 10**9},
        {"num_hidden_layers": 2**31},
        {"pad_token_id": 10**6},
        {"dtype": [None]},
        {"architectures": [5]},
    ],
)
def test_numbers_that_no_model_has_are_refused_before_memory_is_taken(tmp_path, changes):
    folder = changed(tiny.make(tmp_path / "model"), **changes)
    with pytest.raises(BadCheckpoint) as refusal:
        halfbyte.load(folder)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_config_fetches_no_kernel(tmp_path, monkeypatch, key):
    def fetch(*args, **kwargs):
        raise AssertionError("a kernel was asked for")

    monkeypatch.setattr("transformers.integrations.hub_kernels.get_kernel", fetch)
    model = halfbyte.load(changed(tiny.make(tmp_path / "model"), **{key: "evil-org/evil-kernel"}))
    assert model.config._attn_implementation in ("sdpa", "eager")


def test_a_name_among_architectures_that_is_no_model_calls_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers, "pipeline", None)
    model = halfbyte.load(changed(tiny.make(tmp_path / "model"), architectures=["pipeline"]))
    assert type(model) is transformers.LlamaForCausalLM


@pytest.mark.slow
def test_a_block_that_computes_no_numbers_is_named(tmp_path, text):
    folder = tiny.make(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] = torch.full_like(
        tensors["model.layers.1.mlp.down_proj.weight"], 3e38
    )
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for method in ("gptq", "awq"):
        with pytest.raises(BadCheckpoint, match=r"model\.layers\.1 computes NaN or Inf in bfloat16"):
            halfbyte.quantize(folder, tmp_path / "out", method=method, calibration=few(text), grid="int4-g128-asym")
        assert not (tmp_path / "out").exists()
    with pytest.raises(BadCheckpoint, match=r"model\.layers\.1 computes NaN or Inf in float32"):
        halfbyte.evaluate([folder], folder, text, length=32)


def test_no_report_holds_a_number_that_is_none():
    report = {"weights": [{"name": "a.b", "error": 0.1}, {"name": "a.c", "error": float("nan")}]}
    with pytest.raises(BrokenOutput, match=r"report, weights, a\.c, error is nan"):
        require_finite(report)
    assert require_finite({"kl": 0.0, "kl_error": None}) == {"kl": 0.0, "kl_error": None}
    assert mean_and_error(torch.tensor([[2.0]])) == (2.0, None)
