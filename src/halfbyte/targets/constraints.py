"""Which weights cannot be chosen for by themselves, as data, known before schemes are chosen."""

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

from halfbyte.engines.engines import ENGINES
from halfbyte.grids.quantized import Scheme
from halfbyte.models.weight import Weight
from halfbyte.names import fused_set

Schemes = Mapping[Weight, Scheme | None]
"""Scheme by weight; None: it stays in 16 bits."""


EACH = "<schemes>"
"""Stands in a reason for the schemes that do not go together."""


class Rule(Enum):
    """What holds of weights that are tied."""

    SAME = "one scheme for all, or all in 16 bits"
    ALL_OR_NONE = "all quantized or none, on whichever schemes"
    ONE_SCHEME = "one scheme for those that are quantized"


@dataclass(frozen=True)
class TiedGroup:
    """Weights whose schemes depend on one another, and why."""

    weights: tuple[Weight, ...]
    rule: Rule
    reason: str

    def is_kept(self, schemes: Schemes) -> bool:
        """Whether the rule holds."""
        distinct = {schemes.get(weight) for weight in self.weights}
        if self.rule is Rule.ALL_OR_NONE:
            return None not in distinct or len(distinct) == 1
        return len(distinct - {None} if self.rule is Rule.ONE_SCHEME else distinct) <= 1


def tied_by(
    weights: Iterable[Weight], key: Callable[[Weight], Hashable | None], rule: Rule, reason: str
) -> list[TiedGroup]:
    """Groups of weights with the same key; those whose key is None are free. `reason` may name the {key}."""
    groups: dict[Hashable, list[Weight]] = {}
    for weight in weights:
        if (shared := key(weight)) is not None:
            groups.setdefault(shared, []).append(weight)
    return [
        TiedGroup(tuple(members), rule, reason.format(key=shared))
        for shared, members in groups.items()
        if len(members) > 1
    ]


def stacks(weights: Iterable[Weight]) -> list[TiedGroup]:
    """Experts that lie in one tensor."""
    reason = "'{key}' holds all experts in one tensor: quantize all of them or none"
    return tied_by(weights, lambda w: w.tensor if w.expert is not None else None, Rule.ALL_OR_NONE, reason)


def fused(weights: Iterable[Weight], engine: str, container: str) -> list[TiedGroup]:
    """What an engine makes one matrix of, where it does so with this container."""
    support = ENGINES[engine].support.get(container)
    if support is None or support.everything or not support.fuses:
        return []
    return tied_by(weights, lambda w: fused_set(w.name), Rule.SAME, f"{engine} fuses these into one matrix")


def may_stay(weight: Weight, engine: str, container: str) -> bool:
    """Whether a weight of a block may stay in 16 bits beside quantized ones, as far as the engine sees it there."""
    support = ENGINES[engine].support.get(container)
    if support is None or support.everything or weight.block is None or support.keeps == "any":
        return True
    return support.keeps == "unfused" and fused_set(weight.name) is None
