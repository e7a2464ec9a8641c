"""Words to a Job: every check that needs no weight happens here, before quantize() reads any. What convert() can keep, values decide."""

import re
from dataclasses import replace

import torch

from halfbyte.containers import CONTAINERS, GGUF, Container, container_named
from halfbyte.containers.plain import Plain
from halfbyte.engines import verdicts
from halfbyte.engines.engines import ENGINES, NOBODY, engine_named
from halfbyte.errors import BadCheckpoint, BadRequest, UnknownName, Unsupported, plural
from halfbyte.grids import schemes
from halfbyte.grids.floats import FloatGrid
from halfbyte.grids.quantized import AnyScheme
from halfbyte.grids.scalar import IntGrid
from halfbyte.models import adapter, heads, roles, sizes
from halfbyte.models.checkpoint import DTYPE_NAMES, Checkpoint, Weight
from halfbyte.recipe import Method, Recipe, method_named
from halfbyte.targets.gguf import presets
from halfbyte.targets.gguf import types as gguf
from halfbyte.targets.gguf.container import TYPE_OF
from halfbyte.targets.gguf.source import translation_of
from halfbyte.targets.hf import cache
from halfbyte.targets.hf import schemes as folder
from halfbyte.targets.plan import Job, commonest, doubts
from halfbyte.words import require_plain

DEFAULT_PRESET = "Q4_K_M"
"""Of a GGUF for which no grid is named."""
ANY_SHAPE = (1024, 1024)
"""That every block and group divides."""


def resolve(recipe: Recipe) -> Job:
    """Check every word of a recipe against the tables, the checkpoint's shapes and the engine's rules."""
    if (preset := schemes.PRESETS.get(recipe.grid.lower())) and "method" not in recipe.model_fields_set:
        recipe = recipe.model_copy(update={"method": preset.method})
    method = method_named(recipe.method)
    recipe = recipe.model_copy(update={"engine": _engine(recipe.engine)})
    container = container_named(recipe.to or _container_for(recipe))
    recipe = _completed(recipe, container)
    checkpoint = source_of(recipe)
    if checkpoint.container and not _is_original(checkpoint) and not recipe.requantize:
        raise Unsupported(
            f"{recipe.model} is quantized already ({checkpoint.container.name}, {commonest(checkpoint.quantized.values())}); quantize the original, "
            f"or take what is left of it as the original with --requantize{_moved(checkpoint, recipe.model)}"
        )
    method = _with_importance(method, recipe)
    if isinstance(container, GGUF):
        job = gguf.job_of(recipe, checkpoint, container, method)
    else:
        job = folder.job_of(recipe, checkpoint, container, method)
    _check_inputs(job)
    cache.plan(job)
    job.warnings += doubts(checkpoint)
    was = commonest(checkpoint.quantized.values())
    if checkpoint.container and _is_original(checkpoint):
        job.warnings.append(
            f"the source's weights are {was}: errors are those against these, as precise as the model was released"
        )
    elif checkpoint.container:
        job.warnings.append(
            f"the source is quantized already ({checkpoint.container.name}, {was}), and its values were taken as the original: all errors and losses are "
            "those against it, and what it had lost comes on top; quantize the original if you can"
        )
    job.warnings += _of_adapter(checkpoint)
    _judge(job)
    return job


def source_of(recipe: Recipe) -> Checkpoint:
    """The checkpoint that a recipe names, with its adapter."""
    checkpoint = Checkpoint.open(recipe.model)
    heads.settle(checkpoint)
    sizes.require(checkpoint)
    return adapter.merged(checkpoint, recipe.adapter) if recipe.adapter else checkpoint


def _require_names(checkpoint: Checkpoint) -> None:
    """Raise Unsupported for experts that lie apart and that no one looks for so in 16 bits: Transformers would fill its stacks at random."""
    numbered = [m for m in checkpoint.quantized if re.search(r"\.\d+\.[^.]+$", m) and "expert" in m]
    if not numbered:
        return
    from halfbyte.models import modules, skeleton  # Transformers takes seconds to import

    try:
        model = skeleton.outline(checkpoint)
    except BadCheckpoint:
        return
    if lost := modules.read_in_stacks(model, numbered):
        raise Unsupported(
            f"in 16 bits Transformers reads '{lost}' out of one tensor of all experts, which is not put together yet; take the original model"
        )


def _of_adapter(checkpoint: Checkpoint) -> list[str]:
    """What is to be said of an adapter that was merged, or of one that lies beside the model and was not."""
    if checkpoint.adapter:
        counts = f"{plural(len(checkpoint.adapter.low_rank), 'product')}, {plural(len(checkpoint.adapter.whole), 'tensor')} whole"
        return [
            f"the adapter {checkpoint.adapter.path} was merged into the model as it was read ({counts}): the original is the model with it"
        ]
    if adapter.is_adapter(checkpoint.path):
        return [
            f"{checkpoint.path} holds an adapter beside the model, which was left out; --adapter {checkpoint.path} merges it"
        ]
    return []


def _engine(words: str | None) -> str | None:
    """The engine that is meant, or that none is. Raises UnknownName."""
    return words if words in (None, NOBODY) else engine_named(words)


def _judge(job: Job) -> None:
    """Ask every engine. Raises Unsupported where the one that was asked for will not load the output, or where none will and that was not asked for."""
    engine = job.recipe.engine
    job.verdicts = verdicts.verdicts(
        job.container.name, {c.weight: c.scheme for c in job.choices}, job.checkpoint.config
    )
    others = [v.engine for v in job.verdicts if v.loads]
    asked = next((v for v in job.verdicts if v.engine == engine), None)
    if asked and not asked.loads:
        raise Unsupported(
            f"{engine} will not load this: {asked.reasons[0]}"
            + (f" (as it is, it loads in {', '.join(others)})" if others else "")
        )
    if not others and engine != NOBODY:
        raise Unsupported(
            f"no engine is known to load this ({verdicts.nobody_loads(job.container.name, job.verdicts)}); --engine {NOBODY} writes it all the same"
        )


def _completed(recipe: Recipe, container: Container) -> Recipe:
    """With what the container implies. Raises BadRequest for what it has no use for."""
    if isinstance(container, GGUF):
        return recipe.model_copy(
            update={"to": container.name, "grid": recipe.grid if "grid" in recipe.model_fields_set else DEFAULT_PRESET}
        )
    if recipe.pure or recipe.pre:
        raise BadRequest(
            f"{'pure' if recipe.pure else 'pre'} is for GGUF, and this is to be {container.name}; leave it out, or write one with --to gguf"
        )
    return recipe.model_copy(update={"to": container.name})


def _container_for(recipe: Recipe) -> str:
    """The engine's own, or another in which it reads the grid; without an engine, GGUF for its own types, and else the first that holds the grid."""
    try:
        scheme = schemes.parse(recipe.grid.lower())
    except UnknownName:
        scheme = None
    if recipe.engine and recipe.engine != NOBODY:
        own = verdicts.default_container(recipe.engine)
        read = {own: container_named(own)} | {
            name: container_named(name) for name in CONTAINERS if name in ENGINES[recipe.engine].reads
        }
        holding = {name: c.native(scheme, torch.bfloat16) for name, c in read.items() if scheme and _takes(c, scheme)}
        return next(
            (name for name, s in holding.items() if verdicts.multiplies(recipe.engine, name, s)),
            next(iter(holding), own),
        )
    if scheme is None:
        return "gguf" if presets.is_preset(recipe.grid) else next(iter(CONTAINERS))
    if presets.is_preset(recipe.grid) or (scheme in TYPE_OF and not isinstance(scheme, IntGrid)):
        return "gguf"
    return next((name for name in CONTAINERS if _takes(container_named(name), scheme)), next(iter(CONTAINERS)))


def _moved(checkpoint: Checkpoint, model: str) -> str:
    """How to have the same bits in another container, if one holds them all."""
    used = {scheme for scheme, _ in checkpoint.quantized.values()}
    others = [name for name in CONTAINERS if checkpoint.container and name != checkpoint.container.name]
    other = next((name for name in others if all(_takes(container_named(name), scheme) for scheme in used)), None)
    return f"; its bits in another container: halfbyte convert {model} -o OUT --to {other}" if other else ""


def _takes(container: Container, scheme: AnyScheme) -> bool:
    """Whether a container holds a scheme, for some shapes."""
    try:
        container.check(container.native(scheme, torch.bfloat16), ANY_SHAPE)
    except Unsupported:
        return False
    return True


def _is_original(checkpoint: Checkpoint) -> bool:
    """Models are released in floats of 8 bits, in MXFP4 and in NVFP4: there is nothing more precise to quantize."""
    grids = {scheme.weight for scheme, _ in checkpoint.quantized.values()}
    return all(isinstance(grid, FloatGrid) or str(grid) == "mxfp4" for grid in grids)


def _check_inputs(job: Job) -> None:
    """Raise BadRequest for methods, words and schemes of inputs that do not go together."""
    read = [s.activations for s in job.schemes.values() if s.activations]
    if job.recipe.alpha is not None and "smoothquant" not in job.method.transforms:
        raise BadRequest(
            f"alpha is for smoothquant, and the method is {job.recipe.method}; leave it out, or write --method smoothquant+gptq"
        )
    if job.recipe.observer != "max" and not job.recipe.kv and not any(i.static for i in read):
        raise BadRequest(
            "observer is for scales that the file stores, and here it stores none; leave it out, or write --grid w8a8-static"
        )
    if "smoothquant" in job.method.transforms and not read:
        raise BadRequest(
            f"smoothquant makes inputs easier to round, and with {job.recipe.grid} they stay in 16 bits; use awq, or a scheme such as w8a8"
        )
    if job.recipe.imatrix and any(i.static for i in read):
        raise BadRequest(
            f"{next(i for i in read if i.static)} inputs have a stored scale, which an importance matrix does not tell; leave out --imatrix"
        )


def _with_importance(method: Method, recipe: Recipe) -> Method:
    """An importance matrix takes the place of calibration, for solvers that need no more than that."""
    if recipe.imatrix is None:
        return method
    if method.solver != "nearest" or method.transforms:
        raise BadRequest(
            f"method {recipe.method} needs more than an importance matrix holds; it serves --method imatrix"
        )
    return replace(method, calibrated=False)


def transcoding(source: str, to: str, grid: str | None = None, engine: str | None = None) -> Job:
    """The job of moving a quantized checkpoint into another container, every grid as it is where the container holds its values."""
    checkpoint = Checkpoint.open(source)
    heads.settle(checkpoint)
    sizes.require(checkpoint)
    if checkpoint.container is None:
        raise BadRequest(f"{source} is not quantized; to quantize it: halfbyte quantize {source} -o OUT --to {to}")
    container = container_named(to)
    if grid and to == checkpoint.container.name == "gguf":
        raise BadRequest(
            f"{source} is a GGUF already, whose types convert keeps; to round it to others: halfbyte quantize {source} -o OUT.gguf --grid {grid} --requantize"
        )
    own = commonest(checkpoint.quantized.values())
    grid = None if grid == own else grid
    weights = [
        Weight(m, f"{m}.weight", roles.block_of(f"{m}."), shape) for m, (_, shape) in checkpoint.quantized.items()
    ]
    gone: dict[str, str] = {}
    preset = None
    if isinstance(container, GGUF):
        names = translation_of(checkpoint)
        gone = {t: reason for t in checkpoint.tensors() if (reason := names.dropped(t))}
        choices, preset = gguf.transcode(
            checkpoint, container, [w for w in weights if w.tensor not in gone], names, grid
        )
    else:
        choices, container = folder.transcode(checkpoint, container, weights, grid)
    recipe = Recipe(model=source, method="convert", grid=grid or own, to=container.name, engine=_engine(engine))
    quantized = {c.weight.tensor for c in choices if c.scheme}
    reasons = {c.weight.tensor: c.note for c in choices}
    kept = {
        t: reasons.get(t, "not quantized in the source")
        for t in checkpoint.tensors()
        if t not in quantized and t not in gone
    }
    job = Job(
        recipe,
        checkpoint,
        container,
        Method((), "nearest", calibrated=False),
        choices,
        kept,
        dropped=gone,
        preset=preset,
    )
    if (
        grid
        and not any(str(s).startswith(grid.lower()) for s in job.schemes.values())
        and grid.upper() != (preset or job.label)
    ):
        job.warnings.append(
            f"most of this is {job.label}, not {grid}: {container.name} holds what the source has as it is"
        )
    if isinstance(container, GGUF):
        job.warnings += gguf.remarks_on(checkpoint, gone)
    cache.plan(job)
    _judge(job)
    return job


def decoding(source: str, to: str, dtype: str | None, folder: str | None) -> Job:
    """The job of writing a quantized checkpoint, or one with an adapter in `folder` merged into it, in 16 (or 32) bits.

    `to` is "safetensors" or "gguf"; without `dtype` it is the one that the checkpoint says engines compute in, and bfloat16 for a GGUF, which
    does not say. Raises HalfbyteError.
    """
    require_plain(to, dtype)
    checkpoint = source_of(Recipe(model=source, adapter=folder))
    if checkpoint.container is None and checkpoint.adapter is None:
        raise BadRequest(
            f"{source} is not quantized, so there is nothing to decode; name a quantized checkpoint, or an --adapter to merge"
        )
    said = "bfloat16" if isinstance(checkpoint.container, GGUF) else str(checkpoint.dtype).removeprefix("torch.")
    recipe = Recipe(model=source, adapter=folder, method="dequantize", grid=dtype or said, to=to)
    if to == GGUF.name:
        job = gguf.job_of(
            recipe.model_copy(update={"grid": presets.PLAIN_NAMES[DTYPE_NAMES[recipe.grid]]}),
            checkpoint,
            GGUF(),
            method_named("nearest"),
        )
        job.recipe, job.plain_dtype = recipe, torch.float32  # the edition rounds what it is given, once
        job.verdicts = verdicts.verdicts(job.container.name, {}, checkpoint.config)
    else:
        _require_names(checkpoint)
        kept = dict.fromkeys(checkpoint.tensors(), "decoded" if checkpoint.container else "as in the source")
        job = Job(recipe, checkpoint, Plain(), method_named("nearest"), [], kept, plain_dtype=DTYPE_NAMES[recipe.grid])
    cache.plan(job)
    if checkpoint.container:
        job.warnings.append(
            f"these are the values of {commonest(checkpoint.quantized.values())} in {recipe.grid}: what quantizing lost does not come back"
        )
    job.warnings += _of_adapter(checkpoint)
    return job
