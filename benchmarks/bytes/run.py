"""Runs cases with the halfbyte that Python finds, in this one process, and prints what came of each as a line of JSON.

    PYTHONPATH=REVISION/src python benchmarks/bytes/run.py FOLDER < NAMES

FOLDER holds the inputs and is worked in. Of a case: how it ended, and a digest of every part of every file.
"""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from cases import SOURCES, Case, Command, every
from parts import Parts, digest, parts_of, told

SECONDS = 0.002
KILLED_AT = 5
"""Changes seen under the output's folder before the signal: blocks are being written then."""
TOKENS = 24


class Ended(NamedTuple):
    """How a command ended: its exit code, what it said on standard output, and, if it failed, its last words."""

    code: int
    out: str
    last: str


def halfbyte(words: Iterable[str]) -> Ended:
    """The command line, in this process."""
    from halfbyte.cli import main

    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(list(words))
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Ended(code, out.getvalue(), err.getvalue().strip().rpartition("\n")[2] if code else "")


def logits(path: str) -> Ended:
    """A digest of what the loaded model computes."""
    import torch

    import halfbyte

    tokens = torch.arange(1, TOKENS + 1)[None] * 7 % 256
    try:
        model = halfbyte.load(path)
    except halfbyte.HalfbyteError as error:
        return Ended(2, "", f"halfbyte: {error}")
    with torch.no_grad():
        found = model(input_ids=tokens, use_cache=False).logits
    if not found.isfinite().all():
        return Ended(1, "", "logits are not finite")
    about = {"dtype": str(found.dtype), "logits": digest(found.float().numpy().tobytes())}
    return Ended(0, json.dumps(about), "")


def killed(words: Command) -> Ended:
    """SIGKILL in the middle, and the same command again."""
    out = Path(words[words.index("-o") + 1])
    out.parent.mkdir(parents=True)
    command = [sys.executable, "-m", "halfbyte", *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seen: set[tuple[str, int]] = set()
    changes = 0
    while process.poll() is None and changes < KILLED_AT:
        now = sizes(out.parent)
        changes += now != seen
        seen = now
        time.sleep(SECONDS)
    process.send_signal(signal.SIGKILL)
    if process.wait() != -signal.SIGKILL or not seen or out.exists():
        return Ended(1, "", "the run was not ended in its middle")
    return halfbyte(words)


def sizes(folder: Path) -> set[tuple[str, int]]:
    found = set()
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # renamed as we look
            found.add((str(path), path.stat().st_size))
    return found


def same(one: str, other: str) -> Ended:
    """Whether two outputs of this case are."""
    a, b = (parts_of_folder(Path(folder)) for folder in (one, other))
    if unlike := sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name)):
        return Ended(1, "", f"{unlike[0]} differs between {one} and {other}")
    return Ended(0, "", "")


def parts_of_folder(folder: Path) -> dict[str, Parts]:
    return {str(path.relative_to(folder)): parts_of(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def command(words: Command) -> Ended:
    match words:
        case ("logits", path):
            return logits(path)
        case ("killed", *rest):
            return killed(tuple(rest))
        case ("same", one, other):
            return same(one, other)
    return halfbyte(words)


def need(words: Command) -> None:
    """Make the sources that a command names. Raises RuntimeError if one cannot be made."""
    for word in words:
        if word in SOURCES and not Path(word).exists():
            Path("sources").mkdir(exist_ok=True)
            ended = halfbyte(SOURCES[word])
            if ended.code:
                raise RuntimeError(f"{word} cannot be made: {ended.last}")


def result_of(case: Case) -> dict[str, Any]:
    """Files of the case and what its commands said, each as its parts; `ended` is the last exit code."""
    out = Path("out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    files, ended = {}, Ended(0, "", "")
    for number, words in enumerate(case.commands, 1):
        need(words)
        ended = command(words)
        if ended.code:
            break
        if ended.out.startswith("{"):
            files[f"what {words[0]} ({number}) says"] = told(ended.out)
    files |= parts_of_folder(out)
    return {"case": case.name, "code": ended.code, "last": ended.last, "files": files}


def main() -> None:
    names = set(sys.stdin.read().split("\n"))
    os.chdir(sys.argv[1])
    for case in every():
        if case.name in names:
            started = time.monotonic()
            result = result_of(case)
            print(json.dumps(result | {"seconds": round(time.monotonic() - started, 2)}), flush=True)


if __name__ == "__main__":
    main()
