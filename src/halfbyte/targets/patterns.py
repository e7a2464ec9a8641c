"""Patterns of weights' names, as users write them.

`layers.0.*` matches model.layers.0.mlp.up_proj: a pattern may start at any dot.
"""

import fnmatch
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeVar

from halfbyte.errors import BadRequest
from halfbyte.models.weight import Weight

Value = TypeVar("Value")
WILD = re.compile(r"\[!?.[^]]*\]|[*?[]")


class Pattern(NamedTuple):
    """One pattern, ready to be asked of very many weights."""

    text: str
    literal: str
    """A part of every name that it matches: one search for it spares most names the expression."""
    expression: re.Pattern[str]

    @classmethod
    def of(cls, text: str) -> "Pattern":
        """A pattern with * and ?, made ready."""
        literal = max(WILD.split(text), key=len)
        return cls(text, literal, re.compile(rf"(?s:.*\.)?{fnmatch.translate(text)}"))

    def among(self, names: Mapping[Weight, str]) -> list[Weight]:
        """Those that are called so, by their modules or by their tensors: both names, in a line each."""
        literal, match = self.literal, self.expression.match
        near = [weight for weight, both in names.items() if literal in both]
        return [weight for weight in near if match(weight.name) or match(weight.tensor)]


def first_match(weights: Iterable[Weight], table: Mapping[str, Value]) -> dict[Weight, Value]:
    """By weight the value of the first pattern that matches. Raises BadRequest for a pattern that matches none."""
    names = {weight: f"{weight.name}\n{weight.tensor}" for weight in weights} if table else {}
    matched: dict[Weight, Value] = {}
    for pattern, value in table.items():
        matching = Pattern.of(pattern).among(names)
        if not matching:
            example = next(w.name for w in names if w.block)
            raise BadRequest(f"pattern '{pattern}' matches no weight; they are called like {example}")
        for weight in matching:
            matched.setdefault(weight, value)
    return matched
