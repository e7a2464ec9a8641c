"""What is chosen for: weights that share a grid, and the grids that they may have, with the bytes of each."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod

from halfbyte.engines.engines import ENGINES, NOBODY
from halfbyte.engines.verdicts import multiplies
from halfbyte.errors import BadRequest, Unsupported
from halfbyte.grids import schemes
from halfbyte.grids.quantized import Scheme
from halfbyte.models.checkpoint import Weight
from halfbyte.names import Expert, with_experts
from halfbyte.targets.constraints import Rule, TiedGroup, fused, may_stay, tied_by
from halfbyte.targets.patterns import first_match
from halfbyte.targets.plan import Plan

ANY_SHAPE = (1024, 1024)
"""That every block and group divides."""
KEEP = "keep"
"""The word of a recipe for 16 bits."""


@dataclass(frozen=True)
class Unit:
    """Weights that get one grid."""

    weights: tuple[Weight, ...]
    options: Mapping[str, int]
    """Grids by the names that recipes give them, and the bytes that all the weights take on each."""


def engine_of(plan: Plan) -> str:
    """The engine whose rules hold: that which is asked for, or the first that such files are made for or read by."""
    asked = plan.recipe.engine
    if asked and asked != NOBODY:
        return asked
    own = (name for name, engine in ENGINES.items() if engine.default == plan.target.name)
    reads = (name for name, engine in ENGINES.items() if plan.target.name in engine.support)
    return next(own, next(reads, NOBODY))


def candidates(plan: Plan, names: Sequence[str] = ()) -> dict[str, Scheme]:
    """The schemes of these names, or the target's usual ones, as far as the engine multiplies by them.

    Raises Unsupported where the target holds one grid for all.
    """
    if not plan.target.mixes:
        raise Unsupported(
            f"{plan.target.name} holds one grid for all weights, so there is nothing to choose; compressed-tensors, "
            "gptq and gguf mix them"
        )
    engine = engine_of(plan)
    known = _schemes(plan, names or _held(plan))
    if names or plan.recipe.engine == NOBODY or engine == NOBODY:
        return known
    return {name: scheme for name, scheme in known.items() if multiplies(engine, plan.target.name, scheme)}


def _schemes(plan: Plan, names: Iterable[str]) -> dict[str, Scheme]:
    """As the plan's target stores them. Raises HalfbyteError for names of none."""
    target, dtype = plan.target, plan.checkpoint.dtype
    return {name: target.resolve(schemes.parse(target.means(name)), dtype) for name in names}


def _held(plan: Plan) -> Iterator[str]:
    """The usual grids that the target holds, for some shapes."""
    for name in plan.target.candidates:
        with suppress(Unsupported):
            plan.target.check(_schemes(plan, [name])[name], ANY_SHAPE)
            yield name


def units(plan: Plan, known: Mapping[str, Scheme]) -> list[Unit]:
    """Of a plan in which all that may be quantized is: what the recipe itself names stays as it is there.

    Raises Unsupported where none of those that are `known` holds a weight.
    """
    fixed = first_match([c.weight for c in plan.weights], plan.recipe.override)
    free = [c.weight for c in plan.weights if c.scheme and c.weight not in fixed]
    if not free:
        raise BadRequest("every weight is skipped, kept or overridden, so there is nothing to choose")
    found = [Unit(group, _options(plan, group, known)) for group in _together(free, _ties(plan, free))]
    if lost := next((unit for unit in found if not unit.options), None):
        first = lost.weights[0]
        raise Unsupported(
            f"none of {', '.join(known)} holds {first.name} ({first.shape[0]} x {first.shape[1]}), and it cannot stay "
            "in 16 bits; name others with --candidates"
        )
    return found


def _ties(plan: Plan, weights: list[Weight]) -> list[TiedGroup]:
    engine, name = engine_of(plan), plan.target.name
    ties = plan.target.ties(plan.checkpoint, weights)
    support = ENGINES[engine].support.get(name) if engine != NOBODY else None
    if support is None or support.everything:
        return ties
    home = (lambda w: with_experts(w.name)) if support.shared_experts else lambda w: (e := Expert.of(w.name)) and e.home
    experts = tied_by(weights, home, Rule.SAME, f"{engine} loads experts as one")
    return [*ties, *fused(weights, engine, name), *(experts if support.fuses else [])]


def _together(weights: list[Weight], ties: Iterable[TiedGroup]) -> list[tuple[Weight, ...]]:
    """Groups of weights that are tied, directly or by others; most are alone."""
    group_of = {weight: [weight] for weight in weights}
    for tie in ties:
        first = group_of[tie.weights[0]]
        for weight in tie.weights[1:]:
            if (other := group_of[weight]) is not first:
                first.extend(other)
                group_of.update(dict.fromkeys(other, first))
    return [tuple(group) for group in {id(group): group for group in group_of.values()}.values()]


def _options(plan: Plan, weights: tuple[Weight, ...], known: Mapping[str, Scheme]) -> dict[str, int]:
    found = {}
    for name, scheme in known.items():
        sizes = [taken for weight in weights if (taken := _held_in(plan, scheme, weight)) is not None]
        if len(sizes) == len(weights):
            found[name] = sum(sizes)
    engine = engine_of(plan)
    if plan.recipe.engine in (None, NOBODY) or all(may_stay(w, engine, plan.target.name) for w in weights):
        found[KEEP] = sum(size_of(plan, weight, None) for weight in weights)
    return found


def _held_in(plan: Plan, scheme: Scheme, weight: Weight) -> int | None:
    """Bytes of a weight on a scheme; None where the target does not hold that, or groups do not divide its rows."""
    if scheme.activations and weight.block is None:
        return None
    try:
        plan.target.check(scheme, weight.shape)
        return size_of(plan, weight, scheme)
    except (BadRequest, Unsupported):
        return None


def size_of(plan: Plan, weight: Weight, scheme: Scheme | None) -> int:
    """Bytes of a weight in the file, padding counted."""
    step = plan.target.alignment
    if scheme is None:
        dtype = plan.checkpoint.spec(weight.tensor).dtype
        return -(-prod(weight.shape) * dtype.itemsize // step) * step
    return sum(-(-spec.size_bytes // step) * step for spec in plan.target.specs(scheme, weight.shape).values())
