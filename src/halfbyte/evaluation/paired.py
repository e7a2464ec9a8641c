"""The same questions put to the original and to what was made of it: an average hides what single ones tell."""

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any


def paired(original: Sequence[float], model: Sequence[float]) -> dict[str, Any]:
    """Of what each got for every item: means, the mean difference with its standard error (which nobody knows of one
    item), and how many items went which way."""
    differences = [after - before for before, after in zip(original, model, strict=True)]
    count = len(differences)
    return {
        "items": count,
        "original": fmean(original) if count else None,
        "model": fmean(model) if count else None,
        "difference": (fmean(differences), stdev(differences) / count**0.5 if count > 1 else None) if count else None,
        "lost": sum(difference < 0 for difference in differences),
        "gained": sum(difference > 0 for difference in differences),
    }
