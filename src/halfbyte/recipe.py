"""Words to a Job: every check that needs no weight happens here, before any is read."""

import fnmatch
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from halfbyte import grids
from halfbyte.containers import CONTAINERS, GPTQ, Container, container_named
from halfbyte.errors import BadRequest, UnknownName, Unsupported
from halfbyte.grids.grid import Grid
from halfbyte.grids.scalar import IntGrid
from halfbyte.models import roles
from halfbyte.models.checkpoint import Checkpoint, Weight
from halfbyte.plan import engines

SMALLER_GROUPS = (256, 128, 64, 32)
SKIPPED = "skipped as asked"


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
    shard_gb: float = Field(default=5.0, gt=0)

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
    verdicts: list[engines.Verdict]

    @property
    def grids(self) -> dict[Weight, Grid]:
        return {c.weight: c.grid for c in self.choices if c.grid}


def resolve(recipe: Recipe) -> Job:
    """Check every word of a recipe against the tables, the checkpoint's shapes and the engine's rules."""
    method = method_named(recipe.method)
    grid = grids.parse(recipe.grid)
    overrides = {p: None if g == "keep" else grids.parse(g) for p, g in recipe.override.items()}
    to = recipe.to or (engines.default_container(recipe.engine) if recipe.engine else next(iter(CONTAINERS)))
    recipe, container = recipe.model_copy(update={"to": to}), container_named(to)
    if recipe.engine and recipe.engine not in engines.ENGINES:
        raise UnknownName("engine", recipe.engine, engines.ENGINES)
    checkpoint = Checkpoint.open(recipe.model)
    if checkpoint.container:
        other = next(name for name in (container.name, *CONTAINERS) if name != checkpoint.container.name)
        raise Unsupported(
            f"{recipe.model} is quantized already ({checkpoint.container.name}, {_most(checkpoint.quantized.values())}); "
            f"quantize the original, or change its container with: halfbyte convert {recipe.model} -o OUT --to {other}"
        )
    choices = choose(checkpoint, container, grid, overrides, recipe.skip, recipe.head)
    job = Job(recipe, checkpoint, container, method, choices, keep(checkpoint, choices), [])
    job.verdicts = engines.verdicts(container.name, {c.weight: c.grid for c in choices}, checkpoint.model_type)
    asked = next((v for v in job.verdicts if v.engine == recipe.engine), None)
    if asked and not asked.loads:
        others = [v.engine for v in job.verdicts if v.loads]
        raise Unsupported(f"{recipe.engine} will not load this: {asked.reasons[0]}" + (f" (as it is, it loads in {', '.join(others)})" if others else ""))
    return job


def transcoding(source: str, to: str) -> Job:
    """The job of moving a quantized checkpoint into another container, every grid as it is where the container holds it."""
    checkpoint = Checkpoint.open(source)
    if checkpoint.container is None:
        raise BadRequest(f"{source} is not quantized; to quantize it: halfbyte quantize {source} -o OUT --to {to}")
    container = container_named(to)
    choices, versions = [], {1}
    for module, (grid, shape) in checkpoint.quantized.items():
        weight, q, note = Weight(module, f"{module}.weight", roles.block_of(f"{module}."), shape), checkpoint.read_quantized(module), ""
        if not container.holds(q):
            grid, note = container.native(grid, checkpoint.dtype), f"{container.name} does not hold these scales exactly: rounded again"
        elif "zero" in q.params and not q.params["zero"].all():
            versions.add(2)
        choices.append(fit(weight, grid, container, note))
    _check_mixed(choices, container)
    if isinstance(container, GPTQ):
        container = GPTQ(max(versions))
    recipe = Recipe(model=source, method="convert", grid=_most(checkpoint.quantized.values()), to=container.name)
    kept = {t: "not quantized in the source" for t in checkpoint.tensors() if t.removesuffix(".weight") not in checkpoint.quantized}
    job = Job(recipe, checkpoint, container, Method((), "nearest", calibrated=False), choices, kept, [])
    job.verdicts = engines.verdicts(container.name, {c.weight: c.grid for c in choices}, checkpoint.model_type)
    return job


def choose(checkpoint: Checkpoint, container: Container, grid: Grid, overrides: dict[str, Grid | None], skip: Iterable[str], head: bool) -> list[Choice]:
    """A grid for every weight. Raises for patterns that match nothing and for shapes that no fallback fits."""
    weights = list(checkpoint.weights())
    if not [w for w in weights if w.block]:
        raise Unsupported(f"{checkpoint.path} has no matrix in numbered blocks to quantize")
    for pattern in (*overrides, *skip):
        if not any(matches(w, pattern) for w in weights):
            raise BadRequest(f"pattern '{pattern}' matches no weight; they are called like {next(w.name for w in weights if w.block)}")
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
