"""A run that is cut off, at any moment and by any means: the same command goes on, and the result is the same bytes."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryFile

import filelock
import pytest

import tiny
from halfbyte.containers.folder import OutputFolder
from halfbyte.containers.safetensors import read_header
from halfbyte.models import placement, streams
from halfbyte.targets.gguf import file as gguf_file

SMALL = {"num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 128}
METHODS = ["nearest", "gptq", "awq+gptq", "guided+gptaq"]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("resume")
    tiny.make(home / "model", **SMALL)
    tiny.text(home / "text.txt")
    return home


class Whole(dict[str, dict[str, bytes]]):
    """The bytes of every method's run without interruption, as it is asked for."""

    def __init__(self, home: Path):
        super().__init__()
        self.home = home

    def __missing__(self, method: str) -> dict[str, bytes]:
        assert tiny.halfbyte(*words(self.home, method), "-o", self.home / method).code == 0
        return self.setdefault(method, tiny.weights(self.home / method))


@pytest.fixture(scope="module")
def whole(home) -> Whole:
    found = Whole(home)
    assert found["gptq"]  # which most compare with, when they have cut runs off by other means
    return found


def words(home: Path, method: str) -> list[object]:
    shards = home / "shards.yaml"  # shards so small that there are several
    shards.write_text("shard_gb: 0.0001\ngrid: int4-g32\n")
    return [
        "quantize",
        home / "model",
        "--recipe",
        shards,
        "--method",
        method,
        "--calibration",
        home / "text.txt",
        "--samples",
        "3",
        "--length",
        "64",
    ]


def cut_off(command: list[object], number: int, after: int) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", tiny.CUT, str(number), str(after), *map(str, command)],
        capture_output=True,
        text=True,
        env=tiny.ALONE,
    )


def check(out: Path, expected: dict[str, bytes]) -> None:
    assert tiny.weights(out) == expected
    assert len(expected) > 1
    assert [p.name for p in out.parent.iterdir() if p.name.startswith(out.name)] == [out.name]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "method"),
    [
        *((n, m) for n in (signal.SIGINT, signal.SIGKILL) for m in METHODS),
        (signal.SIGTERM, "gptq"),
        (signal.SIGHUP, "nearest"),
        (signal.SIGKILL, "rotate+gptq"),
    ],
)
def test_signals(number, method, home, whole, tmp_path):
    command = [*words(home, method), "-o", tmp_path / "out"]
    done = cut_off(command, number, after=2)
    if number != signal.SIGKILL:
        assert done.returncode == 128 + number
        assert done.stderr.strip().count("\n") == 0
        assert done.stderr.strip().startswith(
            "halfbyte: interrupted" + ("" if number == signal.SIGINT else f" by {number.name}")
        )
        assert done.stderr.strip().endswith("the same command goes on where it stopped")
        assert "Traceback" not in done.stderr
    else:
        assert done.returncode == -number
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial.jsonl").read_text().count("\n") >= 3
    assert tiny.halfbyte(*command).code == 0
    check(tmp_path / "out", whole[method])


@pytest.mark.slow
def test_ctrl_c_from_outside(home, whole, tmp_path):
    command = [*words(home, "gptq"), "-o", tmp_path / "out"]
    process = subprocess.Popen(
        [sys.executable, "-c", tiny.WAIT, *map(str, command)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=tiny.ALONE,
    )  # fmt: skip
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()
    assert tiny.halfbyte(*command).code == 0
    check(tmp_path / "out", whole["gptq"])


@pytest.mark.parametrize(
    "method",
    [
        "gptq",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("nearest", "awq+gptq", "guided+gptaq", "descent")),
    ],
)
def test_every_step(method, home, whole, tmp_path, monkeypatch):
    """One run, cut off again and again, before and after each record."""
    uncut, record, seen = whole[method], OutputFolder.record, 0

    def cut(self, value):
        nonlocal seen
        seen += 1
        if "rows" in value and seen % 2:
            raise KeyboardInterrupt
        record(self, value)
        if "rows" in value:
            raise KeyboardInterrupt

    monkeypatch.setattr(OutputFolder, "record", cut)
    command, cuts = [*words(home, method), "-o", tmp_path / "out"], 0
    while (result := tiny.halfbyte(*command)).code == 130:
        cuts += 1
        assert cuts < 60
    assert result.code == 0, result.err
    assert cuts >= 3
    check(tmp_path / "out", uncut)


def interrupt(home: Path, out: Path, monkeypatch, method: str = "gptq", *more: object) -> list[object]:
    """Leave the partial folder of a run with one record."""
    command = [*words(home, method), "-o", out, *more]
    with tiny.cut_after_each_record(monkeypatch):
        assert tiny.halfbyte(*command).code == 130
    return command


def test_a_resumed_run_does_not_solve_twice(home, whole, tmp_path, monkeypatch):
    command = interrupt(home, tmp_path / "out", monkeypatch)
    done, record = [], OutputFolder.record
    monkeypatch.setattr(OutputFolder, "record", lambda self, value: (done.append(value), record(self, value))[1])
    assert tiny.halfbyte(*command).code == 0
    assert [value["block"] for value in done if "block" in value] == ["model.layers.1", "model.layers.2"]
    check(tmp_path / "out", whole["gptq"])


@pytest.mark.parametrize("damage", ["half a record", "no record", "garbage"])
def test_a_torn_journal(damage, home, whole, tmp_path, monkeypatch):
    command = interrupt(home, tmp_path / "out", monkeypatch)
    journal = tmp_path / "out.partial.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(
        {"half a record": b"".join(lines)[:-40], "no record": b"", "garbage": lines[0] + b"\xff{\n" + lines[1]}[damage]
    )
    assert tiny.halfbyte(*command).code == 0
    check(tmp_path / "out", whole["gptq"])


@pytest.mark.parametrize("lose", [lambda shard: shard.write_bytes(b""), lambda shard: shard.unlink()])
def test_lost_files_are_made_again(lose, home, whole, tmp_path, monkeypatch):
    command = interrupt(home, tmp_path / "out", monkeypatch)
    lose(min((tmp_path / "out.partial").glob("*.safetensors")))
    assert tiny.halfbyte(*command).code == 0
    check(tmp_path / "out", whole["gptq"])


def test_lost_bytes_are_noticed(home, whole, tmp_path, monkeypatch):
    command = interrupt(home, tmp_path / "out", monkeypatch)
    shard = min((tmp_path / "out.partial").glob("*.safetensors"))
    entry = read_header(shard)["model.layers.0.mlp.down_proj.weight_packed"]
    with open(shard, "r+b") as file:
        file.seek(entry.offset)
        file.write(bytes(entry.size_bytes))
    tiny.refused(tiny.halfbyte(*command), "reads back as something else than was written")
    assert list(tmp_path.iterdir()) == []
    assert tiny.halfbyte(*command).code == 0
    check(tmp_path / "out", whole["gptq"])


@pytest.mark.slow
def test_another_request_starts_anew(home, whole, tmp_path, monkeypatch):
    interrupt(home, tmp_path / "out", monkeypatch, "awq+gptq")
    assert tiny.halfbyte(*words(home, "gptq"), "-o", tmp_path / "out").code == 0
    check(tmp_path / "out", whole["gptq"])


@pytest.mark.slow
def test_another_source_starts_anew(home, whole, tmp_path, monkeypatch):
    model = Path(shutil.copytree(home / "model", tmp_path / "model"))
    command = [*words(home, "gptq"), "-o", tmp_path / "out"]
    command[1] = model
    with monkeypatch.context() as patch:
        patch.setattr(OutputFolder, "record", stop_after(1))
        assert tiny.halfbyte(*command).code == 130
    shutil.rmtree(model)
    tiny.make(model, seed=1, **SMALL)
    assert tiny.halfbyte(*command).code == 0
    resumed = tiny.weights(tmp_path / "out")
    assert tiny.halfbyte(*command[:-1], tmp_path / "fresh").code == 0
    assert tiny.weights(tmp_path / "fresh") == resumed != whole["gptq"]


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_another_config_starts_anew(name, home, tmp_path, monkeypatch):
    model = Path(shutil.copytree(home / "model", tmp_path / "model"))
    command = [*words(home, "gptq"), "-o", tmp_path / "out"]
    command[1] = model
    with monkeypatch.context() as patch:
        patch.setattr(OutputFolder, "record", stop_after(1))
        assert tiny.halfbyte(*command).code == 130
    said = json.loads((model / name).read_text())
    (model / name).write_text(json.dumps(said | {"rms_norm_eps": 1e-2, "model_max_length": 99}))
    assert tiny.halfbyte(*command).code == 0
    assert tiny.halfbyte(*command[:-1], tmp_path / "fresh").code == 0
    assert tiny.weights(tmp_path / "fresh") == tiny.weights(tmp_path / "out")
    assert (tmp_path / "out" / name).read_text().count("99") == 1


def test_another_card_starts_anew(home, tmp_path, monkeypatch):
    """The licence in a GGUF is what the model's card says when the run ends."""
    model = Path(shutil.copytree(home / "model", tmp_path / "model"))
    (model / "README.md").write_text("---\nlicense: mit\n---\n")
    command = ["quantize", model, "--method", "nearest", "--grid", "Q8_0", "-o", tmp_path / "out.gguf"]
    with monkeypatch.context() as patch:
        patch.setattr(OutputFolder, "record", stop_after(1))
        assert tiny.halfbyte(*command).code == 130
    (model / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    assert tiny.halfbyte(*command).code == 0
    assert gguf_file.read(tmp_path / "out.gguf").metadata["general.license"].value == "apache-2.0"
    assert tiny.halfbyte(*command[:-1], tmp_path / "fresh.gguf").code == 0
    assert (tmp_path / "fresh.gguf").read_bytes() == (tmp_path / "out.gguf").read_bytes()


def stop_after(count: int):
    record, seen = OutputFolder.record, 0

    def stop(self, value):
        nonlocal seen
        record(self, value)
        seen += "rows" in value
        if seen >= count:
            raise KeyboardInterrupt

    return stop


def test_two_runs_at_once(home, tmp_path, monkeypatch):
    command = interrupt(home, tmp_path / "out", monkeypatch)
    with filelock.FileLock(tmp_path / "out.partial.lock"):
        before = tiny.weights(tmp_path / "out.partial")
        tiny.refused(tiny.halfbyte(*command), "another run is writing")
        assert tiny.weights(tmp_path / "out.partial") == before
    assert tiny.halfbyte(*command).code == 0


def test_overwrite_keeps_the_old_until_the_new_is_whole(home, whole, tmp_path, monkeypatch):
    out, before = tmp_path / "out", whole["nearest"]
    assert tiny.halfbyte(*words(home, "nearest"), "-o", out).code == 0
    command = interrupt(home, out, monkeypatch, "gptq", "--overwrite")
    assert tiny.weights(out) == before
    assert tiny.halfbyte(*command).code == 0
    check(out, whole["gptq"])


def test_a_crash_keeps_what_is_done(home, whole, tmp_path, monkeypatch):
    """What is no fault of the request, such as too little memory, may be mended: the journal stays."""
    record = OutputFolder.record

    def crash(self, value):
        record(self, value)
        if "rows" in value:
            raise MemoryError

    command = [*words(home, "gptq"), "-o", tmp_path / "out"]
    with monkeypatch.context() as patch:
        patch.setattr(OutputFolder, "record", crash)
        stopped = tiny.halfbyte(*command)
    assert stopped.code != 0
    assert stopped.err.count("\n") == 1
    assert "memory" in stopped.err
    assert (tmp_path / "out.partial.jsonl").exists()
    assert tiny.halfbyte(*command).code == 0
    check(tmp_path / "out", whole["gptq"])


@pytest.mark.parametrize("method", ["gptq", "gptaq"])
def test_hidden_states_beyond_the_budget_lie_in_files(home, tmp_path, method, monkeypatch):
    assert tiny.halfbyte(*words(home, method), "-o", tmp_path / "memory").code == 0
    monkeypatch.setattr(placement, "HIDDEN_BYTES", 0)
    files = []
    spilt = lambda dir: files.append(dir) or TemporaryFile(dir=dir)  # noqa: E731, SIM115
    monkeypatch.setattr(streams, "TemporaryFile", spilt)
    assert tiny.halfbyte(*words(home, method), "-o", tmp_path / "files").code == 0
    assert set(files) == {tmp_path.resolve()}
    assert tiny.weights(tmp_path / "files") == tiny.weights(tmp_path / "memory")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["files", "memory"]
