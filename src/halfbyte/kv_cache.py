"""attach(): give a checkpoint a quantized KV cache. Scales are found on the model as it is; all else is copied byte for
byte."""

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
import xxhash
from jaxtyping import Int64
from torch import Tensor, nn

from halfbyte import demo
from halfbyte.containers import kv as layout
from halfbyte.containers.folder import OutputFolder, check_output_path, kept_on_interrupt
from halfbyte.containers.kv import KVCache
from halfbyte.containers.place import is_file
from halfbyte.containers.safetensors import Spec, read_header
from halfbyte.devices import title
from halfbyte.errors import BadRequest, BrokenOutput, UnknownName, Unsupported
from halfbyte.grids.activations import OBSERVERS, ActivationQuant
from halfbyte.grids.grid import Params
from halfbyte.grids.kv import KVGrid
from halfbyte.models import calibrate, heads, kv
from halfbyte.models.block import Block
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.placement import CPU, Placement
from halfbyte.models.stamp import stamp
from halfbyte.models.walk import Walk
from halfbyte.progress import Progress, silent
from halfbyte.recipe import Calibration
from halfbyte.report import build, written
from halfbyte.report.types import AttentionReport, CacheReport
from halfbyte.run import Run, digest
from halfbyte.targets.hf.writer import copy_companions, index_of, shards_of, write_json
from halfbyte.targets.table import file_target, output_path

CHECKED = 16
"""Windows of held-out text on which values beyond the scales are counted."""
CLIPPED = 1e-3
"""A larger share of values beyond the scales is warned of."""


def attach(
    source: str | Path,
    out: str | Path,
    grid: str = "fp8-e4m3",
    calibration: Calibration | None = None,
    observer: str = "max",
    overwrite: bool = False,
    progress: Progress = silent,
    device: torch.device = CPU,
) -> CacheReport:
    """Write `source` into the folder `out` with the scales of a KV cache; returns the report of it, which is written
    there.

    Raises HalfbyteError, with nothing half-written left behind.
    """
    started = time.perf_counter()
    if observer not in OBSERVERS:
        raise UnknownName("observer", observer, OBSERVERS)
    kind, out = KVGrid.parse(grid), Path(out).expanduser()
    checkpoint = heads.settled(Checkpoint.open(source))
    if source_form := file_target(checkpoint.path):
        source_form.require_cache(kind)
    if is_file(out):
        raise BadRequest(f"a checkpoint is a folder, and {out} is called like a file; name it without {out.suffix}")
    config = layout.config(
        checkpoint.config.get("quantization_config") or checkpoint.text_config.get("quantization_config"), kind
    )
    check_output_path(output_path(out), checkpoint.path, overwrite)
    checkpoint = checkpoint.replaced(kv=None)  # what it had makes room for another
    samples = calibrate.calibration(checkpoint, calibration or Calibration())
    cache, rows = _find_scales(checkpoint, kind, samples.tokens, observer, progress, Placement.on(device))
    tensors = cache.tensors()
    about = _describe(kind, observer, samples, rows, device, checkpoint.left_out)
    files = _files(checkpoint, tensors)
    identity = xxhash.xxh3_128_hexdigest(repr((stamp(checkpoint), about)).encode())
    folder = OutputFolder(output_path(out), shards_of(files), identity, overwrite)
    if folder.is_published:
        return written.cache_of(out)
    with kept_on_interrupt(folder):
        for number, (name, specs) in enumerate(files.items()):
            old = read_header(checkpoint.path / name)
            for tensor in specs:
                folder.write(tensor, tensors[tensor] if tensor in tensors else old[tensor].read())
            progress("copying", number, len(files))
        folder.seal()
        copy_companions(checkpoint, folder.partial)
        contents = {"config.json": {**checkpoint.config, "quantization_config": config}, **index_of(files)}
        write_json(folder.partial, contents)
        _verify(checkpoint, folder.partial, tensors)
        about = about.model_copy(update={"seconds": round(time.perf_counter() - started, 2)})
        written.add_cache(checkpoint.path, folder.partial, out, about)
        folder.publish()
    return about


def _describe(
    grid: KVGrid,
    observer: str,
    samples: calibrate.Samples,
    rows: list[AttentionReport],
    device: torch.device,
    left_out: Sequence[str] = (),
) -> CacheReport:
    """For the report."""
    return CacheReport(
        grid=str(grid),
        observer=observer,
        calibration=build.calibration(samples),
        rows=rows,
        most_clipped=max(max(row.keys_clipped, row.values_clipped) for row in rows),
        serve=layout.served(grid),
        device=title(device),
        warnings=[*_warnings(rows), *left_out],
    )


def complete(run: Run) -> CacheReport | None:
    """Write the scales that a plan has: those of the source, or new ones of what was just written.

    Returns what the report says of them.
    """
    plan, about = run.plan, None
    if plan.recipe.kv and plan.kv:
        run.checkpoint_writer.write_sidecars(run.folder.partial)  # with it, what is written is a checkpoint
        checkpoint = Checkpoint(run.folder.partial).replaced(kv=None)
        samples = run.samples or calibrate.calibration(plan.checkpoint, plan.recipe.calibration)
        placement = Placement.on(run.device, run.folder.partial.parent)
        cache, rows = _find_scales(checkpoint, plan.kv, samples.tokens, plan.recipe.observer, run.progress, placement)
        about = _describe(plan.kv, plan.recipe.observer, samples, rows, run.device)
    else:
        cache = plan.checkpoint.kv
    for name, scale in cache.tensors().items() if cache else ():
        run.folder.write(name, scale)
        run.digests[name] = [digest([scale])]
    return about


def _find_scales(
    checkpoint: Checkpoint,
    grid: KVGrid,
    samples: Int64[Tensor, "samples length"],
    observer: str = "max",
    progress: Progress = silent,
    placement: Placement | None = None,
) -> tuple[KVCache, list[AttentionReport]]:
    """Stored scales of every attention, found block after block, each fed by blocks whose caches are rounded already.

    `observer` is a key of `halfbyte.grids.activations.OBSERVERS`, `placement` where the model runs. Raises Unsupported
    for a model without such a cache.
    """
    held_out = calibrate.evaluation(checkpoint, str(demo.HELDOUT), samples.shape[1], CHECKED).tokens
    walk = Walk(
        checkpoint,
        samples,
        checkpoint.dtype,
        placement,
        held_out=held_out,
        fake_quantize_activations=True,
        to_the_end=False,
        progress=progress,
    )
    keys, values, rows, latent = {}, {}, [], False
    for block in walk:
        for name, attention in kv.names(walk.model, walk.weight_map, block.module).items():
            seen = walk.fitting(partial(_observed, walk, block, attention))
            _require_heads(checkpoint, grid, seen[0])
            latent = kv.is_latent(attention)
            keys[name], values[name] = _together(
                seen[0].fit(grid.key, observer), seen[1].fit(grid.value, observer), latent
            )
            key, value = ActivationQuant(grid.key, keys[name]), ActivationQuant(grid.value, values[name])
            clipped = walk.fitting(partial(_clipped, walk, block, attention, key, value))
            rows.append(
                AttentionReport(
                    module=name,
                    key_scale=_largest(keys[name]),
                    value_scale=_largest(values[name]),
                    keys_clipped=clipped[0],
                    values_clipped=clipped[1],
                )
            )
            kv.put(walk.model, attention, kv.rounded(key, value))
    if not rows:
        raise Unsupported(f"{checkpoint.model_type} has no attention that caches keys and values")
    return KVCache(grid, _on_cpu(keys), _on_cpu(values), latent), rows


def with_cache(
    path: str | Path, kind: str, progress: Progress = silent, placement: Placement | None = None
) -> Checkpoint:
    """A checkpoint whose cache is of another kind than it says, to measure it: "none" for 16 bits, "stored" for what it
    says.

    Scales that would be stored are found on the embedded text.
    """
    checkpoint = Checkpoint.open(path)
    if kind == "stored":
        return checkpoint
    grid = None if kind == "none" else KVGrid.parse(kind)
    checkpoint = checkpoint.replaced(kv=KVCache(grid) if grid and not grid.static else None)
    if grid and grid.static:
        default = Calibration()
        length = min(default.length, calibrate.longest(checkpoint, default.length))
        samples = calibrate.calibration(checkpoint, default.model_copy(update={"length": length}))
        cache, _ = _find_scales(checkpoint, grid, samples.tokens, progress=progress, placement=placement)
        return checkpoint.replaced(kv=cache)
    return checkpoint


def _on_cpu(scales: Mapping[str, Params]) -> dict[str, Params]:
    return {name: {entry: value.cpu() for entry, value in params.items()} for name, params in scales.items()}


def _largest(params: Params) -> float | None:
    return float(params["scale"].max()) if params else None


def _observed(walk: Walk, block: Block, attention: nn.Module) -> tuple[kv.KVObserver, kv.KVObserver]:
    """Keys and values that an attention caches of the calibration's samples."""
    keys, values = kv.KVObserver(), kv.KVObserver()

    def through(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys.add(k)
        values.add(v)
        return k, v

    _run(walk, block, walk.batches.calibrating, attention, through)
    return keys, values


def _clipped(
    walk: Walk, block: Block, attention: nn.Module, key: ActivationQuant, value: ActivationQuant
) -> tuple[float, float]:
    """Shares of keys and values beyond what the scales span, of the samples that they were not found with."""
    shares: list[tuple[float, float]] = []

    def through(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        shares.append((_beyond(k, key), _beyond(v, value)))
        return k, v

    _run(walk, block, walk.batches.checking, attention, through)
    keys, values = zip(*shares, strict=True)
    return sum(keys) / len(keys), sum(values) / len(values)


def _run(walk: Walk, block: Block, batches: range, attention: nn.Module, through: kv.CacheHook) -> None:
    """Run batches of the block with a look at what an attention caches."""
    handle = kv.put(walk.model, attention, through)
    try:
        for batch in batches:
            block.run(walk.inputs[batch], batch)
    finally:
        handle.remove()


def _beyond(x: Tensor, inputs: ActivationQuant) -> float:
    low, high = inputs.grid.limits(inputs.params)
    return float(((x < low) | (x > high)).float().mean())


def _together(key: Params, value: Params, latent: bool) -> tuple[Params, Params]:
    """Latents and positions lie in one row of an engine's cache, under one scale (vllm csrc/cache_kernels.cu
    concat_and_cache_mla)."""
    if not (latent and key and value):
        return key, value
    scale = torch.maximum(key["scale"], value["scale"])
    return {"scale": scale}, {"scale": scale}


def _require_heads(checkpoint: Checkpoint, grid: KVGrid, keys: kv.KVObserver) -> None:
    """Engines give each head of the config a scale; some families repeat heads before they cache them."""
    text = checkpoint.text_config
    configured = text.get("num_key_value_heads", len(keys.low))
    if "-head" in str(grid) and len(keys.low) != configured:
        raise Unsupported(
            f"{checkpoint.model_type} caches {len(keys.low)} heads where its config has {configured}, so scales of "
            "heads fit no engine; write fp8-e4m3"
        )


def _warnings(rows: list[AttentionReport]) -> list[str]:
    """What a user should know of the scales."""
    most = max(rows, key=lambda row: max(row.keys_clipped, row.values_clipped))
    share = max(most.keys_clipped, most.values_clipped)
    if share <= CLIPPED:
        return []
    return [
        f"{100 * share:.2f}% of the cache of {most.module} lies beyond its scale on other text; calibrate on text "
        "of the kind that the model will see"
    ]


def _files(checkpoint: Checkpoint, scales: Mapping[str, Tensor]) -> dict[str, dict[str, Spec]]:
    """What each file of safetensors holds: the source's tensors where they were, and the scales at the end of the
    last."""
    was = set(layout.scales(checkpoint.entries))
    files: dict[str, dict[str, Spec]] = {}
    for path in sorted({entry.path for entry in checkpoint.entries.values()}):
        files[path.name] = {name: Spec(e.shape, e.dtype) for name, e in read_header(path).items() if name not in was}
    files[max(files)].update({name: Spec(tuple(scale.shape), scale.dtype) for name, scale in scales.items()})
    return files


def _verify(checkpoint: Checkpoint, folder: Path, scales: Mapping[str, Tensor]) -> None:
    """What was written has the scales and, bit for bit, all else."""
    written = Checkpoint(folder)
    if written.kv is None or written.kv.tensors().keys() != scales.keys():
        raise BrokenOutput("the written folder does not say that its cache is quantized; the disk is broken")
    for name, entry in written.entries.items():
        wanted = scales[name] if name in scales else checkpoint.entries[name].read()
        if digest([entry.read()]) != digest([wanted]):
            raise BrokenOutput(f"'{name}' reads back as something else than was written; the disk is broken")
