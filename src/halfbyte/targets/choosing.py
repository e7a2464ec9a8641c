"""A scheme for every weight of a checkpoint that is written under its own names."""

from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch

from halfbyte import grids
from halfbyte.engines.verdicts import takes_head
from halfbyte.errors import BadRequest, Unsupported
from halfbyte.grids import schemes
from halfbyte.grids.grid import Shape
from halfbyte.grids.quantized import Quantized, Scheme, WeightActivation
from halfbyte.grids.scalar import is_integer
from halfbyte.models import experts, roles
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.weight import Weight
from halfbyte.recipe import Method, Recipe
from halfbyte.targets.constraints import EACH, Rule
from halfbyte.targets.patterns import first_match
from halfbyte.targets.plan import AS_ASKED, SKIPPED, Plan, TensorPlan, unquantized_tensors

if TYPE_CHECKING:
    from halfbyte.targets.target import Target

SMALLER_GROUPS = (256, 128, 64, 32)
SMALLER = "--smaller-groups"
HEAD = "the head, kept unless --head"
USUAL_SHAPE, SCALE_BITS = (4096, 4096), 16 / 128
"""A matrix by which grids are compared, and what a scale for each 128 weights takes of each."""
ROUNDING = Method((), "nearest", calibrated=False)
"""Of matrices that cannot stay as they are."""


def quantizing(target: "Target", recipe: Recipe, checkpoint: Checkpoint, method: Method) -> Plan:
    """What quantizing makes of every tensor."""
    if recipe.smaller_groups is None and "grid" not in recipe.model_fields_set:
        # Said, so that the written recipe, which names the grid, does the same.
        recipe = recipe.model_copy(update={"smaller_groups": True})
    apart = experts.unstacked(checkpoint)
    choices = _choose(target, apart, recipe)
    # Experts that all stay in 16 bits stay as they lie.
    notes = {part.stack: "" for part in apart.expert_slices.values()}
    notes |= {
        apart.expert_slices[c.weight.tensor].stack: c.note for c in choices if c.weight.tensor in apart.expert_slices
    }
    whole = notes.keys() - {
        apart.expert_slices[c.weight.tensor].stack
        for c in choices
        if c.scheme and c.weight.tensor in apart.expert_slices
    }
    checkpoint = experts.restacked(apart, whole)
    planned = {c.weight: c for c in choices}
    choices = [planned.get(w) or TensorPlan(w, None, notes[w.tensor]) for w in checkpoint.weights()]
    return Plan(recipe, checkpoint, target, method, tuple(choices), unquantized_tensors(checkpoint, choices))


def _choose(target: "Target", checkpoint: Checkpoint, recipe: Recipe) -> list[TensorPlan]:
    """A scheme for every weight. Raises for patterns that match nothing and for shapes that no fallback fits."""
    scheme = schemes.parse(recipe.grid)
    overrides = {p: None if name == "keep" else schemes.parse(name) for p, name in recipe.override.items()}
    weights = list(checkpoint.weights())
    if not [w for w in weights if w.block]:
        raise Unsupported(f"{checkpoint.path} has no matrix in numbered blocks to quantize")
    overridden = first_match(weights, overrides)
    skipped = first_match(weights, dict.fromkeys(recipe.skip, True))
    if recipe.head and not any(w.block is None for w in weights):
        raise Unsupported(
            "the head shares its tensor with the embedding, which is looked up and not multiplied; it stays in 16 bits"
        )
    by_preset = _of_preset(target, checkpoint, recipe, [w for w in weights if w not in overridden])
    choices = []
    for weight in weights:
        wanted = overridden.get(weight, scheme)
        if weight in skipped:
            choices.append(TensorPlan(weight, None, SKIPPED))
        elif weight in by_preset:
            choices.append(by_preset[weight])
        elif weight.block is None and not recipe.head and wanted is scheme:
            choices.append(TensorPlan(weight, None, HEAD))
        elif wanted is None:
            choices.append(TensorPlan(weight, None, AS_ASKED))
        else:
            # What the head reads stays in 16 bits: engines have no other kernels there.
            wanted = target.resolve(wanted if weight.block else wanted.weight, checkpoint.dtype)
            choices.append(_fit(weight, wanted, target, bool(recipe.smaller_groups)))
    require_ties(target, checkpoint, choices)
    if not any(c.scheme for c in choices):
        raise BadRequest("every weight is skipped or kept, so there is nothing to quantize")
    return choices


def _of_preset(
    target: "Target", checkpoint: Checkpoint, recipe: Recipe, weights: Iterable[Weight]
) -> dict[Weight, TensorPlan]:
    """What becomes of the weights that the recipe's preset gives another scheme than most."""
    by_name = {weight.name: weight for weight in weights}
    plans = {}
    for name, wanted in schemes.of_others(recipe.grid, by_name).items():
        weight = by_name[name]
        resolved = wanted and target.resolve(wanted, checkpoint.dtype)
        if weight.block is None and "head" in recipe.model_fields_set and not recipe.head:
            plans[weight] = TensorPlan(weight, None, HEAD)
        elif weight.block is None and resolved and not takes_head(recipe.engine, target.name, resolved):
            plans[weight] = TensorPlan(weight, None, f"the head, which {recipe.engine} does not load on {resolved}")
        elif resolved:
            plans[weight] = _fit(weight, resolved, target, bool(recipe.smaller_groups))
        else:
            plans[weight] = TensorPlan(weight, None, f"in 16 bits, as {recipe.grid} has it")
    return plans


def _fit(weight: Weight, scheme: Scheme, target: "Target", smaller_groups: bool, note: str = "") -> TensorPlan:
    """The scheme, or one with smaller groups where the row is no multiple of the group and that is asked for."""
    width, grid = weight.shape[1], scheme.weight
    if is_integer(grid) and grid.group_size and width % grid.group_size:
        fits = [g for g in SMALLER_GROUPS if width % g == 0]
        smaller = next((g for g in fits if g < grid.group_size), None)
        if smaller is None or not target.mixes or not smaller_groups:
            hint = (
                f"groups of {' or '.join(map(str, fits))} would fit"
                if fits
                else f"{grid.with_granularity('channel')} would fit"
            )
            alone = "" if target.mixes else f", and {target.name} holds one grid for all"
            taken = f" ({SMALLER} takes {smaller} where {grid.group_size} does not)" if smaller and target.mixes else ""
            raise Unsupported(
                f"{grid} does not divide the {width} in-features of {weight.name}{alone}; {hint}{taken}, or --skip it"
            )
        note = f"{grid} does not divide {width} in-features"
        grid = grid.with_granularity(smaller)
        scheme = WeightActivation(grid, scheme.activations) if scheme.activations else grid
    try:
        target.check(scheme, weight.shape)
    except Unsupported as error:
        raise Unsupported(f"{weight.name} {list(weight.shape)}: {error}") from None
    return TensorPlan(weight, scheme, note)


def converting(target: "Target", recipe: Recipe, checkpoint: Checkpoint, grid: str | None) -> Plan:
    """What moving a quantized checkpoint makes of every tensor."""
    choices, target = _transcode(target, checkpoint, modules_of(checkpoint), grid)
    return Plan(recipe, checkpoint, target, ROUNDING, tuple(choices), left(checkpoint, choices))


def modules_of(checkpoint: Checkpoint) -> list[Weight]:
    """Every matrix that is quantized already."""
    return [Weight(m, f"{m}.weight", roles.block_of(f"{m}."), shape) for m, (_, shape) in checkpoint.quantized.items()]


def left(
    checkpoint: Checkpoint, choices: list[TensorPlan], dropped: Mapping[str, str] = MappingProxyType({})
) -> dict[str, str]:
    """Every tensor that stays as it is when a quantized checkpoint is moved, with the reason."""
    quantized = {c.weight.tensor for c in choices if c.scheme}
    reasons = {c.weight.tensor: c.note for c in choices}
    others = (t for t in checkpoint.tensors() if t not in quantized and t not in dropped)
    return {t: reasons.get(t, "not quantized in the source") for t in others}


def _transcode(
    target: "Target", checkpoint: Checkpoint, weights: list[Weight], grid: str | None
) -> tuple[list[TensorPlan], "Target"]:
    """As it is, or rounded to what is asked for; and the version of the target that holds it all."""
    choices: list[TensorPlan] = []
    for weight in weights:
        scheme, q = checkpoint.quantized[weight.name][0], checkpoint.read_quantized(weight.name)
        if roles.EMBEDDING.match(weight.tensor):
            choices.append(TensorPlan(weight, None, "the embedding, which is looked up and not multiplied: in 16 bits"))
        elif same := _held(target, q):
            target = target.for_tensor(same)
            note = (
                f"{scheme.activations} inputs stay in 16 bits, which is all that {target.name} has"
                if scheme.activations and not same.activations
                else ""
            )
            choices.append(TensorPlan(weight, same.scheme, note))
        elif weight.block is None and not is_integer(scheme.weight):
            choices.append(TensorPlan(weight, None, "the head, which engines want in 16 bits"))
        else:
            try:
                wanted = target.resolve(schemes.parse(grid) if grid else scheme, checkpoint.dtype)
                if wanted.activations and wanted.activations.static and wanted.activations != scheme.activations:
                    raise Unsupported(
                        f"{wanted.activations} inputs have a stored scale, which calibration finds: "
                        "halfbyte quantize the original instead"
                    )
                choices.append(
                    _fit(
                        weight,
                        wanted,
                        target,
                        not grid,
                        f"{target.name} does not hold {scheme} value for value: rounded again",
                    )
                )
            except Unsupported as error:
                like = None if grid else _like(scheme, target, {w.shape for w in weights if w.block})
                again = f"; to round it again, name what it should be, such as --grid {like}" if like else ""
                hint = "" if grid else f"{again}; in 16 bits: halfbyte dequantize {checkpoint.path} -o OUT"
                raise Unsupported(f"{error}{hint}") from None
    require_ties(target, checkpoint, choices)
    return choices, target


def _like(scheme: Scheme, target: "Target", shapes: Collection[Shape]) -> str | None:
    """The grid of a target that people use in place of one that it does not hold: as wide or the next wider, with a
    scale for each 128 weights, or what comes nearest to that. None where it holds no matrix of these shapes."""

    def holds(name: str) -> bool:
        grid = grids.GRIDS[name]
        group = grid.group_size if is_integer(grid) else None
        try:
            for shape in shapes:
                target.check(target.resolve(grid, torch.bfloat16), shape)
        except Unsupported:
            return False
        return not group or all(width % group == 0 for _, width in shapes)

    def distance(name: str) -> tuple[bool, int, bool, bool, float]:
        bits = _width(name)
        beyond = grids.GRIDS[name].bits(USUAL_SHAPE) - (bits + SCALE_BITS)
        return bits < wanted, abs(bits - wanted), beyond < 0, name.endswith("-asym"), abs(beyond)

    wanted = _width(str(scheme.weight))
    return min(filter(holds, grids.GRIDS), key=distance, default=None)


def _width(name: str) -> int:
    """Bits of a number, without scales, as a grid's name says."""
    return int(next(filter(str.isdigit, name)))


def _held(target: "Target", q: Quantized) -> Quantized | None:
    """A matrix as the target holds it, value for value."""
    same = target.cast_exact(q)
    try:
        if same:
            target.for_tensor(same).check(same.scheme, same.shape)
    except Unsupported:
        return None
    return same


def require_ties(target: "Target", checkpoint: Checkpoint, choices: list[TensorPlan]) -> None:
    """Raise Unsupported where weights that depend on one another have schemes that do not go together."""
    chosen = {c.weight: c.scheme for c in choices}
    broken = next((group for group in target.ties(checkpoint, list(chosen)) if not group.is_kept(chosen)), None)
    if broken is None:
        return
    conflicting = {chosen[weight] for weight in broken.weights} - ({None} if broken.rule is Rule.ONE_SCHEME else set())
    named = sorted(target.grid_name(scheme) if scheme else "16 bits" for scheme in conflicting)
    raise Unsupported(broken.reason.replace(EACH, ", ".join(named)))
