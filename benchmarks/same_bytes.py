"""Whether two revisions write the same bytes: every method, scheme, container, preset, family, and what else there is.

    python benchmarks/same_bytes.py main                  # the working tree against main
    python benchmarks/same_bytes.py main --quick          # some cases of each kind
    python benchmarks/same_bytes.py main -k 'gptq|awq'    # cases whose names match this
    python benchmarks/same_bytes.py v1 v2 --refusals      # two commits; what was refused on both sides, too
    python benchmarks/same_bytes.py --write-goldens       # tests/goldens/bytes.json, from the working tree

Each revision's package is laid into the cache and run on the same machine with as many threads. What came of a case is
kept there for as long as package, machine, libraries, inputs and the case itself are the same. Exit code 1: something
differs, or a case does not end as it should.
"""

import argparse
import hashlib
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, cast

from bytes import cases
from bytes.cases import Case

REPOSITORY = Path(__file__).parents[1]
TOOLS = Path(__file__).parent / "bytes"
GOLDENS = REPOSITORY / "tests/goldens/bytes.json"
LIBRARIES = ("torch", "transformers", "numpy", "numba", "safetensors", "tokenizers", "gguf")
CHOICES = ("ATEN_CPU_CAPABILITY", "NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES")
"""Variables that change which instructions are used."""
ABOUT_PROCESSOR = ("model name", "flags", "Features")
"""Of /proc/cpuinfo."""
WHOLE = "all of it"
REFUSED = 2
"""The exit code."""
CACHE = Path.home() / ".cache/halfbyte/same_bytes"
GOLDEN = re.compile(r"\.(safetensors|gguf)$|(^|/)config\.json$")
"""Files that goldens hold. Errors in a report are sums, whose last digits depend on the processor."""

Result = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", nargs="?", help="a commit")
    parser.add_argument("after", nargs="?", help="another; the working tree if left out")
    parser.add_argument("-k", dest="pattern", default="", help="only cases whose names match this regular expression")
    parser.add_argument("--quick", action="store_true", help=f"only every {cases.QUICK}th case of each kind")
    parser.add_argument("--leave-out", default="$^", help="files that are not compared, such as 'report.json|README'")
    parser.add_argument("--cache", type=Path, default=CACHE, help="a folder that may be deleted at any time")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--list", action="store_true", help="name the cases, and run none")
    parser.add_argument("--refusals", action="store_true", help="say what was refused on both sides")
    parser.add_argument("--write-goldens", action="store_true")
    asked = parser.parse_args()
    chosen = [case for case in cases.every() if re.search(asked.pattern, case.name)]
    chosen = cases.quick(chosen) if asked.quick else chosen
    if asked.list:
        print(*(case.name for case in chosen), sep="\n")
        return 0
    asked.cache.mkdir(parents=True, exist_ok=True)
    bench = Bench(asked.cache.resolve(), asked.threads)
    if asked.write_goldens:
        return write_goldens(bench)
    if asked.before is None:
        parser.error("which commit is the working tree to be compared with?")
    before, after = (bench.results(revision, chosen) for revision in (asked.before, asked.after))
    return tell(chosen, before, after, re.compile(asked.leave_out), asked.refusals)


class Bench:
    """A cache: packages by their content, inputs by what makes them, and results by all that they depend on."""

    def __init__(self, cache: Path, threads: int):
        self.cache, self.threads = cache, threads
        self.inputs = self._inputs()
        self.digests = {str(path.relative_to(self.inputs)): folder_digest(path) for path in self._named()}
        choices = [os.environ.get(name) for name in CHOICES]
        self.machine = digest(processor(), threads, sys.version, *map(version, LIBRARIES), *choices)

    def results(self, revision: str | None, chosen: list[Case]) -> dict[str, Result]:
        """By the names of cases; those that are not known yet are run."""
        package = self._package(revision)
        kept = self.cache / "results" / f"{package.name}-{self.machine}.jsonl"
        kept.parent.mkdir(exist_ok=True)
        known = {line["key"]: line for line in map(json.loads, whole_lines(kept))}
        keys = {case.name: self._key(case.commands) for case in chosen}
        missing = [case.name for case in chosen if keys[case.name] not in known]
        print(f"{revision or 'working tree'}: {len(chosen)} cases, {len(missing)} of them to run", file=sys.stderr)
        with open(kept, "ab", buffering=0) as file:  # a line at once: others may write into the same cache
            for result in self._run(package, missing):
                key = keys[result["case"]]
                known[key] = result
                file.write(json.dumps(result | {"key": key}).encode() + b"\n")
        return {case.name: known[keys[case.name]] for case in chosen}

    def _run(self, package: Path, names: list[str]) -> Iterator[Result]:
        """In one process, or one more after each case that ends it."""
        left = list(names)
        while left:
            with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryFile("w+") as errors:
                shutil.copytree(self.inputs, scratch, dirs_exist_ok=True)
                command = [sys.executable, str(TOOLS / "run.py"), scratch]
                pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
                process = subprocess.Popen(command, text=True, env=self._environment(package), **pipes)
                with cast(IO[str], process.stdin) as told:
                    told.write("\n".join(left))
                for line in cast(IO[str], process.stdout):
                    result = json.loads(line)
                    left.remove(result["case"])
                    done = f"{len(names) - len(left)}/{len(names)}"
                    print(f"{done} {result['seconds']:.1f} s {result['case']}", file=sys.stderr)
                    yield result
                if process.wait() == 0:
                    return
                errors.seek(0)
                last = "the process ended: " + errors.read().strip().rpartition("\n")[2]
                yield {"case": left.pop(0), "code": process.returncode, "last": last, "files": {}}

    def _environment(self, package: Path) -> dict[str, str]:
        threads = str(self.threads)
        ours = {"PYTHONPATH": str(package), "NUMBA_CACHE_DIR": str(self.cache / "kernels"), "HF_HUB_OFFLINE": "1"}
        return {**os.environ, **ours, "OMP_NUM_THREADS": threads, "NUMBA_NUM_THREADS": threads}

    def _package(self, revision: str | None) -> Path:
        """The folder that holds `halfbyte` as a commit, or the working tree, has it."""
        with tempfile.TemporaryDirectory(dir=self.cache) as scratch:
            fresh = Path(scratch) / "src"
            if revision is None:
                shutil.copytree(REPOSITORY / "src", fresh, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                command = ["git", "-C", str(REPOSITORY), "archive", revision, "src"]
                packed = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
                with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
                    archive.extractall(scratch, filter="data")
            place = self.cache / "packages" / folder_digest(fresh)
            place.parent.mkdir(exist_ok=True)
            if not place.exists():
                fresh.rename(place)
        return place

    def _inputs(self) -> Path:
        """Made once for the same makers."""
        makers = [TOOLS / "inputs.py", REPOSITORY / "tests/tiny.py", REPOSITORY / "tests/models/families.py"]
        read = [REPOSITORY / "src/halfbyte/demo", REPOSITORY / "tests/goldens/folders"]
        place = self.cache / "inputs" / digest(*map(folder_digest, (*makers, *read)), *map(version, LIBRARIES))
        if not place.exists():
            place.parent.mkdir(exist_ok=True)
            paths = os.pathsep.join([str(REPOSITORY / "src"), str(REPOSITORY / "tests")])
            with tempfile.TemporaryDirectory(dir=self.cache) as scratch:
                command = [sys.executable, TOOLS / "inputs.py", f"{scratch}/inputs"]
                environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
                subprocess.run(command, check=True, env=environment, stderr=subprocess.DEVNULL)
                (Path(scratch) / "inputs").rename(place)
        return place

    def _named(self) -> Iterator[Path]:
        for path in self.inputs.iterdir():
            yield from path.iterdir() if path.name in ("families", "goldens") else [path]

    def _key(self, commands: Iterable[cases.Command]) -> str:
        """Of all that a case depends on beside package and machine: its words, what they name, and how it is run."""
        words = [[self._named_by(word) for word in command] for command in commands]
        return digest(words, *((TOOLS / name).read_text() for name in ("run.py", "parts.py")))

    def _named_by(self, word: str) -> list[str]:
        if word in cases.SOURCES:
            return [word, self._key([tuple(other for other in cases.SOURCES[word] if other != word)])]
        return [word, self.digests.get(word, "")]


def whole_lines(path: Path) -> list[str]:
    """Without one that is being written."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return text[: text.rfind("\n") + 1].splitlines()


def processor() -> str:
    """What its instructions are."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return "".join(sorted({line for line in file if line.startswith(ABOUT_PROCESSOR)}))
    except OSError:
        return platform.platform() + platform.processor()


def digest(*values: object) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def folder_digest(path: Path) -> str:
    """Of the names and contents of all files."""
    found = path.rglob("*") if path.is_dir() else [path]
    files = sorted(p for p in found if p.is_file() and "__pycache__" not in p.parts)
    return digest([[str(p.relative_to(path)), hashlib.sha256(p.read_bytes()).hexdigest()] for p in files])


def tell(
    chosen: list[Case],
    before: dict[str, Result],
    after: dict[str, Result],
    left_out: re.Pattern,
    refusals: bool,
) -> int:
    """Print what differs and what does not end as it should; the exit code."""
    differing = {case.name: difference(before[case.name], after[case.name], left_out) for case in chosen}
    differing = {name: said for name, said in differing.items() if said}
    broken = {case.name: wrong(case, before[case.name]) or wrong(case, after[case.name]) for case in chosen}
    broken = {name: said for name, said in broken.items() if said}
    refused = [case.name for case in chosen if case.may_refuse and after[case.name]["code"] == REFUSED]
    if refusals:
        print(*(f"refused: {name}: {after[name]['last']}" for name in refused), sep="\n")
    for name, said in broken.items():
        print(f"ends as it should not: {name}: {said}")
    for name, said in differing.items():
        print(f"differs: {name}: {said}")
    same = len(chosen) - len(differing)
    print(f"{len(chosen)} cases, {same} the same, {len(differing)} differ, {len(broken)} end as they should not;")
    print(f"{len(refused)} are refused, as they may be (--refusals says why)")
    return int(bool(differing or broken))


def wrong(case: Case, result: Result) -> str | None:
    """What is wrong with a case in itself: it is refused where it must not be, or crashed, or nothing came of it."""
    if result["code"] and not (result["code"] == REFUSED and case.may_refuse):
        return f"exit code {result['code']}: {result['last']}"
    return None if result["code"] or result["files"] else "nothing came of it"


def difference(a: Result, b: Result, left_out: re.Pattern) -> str | None:
    """File by file, the first part that differs; None if none does."""
    if (a["code"], a["last"]) != (b["code"], b["last"]):
        return f"{ending(a)}, then {ending(b)}"
    names = [name for name in dict.fromkeys([*a["files"], *b["files"]]) if not left_out.search(name)]
    said = [(name, unlike(a["files"].get(name), b["files"].get(name))) for name in names]
    return "; ".join(f"{name}: {words}" for name, words in said if words) or None


def unlike(one: dict[str, str] | None, other: dict[str, str] | None) -> str | None:
    """What differs between two files."""
    if one is None or other is None:
        return f"there {'after' if one is None else 'before'} only"
    parts = [part for part in dict.fromkeys([*one, *other]) if one.get(part) != other.get(part)]
    if not parts:
        return None
    return parts[0] + (f" and {len(parts) - 1} more" if parts[1:] else "")


def ending(result: Result) -> str:
    return f"exit code {result['code']} ({result['last']})" if result["code"] else "written"


def write_goldens(bench: Bench) -> int:
    """Digests of the files of cases without calibration."""
    chosen = cases.golden()
    results = bench.results(None, chosen)
    if broken := [name for name, result in results.items() if result["code"]]:
        print(f"no goldens are written: {broken[0]} ends with {ending(results[broken[0]])}")
        return 1
    lines = [f"{json.dumps(name)}: {json.dumps(golden_files(results[name]))}" for name in sorted(results)]
    GOLDENS.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print(f"{GOLDENS}: {len(lines)} cases")
    return 0


def golden_files(result: Result) -> dict[str, str]:
    return {name: parts[WHOLE] for name, parts in result["files"].items() if GOLDEN.search(name)}


if __name__ == "__main__":
    sys.exit(main())
