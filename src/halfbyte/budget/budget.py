"""What a mix is to hold to: bits per parameter, bytes of a file, memory, or a divergence. Words alone: no torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from halfbyte.errors import BadRequest, UnknownName, brief
from halfbyte.recipe import Entries
from halfbyte.report.summary import size
from halfbyte.sizing.devices import parse_size

Sensitivity = Literal["predicted", "measured"]
SENSITIVITY: tuple[Sensitivity, ...] = get_args(Sensitivity)
LIMITS = ("bits", "size", "fit", "max_kl")


class Budget(Entries, frozen=True, use_attribute_docstrings=True):
    """One of four limits, the others being None, and how it is to be kept. Sizes are bytes."""

    bits: float | None = None
    """Choose each weight's grid: so many bits per parameter in all."""
    size: int | None = None
    """... files of this size: 3.7GB, 3500MiB, or bytes."""
    fit: int | None = None
    """... what fits into this memory with a cache: 22GiB."""
    max_kl: float | None = None
    """... the smallest output with this predicted KL divergence."""
    context: int | None = None
    """Tokens of the cache beside what is to --fit."""
    candidates: tuple[str, ...] = ()
    """Grids to choose among, such as Q4_K,Q5_K,Q6_K."""
    sensitivity: Sensitivity = "predicted"
    """How what each weight costs is found: predicted by one pass back through the model, or measured, each weight
    rounded alone on each grid, which takes half a forward pass for each."""
    sensitivities: Path | None = None
    """The file of what each weight costs, which other budgets read; beside the output."""

    @classmethod
    def of(
        cls,
        bits: float | None = None,
        size: str | int | None = None,
        fit: str | int | None = None,
        max_kl: float | None = None,
        context: int | None = None,
        candidates: str | Sequence[str] | None = None,
        sensitivity: str | None = None,
        sensitivities: str | Path | None = None,
    ) -> "Budget | None":
        """What is asked for; None where nothing is. Raises BadRequest."""
        given = dict(zip(LIMITS, (bits, size, fit, max_kl), strict=True))
        named = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None]
        if len(named) > 1:
            raise BadRequest(f"{' and '.join(named)} are {len(named)} budgets; give one of them")
        needs = dict(zip(EXAMPLES, (context, candidates, sensitivity, sensitivities), strict=True))
        for name, value in needs.items():
            if value and (not named or (name == "context" and fit is None)):
                raise BadRequest(f"--{name} is of a budget; give one too, such as {EXAMPLES[name]}")
        if not named:
            return None
        for name, value in (("bits", bits), ("max-kl", max_kl), ("context", context)):
            if value is not None and not 0 < value < float("inf"):
                raise BadRequest(f"--{name} is {brief(value)}, and has to be above 0")
        kinds: dict[str | None, Sensitivity] = {None: SENSITIVITY[0], **{kind: kind for kind in SENSITIVITY}}
        how = kinds.get(sensitivity)
        if how is None:
            raise UnknownName("sensitivity", str(sensitivity), SENSITIVITY)
        grids = candidates.split(",") if isinstance(candidates, str) else candidates or ()
        path = None if sensitivities is None else Path(sensitivities).expanduser()
        return cls(
            bits=bits,
            size=_bytes("size", size),
            fit=_bytes("fit", fit),
            max_kl=max_kl,
            context=context,
            candidates=tuple(map(str.strip, grids)),
            sensitivity=how,
            sensitivities=path,
        )

    @property
    def description(self) -> str:
        """As a person would ask for it."""
        if self.bits is not None:
            return f"{self.bits:g} bits per parameter"
        if self.size is not None:
            return f"files of {size(self.size)}"
        if self.fit is not None:
            context = f" of {self.context} tokens" if self.context else ""
            return f"{size(self.fit)} of memory with a cache{context}"
        return f"a predicted KL of {self.max_kl:g}"


EXAMPLES = {
    "context": "--fit 22GiB",
    **dict.fromkeys(("candidates", "sensitivity", "sensitivities"), "--bits 4.25"),
}


def _bytes(name: str, value: str | int | None) -> int | None:
    limit = parse_size(value) if isinstance(value, str) else value
    if limit is not None and limit <= 0:
        raise BadRequest(f"--{name} is {brief(value)}, and has to be above 0, such as 3.7GB")
    return limit
