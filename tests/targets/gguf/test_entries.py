"""Every entry of a config.json is said in a GGUF, computed so by llama.cpp anyway, idle, or refused by name."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from llamacpp import logits
from variants import BY_LAYERS, CASES, YARN, as_f32, distance, transformers_logits

import halfbyte
from halfbyte.errors import Unsupported
from halfbyte.targets.gguf import file
from halfbyte.targets.gguf.entries import IDLE, SAID
from halfbyte.targets.gguf.families import FAMILIES, family_of
from halfbyte.targets.gguf.hyperparameters import BIASES, KEYS
from models.families import GEOMETRY, Family

TOKENS = torch.randint(0, 256, (60,), generator=torch.Generator().manual_seed(0)).tolist()
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("qwen3", {"attention_bias": True}, "attention_bias = False"),
    ("olmo2", {"attention_bias": True}, "attention_bias = False"),
    ("gemma3", {"attention_bias": True}, "attention_bias = False"),
    ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention = False or None"),
    ("gemma", {"hidden_act": "silu"}, "hidden_act = gelu_pytorch_tanh or gelu"),
    ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping = 50"),
    ("gemma2", {"final_logit_softcapping": None}, "final_logit_softcapping = 30"),
    ("smollm3", {"hidden_act": "gelu"}, "hidden_act = silu"),
    ("smollm3", {"mlp_bias": True}, "mlp_bias = False"),
    ("gpt_neox", {"hidden_act": "silu"}, "hidden_act = gelu"),
    ("gpt_oss", {"tie_word_embeddings": True}, "tie_word_embeddings = False"),
    ("gpt_oss", {"layer_types": ["full_attention"] * 2}, "some that attend to a window"),
    ("falcon", {"activation": "relu"}, "activation = relu, and what llama.cpp's 'falcon' makes of that is not known"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor = 0.5",
    ),
    ("llama", {"rope_parameters": {**YARN, "beta_slow": 2.0}}, "beta_slow = 1 alone, and config.json says 2.0"),
    (
        "gemma3",
        {"rope_parameters": {**BY_LAYERS, "sliding_attention": YARN}},
        "stretches no rotary embeddings of layers with a window",
    ),
    (
        "olmo3",
        {"rope_parameters": {**BY_LAYERS, "sliding_attention": {"rope_type": "default", "rope_theta": 2e4}}},
        "from one base",
    ),
]
NO_MODEL = (TypeError, ValueError, RuntimeError, AttributeError, StrictDataclassError)
"""Of values with which Transformers makes none."""
WINDOWS = ["mistral", "mixtral", "phi3", "starcoder2"]


@pytest.mark.parametrize(
    ("name", "changes", "why"), REFUSED, ids=[f"{name}-{next(iter(changes))}" for name, changes, _ in REFUSED]
)
def test_what_llama_cpp_computes_otherwise_is_refused(name, changes, why):
    kind, usual = CASES[name]
    config = transformers.AutoConfig.for_model(kind, **(GEOMETRY | usual)).to_dict()
    family_of(config)
    with pytest.raises(Unsupported, match=why):
        family_of(config | changes)


def test_what_is_written_is_answered_for():
    assert {name for key in KEYS.values() for name in key.names} | BIASES.keys() <= SAID
    assert not SAID & IDLE


@pytest.mark.parametrize("name", WINDOWS)
def test_a_window_that_llama_cpp_has_not_bounds_the_context(name, tmp_path):
    kind, usual = CASES[name]
    model = Family(kind, {}, {**usual, "sliding_window": 16}).save(tmp_path / "model")
    report = halfbyte.quantize(model, tmp_path / "out.gguf", grid="F32")
    assert any("every layer attends to the last 16 tokens" in warning for warning in report["warnings"])
    said = file.read(tmp_path / "out.gguf").metadata
    assert said[f"{said['general.architecture'].value}.context_length"].value == 16
    assert distance(logits(tmp_path / "out.gguf", TOKENS[:16]), transformers_logits(model, TOKENS[:16])) < 3e-3
    assert (
        distance(logits(tmp_path / "out.gguf", TOKENS), transformers_logits(model, TOKENS)) > 0.01
    )  # or there would be nothing to say
    wide = Family(kind, {}, {**usual, "sliding_window": 128}).save(tmp_path / "wide")
    assert halfbyte.quantize(wide, tmp_path / "wide.gguf", grid="F32")["warnings"] == []


def other(name: str, value: Any) -> list[Any]:
    """Other values that an entry might have."""
    if name in ("hidden_act", "hidden_activation", "activation_function", "activation"):
        return ["silu", "gelu", "relu"]
    if isinstance(value, bool):
        return [not value]
    if name == "layer_types":
        return [value[1:] + value[:1], ["full_attention"] * len(value)]
    if name == "no_rope_layers":
        return [[1] * len(value)]
    if isinstance(value, float):
        return [1.5 * value + 0.01, None]
    return {
        "num_ln_in_parallel_attn": [1],
        "use_bidirectional_attention": [True],
        "num_experts_per_tok": [1],
        "clip_qkv": [0.1],
    }.get(name, [])


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILIES)
def test_another_value_of_any_entry_is_refused_or_computed(kind, tmp_path):
    """llama.cpp says what Transformers says, whatever an entry says; it runs in a process of its own, since it may
    abort."""
    usual = next(changes for family, changes in CASES.values() if family == kind)
    before = transformers.AutoConfig.from_pretrained(Family(kind, {}, usual).save(tmp_path / "usual")).to_dict()
    tried = 0
    for name in sorted({*before} - {*GEOMETRY} - IDLE):
        for value in other(name, before[name]):
            model, path = tmp_path / f"{tried}", tmp_path / f"{tried}.gguf"
            tried += 1
            with suppress(Unsupported, *NO_MODEL):
                theirs = transformers_logits(Family(kind, {}, {**usual, name: value}).save(model), TOKENS)
                as_f32(model, path)
            if path.exists():
                assert said_by_llama_cpp(path, theirs) < 3e-3, f"{name} = {value}"


def said_by_llama_cpp(path: Path, theirs: torch.Tensor) -> float:
    end, start = os.pipe()
    child = os.fork()
    if not child:
        os.write(start, json.dumps(distance(logits(path, TOKENS), theirs)).encode())
        os._exit(0)
    os.close(start)
    with os.fdopen(end) as answer:
        found = answer.read()
    os.waitpid(child, 0)
    return float(found or "inf")
