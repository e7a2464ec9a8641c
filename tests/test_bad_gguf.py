"""Requests for a GGUF, or of one, that cannot be met: one clear line, exit code 2, and the disk as it was."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import halfbyte
import tiny
from halfbyte.targets.gguf import file as gguf_file
from halfbyte.targets.gguf import imatrix

NEAREST = ["--method", "nearest"]
WIDE = {"hidden_size": 256, "intermediate_size": 512}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A model, and GGUFs of it: whole, split, and quantized."""
    home = tmp_path_factory.mktemp("bad")
    tiny.make(home / "model", **WIDE)
    assert tiny.halfbyte("quantize", home / "model", "-o", home / "q4.gguf", *NEAREST).code == 0
    assert (
        tiny.halfbyte(
            "quantize", home / "model", "-o", home / "parts", *NEAREST, "--grid", "BF16", "--shard-gb", "0.001"
        ).code
        == 0
    )
    return home


@pytest.fixture
def model(home, tmp_path) -> Path:
    """A copy of the model, to be broken."""
    return Path(shutil.copytree(home / "model", tmp_path / "model"))


def contents(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def refused(folder: Path, *words: object, says: tuple[str, ...] | str) -> None:
    before = contents(folder)
    tiny.refused(tiny.halfbyte(*words), *([says] if isinstance(says, str) else says))
    assert contents(folder) == before


# Sources ------------------------------------------------------------------------------------------------------------


def header_cut(raw: bytes) -> bytes:
    return raw[:3000]


def tensors_cut(raw: bytes) -> bytes:
    return raw[:-4000]


def with_type(number: int):
    def change(raw: bytes) -> bytes:
        name = b"blk.0.attn_k.weight"
        at = raw.index(name) + len(name)
        at += 4 + 8 * struct.unpack_from("<I", raw, at)[0]
        return raw[:at] + struct.pack("<I", number) + raw[at + 4 :]

    return change


SOURCES = {
    "header-cut": (header_cut, "cut short: its header goes on to byte"),
    "tensors-cut": (tensors_cut, ("bytes more than there are", "download the file again")),
    "empty": (lambda raw: b"", "cut short"),
    "text": (lambda raw: b"these are notes", "it starts with b'thes'"),
    "pointer": (lambda raw: b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "unknown-type": (with_type(99), ("blk.0.attn_k.weight", "type 99, which is not known")),
    "undecoded-type": (with_type(42), ("blk.0.attn_k.weight", "Q2_0, which is not decoded", "Q4_K")),
}


@pytest.mark.parametrize(
    ("damage", "command"),
    [
        (damage, command)
        for damage in SOURCES
        for command in ("quantize", "convert", "inspect", "eval")
        if (damage, command) != ("undecoded-type", "inspect")
    ],
)
def test_a_damaged_source_is_named(damage, command, home, tmp_path):
    change, says = SOURCES[damage]
    path = tmp_path / "broken.gguf"
    path.write_bytes(change((home / "q4.gguf").read_bytes()))
    options = {
        "quantize": ["-o", tmp_path / "out.gguf"],
        "convert": ["-o", tmp_path / "out", "--to", "gptq"],
        "eval": ["--against", home / "model"],
    }
    refused(
        tmp_path,
        command,
        path,
        *options.get(command, []),
        says=(str(path), *([says] if isinstance(says, str) else says)),
    )


def test_a_type_that_is_not_decoded_is_inspected(home, tmp_path):
    path = tmp_path / "undecoded.gguf"
    path.write_bytes(with_type(42)((home / "q4.gguf").read_bytes()))
    found = halfbyte.inspect(path).grids
    assert found["Q2_0"].tensors == 1


def test_a_missing_part_is_named(home, tmp_path):
    parts = Path(shutil.copytree(home / "parts", tmp_path / "parts"))
    sorted(parts.glob("*.gguf"))[1].unlink()
    refused(
        tmp_path, "quantize", parts, "-o", tmp_path / "out.gguf", says=("parts, and 1 are missing", "parts-00002-of-")
    )


@pytest.mark.slow
def test_a_lost_tensor_is_named(home, tmp_path):
    whole = gguf_file.read(home / "q4.gguf")
    left = {name: stored for name, stored in whole.tensors.items() if name != "blk.1.ffn_gate.weight"}
    writer = gguf_file.GGUFFileWriter(
        tmp_path / "lost.gguf", whole.metadata, {name: (s.type, s.shape) for name, s in left.items()}
    )
    for name, stored in left.items():
        writer.write(name, stored.entry.read())
    writer.close()
    refused(tmp_path, "eval", tmp_path / "lost.gguf", "--against", home / "model", says="layers.1.mlp.gate_proj")


# Names --------------------------------------------------------------------------------------------------------------

REQUESTS = {
    "unknown preset": (["-o", "out.gguf", "--grid", "Q4_K_X"], ("Q4_K_X", "did you mean Q4_K_S or Q4_K_M")),
    "preset elsewhere": (
        ["-o", "out", "--grid", "Q4_K_M", "--to", "gptq"],
        ("Q4_K_M", "is a preset of GGUF", "--to gguf", "int4-g128"),
    ),
    "preset for an engine without GGUF": (
        ["-o", "out", "--grid", "Q4_K_M", "--engine", "sglang"],
        ("Q4_K_M", "is a preset of GGUF"),
    ),
    "type elsewhere": (["-o", "out", "--grid", "q4_k", "--to", "gptq"], "gptq holds integer grids only, not q4_k"),
    "file elsewhere": (["-o", "out.gguf", "--grid", "int4-g128", "--to", "gptq"], ("gptq needs a folder", "out.gguf")),
    "grid that GGUF has not": (
        ["-o", "out.gguf", "--grid", "int4-g128"],
        ("gguf has no type for int4-g128", "Q4_0", "Q4_K"),
    ),
    "inputs": (["-o", "out.gguf", "--grid", "w8a8"], ("how inputs are rounded", "Q8_0", "--to compressed-tensors")),
    "type that is not written": (
        ["-o", "out.gguf", "--grid", "IQ1_S"],
        ("iq1_s is read from gguf files, not written", "iq2_xxs"),
    ),
    "parts in a file": (["-o", "out.gguf", "--shard-gb", "0.001"], ("parts of a GGUF need a folder", "--shard-gb")),
    "unknown override": (
        ["-o", "out.gguf", "--override", "layers.0.*=q9"],
        ("unknown preset or type of GGUF 'q9'", "Q4_1"),
    ),
    "pattern": (["-o", "out.gguf", "--override", "blk.0.*=q8_0"], ("'blk.0.*' matches no weight", "model.layers.0.")),
    "nothing left": (["-o", "out.gguf", "--skip", "*"], "nothing is left to quantize: skipped as asked"),
    "pure elsewhere": (["-o", "out", "--pure"], ("pure is for GGUF", "compressed-tensors")),
    "pre elsewhere": (["-o", "out", "--pre", "qwen2"], ("pre is for GGUF", "compressed-tensors")),
}


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_a_request_that_makes_no_sense(request_, home, tmp_path, monkeypatch):
    words, says = request_
    monkeypatch.chdir(tmp_path)
    refused(tmp_path, "quantize", home / "model", *NEAREST, *words, says=says)


def test_a_plain_gguf_is_sent_to_quantize(home, tmp_path):
    refused(
        tmp_path,
        "convert",
        home / "parts",
        "-o",
        tmp_path / "out",
        "--to",
        "gptq",
        says=("is not quantized", "halfbyte quantize"),
    )


def test_a_quantized_gguf_is_quantized_again_only_if_asked(home, tmp_path):
    words = ["quantize", home / "q4.gguf", "-o", tmp_path / "out", "--to", "gptq", "--grid", "int4-g128"]
    refused(tmp_path, *words, says=("is quantized already (gguf, q4_k)", "--requantize"))


def test_what_a_container_does_not_hold_needs_a_grid(home, tmp_path):
    words = ["convert", home / "q4.gguf", "-o", tmp_path / "out", "--to", "gptq"]
    refused(tmp_path, *words, says=("gptq holds integer grids only", "--grid int4-g"))


def test_convert_does_not_round_a_gguf_to_other_types(home, tmp_path):
    words = ["convert", home / "q4.gguf", "-o", tmp_path / "out.gguf", "--to", "gguf", "--grid", "Q3_K_M"]
    refused(tmp_path, *words, says=("is a GGUF already", "halfbyte quantize"))


# Outputs ------------------------------------------------------------------------------------------------------------


def test_an_output_that_exists_is_kept(home, tmp_path):
    (tmp_path / "out.gguf").write_bytes(b"precious")
    refused(
        tmp_path,
        "quantize",
        home / "model",
        "-o",
        tmp_path / "out.gguf",
        *NEAREST,
        says=("exists and is kept", "--overwrite"),
    )


def test_a_part_of_the_source_is_never_replaced(home, tmp_path):
    parts = Path(shutil.copytree(home / "parts", tmp_path / "parts"))
    first, second, *_ = sorted(parts.glob("*.gguf"))
    for source in (first, second, parts):
        words = ["quantize", source, "-o", second, *NEAREST, "--overwrite"]
        refused(tmp_path, *words, says=str(second))


def test_what_another_program_keeps_under_our_partial_name_is_left_alone(home, tmp_path):
    (tmp_path / "out.gguf.partial").mkdir()
    (tmp_path / "out.gguf.partial" / "thesis.txt").write_text("years of work")
    refused(
        tmp_path,
        "quantize",
        home / "model",
        "-o",
        tmp_path / "out.gguf",
        *NEAREST,
        says=("out.gguf.partial", "not of halfbyte's making"),
    )


# Models -------------------------------------------------------------------------------------------------------------


def configured(**changes):
    def change(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | changes))

    return change


def without_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()


def strange_pattern(model: Path) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "a+b"}, "behavior": "Isolated", "invert": False}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))


def strange_tensor(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    save_file(
        {**tensors, "model.layers.0.self_attn.extra.weight": torch.zeros(32, 32)},
        model / "model.safetensors",
        {"format": "pt"},
    )


def poisoned(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


MODELS = {
    "architecture": (configured(model_type="opt"), ("'opt'", "known are llama, mistral")),
    "variant": (configured(hidden_act="gelu"), ("hidden_act", "gelu")),
    "no tokenizer": (without_tokenizer, ("no tokenizer.json", "save_pretrained")),
    "unknown pattern": (strange_pattern, ("a+b", "--pre NAME")),
    "unknown tensor": (strange_tensor, ("self_attn.extra.weight", "no place")),
    "NaN": (poisoned, ("model.layers.1.mlp.up_proj.weight", "NaN")),
}


@pytest.mark.parametrize("change", MODELS)
def test_a_model_that_no_gguf_can_hold(change, model, tmp_path):
    spoil, says = MODELS[change]
    spoil(model)
    refused(tmp_path, "quantize", model, "-o", tmp_path / "out.gguf", *NEAREST, says=says)


# Importance matrices -----------------------------------------------------------------------------------------------


def importance(path: Path, **widths: int) -> Path:
    """Of a model of one block."""
    names = {
        "attn_q": 256,
        "attn_k": 256,
        "attn_v": 256,
        "attn_output": 256,
        "ffn_gate": 256,
        "ffn_up": 256,
        "ffn_down": 512,
        **widths,
    }
    squares = {
        f"blk.{b}.{n}.weight": imatrix.Squares(torch.rand(1, w), torch.ones(1))
        for b in range(2)
        for n, w in names.items()
        if w
    }
    imatrix.write(path, imatrix.Importance(squares))
    return path


MATRICES = {
    "other widths": ({"ffn_down": 1024}, ("blk.0.ffn_down.weight", "1024", "512", "another model")),
    "a matrix less": ({"attn_v": 0}, ("blk.0.attn_v.weight", "another model")),
    "a matrix more": ({"attn_qkv": 256}, ("blk.0.attn_qkv.weight", "another model")),
}


@pytest.mark.parametrize(("widths", "says"), MATRICES.values(), ids=MATRICES)
def test_an_importance_matrix_of_another_model_is_refused(widths, says, home, tmp_path):
    path = importance(tmp_path / "imatrix.gguf", **widths)
    words = ["quantize", home / "model", "-o", tmp_path / "out.gguf", "--method", "imatrix", "--imatrix", path]
    refused(tmp_path, *words, says=says)


def test_an_importance_matrix_that_is_none(home, tmp_path):
    words = ["quantize", home / "model", "-o", tmp_path / "out.gguf", "--imatrix"]
    refused(tmp_path, *words, tmp_path / "gone.gguf", *NEAREST, says=("gone.gguf", "No such file"))
    refused(tmp_path, *words, home / "q4.gguf", *NEAREST, says=("q4.gguf", "no importance matrix"))
    refused(
        tmp_path,
        *words,
        importance(tmp_path / "good.gguf"),
        "--method",
        "gptq",
        says=("gptq needs more than an importance matrix", "--method imatrix"),
    )


def test_experts_of_a_block_have_one_type(tmp_path):
    shape = {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": 2,
        "num_hidden_layers": 1,
    }
    tiny.make(tmp_path / "model", **WIDE, **shape)
    name = next(n for n in load_file(tmp_path / "model" / "model.safetensors") if "experts" in n)
    pattern = f"*{name.split('experts')[0]}experts.0.*"
    words = ["quantize", tmp_path / "model", "-o", tmp_path / "x.gguf", *NEAREST, "--override", f"{pattern}=q8_0"]
    refused(tmp_path, *words, says=("experts of a block", "need one type"))


@pytest.mark.parametrize("key", ["head_count", "head_count_kv", "key_length"])
def test_heads_that_are_none_or_have_no_width_are_refused(key, home, tmp_path):
    raw = (home / "q4.gguf").read_bytes()
    name = f"llama.attention.{key}".encode()
    at = raw.index(name) + len(name) + struct.calcsize("<I")
    (tmp_path / "zero.gguf").write_bytes(raw[:at] + struct.pack("<I", 0) + raw[at + struct.calcsize("<I") :])
    refused(
        tmp_path,
        "dequantize",
        tmp_path / "zero.gguf",
        "-o",
        tmp_path / "out",
        says=f"{key} is 0, which should be above 0",
    )
