"""What runs of this tree take beside the same runs of another revision: seconds, and memory.

    python benchmarks/paired.py main
    python benchmarks/paired.py v0.1 --rounds 5 --model smollm2=/tmp/smollm2 -k 'gptq|Q4_K_M'

Whole processes, in turn, since whatever else is on the machine then slows both. The first round is not counted: it
compiles modules and kernels. Of the others the best counts, which others on the machine disturbed least.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from measure import Cost, machine, run

from halfbyte import demo

REPOSITORY = Path(__file__).parents[1]
RUNS = {
    "nearest int4-g64": ("--method", "nearest", "--grid", "int4-g64"),
    "gptq int4-g64": ("--method", "gptq", "--grid", "int4-g64"),
    "awq int4-g64": ("--method", "awq", "--grid", "int4-g64"),
    "nearest Q4_K_M": ("--method", "nearest", "--to", "gguf", "--grid", "Q4_K_M"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", help="a commit, which `git worktree` lays out for as long as this runs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--model", action="append", default=[], metavar="NAME=PATH", help="beside bookworm-6m")
    parser.add_argument("-k", dest="pattern", default="", help="only 'NAME RUN' that match this regular expression")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the worktree goes then, too
    models = {"bookworm-6m": str(demo.MODEL)} | dict(words.split("=", 1) for words in asked.model)
    commit = _git("rev-parse", "--short", asked.revision)
    print(f"{commit} and this tree; {machine()}; {os.environ.get('OMP_NUM_THREADS', 'all')} threads; {asked.samples} "
          f"samples; the best of {asked.rounds} rounds\n")  # fmt: skip
    print(f"| model | run | wall, s: {commit} | here | ratio | processor, s: {commit} | here | ratio "
          f"| peak, MB: {commit} | here | ratio |")  # fmt: skip
    print("|---|---|" + "---:|" * 9)
    with worktree(commit) as other:
        for name, model in models.items():
            for title, words in RUNS.items():
                if re.search(asked.pattern, f"{name} {title}"):
                    command = ["quantize", model, *words, "--samples", str(asked.samples)]
                    before, after = paired(command, (other / "src", REPOSITORY / "src"), asked.rounds)
                    print(f"| {name} | {title} | {' | '.join(cells(before, after))} |", flush=True)


@contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """The repository as it was, in a folder that is there for as long as this lasts."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "tree")
        _git("worktree", "add", "--quiet", "--detach", str(place), commit)
        try:
            yield place
        finally:
            _git("worktree", "remove", "--force", str(place))


def paired(command: list[str], sources: tuple[Path, Path], rounds: int) -> tuple[Cost, Cost]:
    """The best of each, of whole processes in turn."""
    costs: dict[Path, list[Cost]] = {source: [] for source in sources}
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "halfbyte", *command, "-o", f"{folder}/out", "--overwrite"]
        for number in range(1 + rounds):
            for source in sources if number % 2 else reversed(sources):
                cost = run(words, PYTHONPATH=str(source))
                costs[source] += [cost] if number else []
    before, after = (
        Cost(min(c.wall for c in taken), min(c.cpu for c in taken), min(c.peak_mb for c in taken))
        for taken in costs.values()
    )
    return before, after


def cells(before: Cost, after: Cost) -> Iterator[str]:
    for one, other, digits in (
        (before.wall, after.wall, 2),
        (before.cpu, after.cpu, 2),
        (before.peak_mb, after.peak_mb, 0),
    ):
        yield from (f"{one:.{digits}f}", f"{other:.{digits}f}", f"{other / one:.2f}")


def _git(*words: str) -> str:
    """What it prints."""
    command = ["git", "-C", str(REPOSITORY), *words]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


if __name__ == "__main__":
    main()
