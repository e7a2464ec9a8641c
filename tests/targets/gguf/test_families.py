"""A checkpoint becomes a GGUF's tensors and comes back."""

import pytest
import torch
from safetensors.torch import load_file
from variants import CASES, as_f32, distance, transformers_logits

import halfbyte
from halfbyte.errors import Unsupported
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.targets.gguf.families import FAMILIES, Family, TensorNameMap, family_named, family_of
from models.families import Family as Variant

SMALL = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 264}


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_comes_back_from_its_gguf(name, tmp_path):
    kind, changes = CASES[name]
    before = Variant(kind, {}, changes).save(tmp_path / "before")
    path = as_f32(before, tmp_path / "model.gguf")
    was, after = load_file(before / "model.safetensors"), Checkpoint.open(path)
    both = was.keys() & after.tensors().keys()
    assert len(both) > len(was) / 2
    assert all(torch.allclose(was[n].float(), after.read(n), atol=1e-6) for n in both)  # norms + 1 - 1
    tokens = torch.randint(0, 256, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        logits = halfbyte.load(path, torch.float32)(torch.tensor([tokens])).logits[0]
    assert distance(logits, transformers_logits(before, tokens)) < 1e-5


def test_gguf_has_a_name_for_every_tensor_of_every_family():
    for family in FAMILIES.values():
        assert len(family.block_names) == len(family.block)
        assert "output" in family.outside_names.values()
    olmo = FAMILIES["olmo2"].block_names
    assert olmo["post_attention_layernorm"] == "post_attention_norm"
    assert FAMILIES["llama"].block_names["post_attention_layernorm"] == "ffn_norm"
    with pytest.raises(Unsupported, match=r"gguf .* does not know 'newest'; pip install -U gguf"):
        _ = Family("newest").block_names
    with pytest.raises(Unsupported, match=r"gguf .* has no name for 'model.layers.0.extra' of 'llama'"):
        _ = Family("llama", {"extra": "extra"}).block_names


def test_what_llama_cpp_would_compute_otherwise_is_refused():
    for changes, why in [
        ({"model_type": "blenderbot"}, "not written for 'blenderbot'.*llama, mistral"),
        ({"hidden_act": "gelu"}, "hidden_act = silu, but config.json says gelu"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "scaling of type 'dynamic'"),
    ]:
        with pytest.raises(Unsupported, match=why):
            family_of(SMALL | changes)
    with pytest.raises(Unsupported, match="'mamba' is not read yet"):
        family_named("mamba")


def test_every_tensor_is_placed_or_dropped_with_a_reason():
    shapes = {
        "model.embed_tokens.weight": (264, 64),
        "lm_head.weight": (264, 64),
        "model.layers.0.self_attn.rotary_emb.inv_freq": (8,),
        "model.layers.2.self_attn.q_proj.weight": (64, 64),
        "model.layers.0.self_attn.gadget.weight": (64, 64),
        "model.vision_tower.layers.0.self_attn.q_proj.weight": (64, 64),
    }
    config = SMALL | {"tie_word_embeddings": True}
    names = TensorNameMap(family_of(config), config, shapes)
    assert names.dropped("lm_head.weight") == "the head is the embedding"
    assert names.dropped("model.layers.0.self_attn.rotary_emb.inv_freq") == "computed from the config"
    assert names.dropped("model.layers.2.self_attn.q_proj.weight") == "beyond the model's last block"
    assert names.dropped("model.vision_tower.layers.0.self_attn.q_proj.weight") == "not of the text decoder"
    assert [p.name for p in names.mapped("model.embed_tokens.weight")] == ["token_embd.weight"]
    with pytest.raises(Unsupported, match=r"no place for tensor 'model\.layers\.0\.self_attn\.gadget\.weight'"):
        names.mapped("model.layers.0.self_attn.gadget.weight")


@pytest.mark.parametrize("prefix", ["model.", "language_model.model.", "model.language_model."])
def test_the_decoder_of_a_model_that_sees_is_found(prefix):
    name = f"{prefix}layers.0.self_attn.v_proj.weight"
    config = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "num_hidden_layers": 2}}
    names = TensorNameMap(family_of(config), config, {name: (64, 64)})
    assert [p.name for p in names.mapped(name)] == ["blk.0.attn_v.weight"]


def test_experts_fused_or_apart_go_to_the_same_stacks():
    config = {"model_type": "qwen3_moe", "num_hidden_layers": 1, "norm_topk_prob": True, "hidden_size": 64}
    fused, apart = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.3.up_proj.weight"
    names = TensorNameMap(family_of(config), config, {fused: (8, 96, 64), apart: (48, 64)})
    gate, up = names.mapped(fused)
    (one,) = names.mapped(apart)
    assert (gate.name, up.name) == ("blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight")
    assert gate.rows is not None
    assert up.rows is not None
    assert (gate.rows.tolist(), up.rows.tolist()) == (list(range(48)), list(range(48, 96)))
    assert (one.name, one.expert, one.rows) == (up.name, 3, None)
