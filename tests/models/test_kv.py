"""The KV cache: seen in every family, rounded as compressed-tensors rounds it, written as vLLM reads it."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from compressed_tensors.quantization import QuantizationConfig
from families import FAMILIES
from safetensors.torch import load_file

import halfbyte
import tiny
from halfbyte.containers.kv import KVGrid
from halfbyte.models import kv
from halfbyte.models.checkpoint import Checkpoint

GOLDENS = Path(__file__).parent.parent / "goldens" / "llm_compressor_kv"
TOKENS = torch.arange(48).view(2, 24) * 5
SMALL = {"samples": 4, "length": 128}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("kv") / "source")


@pytest.fixture(scope="module")
def cached(source) -> dict[str, Path]:
    """The source with each kind of cache that is stored."""
    made = {}
    for grid in ("fp8-e4m3", "fp8-e4m3-head"):
        made[grid] = source.parent / grid
        halfbyte.kv(source, made[grid], grid, **SMALL)
    return made


def logits(model: torch.nn.Module, **how) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, **how).logits


@pytest.mark.parametrize("name", FAMILIES)
def test_keys_and_values_of_every_family_are_seen_and_nothing_else_changes(name):
    model = FAMILIES[name].build()
    seen = []

    def note(k, v):
        seen.append((k, v))
        return k, v

    with kv.doors(model, dict.fromkeys(kv.attentions(model).values(), note)):
        with_doors = logits(model, use_cache=False)
    assert torch.equal(with_doors, logits(model, use_cache=False))
    cache = model(input_ids=TOKENS, use_cache=True).get("past_key_values")
    stored = [layer for layer in getattr(cache, "layers", []) if isinstance(getattr(layer, "keys", None), torch.Tensor) and layer.keys.numel()]
    assert len(seen) == len(stored)
    for (k, v), layer in zip(seen, stored, strict=True):
        assert torch.equal(k, layer.keys)
        assert torch.equal(v, layer.values)


@pytest.mark.parametrize("grid", ["fp8-e4m3", "fp8-e4m3-head"])
def test_transformers_with_compressed_tensors_computes_the_same_logits(cached, grid):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(cached[grid], dtype=torch.float32)
    ours = halfbyte.load(cached[grid], torch.float32)
    assert torch.equal(logits(ours, use_cache=False), logits(theirs, use_cache=False))
    assert not torch.equal(logits(ours, use_cache=False), logits(halfbyte.load(cached[grid].parent / "source", torch.float32), use_cache=False))


def test_tokens_one_by_one_read_the_same_cache_as_tokens_at_once(cached):
    model = halfbyte.load(cached["fp8-e4m3"], torch.float32)
    cache, one_by_one = None, []
    for token in TOKENS.unbind(1):
        out = model(input_ids=token[:, None], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        one_by_one.append(out.logits)
    torch.testing.assert_close(torch.cat(one_by_one, 1), logits(model, use_cache=False), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("grid", "shape"), [("fp8-e4m3", (1,)), ("fp8-e4m3-head", (2, 1, 1))])
def test_scales_have_the_names_shapes_and_config_of_llm_compressor(cached, grid, shape):
    theirs = json.loads((GOLDENS / f"{grid}.json").read_text())["quantization_config"]
    config = json.loads((cached[grid] / "config.json").read_text())["quantization_config"]
    ours, known = QuantizationConfig.model_validate(config), QuantizationConfig.model_validate(theirs)
    said = ("num_bits", "type", "strategy", "symmetric", "dynamic")
    assert all(getattr(ours.kv_cache_scheme, word) == getattr(known.kv_cache_scheme, word) for word in said)
    assert (ours.config_groups, ours.format, ours.ignore) == (known.config_groups, known.format, known.ignore)
    golden = load_file(GOLDENS / f"{grid}.safetensors")
    scales = {name: t for name, t in load_file(cached[grid] / "model.safetensors").items() if name.endswith("_scale")}
    assert scales.keys() == {name for name in golden if int(name.split(".")[2]) < 2}  # theirs has six layers
    assert all(scales[name].shape == golden[name].shape == shape and scales[name].dtype == golden[name].dtype for name in scales)
    assert Checkpoint(cached[grid]).kv.grid == KVGrid.parse(grid)


def test_the_rest_of_the_checkpoint_is_the_same_to_the_byte(source, cached):
    before, after = load_file(source / "model.safetensors"), load_file(cached["fp8-e4m3"] / "model.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert (source / "tokenizer.json").read_bytes() == (cached["fp8-e4m3"] / "tokenizer.json").read_bytes()
    config = json.loads((cached["fp8-e4m3"] / "config.json").read_text())
    assert {name: value for name, value in config.items() if name != "quantization_config"} == json.loads((source / "config.json").read_text())
