"""LoRA adapters, merged as peft merges them."""

import json
import shlex
import shutil

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests import tiny

import halfbyte
from halfbyte.errors import HalfbyteError
from halfbyte.models.adapter import merged
from halfbyte.models.checkpoint import Checkpoint

EVERY = ["q_proj", "v_proj", "down_proj"]
KINDS = {
    "plain": {"target_modules": EVERY},
    "rslora": {"target_modules": EVERY, "use_rslora": True, "lora_alpha": 3},
    "dora": {"target_modules": EVERY, "use_dora": True},
    "patterns": {
        "target_modules": EVERY,
        "rank_pattern": {"layers.1.mlp.down_proj": 2},
        "alpha_pattern": {"v_proj": 5},
    },
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "transposed": {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
}
GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "vocab_size": 264,
    "dtype": "float32",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2") / "model"
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)).save_pretrained(folder)
    return folder


def adapt(base, folder, kind="plain"):
    """An adapter of random values, as peft saves it, and the model with it merged in."""
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, task_type="CAUSAL_LM", **KINDS[kind]))
    for name, p in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            p.data += 0.1 * torch.randn_like(p)
    model.save_pretrained(folder)
    return model.merge_and_unload()


@pytest.mark.parametrize("kind", KINDS)
def test_merged_as_peft_does(base, gpt2, tmp_path, kind):
    source = gpt2 if kind == "transposed" else base
    theirs = adapt(source, tmp_path / "adapter", kind).state_dict()
    ours = merged(Checkpoint.open(source), tmp_path / "adapter")
    stored = Checkpoint.open(source)
    changed = 0
    for tensor in ours.tensors():
        mine, wanted = (
            ours.read(tensor).float(),
            theirs[tensor if tensor in theirs else f"transformer.{tensor}"].float(),
        )
        assert torch.allclose(mine, wanted, atol=1e-6), tensor  # not rounded to the dtype of the base
        changed += not torch.equal(mine, stored.read(tensor).float())
    assert changed == len(ours.adapter.low_rank.keys() | ours.adapter.whole.keys()) > 0


@pytest.mark.parametrize("method", ["nearest", "gptq"])
def test_quantizing_with_an_adapter_is_quantizing_what_peft_merged(base, tmp_path, method):
    adapt(base, tmp_path / "adapter")
    halfbyte.dequantize(base, tmp_path / "merged", adapter=tmp_path / "adapter", dtype="float32")
    config = tmp_path / "merged" / "config.json"  # whose dtype is that of scales
    config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "bfloat16"}))
    words = {
        "method": method,
        "grid": "int4-g32",
        "calibration": {"source": str(tiny.text(tmp_path / "text.txt")), "samples": 4, "length": 64},
    }
    report = halfbyte.quantize(base, tmp_path / "a", adapter=str(tmp_path / "adapter"), **words)
    halfbyte.quantize(tmp_path / "merged", tmp_path / "b", **words)
    a, b = (Checkpoint.open(tmp_path / name) for name in "ab")
    assert a.quantized.keys() == b.quantized.keys()
    assert all(torch.equal(a.read_quantized(m).decode(), b.read_quantized(m).decode()) for m in a.quantized)
    assert any("was merged into the model" in warning for warning in report["warnings"])


def test_a_merged_folder_is_what_transformers_and_peft_compute(base, tmp_path):
    theirs = adapt(base, tmp_path / "adapter")
    halfbyte.dequantize(base, tmp_path / "merged", adapter=tmp_path / "adapter", dtype="float32")
    ids = torch.arange(40)[None]
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert torch.allclose(ours(ids).logits, theirs(ids).logits, atol=1e-4)


def test_an_adapter_alone_is_recognised(base, tmp_path):
    adapt(base, tmp_path / "adapter")
    tiny.refused(
        tiny.halfbyte("quantize", tmp_path / "adapter", "-o", tmp_path / "out"),
        f"halfbyte quantize {base} --adapter {tmp_path / 'adapter'} -o OUT",
    )


def test_an_adapter_beside_a_model_is_left_out_loudly(base, tmp_path):
    both = tmp_path / "both"
    shutil.copytree(base, both)
    adapt(base, tmp_path / "adapter")
    for path in (tmp_path / "adapter").iterdir():
        if path.name.startswith("adapter_"):
            shutil.copy(path, both)
    report = halfbyte.quantize(both, tmp_path / "out", method="nearest", grid="int4-g32")
    assert any(f"--adapter {both} merges it" in warning for warning in report["warnings"])
    assert not list((tmp_path / "out").glob("adapter_*"))
    halfbyte.quantize(base, tmp_path / "alone", method="nearest", grid="int4-g32")
    assert tiny.weights(tmp_path / "out") == tiny.weights(tmp_path / "alone")


def break_config(folder, **changes):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, "of kind 'IA3'"),
        ({"use_qalora": True}, "use_qalora"),
        ({"lora_alpha": "x"}, "numbers above 0"),
        ({"r": 8}, "what it has for"),
    ],
)
def test_what_is_not_merged_is_refused_by_name(base, tmp_path, changes, words):
    adapt(base, tmp_path / "adapter")
    break_config(tmp_path / "adapter", **changes)
    with pytest.raises(HalfbyteError, match=words):
        halfbyte.quantize(base, tmp_path / "out", method="nearest", grid="int4-g32", adapter=str(tmp_path / "adapter"))
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_model_is_refused(base, tmp_path):
    adapt(base, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name.replace("q_proj", "query"): t for name, t in load_file(path).items()}, path)
    with pytest.raises(HalfbyteError, match=r"adapts 'model.layers.0.self_attn.query'.* which .* has no matrix of"):
        halfbyte.quantize(base, tmp_path / "out", method="nearest", grid="int4-g32", adapter=str(tmp_path / "adapter"))


@pytest.mark.slow
def test_the_loss_is_measured_against_the_model_with_its_adapter(base, tmp_path):
    """The line that quantize prints works as it stands."""
    adapt(base, tmp_path / "adapter")
    text = tiny.text(tmp_path / "text.txt")
    made = tiny.halfbyte(
        "quantize",
        base,
        "-o",
        tmp_path / "q",
        "--adapter",
        tmp_path / "adapter",
        "--method",
        "nearest",
        "--grid",
        "int8-channel",
    )
    line = next(line for line in made.out.splitlines() if line.startswith("what was lost: halfbyte ")).removeprefix(
        "what was lost: halfbyte "
    )
    assert "--against model --adapter adapter" in (tmp_path / "q" / "README.md").read_text()
    short = "--text", text, "--length", "32", "--windows", "4"
    assert tiny.halfbyte(*shlex.split(line), *short).code == 0
    shown = json.loads((tmp_path / "q" / "report.json").read_text())["evaluation"]
    assert shown["reference_adapter"] == str(tmp_path / "adapter")
    halfbyte.dequantize(base, tmp_path / "merged", adapter=tmp_path / "adapter", dtype="float32")
    merged_first = halfbyte.evaluate([tmp_path / "q"], tmp_path / "merged", str(text), 32, 4, foreign=True)["models"][0]
    assert shown["model"]["kl"] == pytest.approx(merged_first["kl"], rel=1e-4)
    tiny.refused(tiny.halfbyte("eval", tmp_path / "q", "--against", base, *short), "with the adapter", f"not of {base}")
