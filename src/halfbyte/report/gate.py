"""Limits that a model must keep to, for scripts: `kl=0.05,flips=2%`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import expm1, isfinite
from typing import TYPE_CHECKING

from halfbyte.errors import BadRequest

if TYPE_CHECKING:
    from halfbyte.report.types import Divergence


@dataclass(frozen=True)
class Measure:
    """What can be held to a limit."""

    about: str
    of: Callable[[Divergence], float]


def _rise(row: Divergence) -> float:
    if row.nll_minus_reference is None:
        raise BadRequest(f"the perplexity of {row.path} was not compared with the original's: measure it again")
    return expm1(row.nll_minus_reference[0])


MEASURES = {
    "kl": Measure("KL divergence, nats per token", lambda row: row.kl),
    "kl-p99": Measure("the divergence that 99 of 100 tokens stay below", lambda row: row.kl_p99),
    "flips": Measure("share of places with another most likely token", lambda row: 1 - row.same_top),
    "perplexity": Measure("how much higher than the original's, as a share", _rise),
}


@dataclass(frozen=True)
class Limit:
    """The most that a measure may be."""

    name: str
    value: float

    def of(self, row: Divergence) -> float:
        """What was measured of it."""
        return MEASURES[self.name].of(row)


def limits(words: str) -> Sequence[Limit]:
    """Raises BadRequest for measures that there are not, and for what is no number."""
    found = []
    for word in words.split(","):
        name, _, number = (part.strip() for part in word.partition("="))
        value = _number(number)
        if name not in MEASURES or value is None:
            raise BadRequest(
                f"--gate takes limits such as kl=0.05,flips=2%, of {', '.join(MEASURES)}, and not '{word.strip()}'"
            )
        found.append(Limit(name, value))
    return found


def _number(text: str) -> float | None:
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return value if isfinite(value) and value >= 0 else None
