"""quantize(): plan, walk, transform, solve, write, verify, report."""

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xxhash

from halfbyte.containers.folder import Folder, claim, kept_on_interrupt
from halfbyte.containers.safetensors import Spec
from halfbyte.errors import BrokenOutput
from halfbyte.grids.grid import Grid, Quantized
from halfbyte.models import calibrate
from halfbyte.models.checkpoint import Checkpoint, Weight
from halfbyte.recipe import Job, Recipe, resolve, transcoding
from halfbyte.report import build
from halfbyte.run import Progress, Row, Run, digest, note, read_back, recall, row_of, silent, weight_error
from halfbyte.solvers import SOLVERS


def quantize(recipe: Recipe, out: str | Path, overwrite: bool = False, progress: Progress = silent) -> dict[str, Any]:
    """Quantize a checkpoint into the folder `out` and return the report that is also written there.

    Raises HalfbyteError, with nothing half-written left behind. A run that is killed is taken up again by the same call.
    """
    started = time.perf_counter()
    job = resolve(recipe)
    out = Path(out).expanduser()
    claim(out, job.checkpoint.path, overwrite)
    windows = None
    if job.method.calibrated:
        c = job.recipe.calibration
        windows = calibrate.calibration(job.checkpoint, c.source, c.samples, c.length, c.seed)
    folder = Folder(out, layout(job), identity(job, windows), job.recipe.shard_gb * 1e9)
    with kept_on_interrupt(folder):
        run = Run(job, folder, progress, windows=windows)
        if windows is None:
            solver = SOLVERS[job.method.solver]
            _stream(run, job.checkpoint.read_weight, lambda w, grid: solver(w, grid, None))
        else:
            from halfbyte import blockwise  # Transformers takes seconds to import, and only calibration needs the model

            blockwise.quantize(run, windows)
        report = _finish(run, started)
        folder.publish()
    return report


def convert(source: str | Path, out: str | Path, to: str, overwrite: bool = False, progress: Progress = silent) -> dict[str, Any]:
    """Move a quantized checkpoint into another container: bit for bit where it holds the same grid, else by rounding again.

    The report's errors are those against the quantized source: 0 where nothing was rounded.
    """
    started = time.perf_counter()
    job = transcoding(str(source), to)
    out = Path(out).expanduser()
    claim(out, job.checkpoint.path, overwrite)
    folder = Folder(out, layout(job), identity(job, None), job.recipe.shard_gb * 1e9)

    def transcode(q: Quantized, grid: Grid) -> Quantized:
        return q if q.grid == grid else SOLVERS["nearest"](q.decode(), grid, None)

    with kept_on_interrupt(folder):
        run = Run(job, folder, progress)
        _stream(run, lambda weight: job.checkpoint.read_quantized(weight.name), transcode)
        report = _finish(run, started)
        folder.publish()
    return report


def layout(job: Job) -> dict[str, Spec]:
    """Every tensor of the output, in the order of the source, from shapes alone."""
    by_tensor: dict[str, list[tuple[Weight, Grid]]] = {}
    for weight, grid in job.grids.items():
        by_tensor.setdefault(weight.tensor, []).append((weight, grid))
    specs: dict[str, Spec] = {}
    for tensor in job.checkpoint.tensors():
        if tensor in job.kept:
            specs[tensor] = Spec(job.checkpoint.entries[tensor].shape, job.checkpoint.entries[tensor].dtype)
        for weight, grid in by_tensor.get(tensor, []):
            specs.update({f"{weight.name}.{suffix}": spec for suffix, spec in job.container.plan(grid, weight.shape).items()})
    return specs


def identity(job: Job, windows: calibrate.Windows | None) -> str:
    """Two runs with the same identity write the same bytes."""
    source = [(n, e.shape, str(e.dtype), e.path.stat().st_size, e.path.stat().st_mtime_ns) for n, e in job.checkpoint.entries.items()]
    return xxhash.xxh3_128_hexdigest(repr((version("halfbyte"), job.recipe.digest, source, windows and windows.digest)).encode())


def _stream(run: Run, read: Callable[[Weight], Any], solve: Callable[[Any, Grid], Quantized]) -> None:
    """Without calibration: tensor after tensor at the disk's speed. Reading, solving and writing overlap."""
    job = run.job
    for record in run.folder.journal:
        recall(run, record)
    notes = {c.weight: c.note for c in job.choices}
    todo = [(w, g) for w, g in job.grids.items() if w.name not in run.rows]
    total = sum(w.shape[0] * w.shape[1] for w, _ in todo)
    seen = 0

    def write(weight: Weight, q: Quantized, row: Row) -> None:
        run.put(weight, q)
        note(run, [row], {weight.name: digest(q)}, module=weight.name)

    with ThreadPoolExecutor(1) as writer:
        pending = None
        for (weight, grid), w in _ahead(todo, lambda item: read(item[0])):
            q = solve(w, grid)
            row = row_of(weight, grid, weight_error(w, q), None, notes[weight])
            if pending:
                pending.result()
            pending = writer.submit(write, weight, q, row)
            seen += weight.shape[0] * weight.shape[1]
            run.progress(weight.name, seen, total)
        if pending:
            pending.result()
    for tensor, value in _ahead(job.kept, job.checkpoint.read):
        run.keep(tensor, value)


def _ahead(items: Iterable, read: Callable) -> Iterator:
    """Pairs of item and what was read for it; one read runs ahead."""
    with ThreadPoolExecutor(1) as reader:
        waiting = None
        for item in items:
            following = (item, reader.submit(read, item))
            if waiting:
                yield waiting[0], waiting[1].result()
            waiting = following
        if waiting:
            yield waiting[0], waiting[1].result()


def _finish(run: Run, started: float) -> dict[str, Any]:
    """Small files, the check of what was written, and the report."""
    job, source = run.job, run.job.checkpoint
    kept = [c.weight.name for c in job.choices if not c.grid] + _routers(job)
    if all(w.block for w in job.grids) and "lm_head" not in kept:
        kept.append("lm_head")  # a head that is tied, or has another name in the file, is a linear to engines all the same
    if "text_config" in source.config:  # beside encoders of images or sound, names in the file and in the model differ
        from halfbyte.models import skeleton

        kept += skeleton.aliases(source, kept)
    config = job.container.config({w.name: g for w, g in job.grids.items()}, kept, source.dtype)
    report = build.report(run.job, run.rows, run.folds, run.windows, time.perf_counter() - started)
    files = {"config.json": build.as_json({**source.config, "quantization_config": config}), "recipe.yaml": job.recipe.dump()}
    files |= {name: build.as_json(content) for name, content in job.container.extra_files(config).items()}
    copies = {str(p.relative_to(source.path)): p for p in source.other_files}
    run.folder.seal(files, {n: p for n, p in copies.items() if n not in (*files, "README.md", "report.json")})
    verify(run)
    report["seconds"] = round(time.perf_counter() - started, 2)
    (run.folder.partial / "report.json").write_text(build.as_json(report), encoding="utf-8")
    (run.folder.partial / "README.md").write_text(build.card(report, run.folder.target), encoding="utf-8")
    return report


def _routers(job: Job) -> list[str]:
    weights = {c.weight.tensor for c in job.choices}
    return [
        t.removesuffix(".weight")
        for t in job.kept
        if t.endswith(".weight") and t not in weights and len(job.checkpoint.entries[t].shape) == 2 and "embed" not in t
    ]


def verify(run: Run) -> None:
    """Open what was written as any reader would, decode it, and compare it with what the solver returned."""
    written = Checkpoint(run.folder.partial)
    expected = {w.name: g for w, g in run.job.grids.items()}
    found = {module: grid for module, (grid, _) in written.quantized.items()}
    if lost := [n for n in (*run.job.kept, *expected) if n not in run.digests]:
        raise BrokenOutput(f"{len(lost)} tensors of the source are in no part of the output, the first '{lost[0]}'")
    if found.keys() != expected.keys():
        raise BrokenOutput(f"the written folder holds {len(found)} quantized modules, not {len(expected)}")
    weights = {w.name: w for w in run.job.grids}

    def read_again(name: str) -> str:
        known = weights.get(name)
        return digest(read_back(run.job.container, written.entries, known, expected[name]) if known else written.read(name))

    with ThreadPoolExecutor(2) as pool:
        for number, (name, again) in enumerate(zip(run.digests, pool.map(read_again, run.digests), strict=True)):
            run.progress("checking what was written", number, len(run.digests))
            if again != run.digests[name]:
                raise BrokenOutput(f"'{name}' reads back as something else than was written; the disk or {run.job.container.name}'s reader is broken")
