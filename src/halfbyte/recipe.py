"""Words to a Job: every check that needs no weight happens here, before any is read."""

import fnmatch
import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from halfbyte import grids
from halfbyte.containers import CONTAINERS, GGUF, Container, container_named
from halfbyte.containers.gguf import presets
from halfbyte.containers.gguf.container import LAYOUTS, TYPE_OF, type_of
from halfbyte.containers.gguf.file import TYPES
from halfbyte.errors import BadRequest, UnknownName, Unsupported
from halfbyte.grids.floats import FloatGrid
from halfbyte.grids.grid import Grid, Quantized
from halfbyte.grids.scalar import IntGrid
from halfbyte.models import roles
from halfbyte.models.checkpoint import Checkpoint, Weight
from halfbyte.models.ggufs import Names, translation_of
from halfbyte.plan import engines

SMALLER_GROUPS = (256, 128, 64, 32)
DEFAULT_PRESET = "Q4_K_M"
"""Of a GGUF for which no grid is named."""
SKIPPED = "skipped as asked"
MISFIT = "neither"
ANY_SHAPE = (1024, 1024)
"""That every block and group divides."""


class Calibration(BaseModel):
    """Which text to run through the model, and how much of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    source: str = "default"
    samples: int = Field(default=128, ge=1)
    length: int = Field(default=512, ge=8)
    seed: int = Field(default=0, ge=0, lt=1 << 63)


class Recipe(BaseModel):
    """All that a run depends on. The same recipe on the same checkpoint gives the same bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    model: str
    method: str = "gptq"
    grid: str = "int4-g128"
    to: str | None = None
    engine: str | None = None
    calibration: Calibration = Calibration()
    skip: tuple[str, ...] = ()
    override: dict[str, str] = {}
    head: bool = False
    pure: bool = False
    imatrix: str | None = None
    pre: str | None = None
    shard_gb: float | None = Field(default=None, gt=0)

    @field_validator("calibration", mode="before")
    @classmethod
    def _source(cls, words: object) -> object:
        return {"source": words} if isinstance(words, str) else words

    @field_validator("skip", mode="before")
    @classmethod
    def _patterns(cls, words: object) -> object:
        return (words,) if isinstance(words, str) else words

    @classmethod
    def load(cls, path: Path, **changes) -> "Recipe":
        """A recipe from a YAML file; `changes` win."""
        try:
            words = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise BadRequest(f"recipe {path} cannot be read: {' '.join(str(error).split())}") from None
        if not isinstance(words, dict) or not all(isinstance(name, str) for name in words):
            raise BadRequest(f"recipe {path} is no mapping of names to values")
        return cls.of(**{**words, **changes})

    @classmethod
    def of(cls, **words) -> "Recipe":
        try:
            return cls(**words)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            if first["type"] == "extra_forbidden":
                known = [*cls.model_fields, *(f"calibration.{field}" for field in Calibration.model_fields)]
                raise UnknownName("recipe entry", name, known) from None
            if first["type"] == "missing":
                raise BadRequest(f"the recipe has no {name}") from None
            raise BadRequest(f"recipe entry {name}: {first['msg'].lower()}, not {first.get('input')!r}") from None

    def dump(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


@dataclass(frozen=True)
class Method:
    """Transforms, then a solver."""

    transforms: tuple[str, ...]
    solver: str
    calibrated: bool
    twin: bool = False
    """Whether the unquantized model runs beside the one that is being quantized."""


PARTS: dict[str, Method] = {
    "minmax": Method((), "minmax", calibrated=False),
    "nearest": Method((), "nearest", calibrated=False),
    "imatrix": Method((), "nearest", calibrated=True),
    "gptq": Method((), "gptq", calibrated=True),
    "gptaq": Method((), "gptaq", calibrated=True, twin=True),
    "awq": Method(("awq",), "nearest", calibrated=True),
}
METHODS = (*PARTS, "awq+gptq")


def method_named(name: str) -> Method:
    """`awq+gptq` is awq's transforms, then gptq's solver."""
    parts = name.split("+")
    for part in parts:
        if part not in PARTS:
            raise UnknownName("method", part, METHODS)
    if len(set(parts)) < len(parts):
        raise BadRequest(f"method '{name}' names a part twice")
    chosen = [PARTS[part] for part in parts]
    if len(chosen) > 1 and any(m.transforms == () for m in chosen[:-1]):
        raise BadRequest(f"method '{name}' has two solvers; put transforms first and one solver last, such as awq+gptq")
    return Method(sum((m.transforms for m in chosen), ()), chosen[-1].solver, any(m.calibrated for m in chosen), any(m.twin for m in chosen))


@dataclass(frozen=True)
class Choice:
    """What becomes of a weight: a grid, or None and the reason why it stays."""

    weight: Weight
    grid: Grid | None
    note: str = ""


@dataclass
class Job:
    """A recipe that fits its checkpoint."""

    recipe: Recipe
    checkpoint: Checkpoint
    container: Container
    method: Method
    choices: list[Choice]
    kept: dict[str, str]
    """Tensor to the reason why it is copied as it is."""
    verdicts: list[engines.Verdict] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    """Tensor to the reason why the output has none such."""
    preset: str | None = None
    """What a GGUF says that it is."""
    warnings: list[str] = field(default_factory=list)

    @property
    def grids(self) -> dict[Weight, Grid]:
        return {c.weight: c.grid for c in self.choices if c.grid}

    @property
    def plain(self) -> str | None:
        """The type of every matrix, where none is quantized."""
        return self.preset if self.preset in presets.PLAIN else None


def resolve(recipe: Recipe) -> Job:
    """Check every word of a recipe against the tables, the checkpoint's shapes and the engine's rules."""
    method = method_named(recipe.method)
    if recipe.engine and recipe.engine not in engines.ENGINES:
        raise UnknownName("engine", recipe.engine, engines.ENGINES)
    container = container_named(recipe.to or _container_for(recipe))
    recipe = _completed(recipe, container)
    checkpoint = Checkpoint.open(recipe.model)
    again = isinstance(container, GGUF) and isinstance(checkpoint.container, GGUF)
    if checkpoint.container and not again and not _is_original(checkpoint):
        other = next(name for name in (container.name, *CONTAINERS) if name != checkpoint.container.name)
        raise Unsupported(
            f"{recipe.model} is quantized already ({checkpoint.container.name}, {_most(checkpoint.quantized.values())}); "
            f"quantize the original, or change its container with: halfbyte convert {recipe.model} -o OUT --to {other}"
        )
    method = _with_importance(method, recipe)
    if isinstance(container, GGUF):
        job = _gguf_job(recipe, checkpoint, container, method)
    else:
        grid = _grid_named(recipe.grid)
        overrides = {p: None if g == "keep" else _grid_named(g) for p, g in recipe.override.items()}
        choices = choose(checkpoint, container, grid, overrides, recipe.skip, recipe.head)
        job = Job(recipe, checkpoint, container, method, choices, keep(checkpoint, choices))
    was = _most(checkpoint.quantized.values())
    if checkpoint.container and not again:
        job.warnings.append(f"the source's weights are {was}: errors are those against these, as precise as the model was released")
    if again:
        job.warnings.append(f"the source is quantized already ({was}): what it lost comes on top; quantize the original if you can")
    job.verdicts = engines.verdicts(container.name, {c.weight: c.grid for c in job.choices}, checkpoint.model_type)
    asked = next((v for v in job.verdicts if v.engine == recipe.engine), None)
    if asked and not asked.loads:
        others = [v.engine for v in job.verdicts if v.loads]
        raise Unsupported(f"{recipe.engine} will not load this: {asked.reasons[0]}" + (f" (as it is, it loads in {', '.join(others)})" if others else ""))
    return job


def _completed(recipe: Recipe, container: Container) -> Recipe:
    """With what the container implies. Raises BadRequest for what it has no use for."""
    if isinstance(container, GGUF):
        return recipe.model_copy(update={"to": container.name, "grid": recipe.grid if "grid" in recipe.model_fields_set else DEFAULT_PRESET})
    if recipe.pure or recipe.pre:
        raise BadRequest(f"{'pure' if recipe.pure else 'pre'} is for GGUF, and this is to be {container.name}; leave it out, or write one with --to gguf")
    return recipe.model_copy(update={"to": container.name})


def _container_for(recipe: Recipe) -> str:
    """The engine's own; without one, GGUF for its own types, and else the first that holds the grid."""
    if recipe.engine:
        return engines.default_container(recipe.engine)
    try:
        grid = grids.parse(recipe.grid.lower())
    except UnknownName:
        return "gguf" if presets.is_preset(recipe.grid) else next(iter(CONTAINERS))
    if presets.is_preset(recipe.grid) or (grid in TYPE_OF and not isinstance(grid, IntGrid)):
        return "gguf"
    return next((name for name in CONTAINERS if _takes(container_named(name), grid)), next(iter(CONTAINERS)))


def _takes(container: Container, grid: Grid) -> bool:
    """Whether a container holds a grid, for some shapes."""
    try:
        container.check(container.native(grid, torch.bfloat16), ANY_SHAPE)
    except Unsupported:
        return False
    return True


def _is_original(checkpoint: Checkpoint) -> bool:
    """Models are released in floats of 8 bits, and in MXFP4: there is nothing more precise to quantize."""
    return all((isinstance(g, FloatGrid) and g.element.bits == 8) or str(g) == "mxfp4" for g, _ in checkpoint.quantized.values())


def _grid_named(name: str) -> Grid:
    if presets.is_preset(name) and name not in grids.GRIDS and name not in grids.ALIASES:
        raise Unsupported(f"'{name}' is a preset of GGUF, where tensors have several types; write one with --to gguf, or name one grid, such as int4-g128")
    return grids.parse(name)


def _with_importance(method: Method, recipe: Recipe) -> Method:
    """An importance matrix takes the place of calibration, for solvers that need no more than that."""
    if recipe.imatrix is None:
        return method
    if method.solver != "nearest" or method.transforms:
        raise BadRequest(f"method {recipe.method} needs more than an importance matrix holds; it serves --method imatrix")
    return replace(method, calibrated=False)


def _gguf_job(recipe: Recipe, checkpoint: Checkpoint, container: GGUF, method: Method) -> Job:
    names = translation_of(checkpoint)
    preset, base = _preset_and_type(recipe.grid, recipe.pure)
    weights = list(checkpoint.weights(embedding=True))
    _check_patterns(weights, (*recipe.override, *recipe.skip))
    wanted = _types(preset, base, weights, names, checkpoint, method.calibrated or recipe.imatrix is not None)
    choices = []
    for weight in weights:
        override = next((g for p, g in recipe.override.items() if matches(weight, p)), None)
        places = names.places(weight.tensor)
        type_name = max((wanted.get(p.name, "F16") for p in places), key=lambda t: TYPES[t].size_bytes / TYPES[t].block, default="F16")
        if any(matches(weight, p) for p in recipe.skip):
            choices.append(Choice(weight, None, SKIPPED))
        elif override == "keep" or not places or (type_name in presets.PLAIN and override is None):
            choices.append(Choice(weight, None, "kept as asked" if override == "keep" else f"stored as {type_name}"))
        else:
            choices.append(_fitting(weight, type_name if override is None else _type_named(override)))
    dropped = {t: reason for t in checkpoint.tensors() if (reason := names.dropped(t))}
    choices = [c for c in choices if c.weight.tensor not in dropped]
    kept = {t: reason for t, reason in keep(checkpoint, choices).items() if t not in dropped}
    if preset in presets.PLAIN:
        recipe, method = recipe.model_copy(update={"method": "nearest"}), PARTS["nearest"]
    elif not any(c.grid for c in choices):
        raise BadRequest(f"nothing is left to quantize: {next((c.note for c in choices), 'the model has no matrix')}")
    job = Job(recipe, checkpoint, container, method, choices, kept, dropped=dropped, preset=preset)
    misfits = Counter(c.note for c in choices if c.note.startswith(MISFIT))
    job.warnings += [f"{count} matri{'ces' if count > 1 else 'x'} kept as in the source: {note}" for note, count in misfits.items()]
    return job


def _preset_and_type(name: str, pure: bool = False) -> tuple[str | None, str]:
    """The preset of a name, if it is one whose rules are wanted, and the type of most tensors."""
    if presets.is_preset(name) and not (pure and name.upper() in LAYOUTS):
        preset = presets.preset_named(name)
        base = presets.PRESETS[preset].type
        return preset if base in presets.PLAIN or not pure else None, base
    return None, _type_named(name, "preset or type of GGUF", presets.PRESETS)


def _type_named(name: str, kind: str = "type of GGUF", also: Iterable[str] = ()) -> str:
    try:
        return type_of(grids.parse(name.lower()))
    except UnknownName:
        raise UnknownName(kind, name, dict.fromkeys((*also, *LAYOUTS))) from None


def _types(preset: str | None, base: str, weights: list[Weight], names: Names, checkpoint: Checkpoint, imatrix: bool) -> dict[str, str]:
    """The type of every GGUF tensor that is made of these weights."""
    shapes: dict[str, tuple[int, ...]] = {}
    for weight in weights:
        for place in names.places(weight.tensor):
            is_stack = weight.expert is not None or place.expert is not None
            shapes[place.name] = (1, *weight.shape) if is_stack else weight.shape
    if preset is None:
        return dict.fromkeys(shapes, base)
    c = checkpoint.text_config
    heads = c.get("num_attention_heads") or c.get("n_head") or 1
    experts = next((c[k] for k in ("num_local_experts", "num_experts", "n_routed_experts") if isinstance(c.get(k), int)), 0)
    layers = c.get("num_hidden_layers") or c.get("n_layer") or 0
    arch = getattr(getattr(names, "family", None), "arch", checkpoint.model_type)
    per_kv = heads // (c.get("num_key_value_heads") or c.get("num_kv_heads") or heads)
    return presets.types(preset, shapes, presets.Model(arch, layers, per_kv, experts, imatrix, tied="output.weight" not in shapes))


def _fitting(weight: Weight, type_name: str) -> Choice:
    """The type, or one in smaller blocks where it does not divide the row, as llama.cpp has it."""
    fits = presets.fallback(type_name, weight.shape[1])
    if fits == "F16":
        return Choice(weight, None, f"{MISFIT} {type_name} nor a type in smaller blocks divides its {weight.shape[1]} in-features")
    GGUF().check(LAYOUTS[fits].grid, weight.shape)
    note = "" if fits == type_name else f"{type_name} does not divide {weight.shape[1]} in-features: {fits}"
    return Choice(weight, LAYOUTS[fits].grid, note)


def transcoding(source: str, to: str, grid: str | None = None) -> Job:
    """The job of moving a quantized checkpoint into another container, every grid as it is where the container holds its values."""
    checkpoint = Checkpoint.open(source)
    if checkpoint.container is None:
        raise BadRequest(f"{source} is not quantized; to quantize it: halfbyte quantize {source} -o OUT --to {to}")
    container = container_named(to)
    if grid and to == checkpoint.container.name == "gguf":
        raise BadRequest(f"{source} is a GGUF already, whose types convert keeps; to round it to others: halfbyte quantize {source} -o OUT.gguf --grid {grid}")
    weights = [Weight(m, f"{m}.weight", roles.block_of(f"{m}."), shape) for m, (_, shape) in checkpoint.quantized.items()]
    gone: dict[str, str] = {}
    if isinstance(container, GGUF):
        names = translation_of(checkpoint)
        gone = {t: reason for t in checkpoint.tensors() if (reason := names.dropped(t))}
        choices = _into_gguf(checkpoint, container, [w for w in weights if w.tensor not in gone], names, grid)
    else:
        choices, container = _into_folder(checkpoint, container, weights, grid)
    recipe = Recipe(model=source, method="convert", grid=grid or _most(checkpoint.quantized.values()), to=container.name)
    quantized = {c.weight.tensor for c in choices if c.grid}
    reasons = {c.weight.tensor: c.note for c in choices}
    kept = {t: reasons.get(t, "not quantized in the source") for t in checkpoint.tensors() if t not in quantized and t not in gone}
    job = Job(recipe, checkpoint, container, Method((), "nearest", calibrated=False), choices, kept, dropped=gone)
    job.verdicts = engines.verdicts(container.name, {c.weight: c.grid for c in choices}, checkpoint.model_type)
    return job


def _into_gguf(checkpoint: Checkpoint, container: GGUF, weights: list[Weight], names: Names, grid: str | None) -> list[Choice]:
    """As it is, or rounded to what is asked for; by default to the type of as many bits."""
    wanted = _types(*_preset_and_type(grid), weights, names, checkpoint, imatrix=False) if grid else {}
    choices = []
    for weight in weights:
        own = checkpoint.quantized[weight.name][0]
        if same := container.same(checkpoint.read_quantized(weight.name)):
            choices.append(Choice(weight, same.grid))
        else:
            type_name = wanted[names.places(weight.tensor)[0].name] if grid else _type_like(own)
            choice = _fitting(weight, type_name)
            choices.append(replace(choice, note="; ".join(filter(None, (f"gguf does not hold {own} value for value: rounded again", choice.note)))))
    return choices


def _type_like(grid: Grid) -> str:
    """The type that loses least of integers that none holds: as many bits or more, with a minimum in each block where there are zero points."""
    bits = grid.bits_per_code if isinstance(grid, IntGrid) else 8
    symmetric = isinstance(grid, IntGrid) and grid.symmetric
    return "Q8_0" if bits > 5 else f"Q{max(bits, 4)}_{0 if symmetric else 1}"


def _into_folder(checkpoint: Checkpoint, container: Container, weights: list[Weight], grid: str | None) -> tuple[list[Choice], Container]:
    """As it is, or rounded to what is asked for; and the version of the container that holds it all."""
    choices: list[Choice] = []
    for weight in weights:
        own, q = checkpoint.quantized[weight.name][0], checkpoint.read_quantized(weight.name)
        if roles.EMBEDDING.match(weight.tensor):
            choices.append(Choice(weight, None, "the embedding, which is looked up and not multiplied: in 16 bits"))
        elif same := _held(container, q):
            container = container.holding(same)
            choices.append(Choice(weight, same.grid))
        elif weight.block is None and not isinstance(own, IntGrid):
            choices.append(Choice(weight, None, "the head, which engines want in 16 bits"))
        else:
            try:
                wanted = container.native(_grid_named(grid) if grid else own, checkpoint.dtype)
                choices.append(fit(weight, wanted, container, f"{container.name} does not hold {own} value for value: rounded again"))
            except Unsupported as error:
                hint = "" if grid else "; to round it again, name what it should be, such as --grid int4-g128"
                raise Unsupported(f"{error}{hint}") from None
    _check_mixed(choices, container)
    return choices, container


def _held(container: Container, q: Quantized) -> Quantized | None:
    """A matrix as the container holds it, value for value."""
    same = container.same(q)
    try:
        if same:
            container.holding(same).check(same.grid, same.shape)
    except Unsupported:
        return None
    return same


def choose(checkpoint: Checkpoint, container: Container, grid: Grid, overrides: dict[str, Grid | None], skip: Iterable[str], head: bool) -> list[Choice]:
    """A grid for every weight. Raises for patterns that match nothing and for shapes that no fallback fits."""
    weights = list(checkpoint.weights())
    if not [w for w in weights if w.block]:
        raise Unsupported(f"{checkpoint.path} has no matrix in numbered blocks to quantize")
    _check_patterns(weights, (*overrides, *skip))
    if head and not any(w.block is None for w in weights):
        raise Unsupported("the head shares its tensor with the embedding, which is looked up and not multiplied; it stays in 16 bits")
    choices = []
    for weight in weights:
        wanted = next((g for p, g in overrides.items() if matches(weight, p)), grid)
        if any(matches(weight, p) for p in skip):
            choices.append(Choice(weight, None, SKIPPED))
        elif weight.block is None and not head and wanted is grid:
            choices.append(Choice(weight, None, "the head, kept unless --head"))
        elif wanted is None:
            choices.append(Choice(weight, None, "kept as asked"))
        else:
            choices.append(fit(weight, container.native(wanted, checkpoint.dtype), container))
    _check_fused(choices)
    _check_mixed(choices, container)
    if not any(c.grid for c in choices):
        raise BadRequest("every weight is skipped or kept, so there is nothing to quantize")
    return choices


def fit(weight: Weight, grid: Grid, container: Container, note: str = "") -> Choice:
    """The grid, or one with smaller groups where the row is no multiple of the group."""
    width = weight.shape[1]
    if isinstance(grid, IntGrid) and grid.block and width % grid.block:
        smaller = next((g for g in SMALLER_GROUPS if g < grid.block and width % g == 0), None)
        if smaller is None or not container.mixes:
            fits = [g for g in SMALLER_GROUPS if width % g == 0]
            hint = f"groups of {' or '.join(map(str, fits))} would fit" if fits else f"{grid.with_span('channel')} would fit"
            alone = "" if container.mixes else f", and {container.name} holds one grid for all"
            raise Unsupported(f"{grid} does not divide the {width} in-features of {weight.name}{alone}; {hint}, or --skip it")
        note = f"{grid} does not divide {width} in-features"
        grid = grid.with_span(smaller)
    try:
        container.check(grid, weight.shape)
    except Unsupported as error:
        raise Unsupported(f"{weight.name} {list(weight.shape)}: {error}") from None
    return Choice(weight, grid, note)


def keep(checkpoint: Checkpoint, choices: list[Choice]) -> dict[str, str]:
    """Every tensor that is not quantized, with the reason."""
    quantized = {c.weight.tensor for c in choices if c.grid}
    reasons = {c.weight.tensor: c.note for c in choices if not c.grid}
    return {t: reasons.get(t, "not a matrix of a decoder block") for t in checkpoint.tensors() if t not in quantized}


def matches(weight: Weight, pattern: str) -> bool:
    """`layers.0.*` matches model.layers.0.mlp.up_proj: a pattern may start at any dot."""
    return any(fnmatch.fnmatchcase(name, p) for name in (weight.name, weight.tensor) for p in (pattern, f"*.{pattern}"))


def _check_patterns(weights: list[Weight], patterns: Iterable[str]) -> None:
    for pattern in patterns:
        if not any(matches(w, pattern) for w in weights):
            raise BadRequest(f"pattern '{pattern}' matches no weight; they are called like {next(w.name for w in weights if w.block)}")


def _check_fused(choices: list[Choice]) -> None:
    by_tensor: dict[str, set[bool]] = {}
    for choice in choices:
        by_tensor.setdefault(choice.weight.tensor, set()).add(choice.grid is None)
    mixed = next((t for t, kinds in by_tensor.items() if len(kinds) > 1), None)
    if mixed:
        raise Unsupported(f"'{mixed}' holds all experts in one tensor: quantize all of them or none")


def _check_mixed(choices: list[Choice], container: Container) -> None:
    used = {c.grid for c in choices if c.grid}
    if len(used) > 1 and not container.mixes:
        raise Unsupported(f"{container.name} holds one grid for all weights, not {', '.join(sorted(map(str, used)))}; compressed-tensors and gptq mix them")


def _most(found: Iterable[tuple[Grid, tuple[int, ...]]]) -> str:
    names = [str(grid) for grid, _ in found]
    return max(set(names), key=names.count) if names else "no weights"
