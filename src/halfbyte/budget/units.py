"""What is chosen for: weights that share a grid, and the grids that they may have, with the bytes of each."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod

import torch

from halfbyte.engines.engines import ENGINES, NOBODY, engine_named
from halfbyte.engines.verdicts import multiplies, offer, side_by_side
from halfbyte.errors import BadRequest, Unsupported
from halfbyte.grids import schemes
from halfbyte.grids.quantized import Scheme
from halfbyte.models.weight import Weight
from halfbyte.names import Expert, with_experts
from halfbyte.recipe import Recipe
from halfbyte.targets.constraints import Rule, TiedGroup, fused, may_stay, tied_by
from halfbyte.targets.patterns import first_match
from halfbyte.targets.plan import Plan
from halfbyte.targets.table import TARGETS
from halfbyte.targets.target import Target

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
    written_for = (name for name, engine in ENGINES.items() if engine.default == plan.target.name)
    reads = (name for name, engine in ENGINES.items() if plan.target.name in engine.support)
    return next(written_for, next(reads, NOBODY))


def based(recipe: Recipe, names: Sequence[str] = ()) -> Recipe:
    """With a container from which the engine that is asked for reads several grids, and a grid of it that a plan can be
    made with before any is chosen. `names`: of candidates.

    Raises Unsupported where the engine reads one grid, or none of the candidates.
    """
    if recipe.engine in (None, NOBODY):
        return recipe
    engine = engine_named(recipe.engine)
    support, default = ENGINES[engine].support, ENGINES[engine].default
    order = [recipe.to] if recipe.to else [default, *(name for name in support if name != default)]
    if recipe.to and recipe.to not in support:
        return recipe  # the plan says why not
    mixing = [n for n in order if n in TARGETS and TARGETS[n].mixes and (support[n].mixes or support[n].everything)]
    if not mixing:
        others = [n for n in support if n not in order and n in TARGETS and TARGETS[n].mixes and support[n].mixes]
        instead = f"write --to {' or '.join(others)}" if others else "name one with --grid, or take another engine"
        raise Unsupported(f"a budget mixes grids, and {engine} reads one from {' and '.join(order)}; {instead}")
    multiplied = {n: _multiplied(engine, TARGETS[n], names) for n in mixing}
    to = next((n for n, able in multiplied.items() if able), None)
    if to is None:
        raise Unsupported(
            f"a budget for {engine}: it multiplies by none of {', '.join(names) or 'the usual grids'} "
            f"from {mixing[0]}, but by {offer(engine, mixing[0])}; take one with --grid, or name some with --candidates"
        )
    usual = Recipe.model_fields["grid"].default
    if TARGETS[to].default_grid or usual in _multiplied(engine, TARGETS[to], [usual]):
        return recipe.model_copy(update={"to": to})
    return recipe.model_copy(update={"to": to, "grid": multiplied[to][0], "smaller_groups": True})


def _multiplied(engine: str, target: Target, names: Sequence[str]) -> list[str]:
    """Those of the names (by default the target's usual grids) that an engine multiplies by."""
    multiplied = []
    for name in names or target.candidates:
        with suppress(Unsupported):
            scheme = target.resolve(schemes.parse(target.means(name)), torch.bfloat16)
            target.check(scheme, ANY_SHAPE)
            multiplied += [name] if multiplies(engine, target.name, scheme) else []
    return multiplied


def candidates(plan: Plan, names: Sequence[str] = ()) -> dict[str, Scheme]:
    """The schemes of these names, or the target's usual ones, as far as the engine multiplies by them side by side.

    Raises Unsupported where the target holds one grid for all, and for names by which the engine that is asked for does
    not multiply.
    """
    if not plan.target.mixes:
        raise Unsupported(
            f"{plan.target.name} holds one grid for all weights, so there is nothing to choose; compressed-tensors, "
            "gptq and gguf mix them"
        )
    engine, asked = engine_of(plan), plan.recipe.engine
    by_name = _schemes(plan, names or _held(plan))
    if asked == NOBODY or engine == NOBODY or (names and asked is None):
        return by_name
    able = side_by_side(engine, plan.target.name, by_name)
    if names and len(able) < len(by_name):
        lost = ", ".join(name for name in by_name if name not in able)
        raise Unsupported(
            f"{engine} does not multiply by {lost} in one {plan.target.name} checkpoint with {', '.join(able)}; "
            f"leave it out of --candidates (halfbyte support --engine {engine} says what it takes)"
        )
    return {name: by_name[name] for name in able}


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


def units(plan: Plan, choices: Mapping[str, Scheme]) -> list[Unit]:
    """Of a plan in which all that may be quantized is: what the recipe itself names stays as it is there.

    Raises Unsupported where none of the `choices` holds a weight.
    """
    fixed = first_match([c.weight for c in plan.weights], plan.recipe.override)
    free = [c.weight for c in plan.weights if c.scheme and c.weight not in fixed]
    if not free:
        raise BadRequest("every weight is skipped, kept or overridden, so there is nothing to choose")
    result = [Unit(group, _options(plan, group, choices)) for group in _together(free, _ties(plan, free))]
    if lost := next((unit for unit in result if not unit.options), None):
        first = lost.weights[0]
        raise Unsupported(
            f"none of {', '.join(choices)} holds {first.name} ({first.shape[0]} x {first.shape[1]}), and it cannot "
            "stay in 16 bits; name others with --candidates"
        )
    return result


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


def _options(plan: Plan, weights: tuple[Weight, ...], choices: Mapping[str, Scheme]) -> dict[str, int]:
    options = {}
    for name, scheme in choices.items():
        sizes = [taken for weight in weights if (taken := _held_in(plan, scheme, weight)) is not None]
        if len(sizes) == len(weights):
            options[name] = sum(sizes)
    engine = engine_of(plan)
    if plan.recipe.engine in (None, NOBODY) or all(may_stay(w, engine, plan.target.name) for w in weights):
        options[KEEP] = sum(size_of(plan, weight, None) for weight in weights)
    return options


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
