"""What methods without calibration write has the bytes that it had (goldens/bytes.json), on processors that
fuse multiplication and addition, as far as that was tried (docs/processors.md).

Where they have to change: `python benchmarks/same_bytes.py --write-goldens`, and the commit says why.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tiny

REPOSITORY = Path(__file__).parents[1]
TOOLS = REPOSITORY / "benchmarks/bytes"
METHODS = ("minmax", "nearest", "imatrix")
"""Of the cases: each is a test, as workers share them out."""


def run(*words: object, given: str = "") -> str:
    paths = os.pathsep.join(str(REPOSITORY / folder) for folder in ("src", "tests"))
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, input=given, capture_output=True, text=True, env={**tiny.ALONE, "PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bytes")
    run(TOOLS / "inputs.py", folder, "--golden")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_bytes_without_calibration_are_those_that_they_were(method, inputs):
    every = json.loads((REPOSITORY / "tests/goldens/bytes.json").read_text())
    goldens = {case: files for case, files in every.items() if case.startswith(f"{method} ")}
    results = list(map(json.loads, run(TOOLS / "run.py", inputs, given="\n".join(goldens)).splitlines()))
    assert goldens
    assert [result["case"] for result in results if result["code"]] == []
    written = {
        result["case"]: {name: parts.get("all of it") for name, parts in result["files"].items()} for result in results
    }
    assert written.keys() == goldens.keys()
    unlike = [
        (case, file) for case, files in goldens.items() for file in files if written[case].get(file) != files[file]
    ]
    assert unlike == []


def test_every_case_is_of_one_of_these_methods():
    cases = json.loads((REPOSITORY / "tests/goldens/bytes.json").read_text())
    assert {case.partition(" ")[0] for case in cases} == {*METHODS}
