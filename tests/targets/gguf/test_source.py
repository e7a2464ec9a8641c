"""A GGUF as a source: the checkpoint that it was made of, under its names on the hub, whoever wrote the file."""

import ctypes
import json
import shutil
from pathlib import Path

import gguf
import pytest
import torch
import transformers

import halfbyte
import tiny
from halfbyte import demo
from halfbyte.errors import Unsupported
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.report import inspect
from halfbyte.targets.gguf import file as gguf_file
from halfbyte.targets.gguf.blocks import LAYOUTS
from halfbyte.targets.gguf.head import Value
from models.families import FAMILIES, Family

CALIBRATION = {"samples": 2, "length": 128}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16, "norm_topk_prob": True}
KINDS = {
    "llama": FAMILIES["llama"],
    "qwen3": FAMILIES["qwen3"],
    "gemma3": FAMILIES["gemma3"],
    "gpt2": FAMILIES["gpt2"],
    "phi3": FAMILIES["phi3"],
    "qwen3_moe": Family("qwen3_moe", {}, MOE),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """GGUFs of the demo model: in 16 bits, the same in parts, and quantized."""
    home = tmp_path_factory.mktemp("ggufs")
    halfbyte.quantize(demo.MODEL, home / "bf16.gguf", grid="BF16")
    halfbyte.quantize(demo.MODEL, home / "parts", grid="BF16", to="gguf", shard_gb=0.003)
    halfbyte.quantize(demo.MODEL, home / "q4.gguf", method="nearest", grid="Q4_K_M")
    return home


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return {name: stored.entry.read() for name, stored in gguf_file.read(path).tensors.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


# Reading ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_tensors_come_back_under_their_names_and_transformers_computes_the_same(name, tmp_path):
    folder = KINDS[name].save(tmp_path / "model")
    halfbyte.quantize(folder, tmp_path / "model.gguf", grid="F32")
    original, read = Checkpoint.open(folder), Checkpoint.open(tmp_path / "model.gguf")
    names = {n for n in original.tensors() if not (read.tied and n == "lm_head.weight")}
    assert read.tensors().keys() == names
    for n in names:
        assert torch.allclose(read.read(n).float(), original.read(n).float(), atol=1e-6, rtol=0), (
            n
        )  # norms of 1 + w are a sum in 32 bits
    some = torch.arange(40)[None]
    with torch.no_grad():
        wanted = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(some).logits
        assert torch.allclose(halfbyte.load(tmp_path / "model.gguf", torch.float32)(some).logits, wanted, atol=1e-4)


def test_a_quantized_matrix_is_what_the_gguf_package_reads(home):
    checkpoint = Checkpoint.open(home / "q4.gguf")
    read = {
        t.name: torch.tensor(gguf.dequantize(t.data, t.tensor_type)) for t in gguf.GGUFReader(home / "q4.gguf").tensors
    }
    assert torch.equal(checkpoint.read("model.embed_tokens.weight"), read["token_embd.weight"])
    assert torch.equal(checkpoint.read("model.layers.2.mlp.down_proj.weight"), read["blk.2.ffn_down.weight"])
    heads, rows = 4, read["blk.2.attn_q.weight"]  # Transformers' own reader undoes the same order of rows
    unpaired = rows.reshape(heads, rows.shape[0] // heads // 2, 2, -1).transpose(1, 2).reshape(rows.shape)
    assert torch.equal(checkpoint.read("model.layers.2.self_attn.q_proj.weight"), unpaired)


def test_load_keeps_linears_packed(home):
    model = halfbyte.load(home / "q4.gguf")
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "QuantLinear"
    assert model.lm_head.packed_0 is model.model.embed_tokens.packed_0  # tied


def test_parts_read_as_one_whichever_is_named(home):
    whole = Checkpoint.open(home / "bf16.gguf")
    parts = sorted((home / "parts").glob("*.gguf"))
    assert len(parts) > 2
    for named in (home / "parts", parts[0], parts[-1]):
        read = Checkpoint.open(named)
        assert read.tensors() == whole.tensors()
        assert all(torch.equal(read.read(n), whole.read(n)) for n in whole.tensors())


@pytest.mark.slow
def test_inspect_and_eval_take_it(home):
    found = json.loads(tiny.halfbyte("inspect", home / "q4.gguf", "--json").out)
    assert (found["model_type"], found["container"], found["parameters"]) == ("llama", "gguf", 5770496)
    assert set(found["grids"]) == {"q4_k", "q6_k", "float32"}
    result = tiny.halfbyte(
        "eval", home / "bf16.gguf", home / "q4.gguf", "--against", demo.MODEL, "--windows", "2", "--json"
    )
    exact, rounded = json.loads(result.out)["models"]
    assert exact["kl"] == 0
    assert 0.001 < rounded["kl"] < 0.02
    assert "KL" in (home / "q4.README.md").read_text()


def test_a_folder_of_safetensors_is_no_gguf(home, tmp_path):
    both = Path(shutil.copytree(demo.MODEL, tmp_path / "both"))
    shutil.copyfile(home / "q4.gguf", both / "extra.gguf")
    assert type(Checkpoint.open(both)) is Checkpoint


# Files of other programs --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_file_of_llama_quantizes_is_read(home, tmp_path):
    llama = pytest.importorskip("llama_cpp.llama_cpp", reason="llama.cpp (llama-cpp-python) is not installed")
    params = llama.llama_model_quantize_default_params()
    params.ftype, params.nthread = 15, 1  # Q4_K_M
    assert (
        llama.llama_model_quantize(
            str(home / "bf16.gguf").encode(), str(tmp_path / "theirs.gguf").encode(), ctypes.byref(params)
        )
        == 0
    )
    result = tiny.halfbyte(
        "eval", tmp_path / "theirs.gguf", home / "q4.gguf", "--against", demo.MODEL, "--windows", "2", "--json"
    )
    theirs, ours = json.loads(result.out)["models"]
    assert ours["kl"] < theirs["kl"] < 0.02
    assert sorted(p.name for p in tmp_path.iterdir()) == ["theirs.gguf"]


def unknown_architecture(home: Path, path: Path) -> Path:
    """The demo model, as though of a family that nobody knows."""
    whole = gguf_file.read(home / "bf16.gguf")
    said = {key.replace("llama.", "novel."): value for key, value in whole.metadata.items()} | {
        "general.architecture": Value("string", "novel")
    }
    writer = gguf_file.GGUFFileWriter(
        path, said, {name: (stored.type, stored.shape) for name, stored in whole.tensors.items()}
    )
    for name, stored in whole.tensors.items():
        writer.write(name, stored.entry.read())
    writer.close()
    return path


def test_an_unknown_architecture_is_quantized_without_calibration(home, tmp_path):
    source = unknown_architecture(home, tmp_path / "novel.gguf")
    halfbyte.quantize(source, tmp_path / "out.gguf", method="nearest", grid="Q4_K_M")
    found, known = gguf_file.read(tmp_path / "out.gguf"), gguf_file.read(home / "q4.gguf")
    assert {n: s.type for n, s in found.tensors.items()} == {n: s.type for n, s in known.tensors.items()}
    assert all(torch.equal(s.entry.read(), known.tensors[n].entry.read()) for n, s in found.tensors.items())
    assert found.get("novel.block_count") == known.get("llama.block_count")


def test_an_unknown_architecture_cannot_be_calibrated(home, tmp_path):
    source = unknown_architecture(home, tmp_path / "novel.gguf")
    tiny.refused(
        tiny.halfbyte("quantize", source, "-o", tmp_path / "out.gguf", "--method", "gptq"),
        "novel.gguf is of 'novel'",
        "llama",
        "--method nearest",
    )
    with pytest.raises(Unsupported, match="novel"):
        halfbyte.load(source)
    assert [p.name for p in tmp_path.iterdir()] == ["novel.gguf"]


# Quantizing --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "source"),
    [
        ("nearest", "bf16.gguf"),
        ("nearest", "parts"),
        ("gptq", "parts"),
        pytest.param("awq+gptq", "bf16.gguf", marks=pytest.mark.slow),
    ],
)
def test_quantizing_a_gguf_is_quantizing_the_model(method, source, home, tmp_path):
    for name, model in (("hub", demo.MODEL), ("gguf", home / source)):
        halfbyte.quantize(model, tmp_path / f"{name}.gguf", method=method, calibration=CALIBRATION)
    assert same(tensors(tmp_path / "hub.gguf"), tensors(tmp_path / "gguf.gguf"))
    hub, again = (gguf_file.read(tmp_path / f"{name}.gguf").metadata for name in ("hub", "gguf"))
    assert {k: v for k, v in hub.items() if k != "general.name"} == {
        k: v for k, v in again.items() if k != "general.name"
    }


@pytest.mark.slow
def test_a_folder_can_be_made_of_a_gguf(home, tmp_path):
    for name, source in (("hub", demo.MODEL), ("gguf", home / "bf16.gguf")):
        halfbyte.quantize(source, tmp_path / name, method="gptq", grid="int4-g128", to="gptq", calibration=CALIBRATION)
    hub, again = Checkpoint.open(tmp_path / "hub"), Checkpoint.open(tmp_path / "gguf")
    assert hub.entries.keys() == again.entries.keys()
    for name in hub.entries:
        assert torch.equal(hub.entries[name].read().float(), again.entries[name].read().float()), name
    some = "The quick brown fox, and 1234 of them."
    assert again.tokenizer()(some)["input_ids"] == hub.tokenizer()(some)["input_ids"]
    assert (tmp_path / "gguf" / "tokenizer.json").exists()


def test_quantizing_again_warns(home, tmp_path):
    report = halfbyte.quantize(
        home / "q4.gguf", tmp_path / "again.gguf", method="nearest", grid="Q3_K_M", requantize=True
    )
    assert any("quantized already (gguf, q4_k)" in warning for warning in report["warnings"])
    assert "quantized already" in (tmp_path / "again.README.md").read_text()


@pytest.mark.slow
def test_importance_is_measured_of_a_gguf_as_of_the_model(home, tmp_path):
    for name, source in (("hub", demo.MODEL), ("gguf", home / "bf16.gguf")):
        halfbyte.imatrix(source, tmp_path / f"{name}.gguf", CALIBRATION)
    assert same(tensors(tmp_path / "hub.gguf"), tensors(tmp_path / "gguf.gguf"))


ODD = {
    "tokenizer.ggml.add_bos_token": Value("string", "x"),
    "tokenizer.ggml.eos_token_id": Value("string", "257"),
    "tokenizer.ggml.token_type": Value("float32[]", [1.0] * 264),
    "tokenizer.chat_template": Value("string[]", ["x"]),
    "general.name": Value("uint32", 7),
    "general.tags": Value("string", "a"),
    "general.file_type": Value("string", "Q4_0"),
    "llama.block_count": Value("uint64", 1),
    "llama.rope.freq_base": Value("float64", 1e4),
}


def changed(source: Path, path: Path, changes: dict[str, Value]) -> Path:
    """A GGUF with other metadata, of the same tensors."""
    found = gguf_file.read(source)
    kinds = {name: (stored.type, stored.shape) for name, stored in found.tensors.items()}
    writer = gguf_file.GGUFFileWriter(path, {**found.metadata, **changes}, kinds)
    for name, stored in found.tensors.items():
        writer.write(name, stored.entry.read())
    writer.close()
    return path


@pytest.mark.parametrize("key", ODD)
def test_an_entry_that_llamacpp_does_not_read_is_not_written_on(key, home, tmp_path):
    odd = changed(home / "q4.gguf", tmp_path / "odd.gguf", {key: ODD[key]})
    outputs = [tmp_path / "out.gguf"] + [tmp_path / "out"] * key.startswith("tokenizer.")
    for out in outputs:
        tiny.refused(tiny.halfbyte("dequantize", odd, "-o", out), key, ODD[key].type)
        assert not out.exists()


@pytest.mark.parametrize("name", ["add_bos_token", "add_eos_token"])
def test_a_tokenizer_config_that_answers_no_question_is_refused(name, tmp_path):
    model = tiny.make(tmp_path / "model", num_hidden_layers=1)
    about = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**about, name: "x"}))
    result = tiny.halfbyte("quantize", model, "-o", tmp_path / "out.gguf", "--method", "nearest", "--grid", "Q8_0")
    tiny.refused(result, "tokenizer_config.json", f"{name} is 'x'")


def test_layers_of_different_numbers_of_heads_are_refused(home, tmp_path):
    arch = gguf_file.read(home / "q4.gguf").metadata["general.architecture"].value
    name = f"{arch}.attention.head_count"
    same = changed(home / "q4.gguf", tmp_path / "same.gguf", {name: Value("uint32[]", [4] * 8)})
    differ = changed(home / "q4.gguf", tmp_path / "differ.gguf", {name: Value("uint32[]", [4] * 7 + [8])})
    assert type(Checkpoint.open(same).config["num_attention_heads"]) is int
    tiny.refused(tiny.halfbyte("convert", differ, "-o", tmp_path / "o", "--to", "gptq"), name, "from layer to layer")


@pytest.mark.parametrize("name", ["bf16.gguf", "parts", "q4.gguf"])
def test_a_head_says_what_the_checkpoint_holds(name, home):
    assert halfbyte.inspect(home / name).grids == inspect.counted(inspect.stored(Checkpoint.open(home / name))).grids


@pytest.mark.parametrize("type_name", LAYOUTS)
def test_a_head_calls_types_as_grids_are_called(type_name, tmp_path):
    said = {"general.architecture": Value("string", "none")}
    gguf_file.GGUFFileWriter(tmp_path / "one.gguf", said, {"a": (type_name, (2, 256))}).close()
    found = halfbyte.inspect(tmp_path / "one.gguf")
    assert (found.model_type, found.container, [*found.grids]) == ("none", "gguf", [str(LAYOUTS[type_name].grid)])
