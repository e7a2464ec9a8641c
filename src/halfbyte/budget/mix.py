"""A recipe for a budget: each weight's grid named, so that the written recipe makes the same bytes without a budget."""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import xxhash

from halfbyte.budget import measured, sensitivity
from halfbyte.budget.budget import SENSITIVITY, Budget
from halfbyte.budget.ledger import Ledger
from halfbyte.budget.room import Room, sized
from halfbyte.budget.solve import Option, choose
from halfbyte.budget.units import KEEP, Unit, based, candidates, engine_of, units
from halfbyte.engines.verdicts import takes_head
from halfbyte.errors import BadRequest, Unsupported
from halfbyte.models import calibrate
from halfbyte.models.placement import Placement
from halfbyte.models.stamp import origin
from halfbyte.models.weight import Weight
from halfbyte.names import Expert
from halfbyte.plan import fits, resolve
from halfbyte.progress import Progress, silent
from halfbyte.recipe import Calibration, Recipe
from halfbyte.report.types import BudgetReport
from halfbyte.targets.choosing import HEAD
from halfbyte.targets.plan import AS_ASKED, SKIPPED, Plan

SAMPLES = 32
"""Of the calibration, for sensitivities."""
TIGHTENED = 8
"""Times that a limit is lowered by what a solution exceeds it: of safetensors, how long a header is depends on the
offsets in it."""


class Mixed(NamedTuple):
    """What a budget comes to."""

    recipe: Recipe
    """A grid for each weight."""
    report: BudgetReport
    sensitivities: Path
    """The file that another budget of this model reads."""


def mixed(
    recipe: Recipe,
    budget: Budget,
    out: Path,
    placement: Placement | None = None,
    progress: Progress = silent,
) -> Mixed:
    """The recipe with a grid for each weight. Raises HalfbyteError."""
    if "grid" in recipe.model_fields_set:
        raise BadRequest(f"a budget chooses grids, and --grid {recipe.grid} names one; leave one of them out")
    plan = _widest(based(recipe, budget.candidates))
    fits.require_known(plan.target, plan.recipe.grid, budget.candidates)
    candidate_schemes = candidates(plan, budget.candidates)
    undecided = units(plan, candidate_schemes)
    room = Room.of(plan, budget, undecided)
    windows = calibrate.calibration(plan.checkpoint, _fewer(plan.recipe.calibration))
    identity = _identity(plan, windows.digest, budget.sensitivity)
    path = budget.sensitivities or out.parent / f"{Path(recipe.model).name}-{identity[:8]}.sensitivities.jsonl"
    ledger = Ledger(path, identity)
    wanted = {
        w: {n: candidate_schemes[n] for n in unit.options if n != KEEP} for unit in undecided for w in unit.weights
    }
    find = {"predicted": sensitivity.measure, "measured": measured.measure}[budget.sensitivity]
    find(plan.checkpoint, windows.tokens, wanted, plan.method, ledger, placement, progress)
    options = [
        {name: Option(taken, _loss(ledger, unit, name)) for name, taken in unit.options.items()} for unit in undecided
    ]
    names, made, taken = _best(recipe, plan, undecided, options, room, budget.max_kl)
    report = BudgetReport(
        asked=budget.description,
        limit_bytes=room.most,
        file_bytes=taken,
        sensitivity=budget.sensitivity,
        predicted_kl=sum(unit[name].loss for unit, name in zip(options, names, strict=True)),
        grids=dict(
            Counter(name for unit, name in zip(undecided, names, strict=True) for _ in unit.weights).most_common()
        ),
    )
    return Mixed(made, report, path)


def _identity(plan: Plan, text: str, kind: str) -> str:
    """Of what losses are: those of other models, solvers, texts or kinds lie in other files."""
    of = (origin(plan.checkpoint), plan.method.solver, text, *([kind] if kind != SENSITIVITY[0] else []))
    return xxhash.xxh3_128_hexdigest(repr(of).encode())


def _widest(recipe: Recipe) -> Plan:
    """The plan in which all is quantized that the target and the engine can quantize, the head too."""
    plan = resolve(recipe)
    engine = engine_of(plan)
    loaded = all(takes_head(engine, plan.target.name, scheme) for scheme in set(plan.schemes.values()))
    if "head" in recipe.model_fields_set or not loaded or all(c.note != HEAD for c in plan.weights):
        return plan
    with suppress(Unsupported):  # of a head whose shape no kernel of the engine takes
        return resolve(recipe.model_copy(update={"head": True}), plan.checkpoint)
    return plan


def _fewer(calibration: Calibration) -> Calibration:
    return calibration.model_copy(update={"samples": min(calibration.samples, SAMPLES)})


def _loss(ledger: Ledger, unit: Unit, name: str) -> float:
    return 0.0 if name == KEEP else sum(ledger.losses[weight.name][name] for weight in unit.weights)


def _best(
    recipe: Recipe,
    plan: Plan,
    undecided: Sequence[Unit],
    options: Sequence[Mapping[str, Option]],
    room: Room,
    most_loss: float | None,
) -> tuple[list[str], Recipe, int]:
    """The best choice, its recipe, and the bytes of its files, which are laid out to see that they are within."""
    left = None if room.most is None else room.most - room.fixed
    for _ in range(TIGHTENED):
        names = choose(options, left, most_loss)
        if names is None:
            break
        made = _named(recipe, plan, undecided, names)
        taken = sized(resolve(made, plan.checkpoint)).files
        if left is None or room.most is None or taken <= room.most:
            return names, made, taken
        left -= taken - room.most
    raise BadRequest("no mix of the candidates is within; give more, or name other grids with --candidates")


def _named(recipe: Recipe, plan: Plan, undecided: Sequence[Unit], names: Sequence[str]) -> Recipe:
    """The commonest grid for all, and every weight named that is on another."""
    counts = Counter(name for unit, name in zip(undecided, names, strict=True) if name != KEEP for _ in unit.weights)
    if not counts:
        raise BadRequest("all weights would stay in 16 bits: there is nothing to quantize")
    base = counts.most_common(1)[0][0]
    alike = Counter(_pattern(weight) for unit in undecided for weight in unit.weights)
    others: dict[str, str] = {}
    for unit, name in zip(undecided, names, strict=True):
        in_unit = Counter(map(_pattern, unit.weights))
        for weight in unit.weights if name != base else ():
            whole = in_unit[_pattern(weight)] == alike[_pattern(weight)]
            others[_pattern(weight) if whole else weight.name] = name
    stay = {c.weight.name: KEEP for c in plan.weights if not c.scheme and c.note not in (SKIPPED, AS_ASKED, HEAD)}
    one_for_all = {"pure": True} if "pure" in plan.target.recipe_fields else {}
    return recipe.model_copy(
        update={
            "grid": base,
            "to": plan.target.name,
            "override": {**recipe.override, **others, **stay},
            "head": plan.recipe.head,
            **one_for_all,
        }
    )


def _pattern(weight: Weight) -> str:
    """The name of a weight; of an expert, that of all like it."""
    expert = Expert.of(weight.name)
    return f"{expert.home}.*.{expert.part}" if expert else weight.name
