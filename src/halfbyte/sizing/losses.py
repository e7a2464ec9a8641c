"""What a scheme lost where it was measured: losses.yaml."""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from math import log

import yaml


@dataclass(frozen=True)
class MeasuredLoss:
    """The divergence of one model on one scheme."""

    scheme: str
    model: str
    parameters: float
    kl: float
    """Nats per token."""
    method: str
    source: str


@cache
def losses() -> tuple[MeasuredLoss, ...]:
    """Every row of losses.yaml."""
    text = files("halfbyte.sizing").joinpath("losses.yaml").read_text(encoding="utf-8")
    return tuple(MeasuredLoss(**{**row, "parameters": float(row["parameters"])}) for row in yaml.safe_load(text))


def losses_of(schemes: Collection[str], parameters: int) -> dict[str, MeasuredLoss]:
    """Of one model, so that they can be compared: the nearest in size of those of which most of the schemes were
    measured."""
    models: dict[str, dict[str, MeasuredLoss]] = {}
    for row in losses():
        if row.scheme in schemes:
            models.setdefault(row.model, {})[row.scheme] = row

    def order(rows: dict[str, MeasuredLoss]) -> tuple[int, float]:
        return -len(rows), abs(log(next(iter(rows.values())).parameters / parameters))

    return min(models.values(), key=order, default={})
