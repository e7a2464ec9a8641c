"""What no engine loads is said before a run, and what a refusal of an engine advises works."""

import re

import pytest

import halfbyte
import tiny
from halfbyte.errors import Unsupported
from models.every import EVERY

NEAREST = ("--method", "nearest")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    tiny.make(home / "model")
    tiny.make(home / "odd", intermediate_size=160)
    assert (
        tiny.halfbyte(
            "quantize", home / "model", "-o", home / "g16", *NEAREST, "--grid", "int4-g16", "--to", "compressed-tensors"
        ).code
        == 0
    )
    return home


RUNS = {
    "quantize": ("quantize", "model", *NEAREST, "--grid", "int4-g16", "--to", "awq"),
    "convert": ("convert", "g16", "--to", "awq"),
}
NOBODY = "no engine is known to load this (vllm and sglang and transformers and tgi and mlx: has no kernel for int4-g16"


@pytest.mark.parametrize("command", RUNS)
def test_what_no_engine_loads_needs_to_be_asked_for(home, tmp_path, command):
    verb, source, *words = RUNS[command]
    out = tmp_path / "out"
    tiny.refused(
        tiny.halfbyte(verb, home / source, "-o", out, *words),
        NOBODY,
        "the rest do not read awq",
        "--engine none writes it all the same",
    )
    assert not list(tmp_path.iterdir())
    written = tiny.halfbyte(verb, home / source, "-o", out, *words, "--engine", "none")
    assert written.code == 0
    assert "no engine is known to load it" in written.out
    assert (out / "model.safetensors").is_file()


def test_so_it_is_from_python(home, tmp_path):
    words = {"method": "nearest", "grid": "int4-g16", "to": "awq"}
    with pytest.raises(Unsupported, match="no engine is known to load this"):
        halfbyte.quantize(home / "model", tmp_path / "a", **words)
    with pytest.raises(Unsupported, match="no engine is known to load this"):
        halfbyte.convert(home / "g16", tmp_path / "b", "awq")
    assert not list(tmp_path.iterdir())
    reports = [
        halfbyte.quantize(home / "model", tmp_path / "a", **words, engine="none"),
        halfbyte.convert(home / "g16", tmp_path / "b", "awq", engine="none"),
    ]
    assert not any(verdict["loads"] for report in reports for verdict in report["engines"])


ADVICE = {
    "another group size": (
        ("model", "--grid", "int4-g16", "--engine", "sglang"),
        "g32, g64, g128",
        ("model", "--grid", "int4-g32", "--engine", "sglang"),
    ),
    "another engine": (
        ("odd", "--grid", "int4-g32", "--engine", "sglang"),
        "take another engine",
        ("odd", "--grid", "int4-g32", "--engine", "vllm"),
    ),
    "16 bits": (
        ("odd", "--grid", "int4-g32", "--engine", "sglang"),
        "or keep it in 16 bits",
        ("odd", "--grid", "int4-g32", "--engine", "sglang", "--skip", "*.down_proj"),
    ),
    "another container": (
        ("model", "--grid", "int4-g32", "--engine", "transformers", "--to", "gptq", "--skip", "*.down_proj"),
        "write compressed-tensors",
        (
            "model",
            "--grid",
            "int4-g32",
            "--engine",
            "transformers",
            "--to",
            "compressed-tensors",
            "--skip",
            "*.down_proj",
        ),
    ),
    "a container of the engine": (
        ("model", "--grid", "int4-g32", "--engine", "mlx", "--to", "gptq"),
        "it reads awq",
        ("model", "--grid", "int4-g32", "--engine", "mlx", "--to", "awq"),
    ),
    "one grid": (
        (
            "model",
            "--grid",
            "int4-g32",
            "--engine",
            "transformers",
            "--to",
            "gptq",
            "--override",
            "*.down_proj=int8-g32",
        ),
        "use one, or write compressed-tensors",
        (
            "model",
            "--grid",
            "int4-g32",
            "--engine",
            "transformers",
            "--to",
            "compressed-tensors",
            "--override",
            "*.down_proj=int8-g32",
        ),
    ),
    "one grid for what is fused": (
        ("model", "--grid", "int4-g32", "--engine", "vllm", "--override", "*.v_proj=int8-g32"),
        "they need one grid, or all 16 bits",
        ("model", "--grid", "int4-g32", "--engine", "vllm", "--skip", "*.[qkv]_proj"),
    ),
}


@pytest.mark.parametrize("case", ADVICE)
def test_what_is_advised_works(home, tmp_path, case):
    (source, *words), advice, (better, *others) = ADVICE[case]
    tiny.refused(
        tiny.halfbyte("quantize", home / source, "-o", tmp_path / "out", *NEAREST, *words), "will not load this", advice
    )
    followed = tiny.halfbyte("quantize", home / better, "-o", tmp_path / "out", *NEAREST, *others)
    assert followed.code == 0, followed.err
    assert f"\n{others[others.index('--engine') + 1]} (" in followed.out


@pytest.mark.parametrize(
    ("family", "engine"),
    [("gpt_oss", "vllm"), ("gpt_oss", "sglang"), ("granitemoe", "vllm"), ("granitemoehybrid", "transformers")],
)
def test_experts_that_are_to_be_skipped_are_named_so_that_skipping_helps(tmp_path, family, engine):
    words = (
        "quantize",
        EVERY[family].save(tmp_path / "model"),
        "-o",
        tmp_path / "out",
        *NEAREST,
        "--grid",
        "int4-g32",
        "--engine",
        engine,
    )
    refused = tiny.halfbyte(*words)
    tiny.refused(refused, "keep them in 16 bits, with --skip '")
    advised = re.findall("--skip '.*?'|--to compressed-tensors", refused.err)
    followed = tiny.halfbyte(*words, *(word.strip("'") for option in advised for word in option.split()))
    assert followed.code == 0 or "no multiple of" in followed.err, followed.err  # so small, they miss SGLang's tiles
