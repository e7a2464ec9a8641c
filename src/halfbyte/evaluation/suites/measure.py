"""The original and what was made of it, prompt by prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from halfbyte.evaluation.paired import paired
from halfbyte.evaluation.suites import asking
from halfbyte.evaluation.suites.answers import Answer, answers
from halfbyte.evaluation.suites.asking import Asked
from halfbyte.evaluation.suites.suite import Suite
from halfbyte.evaluation.whole import dtype_for
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.progress import Progress, silent


@dataclass(frozen=True)
class SuiteResults:
    """A row for each suite, of each model."""

    models: list[list[dict[str, Any]]]
    dtype: torch.dtype
    warnings: list[str]


def measure(
    checkpoints: Sequence[Checkpoint],
    suites: Sequence[Suite],
    most: int | None,
    device: torch.device,
    progress: Progress = silent,
) -> SuiteResults:
    """All models on all suites, the first being the original; `most`: tokens of an answer, in place of each prompt's
    own. One model is in memory at a time."""
    reading = asking.read(checkpoints[0], [prompt for suite in suites for prompt in suite.prompts], most)
    dtype = dtype_for(checkpoints[0], device)
    by_model = []
    for number, checkpoint in enumerate(checkpoints):
        label = "answering: the original" if number == 0 else f"answering: {checkpoint.path.name}"
        by_model.append(
            answers(
                checkpoint,
                reading,
                dtype,
                device,
                lambda done, number=number, label=label: progress(label, number + done, len(checkpoints)),
            )
        )
    models = [[_row(suite, reading.asked, by_model[0], candidate) for suite in suites] for candidate in by_model[1:]]
    return SuiteResults(models, dtype, reading.warnings)


def _row(suite: Suite, asked: Sequence[Asked], original: Sequence[Answer], model: Sequence[Answer]) -> dict[str, Any]:
    """One model on one suite."""
    places = {id(prompt) for prompt in suite.prompts}
    rows = [row for row in zip(asked, original, model, strict=True) if id(row[0].prompt) in places]
    judged = [(one, a, b) for one, a, b in rows if a.passes is not None]
    free = [(a, b) for _, a, b in rows if a.choice is None]
    parts = [_parting(a.tokens, b.tokens) for a, b in free]
    parted = [at for at in parts if at is not None]
    return {
        "name": suite.name,
        "prompts": len(suite.prompts),
        **paired([float(bool(a.passes)) for _, a, _ in judged], [float(bool(b.passes)) for _, _, b in judged]),
        "changed": sum(a.choice != b.choice for _, a, b in rows if a.choice is not None),
        "parts_after": parts,
        "median_parting": float(median(parted)) if parted else None,
        "loops": (sum(a.loops for a, _ in free), sum(b.loops for _, b in free)),
        "flips": [
            {
                "line": one.prompt.line,
                "prompt": one.prompt.in_short,
                "original": a.text,
                "model": b.text,
                "lost": bool(a.passes),
            }
            for one, a, b in judged
            if a.passes != b.passes
        ],
    }


def _parting(original: Sequence[int], model: Sequence[int]) -> int | None:
    """After how many tokens two answers part; None where they are the same."""
    if original == model:
        return None
    return next(
        (n for n, (a, b) in enumerate(zip(original, model, strict=False)) if a != b), min(map(len, (original, model)))
    )
