"""Windows and macOS, as far as Linux can be them: nothing of Unix alone is asked for, no open file is moved, text is
UTF-8 with bare ends of lines."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import halfbyte
import tiny

SOURCES = sorted(Path(halfbyte.__file__).parent.rglob("*.py"))
UNIX = {
    "fcntl",
    "resource",
    "pwd",
    "grp",
    "termios",
    "os.pwrite",
    "os.pread",
    "os.fork",
    "os.mkfifo",
    "os.getuid",
    "signal.SIGHUP",
    "signal.SIGKILL",
}
TEXT = {"write_text": {"encoding", "newline"}, "read_text": {"encoding"}}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(SOURCES[0].parent)))
def test_nothing_of_one_system_alone(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        names += [ast.unparse(node)] if isinstance(node, ast.Attribute) else []
        assert not UNIX & set(names), f"line {node.lineno}"
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.expr)
        ):
            said = {keyword.arg for keyword in node.keywords}
            own = ast.unparse(node.func) == "files.read_text"
            assert own or TEXT.get(node.func.attr, set()) <= said, (
                f"line {node.lineno} leaves encoding or newline to the system"
            )


def elsewhere(after: int, *commands: list[object]) -> subprocess.CompletedProcess:
    words = [
        sys.executable,
        "-X",
        "warn_default_encoding",
        Path(__file__).with_name("elsewhere.py"),
        str(after),
        json.dumps([[str(w) for w in c] for c in commands]),
    ]
    env = {**tiny.ALONE, "PYTHONIOENCODING": "cp1252"}
    return subprocess.run(list(map(str, words)), capture_output=True, env=env)


@pytest.mark.slow
def test_all_that_a_user_does(tmp_path):
    """Quantize, go on after the process was ended, convert, evaluate, a GGUF and what goes into it; in a folder with a
    name of many letters."""
    home = tmp_path / "Größe 模型 é" / ("long " * 20).strip()
    tiny.make(home / "model", num_hidden_layers=2, hidden_size=64, intermediate_size=128)
    tiny.text(home / "text.txt")
    sampling = ["--calibration", home / "text.txt", "--samples", "2", "--length", "32"]
    gptq = ["quantize", home / "model", "--method", "gptq", "--grid", "int4-g32", *sampling, "-o"]
    cut = elsewhere(3, [*gptq, home / "out"])
    assert cut.returncode == 9, cut.stderr.decode()
    assert (home / "out.partial.jsonl").exists()
    done = elsewhere(
        0,
        [*gptq, home / "out"],
        [*gptq, home / "out", "--overwrite", "--seed", "1"],
        [*gptq, home / "out", "--overwrite"],
        ["convert", home / "out", "--to", "gptq", "-o", home / "gptq"],
        [
            "eval",
            home / "out",
            "--against",
            home / "model",
            "--text",
            home / "text.txt",
            "--length",
            "32",
            "--windows",
            "2",
        ],
        ["inspect", home / "gptq"],
        ["imatrix", home / "model", "-o", home / "i.gguf", *sampling],
        [
            "quantize",
            home / "model",
            "--grid",
            "Q4_0",
            "--method",
            "imatrix",
            "--imatrix",
            home / "i.gguf",
            "-o",
            home / "out.gguf",
        ],
        ["quantize", home / "model", "--grid", "Q8_0", "--method", "nearest", "-o", home / "out.gguf", "--overwrite"],
        ["kv", home / "out", "-o", home / "kv", *sampling],
        ["dequantize", home / "out.gguf", "-o", home / "plain"],
    )
    assert done.returncode == 0, done.stderr.decode()
    assert not [p for p in home.iterdir() if ".partial" in p.name or "halfbyte-old" in p.name]
    assert tiny.halfbyte(*gptq, home / "here").code == 0
    assert tiny.weights(home / "here") == tiny.weights(home / "out")
    for path in (*home.rglob("*.json"), *home.rglob("*.yaml"), *home.rglob("*.md"), *home.rglob("*Modelfile")):
        assert b"\r" not in path.read_bytes()
