"""Limits that a model must keep to, for scripts: `kl=0.05,flips=2%`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import expm1, isfinite
from typing import TYPE_CHECKING

from halfbyte.errors import BadRequest

if TYPE_CHECKING:
    from halfbyte.report.types import Divergence, Gate, Paired


@dataclass(frozen=True)
class Measure:
    """What can be held to a limit."""

    about: str
    of_text: Callable[[Divergence], float] | None = None
    of_answers: Callable[[Sequence[Paired]], float] | None = None


def _rise(row: Divergence) -> float:
    if row.nll_minus_reference is None:
        raise BadRequest(f"the perplexity of {row.path} was not compared with the original's: measure it again")
    return expm1(row.nll_minus_reference[0])


def _share(rows: Sequence[Paired], count: Callable[[Paired], int]) -> float:
    """Of all items."""
    return sum(map(count, rows)) / max(1, sum(row.items for row in rows))


MEASURES = {
    "kl": Measure("KL divergence, nats per token", lambda row: row.kl),
    "kl-p99": Measure("the divergence that 99 of 100 tokens stay below", lambda row: row.kl_p99),
    "perplexity": Measure("how much higher than the original's, as a share", _rise),
    "flips": Measure(
        "share of answers that flip either way, in suites or tasks; without these, of places with another most likely "
        "token",
        lambda row: 1 - row.same_top,
        lambda rows: _share(rows, lambda row: row.lost + row.gained),
    ),
    "lost": Measure(
        "share of answers, in suites or tasks, that only the original gets right",
        of_answers=lambda rows: _share(rows, lambda row: row.lost),
    ),
}


def about_measures() -> str:
    """What each is, in a sentence."""
    return "; ".join(f"{name}: {measure.about}" for name, measure in MEASURES.items()) + "."


@dataclass(frozen=True)
class Limit:
    """The most that a measure may be."""

    name: str
    value: float

    @property
    def measure(self) -> Measure:
        """What is held to it."""
        return MEASURES[self.name]

    def held(self, value: float, path: str, kv: str | None, of: str) -> Gate:
        """Whether it holds for what was measured."""
        from halfbyte.report.types import Gate

        return Gate(path=path, kv=kv, of=of, name=self.name, limit=self.value, value=value, holds=value <= self.value)


def of_text(limits: Sequence[Limit], row: Divergence) -> list[Gate]:
    """Which hold for a model's predictions."""
    asked = [(limit, limit.measure.of_text) for limit in limits]
    return [limit.held(measured(row), row.path, row.kv, "predictions") for limit, measured in asked if measured]


def of_answers(limits: Sequence[Limit], rows: Sequence[Paired], path: str, kv: str | None, of: str) -> list[Gate]:
    """Which hold for a model's answers."""
    asked = [(limit, limit.measure.of_answers) for limit in limits]
    return [limit.held(count(rows), path, kv, of) for limit, count in asked if count]


def shared_out(limits: Sequence[Limit], answers: bool) -> tuple[list[Limit], list[Limit]]:
    """Those for predictions of a text, and those for `answers`, where any are had. Raises BadRequest for a limit on
    answers without any."""
    of_these = [limit for limit in limits if answers and limit.measure.of_answers]
    rest = [limit for limit in limits if limit not in of_these]
    if odd := next((limit for limit in rest if not limit.measure.of_text), None):
        raise BadRequest(
            f"--gate {odd.name} is a {odd.measure.about}: name what is to be answered with --suite or --tasks"
        )
    return rest, of_these


def as_words(limits: Sequence[Limit]) -> str | None:
    """As `limits` reads them."""
    return ",".join(f"{limit.name}={limit.value!r}" for limit in limits) or None


def limits(text: str) -> list[Limit]:
    """Raises BadRequest for measures that there are not, and for what is no number."""
    parsed = []
    for word in text.split(","):
        name, _, number = (part.strip() for part in word.partition("="))
        value = _number(number)
        if name not in MEASURES or value is None:
            raise BadRequest(
                f"--gate takes limits such as kl=0.05,flips=2%, of {', '.join(MEASURES)}, and not '{word.strip()}'"
            )
        parsed.append(Limit(name, value))
    return parsed


def _number(text: str) -> float | None:
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return value if isfinite(value) and value >= 0 else None
