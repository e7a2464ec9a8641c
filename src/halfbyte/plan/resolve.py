"""Words to a plan: every check that needs no weight, before any is read. What convert() can keep, values decide."""

from collections.abc import Iterable
from dataclasses import replace
from math import prod
from typing import Any

import torch

from halfbyte.containers import kv as layout
from halfbyte.containers.safetensors import Spec
from halfbyte.engines import verdicts
from halfbyte.engines.engines import ENGINES, NOBODY, engine_named
from halfbyte.engines.verdicts import Verdict
from halfbyte.errors import BadRequest, UnknownName, Unsupported, plural
from halfbyte.formats import SCHEMES
from halfbyte.grids import schemes
from halfbyte.grids.kv import KVGrid
from halfbyte.grids.quantized import Scheme
from halfbyte.grids.scalar import is_float
from halfbyte.models import adapter, heads, roles, sizes
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.plan import fits
from halfbyte.recipe import Method, Recipe, method_named
from halfbyte.targets.plan import Plan, commonest_name, doubts
from halfbyte.targets.table import TARGETS, UNQUANTIZED, target_named
from halfbyte.targets.target import Target
from halfbyte.words import require_plain

ANY_SHAPE = (1024, 1024)
"""That every block and group divides."""


def resolve(recipe: Recipe, source: Checkpoint | None = None, engines: Iterable[str] = ENGINES) -> Plan:
    """Check every word of a recipe against the tables, the checkpoint's shapes and the engine's rules; `source` is the
    checkpoint that the recipe names, where that is open already, and `engines` are those that are asked."""
    if (preset := SCHEMES.get(recipe.grid.lower())) and "method" not in recipe.model_fields_set:
        recipe = recipe.model_copy(update={"method": preset.method})
    method = method_named(recipe.method)
    recipe = recipe.model_copy(update={"engine": _engine(recipe.engine)})
    target = target_named(recipe.to or _target_for(recipe))
    recipe = fits.completed(recipe, target)
    checkpoint = source or _source_of(recipe)
    if checkpoint.container and not _is_original(checkpoint) and not recipe.requantize:
        raise Unsupported(
            f"{recipe.model} is quantized already ({checkpoint.container}, {commonest_name(checkpoint.quantized)}); "
            f"quantize the original, or take what is left of it as the original with "
            f"--requantize{_moved(checkpoint, recipe.model)}"
        )
    method = _with_importance(method, recipe)
    checkpoint, rotation = _rotated(checkpoint, method)
    fits.require_known(target, recipe.grid, recipe.override.values())
    plan = target.plan(recipe, checkpoint, method)
    _check_activations(plan)
    warnings = (*plan.warnings, *doubts(checkpoint), *_of_source(plan), *_of_adapter(checkpoint), *rotation)
    return _finished(plan, warnings, engines)


def _finished(plan: Plan, warnings: tuple[str, ...], engines: Iterable[str] = ENGINES) -> Plan:
    """With its KV cache, and with what engines say of it."""
    plan = replace(plan, warnings=warnings, **_cache(plan))
    return replace(plan, verdicts=_judged(plan, engines))


def _of_source(plan: Plan) -> list[str]:
    """What is to be said of a source that is quantized already."""
    checkpoint = plan.checkpoint
    if not checkpoint.container:
        return []
    was = commonest_name(checkpoint.quantized)
    if _is_original(checkpoint):
        return [f"the source's weights are {was}: errors are those against these, as precise as the model was released"]
    return [
        f"the source is quantized already ({checkpoint.container}, {was}), and its values were taken as the original: "
        "all errors and losses are those against it, and what it had lost comes on top; "
        f"quantize the original if you can{_bits_again(plan)}"
    ]


def _bits_again(plan: Plan) -> str:
    """How large weights are that are quantized again, and how large they were."""
    stored = plan.checkpoint.quantized
    again = {w: (stored[w.name][0].weight, s.weight) for w, s in plan.schemes.items() if w.name in stored}
    weights = sum(prod(w.shape) for w in again)
    if not weights:
        return ""
    was, now = (sum(grids[i].bits(w.shape) * prod(w.shape) for w, grids in again.items()) / weights for i in range(2))
    no_smaller = ", so that it becomes no smaller and no more exact" if now >= was else ""
    return f"; {was:.2f} bits per weight become {now:.2f}{no_smaller}"


def _source_of(recipe: Recipe) -> Checkpoint:
    """The checkpoint that a recipe names, with its adapter."""
    checkpoint = heads.settled(Checkpoint.open(recipe.model))
    sizes.require(checkpoint)
    return adapter.merged(checkpoint, recipe.adapter) if recipe.adapter else checkpoint


def _rotated(checkpoint: Checkpoint, method: Method) -> tuple[Checkpoint, list[str]]:
    """The checkpoint as the method reads it, and what is to be said of that."""
    if not method.rotated or checkpoint.rotation:
        return checkpoint, []
    from halfbyte.transforms import rotate  # which runs the model, once values are read

    turned = rotate.rotated(checkpoint)
    if not turned.untied:
        return turned, []
    added = sum(turned.spec(tensor).size_bytes for tensor in turned.untied)
    doubt = f"; engines may know no head of '{turned.model_type}' but the embedding: see that yours answers as before"
    return turned, [
        f"the head, which was the embedding, becomes a tensor of its own: {added / 1e6:.1f} MB more, unless it is "
        f"quantized (--head, or a GGUF's preset){doubt if turned.model_type in roles.TIED else ''}"
    ]


def _of_adapter(checkpoint: Checkpoint) -> list[str]:
    """What is to be said of an adapter that was merged, or of one that lies beside the model and was not."""
    if checkpoint.adapter:
        products, whole = len(checkpoint.adapter.low_rank), len(checkpoint.adapter.whole)
        counts = f"{plural(products, 'product')}, {plural(whole, 'tensor')} whole"
        return [
            f"the adapter {checkpoint.adapter.path} was merged into the model as it was read ({counts}): "
            "the original is the model with it"
        ]
    if adapter.is_adapter(checkpoint.path):
        return [
            f"{checkpoint.path} holds an adapter beside the model, which was left out; "
            f"--adapter {checkpoint.path} merges it"
        ]
    return []


def _engine(name: str | None) -> str | None:
    """The engine that is meant, or that none is. Raises UnknownName."""
    return name if name in (None, NOBODY) else engine_named(name)


def _judged(plan: Plan, engines: Iterable[str]) -> tuple[Verdict, ...]:
    """Ask these engines. Raises Unsupported where the one that was asked for will not load the output, or none will."""
    engine, name = plan.recipe.engine, plan.target.name
    results = verdicts.verdicts(name, {c.weight: c.scheme for c in plan.weights}, plan.checkpoint.config, engines)
    others = [v.engine for v in results if v.loads]
    asked = next((v for v in results if v.engine == engine), None)
    if asked and not asked.loads:
        raise Unsupported(
            f"{engine} will not load this: {asked.reasons[0]}"
            + (f" (as it is, it loads in {', '.join(others)})" if others else "")
        )
    if not others and engine != NOBODY:
        raise Unsupported(
            f"no engine is known to load this ({verdicts.nobody_loads(name, results)}); "
            f"--engine {NOBODY} writes it all the same"
        )
    return tuple(results)


def _cache(plan: Plan) -> dict[str, Any]:
    """The KV cache: scales of the source go along where engines read them; those asked for get a place.

    Raises Unsupported for a cache that was asked for and that the target does not hold.
    """
    if plan.recipe.kv:
        grid = KVGrid.parse(plan.recipe.kv)
        plan.target.require_cache(grid)
        return {"kv": grid, "scales": _scales_to_find(plan.checkpoint, grid)}
    cache = plan.checkpoint.kv
    if cache is None:
        return {}
    try:
        plan.target.require_cache(cache.grid)
    except Unsupported as reason:
        return {"dropped": {**plan.dropped, **dict.fromkeys(plan.checkpoint.kv_scales, str(reason))}}
    return {"kv": cache.grid, "scales": layout.specs(cache)}


def _scales_to_find(checkpoint: Checkpoint, grid: KVGrid) -> dict[str, Spec]:
    from halfbyte.models import kv  # needs the model's code, as finding the scales does

    return layout.specs(kv.blank(checkpoint, grid))


def _target_for(recipe: Recipe) -> str:
    """The engine's own, or another in which it reads the grid; without an engine, one that holds it."""
    try:
        scheme = schemes.parse(recipe.grid.lower())
    except UnknownName:
        scheme = None
    if recipe.engine and recipe.engine != NOBODY:
        default = verdicts.default_container(recipe.engine)
        read = {default: TARGETS[default]} | {n: t for n, t in TARGETS.items() if n in ENGINES[recipe.engine].support}
        holding = {n: t.resolve(scheme, torch.bfloat16) for n, t in read.items() if scheme and _takes(t, scheme)}
        multiplied = (n for n, resolved in holding.items() if verdicts.multiplies(recipe.engine, n, resolved))
        return next(multiplied, next(iter(holding), default))
    preferred = (n for n, t in TARGETS.items() if t.prefers(recipe.grid, scheme))
    holding = (n for n, t in TARGETS.items() if scheme and _takes(t, scheme))
    return next(preferred, next(holding, next(iter(TARGETS))))


def _moved(checkpoint: Checkpoint, model: str) -> str:
    """How to have the same bits in another container, if one holds them all."""
    used = {scheme for scheme, _ in checkpoint.quantized.values()}
    others = (name for name in TARGETS if name != checkpoint.container)
    other = next((name for name in others if all(_takes(TARGETS[name], scheme) for scheme in used)), None)
    return f"; its bits in another container: halfbyte convert {model} -o OUT --to {other}" if other else ""


def _takes(target: Target, scheme: Scheme) -> bool:
    """Whether a target holds a scheme, for some shapes."""
    try:
        target.check(target.resolve(scheme, torch.bfloat16), ANY_SHAPE)
    except Unsupported:
        return False
    return True


def _is_original(checkpoint: Checkpoint) -> bool:
    """Models are released in floats of 8 bits, in MXFP4 and in NVFP4: there is nothing more precise to quantize."""
    grids = {scheme.weight for scheme, _ in checkpoint.quantized.values()}
    return all(is_float(grid) or str(grid) == "mxfp4" for grid in grids)


def _check_activations(plan: Plan) -> None:
    """Raise BadRequest for methods, words and schemes of inputs that do not go together."""
    read = [s.activations for s in plan.schemes.values() if s.activations]
    if plan.recipe.alpha is not None and "smoothquant" not in plan.method.transforms:
        raise BadRequest(
            f"alpha is for smoothquant, and the method is {plan.recipe.method}; leave it out, "
            "or write --method smoothquant+gptq"
        )
    if plan.recipe.observer != "max" and not plan.recipe.kv and not any(i.static for i in read):
        raise BadRequest(
            "observer is for scales that the file stores, and here it stores none; leave it out, "
            "or write --grid w8a8-static"
        )
    if "smoothquant" in plan.method.transforms and not read:
        raise BadRequest(
            f"smoothquant makes inputs easier to round, and with {plan.recipe.grid} they stay in 16 bits; use awq, "
            "or a scheme such as w8a8"
        )
    if plan.recipe.imatrix and any(i.static for i in read):
        raise BadRequest(
            f"{next(i for i in read if i.static)} inputs have a stored scale, which an importance matrix "
            "does not tell; leave out --imatrix"
        )


def _with_importance(method: Method, recipe: Recipe) -> Method:
    """An importance matrix takes the place of calibration, for solvers that need no more than that."""
    if recipe.imatrix is None:
        return method
    if method.solver != "nearest" or method.transforms or method.rotated:
        raise BadRequest(
            f"method {recipe.method} needs more than an importance matrix holds; it serves --method imatrix"
        )
    return replace(method, calibrated=False)


def transcoding(source: str, to: str, grid: str | None = None, engine: str | None = None) -> Plan:
    """Moving a quantized checkpoint into another container, every grid as it is where that holds its values."""
    checkpoint = heads.settled(Checkpoint.open(source))
    sizes.require(checkpoint)
    if checkpoint.container is None:
        raise BadRequest(f"{source} is not quantized; to quantize it: halfbyte quantize {source} -o OUT --to {to}")
    target = target_named(to)
    commonest = commonest_name(checkpoint.quantized)
    grid = grid and target.means(grid)
    grid = None if grid == commonest else grid
    if grid:
        fits.require_known(target, grid)
    recipe = Recipe(model=source, method="convert", grid=grid or commonest, to=target.name, engine=_engine(engine))
    plan = target.convert(recipe, checkpoint, grid)
    asked = grid is None or any(str(s).startswith(grid.lower()) for s in plan.schemes.values())
    warnings = plan.warnings
    if grid and not asked and grid.upper() != plan.label:
        other = f"most of this is {plan.label}, not {grid}: the notes of weights that were rounded say why"
        warnings = (other, *warnings)
    return _finished(plan, warnings)


def decoding(source: str, to: str, dtype: str | None, folder: str | None) -> Plan:
    """Writing a quantized checkpoint, or one with an adapter in `folder` merged into it, in 16 (or 32) bits.

    `to` is a key of UNQUANTIZED; `dtype` is by default what engines compute in. Raises HalfbyteError.
    """
    require_plain(to, dtype)
    checkpoint = _source_of(Recipe(model=source, adapter=folder))
    if checkpoint.container is None and checkpoint.adapter is None:
        raise BadRequest(
            f"{source} is not quantized, so there is nothing to decode; name a quantized checkpoint, "
            "or an --adapter to merge"
        )
    grid = dtype or str(checkpoint.unquantized_dtype).removeprefix("torch.")
    recipe = Recipe(model=source, adapter=folder, method="dequantize", grid=grid, to=to)
    plan = UNQUANTIZED[to].decode(recipe, checkpoint)
    warnings = list(plan.warnings)
    if checkpoint.container:
        was = commonest_name(checkpoint.quantized)
        warnings.append(f"these are the values of {was} in {grid}: what quantizing lost does not come back")
    results = (
        verdicts.verdicts(to, {}, checkpoint.config) if any(to in engine.support for engine in ENGINES.values()) else ()
    )
    return replace(plan, warnings=(*warnings, *_of_adapter(checkpoint)), verdicts=tuple(results), **_cache(plan))
