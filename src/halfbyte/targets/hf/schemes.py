"""Schemes for the weights of a Hugging Face folder."""

from collections.abc import Iterable

import torch

from halfbyte import grids
from halfbyte.containers import Container
from halfbyte.errors import BadRequest, UnknownName, Unsupported
from halfbyte.grids import schemes
from halfbyte.grids.grid import Shape
from halfbyte.grids.quantized import AnyScheme, Quantized, Scheme
from halfbyte.grids.scalar import IntGrid
from halfbyte.models import experts, roles
from halfbyte.models.checkpoint import Checkpoint, Weight
from halfbyte.recipe import Method, Recipe
from halfbyte.targets.gguf import presets
from halfbyte.targets.plan import AS_ASKED, SKIPPED, Choice, Job, check_patterns, keep, matches
from halfbyte.words import unknown_grid

SMALLER_GROUPS = (256, 128, 64, 32)
SMALLER = "--smaller-groups"


def scheme_named(name: str) -> AnyScheme:
    if presets.is_preset(name) and name not in grids.GRIDS and name not in grids.ALIASES:
        raise Unsupported(
            f"'{name}' is a preset of GGUF, where tensors have several types; write one with --to gguf, or name one grid, such as int4-g128"
        )
    try:
        return schemes.parse(name)
    except UnknownName:
        if "/" in name:
            raise
        raise unknown_grid(name) from None


def job_of(recipe: Recipe, checkpoint: Checkpoint, container: Container, method: Method) -> Job:
    scheme = scheme_named(recipe.grid)
    overrides = {p: None if words == "keep" else scheme_named(words) for p, words in recipe.override.items()}
    apart = experts.apart(checkpoint)
    if recipe.smaller_groups is None and "grid" not in recipe.model_fields_set:
        recipe = recipe.model_copy(
            update={"smaller_groups": True}
        )  # said, so that the written recipe, which names the grid, does the same
    choices = choose(apart, container, scheme, overrides, recipe.skip, recipe.head, bool(recipe.smaller_groups))
    # Experts that all stay in 16 bits stay as they lie.
    notes = {piece.stack: "" for piece in apart.pieces.values()}
    notes |= {apart.pieces[c.weight.tensor].stack: c.note for c in choices if c.weight.tensor in apart.pieces}
    whole = notes.keys() - {
        apart.pieces[c.weight.tensor].stack for c in choices if c.scheme and c.weight.tensor in apart.pieces
    }
    checkpoint = experts.together(apart, whole)
    known = {c.weight: c for c in choices}
    choices = [known.get(w) or Choice(w, None, notes[w.tensor]) for w in checkpoint.weights()]
    return Job(recipe, checkpoint, container, method, choices, keep(checkpoint, choices))


def choose(
    checkpoint: Checkpoint,
    container: Container,
    scheme: AnyScheme,
    overrides: dict[str, AnyScheme | None],
    skip: Iterable[str],
    head: bool,
    smaller_groups: bool,
) -> list[Choice]:
    """A scheme for every weight. Raises for patterns that match nothing and for shapes that no fallback fits."""
    weights = list(checkpoint.weights())
    if not [w for w in weights if w.block]:
        raise Unsupported(f"{checkpoint.path} has no matrix in numbered blocks to quantize")
    check_patterns(weights, (*overrides, *skip))
    if head and not any(w.block is None for w in weights):
        raise Unsupported(
            "the head shares its tensor with the embedding, which is looked up and not multiplied; it stays in 16 bits"
        )
    choices = []
    for weight in weights:
        wanted = next((g for p, g in overrides.items() if matches(weight, p)), scheme)
        if any(matches(weight, p) for p in skip):
            choices.append(Choice(weight, None, SKIPPED))
        elif weight.block is None and not head and wanted is scheme:
            choices.append(Choice(weight, None, "the head, kept unless --head"))
        elif wanted is None:
            choices.append(Choice(weight, None, AS_ASKED))
        else:
            wanted = (
                wanted if weight.block else wanted.weight
            )  # what the head reads stays in 16 bits: engines have no other kernels there
            choices.append(fit(weight, container.native(wanted, checkpoint.dtype), container, smaller_groups))
    _check_fused(choices)
    _check_mixed(choices, container)
    if not any(c.scheme for c in choices):
        raise BadRequest("every weight is skipped or kept, so there is nothing to quantize")
    return choices


def fit(weight: Weight, scheme: AnyScheme, container: Container, smaller_groups: bool, note: str = "") -> Choice:
    """The scheme, or one with smaller groups where the row is no multiple of the group and that is asked for."""
    width, grid = weight.shape[1], scheme.weight
    if isinstance(grid, IntGrid) and grid.group_size and width % grid.group_size:
        fits = [g for g in SMALLER_GROUPS if width % g == 0]
        smaller = next((g for g in fits if g < grid.group_size), None)
        if smaller is None or not container.mixes or not smaller_groups:
            hint = (
                f"groups of {' or '.join(map(str, fits))} would fit"
                if fits
                else f"{grid.with_granularity('channel')} would fit"
            )
            alone = "" if container.mixes else f", and {container.name} holds one grid for all"
            taken = (
                f" ({SMALLER} takes {smaller} where {grid.group_size} does not)" if smaller and container.mixes else ""
            )
            raise Unsupported(
                f"{grid} does not divide the {width} in-features of {weight.name}{alone}; {hint}{taken}, or --skip it"
            )
        note = f"{grid} does not divide {width} in-features"
        grid = grid.with_granularity(smaller)
        scheme = Scheme(grid, scheme.activations) if scheme.activations else grid
    try:
        container.check(scheme, weight.shape)
    except Unsupported as error:
        raise Unsupported(f"{weight.name} {list(weight.shape)}: {error}") from None
    return Choice(weight, scheme, note)


def transcode(
    checkpoint: Checkpoint, container: Container, weights: list[Weight], grid: str | None
) -> tuple[list[Choice], Container]:
    """As it is, or rounded to what is asked for; and the version of the container that holds it all."""
    choices: list[Choice] = []
    for weight in weights:
        own, q = checkpoint.quantized[weight.name][0], checkpoint.read_quantized(weight.name)
        if roles.EMBEDDING.match(weight.tensor):
            choices.append(Choice(weight, None, "the embedding, which is looked up and not multiplied: in 16 bits"))
        elif same := _held(container, q):
            container = container.holding(same)
            note = (
                f"{own.activations} inputs stay in 16 bits, which is all that {container.name} has"
                if own.activations and not same.activations
                else ""
            )
            choices.append(Choice(weight, same.scheme, note))
        elif weight.block is None and not isinstance(own.weight, IntGrid):
            choices.append(Choice(weight, None, "the head, which engines want in 16 bits"))
        else:
            try:
                wanted = container.native(scheme_named(grid) if grid else own, checkpoint.dtype)
                if wanted.activations and wanted.activations.static and wanted.activations != own.activations:
                    raise Unsupported(
                        f"{wanted.activations} inputs have a stored scale, which calibration finds: halfbyte quantize the original instead"
                    )
                choices.append(
                    fit(
                        weight,
                        wanted,
                        container,
                        not grid,
                        f"{container.name} does not hold {own} value for value: rounded again",
                    )
                )
            except Unsupported as error:
                again = (
                    f"; to round it again, name what it should be, such as --grid {_like(own, container, weight.shape)}"
                )
                hint = "" if grid else f"{again}; in 16 bits: halfbyte dequantize {checkpoint.path} -o OUT"
                raise Unsupported(f"{error}{hint}") from None
    _check_mixed(choices, container)
    return choices, container


def _like(own: AnyScheme, container: Container, shape: Shape) -> str:
    """The grid of a container that is nearest in bits to one that it does not hold."""

    def holds(name: str) -> bool:
        try:
            container.check(container.native(grids.GRIDS[name], torch.bfloat16), shape)
        except Unsupported:
            return False
        return True

    return min(
        filter(holds, grids.GRIDS),
        key=lambda name: abs(grids.GRIDS[name].bits(shape) - own.weight.bits(shape)),
        default="int4-g128",
    )


def _held(container: Container, q: Quantized) -> Quantized | None:
    """A matrix as the container holds it, value for value."""
    same = container.same(q)
    try:
        if same:
            container.holding(same).check(same.scheme, same.shape)
    except Unsupported:
        return None
    return same


def _check_fused(choices: list[Choice]) -> None:
    by_tensor: dict[str, set[bool]] = {}
    for choice in choices:
        by_tensor.setdefault(choice.weight.tensor, set()).add(choice.scheme is None)
    mixed = next((t for t, kinds in by_tensor.items() if len(kinds) > 1), None)
    if mixed:
        raise Unsupported(f"'{mixed}' holds all experts in one tensor: quantize all of them or none")


def _check_mixed(choices: list[Choice], container: Container) -> None:
    used = {c.scheme for c in choices if c.scheme}
    if len(used) > 1 and not container.mixes:
        raise Unsupported(
            f"{container.name} holds one scheme for all weights, not {', '.join(sorted(map(str, used)))}; compressed-tensors and gptq mix them"
        )
