"""A run that is killed before any single change to the file system: old or new is whole under its name, and the same
command ends well.

From the change that it is killed before nothing changes any more, as after SIGKILL: cleaning up is refused as well.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock
import pytest

import tiny
from halfbyte.containers.place import BESIDE, PICTURE

SMALL = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 128}
CHANGES = {"os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}


class Killed(BaseException):
    """In place of the signal: nothing but the test catches it."""


class Killer:
    """Counts the changes under a folder, and lets none happen from one of them on."""

    def __init__(self, folder: Path):
        self.folder, self.seen, self.before, self.armed = str(folder.resolve()), 0, 0, False
        sys.addaudithook(self._audit)

    def _audit(self, event: str, args: tuple) -> None:
        if self.armed and self._changes(event, args):
            self.seen += 1
            if self.before and self.seen >= self.before:
                raise Killed

    def _changes(self, event: str, args: tuple) -> bool:
        if event == "open":
            path, mode, flags = args
            writes = (
                bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
                if isinstance(flags, int)
                else "r" not in (mode or "r")
            )
            return writes and self._inside(path) and flags & getattr(os, "O_TMPFILE", 0) != getattr(os, "O_TMPFILE", -1)
        return event in CHANGES and (
            self._inside(args[0]) or (isinstance(args[-1], int) and args[-1] >= 0)
        )  # or by a folder's descriptor

    def _inside(self, path: object) -> bool:
        return isinstance(path, str | os.PathLike) and os.path.abspath(path).startswith(self.folder)

    @contextmanager
    def kills(self, before: int) -> Iterator[None]:
        self.seen, self.before, self.armed = 0, before, True
        try:
            yield
        finally:
            self.armed = False


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("kills")
    tiny.make(home / "model", **SMALL)
    tiny.text(home / "text.txt")
    return home


@pytest.fixture(scope="module")
def killer(tmp_path_factory) -> Killer:
    return Killer(tmp_path_factory.mktemp("killed"))


@pytest.fixture
def place(killer, request, monkeypatch) -> Path:
    """A folder under the killer's eyes; locks of a run that was killed are let go, as the system does."""
    held, acquire = [], filelock.FileLock.acquire
    monkeypatch.setattr(
        filelock.FileLock,
        "acquire",
        lambda lock, *args, **kwargs: (held.append(lock), acquire(lock, *args, **kwargs))[1],
    )
    killer.release = lambda: [lock.release(force=True) for lock in held if lock.is_locked]
    folder = Path(killer.folder) / request.node.name.replace("/", "-")
    folder.mkdir()
    return folder


def contents(path: Path) -> dict[str, bytes]:
    """Every file of an output, but for what says how long it took."""
    files = sorted(path.rglob("*") if path.is_dir() else path.parent.glob(f"{path.stem}.*"))
    timed = ("README.md", "report.json", ".jsonl", ".lock")
    return {p.name: p.read_bytes() for p in files if p.is_file() and not p.name.endswith(timed)}


def sweep(
    killer: Killer,
    place: Path,
    command: list[object],
    prepare: Callable[[], object],
    check: Callable[[bool], None],
) -> int:
    """Kill the command before its first change, its second, and so on, until it ends; each time run it again. How many
    changes it has."""
    for number in range(1, 200):
        for path in sorted(place.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        prepare()
        try:
            with killer.kills(number):
                result = tiny.halfbyte(*command)
        except Killed:
            killer.release()
            check(False)
            again = tiny.halfbyte(*command)
            assert again.code == 0, (number, again.err, sorted(place.rglob("*")))
            check(True)
        else:
            assert result.code == 0, result.err
            return number - 1
    raise AssertionError("it never ends")


def words_of(home: Path, what: str) -> list[object]:
    method, grid = {"folder": ("nearest", "int4-g32"), "calibrated": ("gptq", "int4-g32"), "gguf": ("nearest", "Q4_0")}[
        what
    ]
    sampling = ["--calibration", home / "text.txt", "--samples", "2", "--length", "32"] if what == "calibrated" else []
    return ["quantize", home / "model", "--method", method, "--grid", grid, *sampling]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["folder", "calibrated", "gguf"])
def test_a_new_output(what, home, killer, place, tmp_path):
    name = "out.gguf" if what == "gguf" else "out"
    command = words_of(home, what)
    assert tiny.halfbyte(*command, "-o", tmp_path / name).code == 0
    new = contents(tmp_path / name)

    def check(done: bool) -> None:
        out = place / name
        if done or out.exists():
            assert (
                contents(out)["out.gguf" if what == "gguf" else "model.safetensors"]
                == new["out.gguf" if what == "gguf" else "model.safetensors"]
            )
        if done:
            assert contents(out) == new
            assert {p.name for p in place.iterdir()} == (
                {name, *(f"out.{end}" for end in BESIDE if end != PICTURE)} if what == "gguf" else {name}
            )

    assert sweep(killer, place, [*command, "-o", place / name], lambda: None, check) > 10


@pytest.mark.slow
@pytest.mark.parametrize("what", ["folder", "gguf"])
def test_an_output_that_is_replaced(what, home, killer, place, tmp_path):
    name, main = ("out.gguf", "out.gguf") if what == "gguf" else ("out", "model.safetensors")
    command = words_of(home, what)
    before = [*command[:-1], "Q8_0" if what == "gguf" else "int8-g32"]
    for folder, line in (("old", before), ("new", command)):
        (tmp_path / folder).mkdir()
        assert tiny.halfbyte(*line, "-o", tmp_path / folder / name).code == 0
    old, new = contents(tmp_path / "old" / name), contents(tmp_path / "new" / name)

    def prepare() -> None:  # as the command left it, which is run once
        shutil.copytree(tmp_path / "old", place, dirs_exist_ok=True)

    def check(done: bool) -> None:
        out = place / name
        if not out.exists():  # a folder cannot be replaced in one step
            out = place / "out.halfbyte-old"
            assert not done
            assert contents(out) == old
            return
        found = contents(out)
        assert found[main] == (new if done else found)[main]
        assert found[main] in (old[main], new[main])
        report = out.with_name("out.report.json") if what == "gguf" else out / "report.json"
        if report.exists():
            said = json.loads(report.read_text())["recipe"]["grid"]
            assert said == (command if found[main] == new[main] else before)[-1]
        if done:
            assert found == new
            assert report.exists()
            assert {p.name for p in place.iterdir()} == (
                {name, *(f"out.{end}" for end in BESIDE if end != PICTURE)} if what == "gguf" else {name}
            )

    words = [*command, "-o", place / name, "--overwrite"]
    assert sweep(killer, place, words, prepare, check) > 20


@pytest.mark.slow
def test_a_cache(home, killer, place, tmp_path):
    command = ["kv", home / "model", "--calibration", home / "text.txt", "--samples", "2", "--length", "32"]
    assert tiny.halfbyte(*command, "-o", tmp_path / "out").code == 0
    new = contents(tmp_path / "out")

    def check(done: bool) -> None:
        if done or (place / "out").exists():
            found = contents(place / "out")
            assert {n: found[n] for n in new} == new
        if done:
            assert [p.name for p in place.iterdir()] == ["out"]

    assert sweep(killer, place, [*command, "-o", place / "out"], lambda: None, check) > 10


@pytest.mark.slow
def test_an_importance_matrix(home, killer, place, tmp_path):
    command = ["imatrix", home / "model", "--calibration", home / "text.txt", "--samples", "2", "--length", "32"]
    assert tiny.halfbyte(*command, "-o", tmp_path / "i.gguf").code == 0
    new = (tmp_path / "i.gguf").read_bytes()

    def check(done: bool) -> None:
        assert not (place / "i.gguf").exists() or (place / "i.gguf").read_bytes() in (new, b"old")
        if done:
            assert (place / "i.gguf").read_bytes() == new
            assert [p.name for p in place.iterdir()] == ["i.gguf"]

    assert sweep(killer, place, [*command, "-o", place / "i.gguf"], lambda: None, check) >= 3
    assert (
        sweep(
            killer,
            place,
            [*command, "-o", place / "i.gguf", "--overwrite"],
            lambda: (place / "i.gguf").write_bytes(b"old"),
            check,
        )
        >= 3
    )
