"""What is taken for a linear is one in Transformers' model, and every linear of a block is taken."""

import json
import re
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import halfbyte
from halfbyte.errors import BadCheckpoint
from halfbyte.models import roles
from halfbyte.models.checkpoint import Checkpoint
from models.families import FAMILIES

WORDS = {"method": "nearest", "grid": "int4-g16", "to": "compressed-tensors"}
STACKS = {
    f"{stack}_{n}": v
    for stack in ("encoder", "decoder")
    for n, v in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 128))
}
SEQ2SEQ = {
    "d_model": 64,
    "vocab_size": 264,
    "decoder_start_token_id": 257,
    "pad_token_id": 257,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
ODD = {
    "recurrent_gemma": (
        "RecurrentGemmaForCausalLM",
        {"num_hidden_layers": 3, "lru_width": 64, "head_dim": 16, "num_key_value_heads": 1},
    ),  # 3-D gates
    "dbrx": (  # experts stacked in two dimensions
        "DbrxForCausalLM",
        {"d_model": 64, "n_heads": 4, "n_layers": 2, "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4}}
        | {"ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64}},
    ),
    "doge": (
        "DogeForCausalLM",
        {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 2},
    ),  # a router called router_gate
    "zamba": (  # Mamba's projections in three dimensions
        "ZambaForCausalLM",
        {
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "layers_block_type": ["mamba", "hybrid"] * 2,
            "mamba_dt_rank": 16,
        }
        | {
            "attention_hidden_size": 128,
            "attention_head_dim": 32,
            "n_mamba_heads": 2,
            "num_key_value_heads": 4,
            "mamba_d_state": 16,
        },
    ),
    "t5": ("T5ForConditionalGeneration", SEQ2SEQ | {"d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4}),
    "bart": ("BartForConditionalGeneration", SEQ2SEQ | STACKS),
    "whisper": (
        "WhisperForConditionalGeneration",
        SEQ2SEQ
        | STACKS
        | {
            "max_source_positions": 64,
            "max_target_positions": 64,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
    ),
}
CHOOSES = re.compile(r"\.(gate|wg|[^.]*router[^.]*|shared_expert_gate)\.")
"""What chooses experts is a linear too, and stays."""
SMALL = re.compile(r"\.(dt_proj|x_proj|relative_attention_bias)\.")


def linears(model: nn.Module) -> set[str]:
    """Weights of linears in numbered blocks, and stacks of experts."""
    found = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and re.search(r"\.\d+\..", name):
            found.add(f"{name}.weight")
        if type(module).__name__.endswith("Experts"):
            found |= {f"{name}.{n}" for n, p in module.named_parameters(recurse=False) if p.dim() == 3}
    return {
        n
        for n in found
        if not CHOOSES.search(f".{n}") and not SMALL.search(n) and min(model.get_parameter(n).shape[-2:]) >= 16
    }


def taken(path) -> set[str]:
    return {w.tensor for w in Checkpoint.open(path).weights() if w.block}


def odd(kind: str, path):
    name, words = ODD[kind]
    geometry = (
        {}
        if "d_model" in words
        else {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 264,
        }
    )
    config = transformers.AutoConfig.for_model(kind, **(geometry | words))
    torch.manual_seed(0)
    model = getattr(transformers, name)(config)
    model.save_pretrained(path)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_linears_of_a_decoder_are_quantized(tmp_path, family):
    path = replace(FAMILIES[family], as_published=False).save(tmp_path / "model")  # under the names of the modules
    assert taken(path) == linears(FAMILIES[family].build())


@pytest.mark.parametrize("kind", ODD)
def test_what_only_looks_like_a_linear_is_kept(tmp_path, kind):
    model = odd(kind, tmp_path / "model")
    assert taken(tmp_path / "model") == linears(model) & set(
        Checkpoint.open(tmp_path / "model").entries
    )  # Zamba's blocks share some


def test_both_stacks_of_an_encoder_decoder_are_quantized(tmp_path):
    model = odd("t5", tmp_path / "model")
    report = halfbyte.quantize(tmp_path / "model", tmp_path / "out", **WORDS)
    assert {f"{row['name']}.weight" for row in report["weights"]} == linears(model)
    assert report["output"]["quantized"] == 2 * 6 + 2 * 10  # encoder and decoder, whose blocks have cross-attention
    again = transformers.T5ForConditionalGeneration.from_pretrained(
        tmp_path / "out", quantization_config=transformers.CompressedTensorsConfig(dequantize=True)
    )
    decoded = Checkpoint.open(tmp_path / "out")
    for name in ("encoder.block.1.layer.0.SelfAttention.q.weight", "decoder.block.0.layer.1.EncDecAttention.v.weight"):
        assert torch.equal(again.get_parameter(name).float(), decoded.read(name).float())


def test_how_a_matrix_lies_is_asked_too(tmp_path, monkeypatch):
    path = FAMILIES["gpt2"].save(tmp_path / "model")
    monkeypatch.setattr(roles, "TRANSPOSED", {})
    assert [w.transposed for w in Checkpoint.open(path).weights() if w.block] == [True] * 8
    config = json.loads((path / "config.json").read_text())  # the same names, of linears
    (path / "config.json").write_text(
        json.dumps(
            config | {"model_type": "gpt_bigcode", "architectures": ["GPTBigCodeForCausalLM"], "multi_query": False}
        )
    )
    with pytest.raises(BadCheckpoint, match=r"c_attn.*is \[64, 192\].*GPTBigCodeForCausalLM has it as \[192, 64\]"):
        halfbyte.quantize(path, tmp_path / "out", **WORDS)


def test_most_of_the_weights_stay_and_it_is_said(tmp_path):
    odd("dbrx", tmp_path / "model")
    report = halfbyte.quantize(tmp_path / "model", tmp_path / "out", **WORDS, engine="none")
    assert any("DbrxExpertGLU" in warning for warning in report["warnings"])
    assert report["kept"]["transformer.blocks.0.ffn.experts.mlp.w2"] == "DbrxExpertGLU, which reads it, is no linear"
    loaded, source = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / n) for n in ("out", "model"))
    name = "transformer.blocks.1.ffn.experts.mlp.w2"
    assert torch.equal(loaded.get_parameter(name).float(), source.get_parameter(name))


def test_an_architecture_that_nobody_knows_goes_by_names(tmp_path):
    config = {
        "model_type": "unheard-of",
        "architectures": ["UnheardOfForCausalLM"],
        "num_hidden_layers": 1,
        "hidden_size": 64,
    }
    tensors = {
        "model.layers.0.mixer.in_proj.weight": torch.randn(64, 64),
        "model.layers.0.mixer.norm.weight": torch.randn(64),
    }
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model/model.safetensors", {"format": "pt"})
    report = halfbyte.quantize(tmp_path / "model", tmp_path / "out", **WORDS, engine="none")
    assert [row["name"] for row in report["weights"]] == ["model.layers.0.mixer.in_proj"]
    assert any("names and shapes" in warning for warning in report["warnings"])


def test_well_known_names_need_no_model(tmp_path, monkeypatch):
    """Importing Transformers and building a model take seconds."""
    from halfbyte.models import modules

    monkeypatch.setattr(modules, "ask", lambda *_: pytest.fail("asked"))
    for name in ("llama", "qwen3", "gemma3", "phi3", "mixtral", "qwen3_moe", "glm4_moe", "deepseek_v3"):
        assert taken(FAMILIES[name].save(tmp_path / name))
