"""Types for the tensors of a GGUF: those of llama.cpp's presets."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from halfbyte.errors import BadRequest, Unsupported
from halfbyte.grids import schemes
from halfbyte.grids.grid import Grid
from halfbyte.grids.scalar import is_integer
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.weight import Weight
from halfbyte.recipe import PARTS, Method, Recipe
from halfbyte.targets.choosing import ROUNDING, left, modules_of, require_ties
from halfbyte.targets.gguf import blocks, families, hyperparameters, presets
from halfbyte.targets.gguf.blocks import LAYOUTS, type_of
from halfbyte.targets.gguf.head import TYPES
from halfbyte.targets.gguf.names import DTYPES
from halfbyte.targets.gguf.source import GGUFCheckpoint, Names, name_map_of
from halfbyte.targets.patterns import first_match
from halfbyte.targets.plan import AS_ASKED, SKIPPED, Plan, TensorPlan, unquantized_tensors
from halfbyte.targets.target import Target

MISFIT = "neither"


def quantizing(target: Target, recipe: Recipe, checkpoint: Checkpoint, method: Method) -> Plan:
    """What quantizing makes of every tensor."""
    names = name_map_of(checkpoint)
    preset, base = _preset_and_type(recipe.grid, recipe.pure)
    weights = list(checkpoint.weights(embedding=True))
    overridden, skipped = first_match(weights, recipe.override), first_match(weights, dict.fromkeys(recipe.skip, True))
    wanted = _types(preset, base, weights, names, checkpoint, method.calibrated or recipe.imatrix is not None)
    choices = []
    for weight in weights:
        override = overridden.get(weight)
        types = [wanted.get(mapped.name, "F16") for mapped in names.mapped(weight.tensor)]
        type_name = max(types, key=lambda t: TYPES[t].size_bytes / TYPES[t].block, default="F16")
        if weight in skipped:
            choices.append(TensorPlan(weight, None, SKIPPED))
        elif override == "keep" or not types or (type_name in presets.PLAIN and override is None):
            choices.append(TensorPlan(weight, None, AS_ASKED if override == "keep" else f"stored as {type_name}"))
        else:
            choices.append(_fitting(weight, type_name if override is None else type_named(override)))
    dropped = {t: reason for t in checkpoint.tensors() if (reason := names.dropped(t))}
    choices = [c for c in choices if c.weight.tensor not in dropped]
    unquantized = {t: reason for t, reason in unquantized_tensors(checkpoint, choices).items() if t not in dropped}
    if preset in presets.PLAIN:
        name = "rotate" if method.rotated else "nearest"  # of which nothing is rounded
        recipe, method = recipe.model_copy(update={"method": name}), PARTS[name]
    elif not any(c.scheme for c in choices):
        raise BadRequest(f"nothing is left to quantize: {next((c.note for c in choices), 'the model has no matrix')}")
    require_ties(target, checkpoint, choices)
    borne = preset if _is_mostly(preset, choices, wanted, names) else None
    plan = Plan(recipe, checkpoint, target, method, tuple(choices), unquantized, dropped, borne)
    return replace(plan, warnings=(*_remarks_on_types(plan, preset), *_misfits(choices)))


def _remarks_on_types(plan: Plan, preset: str | None) -> Iterator[str]:
    if preset and not plan.preset:
        yield f"most of this is {plan.label}, not {preset}, and the file says so"
    yield from _remarks_on(plan.checkpoint, plan.dropped)


def _misfits(choices: Iterable[TensorPlan]) -> Iterator[str]:
    for note, count in Counter(c.note for c in choices if c.note.startswith(MISFIT)).items():
        yield f"{count} matri{'ces' if count > 1 else 'x'} kept as in the source: {note}"


def _is_mostly(preset: str | None, choices: list[TensorPlan], wanted: Mapping[str, str], names: Names) -> bool:
    """Whether most matrices have the types that a preset gives them, whatever else was asked or fits."""
    if preset is None or preset in presets.PLAIN:
        return True
    same = [
        type_of(c.scheme.weight) in {wanted.get(mapped.name) for mapped in names.mapped(c.weight.tensor)}
        for c in choices
        if c.scheme
    ]
    return 2 * sum(same) >= len(same)


def _remarks_on(checkpoint: Checkpoint, dropped: Mapping[str, str]) -> list[str]:
    """What a GGUF of a checkpoint has not, or llama.cpp does in another way."""
    if isinstance(checkpoint, GGUFCheckpoint):
        return []
    remarks = hyperparameters.remarks(checkpoint.config)
    if foreign := [tensor for tensor, reason in dropped.items() if reason == families.ELSEWHERE]:
        remarks.append(
            f"this is the text model alone: {len(foreign)} tensors of encoders of images or sound, "
            f"such as {foreign[0]}, are left out, "
            "and no mmproj file is made of them (llama.cpp's convert_hf_to_gguf.py --mmproj makes one)"
        )
    return remarks


def _preset_and_type(name: str, pure: bool = False) -> tuple[str | None, str]:
    """The preset of a name, if it is one whose rules are wanted, and the type of most tensors."""
    if presets.is_preset(name) and not (pure and name.upper() in LAYOUTS):
        preset = presets.preset_named(name)
        base = presets.PRESETS[preset].type
        return preset if base in presets.PLAIN or not pure else None, base
    return None, type_named(name)


def type_named(name: str) -> str:
    """Raises UnknownName, and Unsupported for what is no type."""
    if name.upper() in LAYOUTS:
        return name.upper()
    scheme = schemes.parse(name)
    if scheme.activations:
        raise Unsupported(
            f"a GGUF does not say how inputs are rounded, llama.cpp chooses it, and {name} does; write Q8_0 or Q4_K_M, "
            "or --to compressed-tensors"
        )
    return type_of(scheme.weight)


def _types(
    preset: str | None, base: str, weights: list[Weight], names: Names, checkpoint: Checkpoint, imatrix: bool
) -> dict[str, str]:
    """The type of every GGUF tensor that is made of these weights."""
    shapes: dict[str, tuple[int, ...]] = {}
    for weight in weights:
        for mapped in names.mapped(weight.tensor):
            is_stack = weight.expert is not None or mapped.expert is not None
            shapes[mapped.name] = (1, *weight.shape) if is_stack else weight.shape
    if preset is None:
        return dict.fromkeys(shapes, base)
    c = checkpoint.text_config
    heads = c.get("num_attention_heads") or c.get("n_head") or 1
    experts = next(
        (c[k] for k in ("num_local_experts", "num_experts", "n_routed_experts") if isinstance(c.get(k), int)), 0
    )
    layers = c.get("num_hidden_layers") or c.get("n_layer") or 0
    arch = getattr(getattr(names, "family", None), "arch", checkpoint.model_type)
    per_kv = heads // (c.get("num_key_value_heads") or c.get("num_kv_heads") or heads)
    return presets.types(
        preset, shapes, presets.Model(arch, layers, per_kv, experts, imatrix, tied="output.weight" not in shapes)
    )


def _fitting(weight: Weight, type_name: str) -> TensorPlan:
    """The type, or one in smaller blocks where it does not divide the row, as llama.cpp has it."""
    fits = presets.fallback(type_name, weight.shape[1])
    if fits == "F16":
        return TensorPlan(
            weight, None, f"{MISFIT} {type_name} nor a type in smaller blocks divides its {weight.shape[1]} in-features"
        )
    blocks.check(LAYOUTS[fits].grid, weight.shape)
    note = "" if fits == type_name else f"{type_name} does not divide {weight.shape[1]} in-features: {fits}"
    return TensorPlan(weight, LAYOUTS[fits].grid, note)


def converting(target: Target, recipe: Recipe, checkpoint: Checkpoint, grid: str | None) -> Plan:
    """What moving a quantized checkpoint makes of every tensor: as it is, or rounded, as asked or to a like type."""
    if grid and isinstance(checkpoint, GGUFCheckpoint):
        source = recipe.model
        raise BadRequest(
            f"{source} is a GGUF already, whose types convert keeps; to round it to others: "
            f"halfbyte quantize {source} -o OUT.gguf --grid {grid} --requantize"
        )
    names = name_map_of(checkpoint)
    dropped = {t: reason for t in checkpoint.tensors() if (reason := names.dropped(t))}
    weights = [w for w in modules_of(checkpoint) if w.tensor not in dropped]
    preset, base = _preset_and_type(grid) if grid else (None, "")
    if preset in presets.PLAIN:
        raise BadRequest(
            f"{preset} does not quantize: write it with halfbyte dequantize {checkpoint.path} -o OUT.gguf "
            f"--dtype {DTYPES[preset]}"
        )
    wanted = _types(preset, base, weights, names, checkpoint, imatrix=False) if grid else {}
    choices = []
    for weight in weights:
        source_grid, read = (
            checkpoint.quantized[weight.name][0].weight,
            checkpoint.quantized[weight.name][0].activations,
        )
        remark = f"a GGUF does not say how inputs are rounded: no longer to {read}" if read else ""
        asked = _fitting(weight, wanted[names.mapped(weight.tensor)[0].name]) if grid else None
        same = blocks.cast_exact(checkpoint.read_quantized(weight.name))
        if same and (asked is None or same.grid == asked.scheme):
            choices.append(TensorPlan(weight, same.grid, remark))
        else:
            choice = asked or _fitting(weight, _type_like(source_grid))
            again = (
                f"{source_grid} rounded again, as asked"
                if same
                else f"gguf does not hold {source_grid} value for value: rounded again"
            )
            choices.append(replace(choice, note="; ".join(filter(None, (again, remark, choice.note)))))
    unquantized, warnings = left(checkpoint, choices, dropped), tuple(_remarks_on(checkpoint, dropped))
    shapes = {t: checkpoint.spec(t).shape for t in unquantized}
    alone = [Weight(t.removesuffix(".weight"), t, None, shape) for t, shape in shapes.items() if len(shape) == 2]
    require_ties(target, checkpoint, [*choices, *(TensorPlan(weight, None) for weight in alone)])
    borne = preset if _is_mostly(preset, choices, wanted, names) else None
    return Plan(recipe, checkpoint, target, ROUNDING, tuple(choices), unquantized, dropped, borne, warnings)


def _type_like(grid: Grid) -> str:
    """The type that loses least of integers that none holds: of as many bits, with a minimum for zero points."""
    bits = grid.levels.bits if is_integer(grid) else 8
    symmetric = is_integer(grid) and grid.symmetric
    return "Q8_0" if bits > 5 else f"Q{max(bits, 4)}_{0 if symmetric else 1}"
