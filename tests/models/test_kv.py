"""The KV cache: seen in every family, rounded as compressed-tensors rounds it, written as vLLM reads it."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file

import halfbyte
import tiny
from halfbyte.grids.activations import ActivationQuant
from halfbyte.grids.kv import KVGrid
from halfbyte.models import kv, mapping
from halfbyte.models.checkpoint import Checkpoint
from models.families import FAMILIES

GOLDENS = Path(__file__).parent.parent / "goldens" / "llm_compressor_kv"
TOKENS = torch.arange(48).view(2, 24) * 5


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("kv") / "source", dtype="float32")


@pytest.fixture(scope="module")
def small(source) -> dict:
    """A little calibration."""
    return {"samples": 4, "length": 128, "source": str(tiny.text(source.parent / "text.txt"))}


def add(source: Path, out: Path, grid: str, small: dict, **how) -> dict:
    """The command, with a little calibration."""
    return halfbyte.kv(source, out, grid, small, **how)


@pytest.fixture(scope="module")
def cached(source, small) -> dict[str, Path]:
    """The source with each kind of cache that is stored."""
    made = {}
    for grid in ("fp8-e4m3", "fp8-e4m3-head"):
        made[grid] = source.parent / grid
        add(source, made[grid], grid, small)
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

    with kv.cache_proxies(model, dict.fromkeys(kv.attentions(model).values(), note)):
        with_doors = logits(model, use_cache=False)
    assert torch.equal(with_doors, logits(model, use_cache=False))
    cache = model(input_ids=TOKENS, use_cache=True).get("past_key_values")
    stored = [
        layer
        for layer in getattr(cache, "layers", [])
        if isinstance(getattr(layer, "keys", None), torch.Tensor) and layer.keys.numel()
    ]
    places = {name: mapping.ParamView(name) for name in model.state_dict()}
    assert len(seen) == len(stored) == len(kv.names(model, places, model))
    for (k, v), layer in zip(seen, stored, strict=True):
        assert torch.equal(k, layer.keys)
        assert torch.equal(v, layer.values)


@pytest.mark.parametrize("grid", ["fp8-e4m3", "fp8-e4m3-head"])
def test_transformers_with_compressed_tensors_computes_the_same_logits(cached, grid):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(cached[grid], dtype=torch.float32)
    ours = halfbyte.load(cached[grid], torch.float32)
    assert torch.equal(logits(ours, use_cache=False), logits(theirs, use_cache=False))
    assert not torch.equal(
        logits(ours, use_cache=False),
        logits(halfbyte.load(cached[grid].parent / "source", torch.float32), use_cache=False),
    )


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
    assert all(
        scales[name].shape == golden[name].shape == shape and scales[name].dtype == golden[name].dtype
        for name in scales
    )
    assert Checkpoint(cached[grid]).kv.grid == KVGrid.parse(grid)


def test_the_rest_of_the_checkpoint_is_the_same_to_the_byte(source, cached):
    before, after = load_file(source / "model.safetensors"), load_file(cached["fp8-e4m3"] / "model.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert (source / "tokenizer.json").read_bytes() == (cached["fp8-e4m3"] / "tokenizer.json").read_bytes()
    config = json.loads((cached["fp8-e4m3"] / "config.json").read_text())
    assert {name: value for name, value in config.items() if name != "quantization_config"} == json.loads(
        (source / "config.json").read_text()
    )


def test_the_largest_key_of_the_calibration_text_is_the_largest_number_of_fp8(source, tmp_path):
    """Against the cache that Transformers keeps itself; with one window, the first layer reads the same in both."""
    text = tiny.text(tmp_path / "text.txt", words=40)
    found = halfbyte.kv(source, tmp_path / "out", calibration={"source": str(text), "samples": 1, "length": 128})
    tokens = torch.tensor(transformers.AutoTokenizer.from_pretrained(source)(text.read_text())["input_ids"])
    start = next(s for s in range(len(tokens)) if _sha256(tokens[s : s + 128]) == found["calibration"]["tokens_sha256"])
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        layer = model(input_ids=tokens[None, start : start + 128], use_cache=True).past_key_values.layers[0]
    scales = load_file(tmp_path / "out" / "model.safetensors")
    for part, cached in (("k", layer.keys), ("v", layer.values)):
        assert float(scales[f"model.layers.0.self_attn.{part}_scale"]) == pytest.approx(
            float(cached.abs().max()) / torch.finfo(torch.float8_e4m3fn).max, rel=2**-8
        )


def _sha256(tokens: torch.Tensor) -> str:
    return hashlib.sha256(tokens.to(torch.int32).numpy().tobytes()).hexdigest()


@pytest.mark.slow
def test_text_that_the_scales_do_not_span_is_warned_of(source, small, tmp_path):
    """Calibrated on one window; the held-out text goes far beyond most of its values."""
    found = add(source, tmp_path / "out", "fp8-e4m3", small | {"samples": 1, "length": 8}, observer="percentile")
    assert found["most_clipped"] > 1e-3
    assert "beyond its scale" in found["warnings"][0]
    assert add(source, tmp_path / "whole", "fp8-e4m3", small)["warnings"] == []


@pytest.mark.slow
def test_quantizing_and_caching_at_once_is_caching_what_was_quantized(source, small, tmp_path):
    halfbyte.quantize(
        source, tmp_path / "once", method="nearest", grid="int4-g32", kv="fp8-e4m3-head", calibration=small
    )
    halfbyte.quantize(source, tmp_path / "first", method="nearest", grid="int4-g32")
    add(tmp_path / "first", tmp_path / "second", "fp8-e4m3-head", small)
    once, twice = (load_file(tmp_path / name / "model.safetensors") for name in ("once", "second"))
    assert once.keys() == twice.keys()
    assert all(torch.equal(once[name], twice[name]) for name in once)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("once", "second")]
    assert configs[0] == configs[1]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "once", dtype=torch.float32)
    torch.testing.assert_close(
        logits(halfbyte.load(tmp_path / "once", torch.float32), use_cache=False),
        logits(theirs, use_cache=False),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.slow
def test_scales_move_with_the_weights_where_engines_read_them(source, small, tmp_path):
    halfbyte.quantize(source, tmp_path / "made", method="nearest", grid="int4-g32", kv="fp8-e4m3", calibration=small)
    halfbyte.convert(tmp_path / "made", tmp_path / "same", "compressed-tensors")
    scales = load_file(tmp_path / "made" / "model.safetensors"), load_file(tmp_path / "same" / "model.safetensors")
    assert all(
        torch.equal(scales[0][name], scales[1][name]) for name in scales[0] if name.endswith(("k_scale", "v_scale"))
    )
    assert (
        json.loads((tmp_path / "same" / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]["type"]
        == "float"
    )
    dropped = halfbyte.convert(tmp_path / "made", tmp_path / "gptq", "gptq")["dropped"]
    assert {name for name in dropped if name.endswith("k_scale")} == {
        f"model.layers.{i}.self_attn.k_scale" for i in range(2)
    }
    assert Checkpoint(tmp_path / "gptq").kv is None


@pytest.mark.slow
def test_fp8_weights_keep_their_config_which_vllm_reads_scales_under(source, small, tmp_path):
    halfbyte.quantize(source, tmp_path / "fp8", method="nearest", grid="fp8-e4m3-tensor", to="fp8")
    add(tmp_path / "fp8", tmp_path / "out", "fp8-e4m3", small)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("fp8", "out")]
    assert configs[0] == configs[1]
    assert Checkpoint(tmp_path / "out").kv.grid == KVGrid.parse("fp8-e4m3")
    tiny.refused(
        tiny.halfbyte("kv", tmp_path / "fp8", "-o", tmp_path / "no", "--kv", "fp8-e4m3-head"), "compressed-tensors"
    )


def test_names_of_older_tools_are_read(cached, tmp_path):
    """ModelOpt's k_proj.k_scale, and k_proj.output_scale of compressed-tensors before 0.8."""
    shutil.copytree(cached["fp8-e4m3"], tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for new in (r"self_attn.\1_proj.\1_scale", r"self_attn.\1_proj.output_scale"):
        renamed = {re.sub(r"self_attn\.([kv])_scale$", new, name): t for name, t in tensors.items()}
        save_file(renamed, tmp_path / "out" / "model.safetensors")
        read, known = Checkpoint(tmp_path / "out").kv, Checkpoint(cached["fp8-e4m3"]).kv
        assert read.keys == known.keys
        assert read.values == known.values


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("int8", "int8_per_token_head"),
        ("int4", "q4_0"),
        ("q8_0", "-ctk q8_0 -ctv q8_0"),
        ("int8-tensor", "token by token"),
        ("int8-static", "misread"),
        ("fp8-e4m3/fp8-e4m3-head", "one kind"),
        ("int8-static-asym", "write int8-static"),
        ("fp9", "fp8-e4m3"),
    ],
)
def test_caches_that_no_file_can_state_are_refused_with_what_works(source, tmp_path, kind, said):
    tiny.refused(tiny.halfbyte("kv", source, "-o", tmp_path / "out", "--kv", kind), said)
    assert not list(tmp_path.iterdir())


def test_a_model_without_keys_and_values_is_refused(small, tmp_path):
    FAMILIES["mamba"].save(tmp_path / "mamba")
    words = (
        "kv",
        tmp_path / "mamba",
        "-o",
        tmp_path / "out",
        "--length",
        64,
        "--samples",
        2,
        "--calibration",
        small["source"],
    )
    tiny.refused(tiny.halfbyte(*words), "no attention")


def test_latents_and_their_positions_share_one_scale_under_the_name_that_vllm_knows(small, tmp_path):
    source = FAMILIES["deepseek_v3"].save(tmp_path / "source")
    add(source, tmp_path / "out", "fp8-e4m3", small | {"length": 64})
    scales = {n: t for n, t in load_file(tmp_path / "out" / "model.safetensors").items() if n.endswith("_scale")}
    assert scales.keys() == {f"model.layers.{i}.self_attn.{part}_proj.{part}_scale" for i in range(2) for part in "kv"}
    assert all(
        torch.equal(scales[name], scales[name.replace("v_", "k_")]) for name in scales if name.endswith("v_scale")
    )
    assert halfbyte.evaluate([tmp_path / "out"], source, small["source"], length=64, windows=2)["models"][0]["kl"] > 0


@pytest.mark.slow
def test_every_kind_of_cache_can_be_measured_without_writing_it(source):
    rows = halfbyte.evaluate(
        [source], source, length=64, windows=2, kv=["none", "fp8-e4m3", "int8", "int4", "int2-g16", "int8/int4"]
    )["models"]
    losses = {row["kv"]: row["kl"] for row in rows}
    assert losses[None] == 0
    assert 0 < losses["int8-token"] < losses["int4-g32"] < losses["int2-g16"]
    assert losses["fp8-e4m3-static"] < losses["int4-g32"]
    assert losses["int8-token"] < losses["int8-token/int4-g32"] < losses["int4-g32"]


def test_integers_of_a_token_and_head_are_those_of_compressed_tensors():
    """A scale for each token and head, 8 bits: its dynamic token quantization of [tokens, head_dim]."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    k = torch.randn(2, 3, 7, 16, generator=torch.Generator().manual_seed(0))
    args = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)
    grid = KVGrid.parse("int8").key
    for head, ours in zip(k.flatten(0, 1), ActivationQuant(grid, {}).round(k).flatten(0, 1), strict=True):
        scale, zero = compute_dynamic_scales_and_zp(head, args, torch.nn.Module())
        torch.testing.assert_close(
            ours, fake_quantize(head, scale, zero, args), rtol=0, atol=float(scale.max()) * 1.01
        )  # theirs spans 127.5 steps


def test_names_of_caches_are_read_in_capitals_too():
    assert KVGrid.parse("FP8-E4M3") == KVGrid.parse("fp8-e4m3")
    assert KVGrid.parse("INT8/Q4_0") == KVGrid.parse("int8/q4_0")
