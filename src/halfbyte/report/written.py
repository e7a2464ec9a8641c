"""The report that lies beside a checkpoint: anybody's, so it is taken at its word only where it has the form that we write."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from halfbyte.containers.folder import beside
from halfbyte.errors import HalfbyteError
from halfbyte.files import read_object
from halfbyte.report.numbers import require_finite


class Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class Row(Part):
    name: str
    grid: str
    bits_per_weight: float
    error: float
    note: str = ""


class Measured(Part):
    kl: float
    kl_error: float
    perplexity: float


class Reference(Part):
    perplexity: float


class Evaluation(Part):
    model: Measured
    reference: Reference


class Origin(Part):
    path: str
    xxh3_128: str | None = None


class Source(Origin):
    made_of: list[Origin] | None = None


class Asked(Part):
    method: str | None = None
    adapter: str | None = None


class Written(Part):
    """What is shown of a report."""

    source: Source | None = None
    recipe: Asked | None = None

    weights: list[Row] = []
    warnings: list[str] = []
    error_of: str | None = None
    evaluation: Evaluation | None = None


def read(checkpoint: Path) -> dict[str, Any]:
    """The report beside a checkpoint; nothing where there is none, or one of another form."""
    try:
        value = read_object(beside(checkpoint, "report.json"))
        Written.model_validate(require_finite(value))
    except (HalfbyteError, ValidationError):
        return {}
    return value
