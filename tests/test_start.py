"""What a start costs: wrong words are refused before torch is imported, and threads that wait leave the processor to others."""

import subprocess
import sys

import pytest

from halfbyte import demo

COMMAND = """
import os, sys
from halfbyte.cli import main
try:
    main(sys.argv[1:])
finally:
    print("torch" in sys.modules, os.environ["OMP_WAIT_POLICY"], file=sys.stderr)
"""


def start(*words: str) -> tuple[int, list[str]]:
    """The exit status of a process of its own, and its last lines."""
    done = subprocess.run([sys.executable, "-c", COMMAND, *words], capture_output=True, text=True, check=False)
    return done.returncode, done.stderr.splitlines()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "needs a model and an output folder"),
        (["-o", "x", "--method", "gtpq"], "gptq"),
        (["-o", "x", "--method", "gptq+awq"], "put transforms first"),
        (["-o", "x", "--samples", "0"], "calibration.samples"),
        (["-o", "x", "--override", "no-sign"], "PATTERN=GRID"),
    ],
)
def test_wrong_words_are_refused_without_torch(words, said):
    status, lines = start("quantize", str(demo.MODEL), *words)
    assert status == 2
    assert said in lines[-2]
    assert lines[-1] == "False PASSIVE"


def test_help_needs_no_torch():
    assert start("--help") == (0, ["False PASSIVE"])
