"""The command line as a person and as a script meets it."""

import contextlib
import io
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny
from halfbyte import cli
from halfbyte.engines.engines import ENGINES
from halfbyte.models import calibrate
from halfbyte.recipe import METHODS, OBSERVERS, Recipe
from halfbyte.report import types
from halfbyte.words import CONTAINERS as WRITTEN
from halfbyte.words import DTYPES, PLAIN, PRESETS, SCHEMES

COMMANDS = [command.name or command.callback.__name__ for command in cli.app.registered_commands]
LINEARS = [f"mlp.{n}_proj" for n in ("down", "gate", "up")] + [f"self_attn.{n}_proj" for n in "koqv"]
CONTAINERS = ["compressed-tensors", "gptq", "awq"]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("cli")
    tiny.make(home / "model")
    tiny.text(home / "text.txt")
    for container in CONTAINERS:
        assert (
            tiny.halfbyte(
                "quantize",
                home / "model",
                "-o",
                home / container,
                "--method",
                "nearest",
                "--grid",
                "int4-g64",
                "--to",
                container,
            ).code
            == 0
        )
    return home


def process(*words: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "halfbyte", *map(str, words)], capture_output=True, text=True, env=tiny.ALONE
    )


def test_help_is_quick():
    """Nothing large is imported to print a few lines, or to refuse a word."""
    heavy = "{'torch', 'transformers', 'numpy', 'psutil', 'halfbyte.report.types'}"
    code = "import sys\nfrom halfbyte.cli import main\n"
    code += f"try:\n    main(sys.argv[1:])\nfinally:\n    assert not {heavy} & sys.modules.keys()"
    for words, status in ((["--help"], 0), (["quantize", "-h"], 0), (["--version"], 0), ([], 0), (["nonsense"], 2)):
        started = time.monotonic()
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        assert time.monotonic() - started < 10  # 0.2 s on an idle machine


GOES_ON = ("chat", "serve")
"""Commands that end when they are ended, and have no result."""


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command):
    """With an example, and with what every command has."""
    said = tiny.halfbyte(command, "--help")
    assert said.code == 0
    assert f"Usage: halfbyte {command}" in said.out
    assert re.search(rf"^ halfbyte {command}", said.out, re.MULTILINE)
    assert "--help" in said.out
    assert ("--json" in said.out) == (command not in GOES_ON)


COMPLETED = {
    "quantize --method awq": ("awq", "awq+gptq"),
    "quantize --grid Q4_K": ("Q4_K_M", "Q4_K_S"),
    "quantize --grid fp8-e4m3-b": ("fp8-e4m3-block",),
    "quantize --to g": ("gguf", "gptq"),
    "quantize --engine ll": ("llama.cpp",),
    "quantize --device cu": ("cuda",),
    "quantize --for vllm@rtx-409": ("vllm@rtx-4090",),
    "quantize --observer p": ("percentile",),
    "convert --to aw": ("awq",),
    "dequantize --dtype f": ("float16", "float32"),
    "kv --kv fp8": ("fp8-e4m3", "fp8-e4m3-head"),
    "eval --convention p": ("papers",),
    "eval --gate f": ("flips=",),
    "eval --kv q8": ("q8_0",),
    "plan --device rtx-409": ("rtx-4090",),
    "plan --engine sg": ("sglang",),
    "plan --cache q4": ("q4_0",),
    "devices rtx-409": ("rtx-4090",),
    "support --engine tr": ("transformers",),
}


@pytest.mark.parametrize("words", COMPLETED)
def test_values_are_completed(words, monkeypatch):
    monkeypatch.setenv("_HALFBYTE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", f"halfbyte {words}")
    monkeypatch.setenv("COMP_CWORD", str(len(words.split())))
    assert sorted(tiny.halfbyte(*words.split()).out.split()) == sorted(COMPLETED[words])


def test_a_shell_need_not_wait_for_torch():
    code = "import sys\nfrom halfbyte.cli import main\n"
    code += "try:\n    main(['quantize'])\nfinally:\n    assert 'torch' not in sys.modules"
    asked = {"_HALFBYTE_COMPLETE": "complete_bash", "COMP_WORDS": "halfbyte quantize --grid nf", "COMP_CWORD": "3"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**tiny.ALONE, **asked})
    assert done.stdout.split() == ["nf4-g64", "nf4-g64-double"], done.stderr


class Screen(io.StringIO):
    """A standard error that says it is a terminal."""

    def isatty(self):
        return True


@pytest.mark.parametrize(("flag", "is_shown"), [([], True), (["--quiet"], False), (["-q"], False), (["--json"], False)])
def test_quiet_shows_no_progress(flag, is_shown, home, tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    screen = Screen()
    words = ["quantize", home / "model", "-o", tmp_path / "out", "--method", "nearest", "--grid", "int4-g64"]
    with contextlib.redirect_stderr(screen), contextlib.redirect_stdout(io.StringIO()):
        cli.main([*map(str, words), *flag])
    assert bool(screen.getvalue()) == is_shown


SHOWS_PROGRESS = {"quantize", "convert", "dequantize", "kv", "imatrix", "eval", "needle", "blame", "compare", "demo"}
SHOWS_PROGRESS |= {"bench", "chat", "report", "run"}


def test_what_shows_progress_can_be_quiet():
    quiet = {command for command in COMMANDS if "--quiet" in tiny.halfbyte(command, "--help").out}
    assert quiet == SHOWS_PROGRESS


def test_support_for_machines():
    found = types.Support.model_validate_json(tiny.halfbyte("support", "--engine", "vllm", "--json").out)
    assert [*found.containers] == [*WRITTEN]
    rows = {row.container: row for row in found.engines}
    assert "int4-g128" in rows["compressed-tensors"].tested_here
    assert "fp8-e4m3-block" in rows["compressed-tensors"].documented_there


def test_help_names_the_defaults():
    said = " ".join(tiny.halfbyte("quantize", "--help").out.replace("│", " ").split())
    for words in (
        "(the preset's, or gptq)",
        "(int4-g128)",
        "(the engine's, else what holds the grid)",
        "(the embedded text)",
        "(128)",
        "(512)",
        "--no-head",
    ):
        assert words in said
    assert all(command in tiny.halfbyte("--help").out for command in COMMANDS)


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("quantize", (*METHODS, *WRITTEN, *ENGINES, *OBSERVERS, *SCHEMES, *PRESETS)),
        ("convert", (*WRITTEN, *ENGINES)),
        ("dequantize", (*PLAIN, *DTYPES)),
        ("kv", OBSERVERS),
    ],
)
def test_help_lists_what_the_tables_have(command, names):
    said = " ".join(tiny.halfbyte(command, "--help").out.replace("│", " ").split())
    assert not [name for name in names if name not in said]


@pytest.mark.slow
def test_the_old_name_of_the_observer_is_understood(home, tmp_path):
    words = ("quantize", home / "model", "--method", "nearest", "--grid", "fp8-static", "--samples", 2, "--length", 64)
    for name, option in (("new", "--observer"), ("old", "--input-range")):
        assert tiny.halfbyte(*words, "--calibration", home / "text.txt", option, "mse", "-o", tmp_path / name).code == 0
    new, old = ((tmp_path / name / "recipe.yaml").read_text() for name in ("new", "old"))
    assert new == old
    assert "observer: mse" in new
    (tmp_path / "recipe.yaml").write_text(new.replace("observer: mse", "input_range: mse"))
    assert Recipe.load(tmp_path / "recipe.yaml") == Recipe.load(tmp_path / "new" / "recipe.yaml")


def test_version():
    assert tiny.halfbyte("--version").out.startswith("halfbyte 0.")


def test_quantize_says_what_comes_next(home, tmp_path):
    out = tmp_path / "two words"
    said = tiny.halfbyte("quantize", home / "model", "-o", out, "--method", "nearest", "--grid", "int4-g64")
    assert said.code == 0
    assert said.err == ""
    assert (
        f"{out}: nearest int4-g64 as compressed-tensors, 0.29 MB (was 0.73 MB), 4.256 bits per quantized weight"
        in said.out
    )
    assert "read back and verified" in said.out
    assert f"vllm (documented there): vllm serve '{out}'" in said.out
    assert f"what was lost: halfbyte eval '{out}' --against {home / 'model'}" in said.out


def test_json_is_all_there_is(home, tmp_path):
    commands = {
        "quantize": [
            "quantize",
            home / "model",
            "-o",
            tmp_path / "q",
            "--calibration",
            home / "text.txt",
            "--samples",
            "4",
            "--length",
            "64",
            "--json",
        ],
        "convert": ["convert", home / "gptq", "-o", tmp_path / "c", "--to", "awq", "--json"],
        "inspect": ["inspect", home / "awq", "--json"],
        "eval": [
            "eval",
            home / "awq",
            home / "gptq",
            "--against",
            home / "model",
            "--text",
            home / "text.txt",
            "--length",
            "64",
            "--windows",
            "2",
            "--json",
        ],
    }
    found = {name: json.loads(tiny.halfbyte(*words).out) for name, words in commands.items()}
    assert found["quantize"] == json.loads((tmp_path / "q" / "report.json").read_text())
    assert found["convert"]["recipe"]["method"] == "convert"
    assert found["inspect"]["container"] == "awq"
    assert len(found["eval"]["models"]) == 2


@pytest.mark.slow
def test_json_of_a_whole_process(home, tmp_path):
    done = process(
        "quantize",
        home / "model",
        "-o",
        tmp_path / "q",
        "--calibration",
        home / "text.txt",
        "--samples",
        "4",
        "--length",
        "64",
        "--json",
    )
    assert json.loads(done.stdout)["output"]["quantized"] == 14
    assert done.stderr == ""
    done = process(
        "eval",
        tmp_path / "q",
        "--against",
        home / "model",
        "--text",
        home / "text.txt",
        "--length",
        "64",
        "--windows",
        "2",
        "--json",
    )
    assert json.loads(done.stdout)["windows"] == 2
    assert done.stderr == ""
    done = process("inspect", tmp_path / "q", "--json")
    assert json.loads(done.stdout)["container"] == "compressed-tensors"
    assert done.stderr == ""


def test_inspect_of_the_original(home):
    found = json.loads(tiny.halfbyte("inspect", home / "model", "--json").out)
    assert found["container"] is None
    assert found["bits_per_parameter"] == 16
    assert found["grids"].keys() == {"bfloat16"}
    assert (
        found["parameters"]
        == sum(len(data) for data in tiny.weights(home / "model").values()) // 2
        - 8 // 2
        - header_bytes(home / "model") // 2
    )
    said = tiny.halfbyte("inspect", home / "model").out
    assert "llama, not quantized\n0.73 MB" in said


def header_bytes(folder: Path) -> int:
    return int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")


@pytest.mark.parametrize("container", CONTAINERS)
def test_inspect(container, home):
    path = home / container
    found = json.loads(tiny.halfbyte("inspect", path, "--json").out)
    report = json.loads((path / "report.json").read_text())
    assert found["container"] == container
    assert (
        found["size_bytes"]
        == report["output"]["size_bytes"]
        == len((path / "model.safetensors").read_bytes()) - 8 - header_bytes(path)
    )
    grid = next(name for name in found["grids"] if name.startswith("int4-g64"))
    assert found["grids"][grid]["tensors"] == 14
    assert found["grids"][grid]["bits_per_weight"] == pytest.approx(report["output"]["bits_per_weight"])
    assert found["weights"][0]["error"] == max(row["error"] for row in report["weights"])
    said = tiny.halfbyte("inspect", path, "--worst", "3").out
    assert container in said
    assert said.partition("lost most")[2].count(grid) == 3
    assert "lost most" not in tiny.halfbyte("inspect", path, "--worst", "0").out


def test_inspect_without_a_report(home, tmp_path):
    """Of another tool, or of ours with the small files lost."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((home / "gptq" / name).read_bytes())
    found = json.loads(tiny.halfbyte("inspect", tmp_path, "--json").out)
    assert found["container"] == "gptq"
    assert found["weights"] == []
    (tmp_path / "report.json").write_text('{"weights": 3}')
    assert tiny.halfbyte("inspect", tmp_path).code == 0


def test_convert(home, tmp_path):
    said = tiny.halfbyte("convert", home / "gptq", "-o", tmp_path / "awq", "--to", "awq")
    assert "every weight is bit for bit that of the source" in said.out
    assert tiny.halfbyte("convert", tmp_path / "awq", "-o", tmp_path / "gptq", "--to", "gptq").code == 0
    before, after = load_file(home / "gptq" / "model.safetensors"), load_file(tmp_path / "gptq" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_overrides(home, tmp_path):
    words = [
        "--override",
        "layers.0.*=int8-g64",
        "--override",
        "layers.1.mlp.*=keep",
        "--skip",
        "layers.1.self_attn.o_proj",
        "--head",
    ]
    assert (
        tiny.halfbyte(
            "quantize", home / "model", "-o", tmp_path / "q", "--method", "nearest", "--grid", "int4-g64", *words
        ).code
        == 0
    )
    report = json.loads((tmp_path / "q" / "report.json").read_text())
    grids = {row["name"].removeprefix("model."): row["grid"].removesuffix("-bf16") for row in report["weights"]}
    assert grids == {
        **{f"layers.0.{name}": "int8-g64" for name in LINEARS},
        **{f"layers.1.self_attn.{name}": "int4-g64" for name in ("k_proj", "q_proj", "v_proj")},
        "lm_head": "int4-g64",
    }  # fmt: skip
    assert report["kept"]["model.layers.1.self_attn.o_proj.weight"] == "skipped as asked"
    assert report["kept"]["model.layers.1.mlp.up_proj.weight"] == "kept as asked"


@pytest.mark.slow
def test_a_closed_pipe_is_no_error(home):
    command = f"{sys.executable} -m halfbyte inspect {home / 'gptq'} | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=tiny.ALONE)
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_demo(monkeypatch):
    drawn, draw = [], calibrate.calibration
    monkeypatch.setattr(calibrate, "calibration", lambda *asked: drawn.append(asked) or draw(*asked))
    rows = json.loads(tiny.halfbyte("demo", "--samples", "4", "--windows", "2", "--json").out)
    assert rows[0]["method"] == "original"
    by_name = {(r["method"], r["grid"]): r["kl"] for r in rows}
    assert all(kl > 0 for kl in list(by_name.values())[1:])
    assert by_name["smoothquant+gptq", "w8a8"] < by_name["gptq", "int4-g128"] < by_name["gptq", "int3-g128"]
    assert len(drawn) == 1, "the calibration text is made into tokens once for all methods"
