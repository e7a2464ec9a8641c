"""Checkpoints as they come: in shards, with a tied head or one of their own, under old names, beside an image
encoder."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import halfbyte
import tiny
from halfbyte import cli
from halfbyte.errors import BadCheckpoint, BadRequest, Unsupported
from halfbyte.models import roles, skeleton
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.folder import INDEX
from halfbyte.models.walk import Walk
from halfbyte.nn import load
from halfbyte.packed import QuantLinear
from halfbyte.registry import SOURCES
from halfbyte.targets.gguf.source import GGUFCheckpoint
from models.families import FAMILIES, GEOMETRY, Family

TOKENS = torch.randint(0, 250, (2, 32), generator=torch.Generator().manual_seed(1))
LLAMA = FAMILIES["llama"]
TIED = Family("llama", LLAMA.folds, {"tie_word_embeddings": True})
WORDS = {"method": "nearest", "grid": "int4-g32", "to": "compressed-tensors"}


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


def by_transformers(path):
    return logits_of(transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto"))


def walked(path):
    checkpoint = Checkpoint.open(path)
    walk = Walk(checkpoint, TOKENS, checkpoint.dtype)
    for _ in walk:
        pass
    return torch.cat([logits for _, logits in walk.logits()])


def change_config(path, **changes):
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def rename(path, change):
    """Write the tensors again under the names that `change` gives them, without those to which it gives None."""
    tensors = {change(name): t for name, t in load_file(path / "model.safetensors").items()}
    tensors.pop(None, None)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def test_shards_give_what_one_file_gives(tmp_path):
    whole, shards = LLAMA.save(tmp_path / "whole"), LLAMA.save(tmp_path / "shards", max_shard_size="60KB")
    assert len(list(shards.glob("*.safetensors"))) > 5
    assert (shards / INDEX).exists()
    assert torch.equal(walked(shards), walked(whole))
    for source in (whole, shards):
        halfbyte.quantize(source, tmp_path / f"{source.name}-out", **WORDS, shard_gb=5.0 if source is whole else 5e-5)
    assert len(list((tmp_path / "shards-out").glob("*.safetensors"))) > 2
    assert torch.equal(logits_of(load(tmp_path / "shards-out")), logits_of(load(tmp_path / "whole-out")))
    assert torch.equal(by_transformers(tmp_path / "shards-out"), logits_of(load(tmp_path / "whole-out")))


def test_a_tied_head_stays_with_its_embedding(tmp_path):
    source = TIED.save(tmp_path / "model")
    report = halfbyte.quantize(source, tmp_path / "out", **WORDS)
    assert "model.embed_tokens.weight" in report["kept"]
    assert "lm_head" in json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert torch.equal(by_transformers(tmp_path / "out"), logits_of(load(tmp_path / "out")))
    with pytest.raises(Unsupported, match="shares its tensor"):
        halfbyte.quantize(source, tmp_path / "head", **WORDS, head=True)


def test_a_tied_head_that_is_stored_all_the_same_is_kept(tmp_path):
    source = TIED.save(tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
        source / "model.safetensors",
        {"format": "pt"},
    )
    assert torch.equal(walked(source), by_transformers(source))
    report = halfbyte.quantize(source, tmp_path / "out", **WORDS)
    assert "lm_head.weight" in report["kept"]
    assert torch.equal(by_transformers(tmp_path / "out"), logits_of(load(tmp_path / "out")))
    with pytest.raises(Unsupported, match="shares its tensor"):
        halfbyte.quantize(source, tmp_path / "head", **WORDS, head=True)


def test_a_head_of_its_own_is_quantized_if_asked(tmp_path):
    source = LLAMA.save(tmp_path / "model")
    report = halfbyte.quantize(source, tmp_path / "out", **WORDS, head=True)
    assert "lm_head" in {row["name"] for row in report["weights"]}
    assert "lm_head.weight" not in report["kept"]
    model = load(tmp_path / "out")
    assert isinstance(model.lm_head, QuantLinear)
    assert "lm_head" not in json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert torch.equal(by_transformers(tmp_path / "out"), logits_of(model))


def test_what_is_skipped_and_what_is_overridden(tmp_path):
    source = LLAMA.save(tmp_path / "model")
    report = halfbyte.quantize(
        source,
        tmp_path / "out",
        **WORDS,
        skip=("layers.0.mlp.*",),
        override={"v_proj": "int8-g32", "layers.1.*.down_proj": "keep"},
    )
    grids = {row["name"]: row["grid"] for row in report["weights"]}
    assert not any(".0.mlp." in name for name in grids)
    assert {name for name, grid in grids.items() if grid.startswith("int8")} == {
        f"model.layers.{i}.self_attn.v_proj" for i in range(2)
    }
    assert "model.layers.1.mlp.down_proj.weight" in report["kept"]
    assert {"model.layers.1.mlp.up_proj", "model.layers.1.self_attn.o_proj"} <= set(grids)
    assert {w.tensor for w in Checkpoint.open(source).weights() if w.name in grids} | set(report["kept"]) == set(
        Checkpoint.open(source).entries
    )
    assert torch.equal(by_transformers(tmp_path / "out"), logits_of(load(tmp_path / "out")))
    with pytest.raises(BadRequest, match=r"matches no weight.*model\.layers\.0"):
        halfbyte.quantize(source, tmp_path / "none", **WORDS, skip=("w_proj",))


def test_gpt2_as_it_lies_on_the_hub(tmp_path):
    """No prefix, masks among the tensors, and no word on the head."""
    source = FAMILIES["gpt2"].save(tmp_path / "model")
    expected = by_transformers(source)
    rename(source, lambda name: name.removeprefix("transformer."))
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 128, 128).tril() for i in range(2)}
    save_file(load_file(source / "model.safetensors") | masks, source / "model.safetensors", {"format": "pt"})
    change_config(source, tie_word_embeddings=None)
    assert torch.equal(walked(source), expected)
    text = str(tiny.text(tmp_path / "text.txt"))
    report = halfbyte.quantize(
        source,
        tmp_path / "out",
        **WORDS | {"method": "awq+gptq"},
        calibration={"source": text, "samples": 4, "length": 32},
    )
    assert set(masks) <= set(report["kept"])
    assert report["folds"]
    model = load(tmp_path / "out")
    assert model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr()
    assert logits_of(model).isfinite().all()


def test_what_config_says_is_more_than_what_is_there(tmp_path):
    source = LLAMA.save(tmp_path / "model")
    rename(source, lambda name: None if name == "model.layers.1.mlp.up_proj.weight" else name)
    with pytest.raises(BadCheckpoint, match=r"lacks 1 tensor.*up_proj"):
        load(source)
    with pytest.raises(BadCheckpoint, match=r"lacks 1 tensor.*up_proj"):
        walked(source)


VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
IMAGES = {
    "gemma3": {
        "text_config": GEOMETRY | {"head_dim": 16, "query_pre_attn_scalar": 16},
        "vision_config": VISION,
        "mm_tokens_per_image": 1,
        **{"image_token_index": 251, "boi_token_index": 252, "eoi_token_index": 253},
    },
    "mistral3": {
        "text_config": GEOMETRY | {"model_type": "mistral"},
        "vision_config": VISION | {"model_type": "pixtral"},
        "image_token_index": 251,
    },
    "qwen3_5": {
        "text_config": GEOMETRY | LINEAR | {"head_dim": 16, "layer_types": ["linear_attention", "full_attention"]},
        "vision_config": {
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 14,
        },
        **{"image_token_id": 251, "video_token_id": 252, "vision_start_token_id": 253, "vision_end_token_id": 254},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", IMAGES)
def test_the_text_decoder_beside_an_image_encoder(tmp_path, kind):
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(
        transformers.AutoConfig.for_model(kind, **IMAGES[kind]), dtype=torch.float32
    ).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2) if p.dim() == 1 else p.normal_(0, p.shape[-1] ** -0.5)
    source, out = tmp_path / "model", tmp_path / "out"
    model.save_pretrained(source)
    torch.testing.assert_close(walked(source), logits_of(model))
    report = halfbyte.quantize(source, out, **WORDS)
    assert {w.name for w in Checkpoint.open(source).weights() if w.block} == {row["name"] for row in report["weights"]}
    assert not any("vision" in row["name"] or "visual" in row["name"] for row in report["weights"])
    again = transformers.AutoModelForImageTextToText.from_pretrained(out, dtype="auto")
    torch.testing.assert_close(logits_of(again), logits_of(load(out)))
    for name, p in again.named_parameters():
        if "vision" in name or "visual" in name:
            assert torch.equal(p, model.get_parameter(name)), name


def test_a_checkpoint_is_a_value_that_others_are_made_of(tmp_path):
    checkpoint = Checkpoint.open(LLAMA.save(tmp_path / "model"))
    config = {**checkpoint.config, "model_type": "other"}
    other = checkpoint.replaced(config=config)
    assert (other.model_type, checkpoint.model_type) == ("other", "llama")
    assert other.entries is checkpoint.entries
    for name in ("config", "kv", "adapter", "pieces", "new"):
        with pytest.raises(
            AttributeError, match=rf"does not change; checkpoint\.replaced\({name}=\.\.\.\) makes another"
        ):
            setattr(checkpoint, name, None)


def test_planning_lists_the_tensors_once_for_each_checkpoint(tmp_path, monkeypatch):
    """Once for each matrix took minutes, of a mixture with its tens of thousands."""
    halfbyte.quantize(LLAMA.save(tmp_path / "m"), tmp_path / "int8", method="nearest", grid="int8-channel")
    listed, count = Checkpoint._shapes.func, 0

    def counted(checkpoint):
        nonlocal count
        count += 1
        return listed(checkpoint)

    monkeypatch.setattr(Checkpoint._shapes, "func", counted)
    plan = halfbyte.quantize(
        tmp_path / "int8", tmp_path / "out", dry_run=True, method="nearest", grid="int4-g32", requantize=True
    )
    assert len(plan.weights) == 14
    assert count <= 3  # as it is, with its experts apart, and with them together


def test_any_kind_of_checkpoint_is_opened_by_the_class(tmp_path, monkeypatch):
    tiny.make(tmp_path / "model")
    halfbyte.quantize(tmp_path / "model", tmp_path / "out.gguf", grid="Q8_0", method="nearest")
    assert type(Checkpoint.open(tmp_path / "model")) is Checkpoint
    assert type(Checkpoint.open(tmp_path / "out.gguf")) is GGUFCheckpoint
    monkeypatch.setitem(SOURCES, ".other", "halfbyte.targets.gguf.source:GGUFCheckpoint")
    (tmp_path / "out.gguf").rename(tmp_path / "out.other")
    assert type(Checkpoint.open(tmp_path / "out.other")) is GGUFCheckpoint
    (tmp_path / "out.txt").touch()
    with pytest.raises(BadCheckpoint, match=r"out\.txt is a file and no \.gguf or \.other"):
        Checkpoint.open(tmp_path / "out.txt")


def test_scripts_see_where_tensors_lie_and_what_commands_print(tmp_path):
    """By names that others use, which are not to change."""
    checkpoint = Checkpoint.open(tiny.make(tmp_path / "model"))
    model = skeleton.build(checkpoint, torch.float32)
    places = skeleton.places(model, checkpoint.tensors())
    assert places.keys() == checkpoint.tensors().keys()
    assert {place.parameter for place in places.values()} <= dict(model.named_parameters()).keys()
    walk = Walk(checkpoint, torch.arange(16).view(1, 16), torch.float32)
    walk.start()
    for block in walk.blocks:
        block.load(walk.source)
        walk.advance(block)
        block.free()
    assert next(walk.logits())[1].shape == (1, 16, checkpoint.config["vocab_size"])
    assert roles.SMALLEST
    assert roles.HEAD.pattern
    assert cli.out.file is not cli.err.file
