"""What a scheme lost where it was measured: losses.yaml."""

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


def loss_of(scheme: str, parameters: int) -> MeasuredLoss | None:
    """Of the model that is nearest in size; None where nobody has measured that scheme."""
    rows = [row for row in losses() if row.scheme == scheme]
    return min(rows, key=lambda row: abs(log(row.parameters / parameters)), default=None)
