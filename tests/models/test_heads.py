"""config.json and the file may disagree on whether the head is the embedding: what Transformers makes of them is what
counts."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import halfbyte
import tiny
from halfbyte.errors import BadCheckpoint
from halfbyte.models.checkpoint import Checkpoint
from models.families import FAMILIES

WORDS = {"method": "nearest", "grid": "int8-g32", "to": "compressed-tensors"}
TOKENS = torch.randint(0, 250, (1, 24), generator=torch.Generator().manual_seed(1))


def make(path, family: str, said: bool | None, head: str):
    """A checkpoint whose config says `said` (None: nothing), and whose head is as `head` says."""
    FAMILIES[family].save(path)
    config = json.loads((path / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    (path / "config.json").write_text(json.dumps(config if said is None else config | {"tie_word_embeddings": said}))
    tensors = load_file(path / "model.safetensors")
    tensors.pop("lm_head.weight", None)
    embedding = tensors["model.embed_tokens.weight"]
    values = {
        "none": None,
        "equal": embedding.clone(),
        "own": torch.randn(embedding.shape, generator=torch.Generator().manual_seed(0)).to(embedding.dtype),
    }
    if values[head] is not None:
        tensors["lm_head.weight"] = values[head]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def head_of(model) -> torch.Tensor:
    return model.get_output_embeddings().weight.detach().float()


CASES = [(said, head) for said in (True, False, None) for head in ("none", "equal", "own")]


@pytest.mark.parametrize("family", ["llama", "gemma3"])  # untied and tied where config.json says nothing
@pytest.mark.parametrize(("said", "head"), CASES)
def test_the_head_is_the_one_that_transformers_has(tmp_path, family, said, head):
    source = make(tmp_path / "model", family, said, head)
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto", output_loading_info=True)
    outputs = {"folder": WORDS, "model.gguf": {"method": "nearest", "grid": "F32"}}
    if loading["missing_keys"]:
        assert loading["missing_keys"] == {"lm_head.weight"}
        for name, words in outputs.items():
            with pytest.raises(BadCheckpoint, match=r"lacks the head.*tie_word_embeddings"):
                halfbyte.quantize(source, tmp_path / name, **words)
            assert not (tmp_path / name).exists()
        return
    expected = head_of(model)
    checkpoint = Checkpoint.open(source)
    assert (
        checkpoint.tied == torch.equal(expected, model.get_input_embeddings().weight.detach().float())
        or head == "equal"
    )
    for name, words in outputs.items():
        if (family, name) != ("gemma3", "model.gguf") or head != "own":  # llama.cpp's Gemma has no head of its own
            halfbyte.quantize(source, tmp_path / name, **words)
            assert torch.equal(head_of(halfbyte.load(tmp_path / name, torch.float32)), expected), name
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype="auto")
    assert torch.equal(head_of(again), expected)
    assert again.config.tie_word_embeddings == model.config.tie_word_embeddings or head == "own"
    assert head != "own" or not again.config.tie_word_embeddings  # for engines that go by the config alone


def test_a_missing_head_is_refused_in_one_line_by_every_command(tmp_path):
    source = make(tmp_path / "model", "llama", False, "none")
    for words in (
        ("--method", "nearest"),
        ("--method", "gptq", "--samples", 2, "--length", 16),
        ("--grid", "int8-channel", "--head", "--method", "minmax"),
    ):
        tiny.refused(
            tiny.halfbyte("quantize", source, "-o", tmp_path / "out", *words), "lacks the head", "tie_word_embeddings"
        )
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))  # as the message says
    assert (
        tiny.halfbyte("quantize", source, "-o", tmp_path / "out", "--method", "nearest", "--grid", "int4-g32").code == 0
    )


def test_nor_is_it_measured_or_given_a_cache(tmp_path):
    source = make(tmp_path / "model", "llama", False, "none")
    text = tiny.text(tmp_path / "text.txt", 60)
    few = ("--length", 16)
    for words in (
        ("eval", source, "--against", source, "--text", text, "--windows", 1, *few),
        ("kv", source, "-o", tmp_path / "cache", "--calibration", text, "--samples", 2, *few),
    ):
        tiny.refused(tiny.halfbyte(*words), "lacks the head", "tie_word_embeddings")


@pytest.mark.parametrize("said", [True, None])
def test_what_is_made_of_a_model_with_a_head_of_its_own_is_measured_against_it(said, tmp_path):
    """Whatever its config says: a model and its source are known to each other by config, too."""
    source = make(tmp_path / "model", "llama", said, "own")
    halfbyte.quantize(source, tmp_path / "out", **WORDS)
    text = tiny.text(tmp_path / "text.txt", 60)
    losses = halfbyte.evaluate([tmp_path / "out"], against=source, text=str(text), length=16, windows=1)
    assert 0 < losses["models"][0]["kl"] < 0.05


def test_models_without_a_head_need_none(tmp_path):
    """An embedding model, whose config says that a head would not be the embedding."""
    config = transformers.AutoConfig.for_model(
        "qwen3",
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=16,
        vocab_size=264,
    )
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path / "model")
    report = halfbyte.quantize(tmp_path / "model", tmp_path / "out", **WORDS)
    assert report["output"]["quantized"] == 14
