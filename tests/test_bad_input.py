"""A hostile user: one clear line, exit code 2, nothing half-written, nothing existing lost."""

import errno
import json
import os
import random
import resource
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import tiny
from halfbyte.containers import folder, safetensors
from halfbyte.containers.safetensors import read_header
from halfbyte.errors import BadCheckpoint, UnknownName

NEAREST = ["--method", "nearest"]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a model, text for it, and the model quantized."""
    home = tmp_path_factory.mktemp("bad")
    tiny.make(home / "model")
    tiny.text(home / "text.txt")
    assert tiny.halfbyte("quantize", home / "model", "-o", home / "quantized", *NEAREST, "--grid", "int4-g64").code == 0
    return home


@pytest.fixture
def model(home, tmp_path) -> Path:
    """A copy of the model, to be broken."""
    return Path(shutil.copytree(home / "model", tmp_path / "model"))


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def contents(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def refused(tmp_path: Path, *words: object, says: tuple[str, ...] | str) -> None:
    """The command is refused and leaves the disk as it was."""
    before = contents(tmp_path)
    tiny.refused(tiny.halfbyte(*words), *([says] if isinstance(says, str) else says))
    assert contents(tmp_path) == before


def calibrated(home: Path) -> list[object]:
    return ["--calibration", home / "text.txt", "--samples", "4", "--length", "64"]


# Checkpoints ---------------------------------------------------------------------------------------------------------


def configured(**changes):
    return lambda model: (model / "config.json").write_text(json.dumps(tiny.config(**changes)))


def written(name: str, data: str | bytes):
    return lambda model: (model / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def indexed(weight_map: object):
    return written("model.safetensors.index.json", json.dumps({"weight_map": weight_map}))


def with_tensors(change):
    def apply(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        change(tensors)
        save_file(tensors, model / "model.safetensors", {"format": "pt"})

    return apply


def poisoned(name: str, value: float):
    return with_tensors(lambda tensors: tensors[name].view(-1)[3:4].fill_(value))


def truncated(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:400_000])


def linked_to_nothing(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to(model / "gone")


UP = "model.layers.1.mlp.up_proj.weight"
BROKEN = {
    "no config": (lambda m: (m / "config.json").unlink(), "it has no config.json"),
    "config is no JSON": (written("config.json", '{"a":'), "is not JSON"),
    "config is binary": (written("config.json", b"\xff\xfe\0"), "is not JSON"),
    "config is a list": (written("config.json", "[]"), "no JSON object"),
    "config nests wrongly": (configured(text_config="x"), "text_config should be an object"),
    "quantization_config is a word": (
        configured(quantization_config="int4"),
        "quantization_config should be an object",
    ),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "it has no safetensors"),
    "pickled weights": (
        lambda m: (m / "model.safetensors").rename(m / "pytorch_model.bin"),
        ("has .bin files", "save it again as safetensors"),
    ),
    "empty file": (written("model.safetensors", b""), ("cut short", "0 bytes")),
    "truncated": (truncated, ("cut short", "bytes more", "download the file again")),
    "LFS pointer": (
        written("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"),
        "git lfs pull",
    ),
    "dangling link": (linked_to_nothing, "No such file"),
    "missing shard": (
        indexed({"a": "model-1-of-2.safetensors", "b": "model.safetensors"}),
        ("lacks 1 of 2 shards", "model-1-of-2.safetensors"),
    ),
    "index of another": (
        indexed({"gone.weight": "model.safetensors"}),
        ("names 1 tensor that no shard holds", "gone.weight"),
    ),
    "index is a list": (indexed(["a"]), "maps no tensors to files"),
    "index of numbers": (indexed({"a": 3}), "maps no tensors to files"),
    "index leaves the folder": (indexed({"a": "../model/model.safetensors"}), "maps no tensors to files"),
    "NaN": (poisoned(UP, float("nan")), (f"'{UP}'", "NaN or Inf")),
    "Inf": (poisoned(UP, float("-inf")), (f"'{UP}'", "NaN or Inf")),
    "NaN in a norm": (poisoned("model.norm.weight", float("nan")), ("'model.norm.weight'", "NaN or Inf")),
    "Inf in the head": (poisoned("lm_head.weight", float("inf")), ("'lm_head.weight'", "NaN or Inf")),
    "quantized by a stranger": (
        configured(quantization_config={"quant_method": "exl3"}),
        ("quantized with 'exl3'", "known: compressed-tensors"),
    ),
}
BROKEN_FOR_CALIBRATION = {
    "unknown architecture": (
        configured(model_type="gronk", architectures=["GronkForCausalLM"]),
        ("gronk", "--method nearest"),
    ),
    "code of its own": (
        configured(model_type="gronk", auto_map={"AutoConfig": "configuration_gronk.Config"}),
        "--method nearest",
    ),
    "too few layers": (configured(num_hidden_layers=5), "model.layers.2"),
    "layers in words": (configured(num_hidden_layers="two"), "num_hidden_layers"),
    "no heads": (configured(num_attention_heads=0), "zero"),
    "other width": (configured(hidden_size=64), "config.json"),
    "missing tensor": (with_tensors(lambda t: t.pop(UP)), UP),
    "missing head": (with_tensors(lambda t: t.pop("lm_head.weight")), "lm_head.weight"),
    "no tokenizer": (lambda m: [(m / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")], "tokenizer"),
    "broken tokenizer": (written("tokenizer.json", "{"), "tokenizer"),
    "tokenizer of another": (configured(vocab_size=100), ("token", "100")),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoint(name, model, home, tmp_path):
    damage, says = BROKEN[name]
    damage(model)
    refused(tmp_path, "quantize", model, "-o", tmp_path / "out", *NEAREST, says=says)
    refused(tmp_path, "quantize", model, "-o", tmp_path / "out", "--engine", "none", *calibrated(home), says=says)


@pytest.mark.parametrize("name", BROKEN_FOR_CALIBRATION)
def test_broken_for_calibration(name, model, home, tmp_path):
    damage, says = BROKEN_FOR_CALIBRATION[name]
    damage(model)
    refused(tmp_path, "quantize", model, "-o", tmp_path / "out", "--engine", "none", *calibrated(home), says=says)


def test_an_unknown_architecture_needs_no_calibration(model, tmp_path):
    configured(model_type="gronk", architectures=["GronkForCausalLM"])(model)
    refused(
        tmp_path,
        "quantize",
        model,
        "-o",
        tmp_path / "out",
        *NEAREST,
        says=("no engine is known to load this", "--engine none"),
    )
    assert tiny.halfbyte("quantize", model, "-o", tmp_path / "out", *NEAREST, "--engine", "none").code == 0


def test_nan_can_be_skipped(model, tmp_path):
    poisoned(UP, float("nan"))(model)
    assert (
        tiny.halfbyte("quantize", model, "-o", tmp_path / "out", *NEAREST, "--skip", "layers.1.mlp.up_proj").code == 0
    )
    assert load_file(tmp_path / "out" / "model.safetensors")[UP].isnan().sum() == 1


def test_no_checkpoint(home, tmp_path):
    (tmp_path / "empty").mkdir()
    out = ["-o", tmp_path / "out"]
    refused(tmp_path, "quantize", tmp_path / "empty", *out, says="no config.json")
    refused(tmp_path, "quantize", tmp_path / "gone", *out, says=("there is no folder", "org/name"))
    refused(tmp_path, "quantize", "./gone", *out, says="there is no folder")
    refused(tmp_path, "quantize", home / "text.txt", *out, says="is a file")
    refused(tmp_path, "quantize", "no-such-org/no-such-model", *out, says="neither a folder nor a model")
    refused(tmp_path, "quantize", "no-such-org/no-such-model@v9", *out, says="neither a folder nor a model")
    refused(tmp_path, "quantize", "../x/y", *out, says="there is no folder")


def test_quantized_already(home, tmp_path):
    refused(
        tmp_path,
        "quantize",
        home / "quantized",
        "-o",
        tmp_path / "out",
        says=("quantized already (compressed-tensors, int4-g64", "halfbyte convert", "--to gptq"),
    )
    refused(
        tmp_path,
        "convert",
        home / "model",
        "-o",
        tmp_path / "out",
        "--to",
        "gptq",
        says=("is not quantized", "halfbyte quantize"),
    )


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (
            with_tensors(lambda t: t.pop("model.layers.1.mlp.up_proj.weight_scale")),
            "'model.layers.1.mlp.up_proj.weight_scale' is not stored",
        ),
        (
            with_tensors(lambda t: t.update({"model.layers.1.mlp.up_proj.weight_shape": torch.tensor([1, 2, 3])})),
            "weight_shape' is int64 [3]",
        ),
        (
            with_tensors(
                lambda t: t.update({"model.layers.1.mlp.up_proj.weight_packed": torch.zeros(3, 3, dtype=torch.int32)})
            ),
            "no packing of 256 x 128",
        ),
    ],
)
def test_broken_quantized_checkpoint(damage, says, home, tmp_path):
    model = shutil.copytree(home / "quantized", tmp_path / "model")
    damage(model)
    for words in (
        ["inspect", model],
        ["convert", model, "-o", tmp_path / "out", "--to", "gptq"],
        ["eval", model, "--against", home / "model"],
    ):
        refused(tmp_path, *words, says=says)


# Safetensors headers -------------------------------------------------------------------------------------------------


def file_of(path: Path, header: object, data: bytes = bytes(64), length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(shape=(2, 4), dtype="F32", offsets=(0, 32)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


MALFORMED = {
    "no JSON": b"{]",
    "a list": [1],
    "a number": 3,
    "not UTF-8": b'{"\xff": 1}',
    "deep": b"[" * 200_000,
    "no dtype": {"a": {"shape": [1], "data_offsets": [0, 4]}},
    "unknown dtype": {"a": entry(dtype="F99")},
    "dtype is a list": {"a": entry(dtype=["F32"])},
    "entry is a list": {"a": [1, 2]},
    "negative begin": {"a": entry(offsets=(-32, 0))},
    "backwards": {"a": entry(offsets=(32, 0))},
    "wrong size": {"a": entry(offsets=(0, 31))},
    "three offsets": {"a": entry(offsets=(0, 32, 64))},
    "offset is a word": {"a": entry(offsets=("0", "32"))},
    "offset is a fraction": {"a": entry(offsets=(0.0, 32.0))},
    "negative shape": {"a": entry(shape=(-2, -4))},
    "shape is a fraction": {"a": entry(shape=(2.0, 4.0))},
    "shape is a truth": {"a": entry(shape=(True, 8))},
    "shape is a word": {"a": entry(shape=("2", "4"))},
    "shape is no list": {"a": {"dtype": "F32", "shape": 8, "data_offsets": [0, 32]}},
    "overlap": {"a": entry(), "b": entry(offsets=(16, 48))},
    "same place": {"a": entry(), "b": entry()},
    "beyond the end": {"a": entry(offsets=(1 << 40, (1 << 40) + 32))},
    "huge": {"a": entry(shape=(1 << 40, 1), offsets=(0, 1 << 42))},
    "huge and empty": {"a": entry(shape=(0, 1 << 62, 1 << 62), offsets=(0, 0))},
    "a hole": {"a": entry(), "b": entry(offsets=(33, 65))},
    "a hole before the first": {"a": entry(offsets=(1, 33))},
    "bytes after the last": {"a": entry(shape=(1, 4), offsets=(0, 16))},
    "metadata of numbers": {"__metadata__": {"a": 1}, "a": entry()},
    "metadata is a list": {"__metadata__": ["a"], "a": entry()},
    "a name twice": b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},'
    b'"a":{"dtype":"F32","shape":[4],"data_offsets":[16,32]}}',
    "half a surrogate": b'{"\\ud800":{"dtype":"F32","shape":[8],"data_offsets":[0,32]}}',
    "UTF-16": json.dumps({"a": entry()}).encode("utf-16-le"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_header(name, tmp_path):
    path = file_of(
        tmp_path / "x.safetensors", MALFORMED[name], bytes(65 if name == "a hole" else 33 if "before" in name else 32)
    )
    with pytest.raises(SafetensorError):
        safe_open(path, "pt").keys()
    with pytest.raises(BadCheckpoint):
        read_header(path)


@pytest.mark.slow
def test_a_header_that_counts_too_much(tmp_path):
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    for header in (
        {f"{i}": empty for i in range(200_000)},
        {"__metadata__": {f"{i}": "" for i in range(1_100_000)}},
        {"a" * 2000: empty},
    ):
        with pytest.raises(BadCheckpoint, match="has a malformed safetensors header"):
            read_header(file_of(tmp_path / "x.safetensors", header, b""))


@pytest.mark.parametrize("length", [0, 1, 100_000_001, 1 << 40, 1 << 63, (1 << 64) - 1])
def test_header_length(length, tmp_path):
    with pytest.raises(BadCheckpoint):
        read_header(file_of(tmp_path / "x.safetensors", {"a": entry()}, length=length))


def test_fuzzed_headers(tmp_path):
    """Whatever the bytes: the tensors lie in the file and can be read, or it is a BadCheckpoint."""
    good = {
        "__metadata__": {"format": "pt"},
        "a": entry(),
        "b": entry(shape=(4,), dtype="BF16", offsets=(32, 40)),
        "c": entry(shape=(0, 3), offsets=(40, 40)),
    }
    file_of(tmp_path / "good", good, bytes(40))
    assert set(read_header(tmp_path / "good")) == {"a", "b", "c"}
    original = (tmp_path / "good").read_bytes()
    rng = random.Random(0)
    words = [
        b"-1",
        b"1e400",
        b"null",
        b"[]",
        b"{}",
        b'"',
        b"99999999999999999999",
        b"true",
        b"\xff",
        b"\0",
        b"NaN",
        b"F16",
        b"I64",
    ]
    refusals = 0
    for _ in range(2000):
        data = bytearray(original)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(data))
            match rng.randrange(4):
                case 0:
                    data[at] = rng.randrange(256)
                case 1:
                    del data[at : at + rng.randint(1, 40)]
                case 2:
                    data[at : at + rng.randint(0, 4)] = rng.choice(words)
                case _:
                    data = data[: at + 1]
        path = tmp_path / "x.safetensors"
        path.write_bytes(data)
        try:
            for tensor in read_header(path).values():
                assert tensor.offset + tensor.size_bytes <= len(data)
                assert tensor.read().shape == tensor.shape
        except BadCheckpoint:
            refusals += 1
    assert 500 < refusals < 2000


# Words ---------------------------------------------------------------------------------------------------------------

REQUESTS = {
    "grid": (["--grid", "itn4-g128"], "unknown grid 'itn4-g128'; did you mean int4-g128"),
    "grid without span": (["--grid", "int4"], "did you mean int4-g"),
    "no grid at all": (["--grid", ""], "known are"),
    "group of no use": (["--grid", "int4-g12"], ("does not divide the 256 in-features", "would fit")),
    "method": (["--method", "gtpq"], "unknown method 'gtpq'; did you mean gptq"),
    "methods": (["--method", "awq+gtpq"], "unknown method 'gtpq'"),
    "two solvers": (["--method", "gptq+nearest"], "in no order that runs"),
    "nothing to guide": (["--method", "guided+nearest"], "has nothing to guide"),
    "undone": (["--method", "guided+gptq+descent"], "leave one of them out"),
    "twice": (["--method", "awq+awq"], "twice"),
    "container": (["--to", "gguff"], "unknown container 'gguff'; did you mean gguf?"),
    "engine": (["--engine", "vlm"], "unknown engine 'vlm'; did you mean vllm"),
    "alpha of another method": (
        ["--grid", "w8a8", "--method", "gptq", "--alpha", "0.5"],
        ("alpha is for smoothquant", "method is gptq"),
    ),
    "range of nothing": (["--grid", "w8a8", "--observer", "mse"], ("scales that the file stores", "w8a8-static")),
    "engine without the inputs": (
        ["--grid", "w8a8-static", "--engine", "sglang"],
        ("sglang will not load this", "it takes fp8-e4m3", "it loads in vllm"),
    ),
    "engine that does not": (["--engine", "tensorrt-llm"], ("tensorrt-llm will not load this", "it loads in vllm")),
    "grid for awq": (["--to", "awq", "--grid", "int8-g128"], ("awq holds int4", "not int8-g128")),
    "grid for gptq": (
        ["--to", "gptq", "--grid", "int5-g128"],
        ("gptq holds int2, int3, int4 and int8", "not int5-g128"),
    ),
    "two grids for awq": (
        ["--to", "awq", "--override", "layers.0.*=int4-g64"],
        ("awq holds one scheme", "compressed-tensors and gptq mix them"),
    ),
    "override without grid": (["--override", "layers.0.*"], "PATTERN=GRID"),
    "override without pattern": (["--override", "=int4-g64"], "PATTERN=GRID"),
    "override with no grid": (["--override", "layers.0.*=int44"], "unknown grid 'int44'"),
    "override of nothing": (
        ["--override", "layers.9.*=int4-g64"],
        ("pattern 'layers.9.*' matches no weight", "model.layers.0."),
    ),
    "skip of nothing": (["--skip", "nothing"], "pattern 'nothing' matches no weight"),
    "skip of all": (["--skip", "*"], "nothing to quantize"),
    "samples": (["--samples", "0"], ("calibration.samples", "not 0")),
    "samples in words": (["--samples", "many"], ("--samples", "halfbyte quantize --help")),
    "length": (["--length", "1"], ("calibration.length", "not 1")),
    "seed": (["--seed", "-1"], ("calibration.seed", "not -1")),
    "option": (["--mehtod", "gptq"], ("No such option: --mehtod", "--method")),
    "no value": (["--grid"], "requires an argument"),
    "too many": (["again"], "unexpected extra argument"),
    "recipe": (["--recipe", "gone.yaml"], ("gone.yaml", "No such file")),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_bad_words(name, home, tmp_path):
    words, says = REQUESTS[name]
    refused(tmp_path, "quantize", home / "model", "-o", tmp_path / "out", *words, says=says)


def test_bad_commands(home, tmp_path):
    refused(tmp_path, "quantise", says=("No such command 'quantise'", "quantize"))
    refused(tmp_path, "quantize", "-o", tmp_path / "out", says="quantize needs a model and an output folder")
    refused(tmp_path, "convert", home / "quantized", "-o", tmp_path / "out", says="--to")
    refused(tmp_path, "convert", home / "quantized", "-o", tmp_path / "out", "--to", "gpt", says="did you mean gptq")
    refused(tmp_path, "eval", home / "quantized", says="--against")
    refused(
        tmp_path,
        "eval",
        home / "quantized",
        "--against",
        home / "model",
        "--convention",
        "paper",
        says="did you mean papers",
    )
    refused(
        tmp_path,
        "eval",
        home / "quantized",
        "--against",
        home / "model",
        "--text",
        "gone",
        says="there is no text file 'gone'",
    )
    refused(tmp_path, "eval", home / "quantized", "--against", home / "model", "--windows", "0", says="--windows")
    refused(tmp_path, "inspect", tmp_path / "gone", says="there is no folder")


def test_nearest_names_come_first():
    assert "did you mean int4-g32 or int4-g64" in str(
        UnknownName("grid", "int4", [f"int{b}-g{g}" for b in range(2, 9) for g in (32, 64)])
    )
    assert str(UnknownName("thing", "zzz", ["a", "b"])) == "unknown thing 'zzz'; known: a, b"
    assert "known are 63, such as" in str(UnknownName("thing", "zzz", map(str, range(63))))


# Calibration ---------------------------------------------------------------------------------------------------------

CHAT = json.dumps({"messages": [{"role": "user", "content": "hello " * 90}]})
CALIBRATION = {
    "empty.txt": ("", "is empty"),
    "short.txt": ("hi", ("has 2 tokens", "fewer than one window of 64", "--length")),
    "few.txt": ("x" * 65, ("65 tokens", "4 windows of 64 cannot be drawn", "--samples")),
    "binary.txt": (bytes(range(256)) * 50, "is not UTF-8 text"),
    "latin.txt": ("café ".encode("latin1") * 100, "is not UTF-8 text"),
    "zeros.bin": (bytes(5000), "NUL bytes"),
    "x.parquet": (b"PAR1" + bytes(200) + b"PAR1", ("Parquet", ".jsonl")),
    "empty.jsonl": ("", "is empty"),
    "cut.jsonl": ('{"text": "a"}\n{"te', ("line 2", "a record is")),
    "other.jsonl": ('{"a": 1}', ("line 1", "a record is")),
    "number.jsonl": ("3", ("line 1", "a record is")),
    "null.jsonl": ("null", ("line 1", "a record is")),
    "list.jsonl": ("[1, 2]", ("line 1", "a message is a number")),
    "chat.jsonl": (CHAT, ("line 1", "no chat template", "'text'")),
    "cut.json": ('[{"text"', "is not JSON"),
    "list.json": ('["a", 3]', ("record 2", "a record is")),
}


@pytest.mark.parametrize("name", CALIBRATION)
def test_bad_calibration(name, home, tmp_path):
    data, says = CALIBRATION[name]
    (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    refused(
        tmp_path,
        "quantize",
        home / "model",
        "-o",
        tmp_path / "out",
        "--samples",
        "4",
        "--length",
        "64",
        "--calibration",
        tmp_path / name,
        says=says,
    )


def test_no_calibration(home, tmp_path):
    words = ["quantize", home / "model", "-o", tmp_path / "out", "--samples", "4", "--length", "64", "--calibration"]
    refused(tmp_path, *words, "gone.txt", says="there is no text file 'gone.txt'")
    refused(tmp_path, *words, tmp_path, says="there is no text file")
    refused(tmp_path, *words, "", says="there is no text file ''")
    refused(
        tmp_path,
        "quantize",
        home / "model",
        "-o",
        tmp_path / "out",
        "--length",
        "1024",
        says="reads at most 512 tokens",
    )
    refused(
        tmp_path,
        "eval",
        home / "quantized",
        "--against",
        home / "model",
        "--length",
        "1024",
        says="reads at most 512 tokens",
    )


@pytest.mark.slow
def test_texts_and_chats(tmp_path):
    model = tiny.make(tmp_path / "model", chat=True)
    files = {
        "chats.jsonl": "\n".join([CHAT, json.dumps([{"role": "user", "content": "hello " * 90}])]),
        "texts.jsonl": "\n".join(
            json.dumps(record) for record in ({"text": "hello \u2028 world " * 30}, "hello world " * 30)
        ),
        "texts.json": json.dumps([{"text": "hello " * 80}, "hello " * 80], indent=2),
        "marked.txt": "\ufeff" + "hello " * 90,
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        result = tiny.halfbyte(
            "quantize",
            model,
            "-o",
            tmp_path / f"{name}-out",
            "--samples",
            "2",
            "--length",
            "64",
            "--calibration",
            tmp_path / name,
        )
        assert result.code == 0, result.err
    (tmp_path / "bad.jsonl").write_text(CHAT)
    broken = json.loads((model / "tokenizer_config.json").read_text()) | {
        "chat_template": "{{ raise_exception('no') }}"
    }
    (model / "tokenizer_config.json").write_text(json.dumps(broken))
    words = [
        "quantize",
        model,
        "-o",
        tmp_path / "out",
        "--samples",
        "2",
        "--length",
        "64",
        "--calibration",
        tmp_path / "bad.jsonl",
    ]
    refused(tmp_path, *words, says=("line 1", "the chat template does not take it"))


# Outputs -------------------------------------------------------------------------------------------------------------


def test_an_output_that_exists_is_kept(home, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    words = ["quantize", home / "model", *NEAREST, "-o"]
    refused(tmp_path, *words, out, says=("exists and is kept", "--overwrite"))
    refused(tmp_path, *words, out, "--overwrite", says=("no checkpoint", "--overwrite does not replace it"))
    refused(tmp_path, *words, out / "precious", says="is a file")
    refused(tmp_path, *words, out / "precious" / "sub", says=("cannot be written", "Not a directory"))
    refused(tmp_path, "convert", home / "quantized", "--to", "gptq", "-o", out, says="exists and is kept")


def test_the_source_is_not_replaced(model, tmp_path):
    for out in (model, tmp_path, model / "sub", model / ".." / "model"):
        refused(tmp_path, "quantize", model, "-o", out, "--overwrite", *NEAREST, says="the source")
    (tmp_path / "link").symlink_to(model)
    refused(tmp_path, "quantize", model, "-o", tmp_path / "link", "--overwrite", *NEAREST, says="the source")


def test_what_lies_beside_the_output_is_kept(home, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").write_text("x")
    refused(
        tmp_path,
        "quantize",
        home / "model",
        "-o",
        tmp_path / "out",
        *NEAREST,
        says=("out.partial is in the way", "move it"),
    )


def test_overwrite_and_links(home, tmp_path):
    words = ["quantize", home / "model", *NEAREST]
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert tiny.halfbyte(*words, "-o", tmp_path / "link").code == 0
    assert (tmp_path / "link").is_symlink()
    first = tiny.weights(tmp_path / "real")
    assert tiny.halfbyte(*words, "-o", tmp_path / "link", "--overwrite", "--grid", "int8-g128").code == 0
    assert tiny.weights(tmp_path / "real") != first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"]


def test_an_engine_or_disk_that_refuses_keeps_the_old_output(home, tmp_path, monkeypatch):
    words = ["quantize", home / "model", *NEAREST, "-o", tmp_path / "out"]
    assert tiny.halfbyte(*words).code == 0
    monkeypatch.setattr(shutil, "copyfile", full)
    refused(tmp_path, *words, "--overwrite", says="No space left on device")


# Disks ---------------------------------------------------------------------------------------------------------------


def full(*_) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", [(os, "posix_fallocate"), (safetensors.FileWriter, "_write")])
@pytest.mark.parametrize("method", ["nearest", "gptq"])
def test_full_disk(where, method, home, tmp_path, monkeypatch):
    monkeypatch.setattr(*where, full)
    words = ["quantize", home / "model", "-o", tmp_path / "out", "--method", method, *calibrated(home)]
    refused(tmp_path, *words, says=("No space left on device", "it needs 0.29 MB", "nothing was left behind"))


def test_disk_that_fills_late(home, tmp_path, monkeypatch):
    monkeypatch.setattr(folder.OutputFolder, "record", lambda self, record: full() if "rows" in record else None)
    refused(tmp_path, "quantize", home / "model", "-o", tmp_path / "out", *NEAREST, says="No space left on device")


@pytest.mark.slow
def test_file_that_may_not_grow(home, tmp_path):
    """A real limit of the operating system, in a process of its own."""
    command = [sys.executable, "-m", "halfbyte", "quantize", home / "model", "-o", tmp_path / "out", *NEAREST]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # noqa: E731
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, preexec_fn=limit, env=tiny.ALONE)
    tiny.refused(tiny.Result(done.returncode, done.stdout, done.stderr), "cannot be written (File too large")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("reason", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_disk_that_cannot_reserve(reason, home, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(safetensors.os, "posix_fallocate", refuse)
    assert tiny.halfbyte("quantize", home / "model", "-o", tmp_path / "out", *NEAREST).code == 0
    assert tiny.weights(tmp_path / "out").keys() == {"model.safetensors"}


def test_folder_that_may_not_be_written(home, tmp_path, monkeypatch):
    def refuse(self, *_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    refused(tmp_path, "quantize", home / "model", "-o", tmp_path / "out", *NEAREST, says="Permission denied")
