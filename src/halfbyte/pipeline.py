"""quantize(): plan, walk, transform, solve, write, verify, report."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from halfbyte.containers import Container
from halfbyte.containers.folder import Folder, claim, kept_on_interrupt
from halfbyte.containers.safetensors import Spec
from halfbyte.errors import BrokenOutput
from halfbyte.grids.grid import Grid, Quantized
from halfbyte.models import calibrate
from halfbyte.models.checkpoint import Checkpoint, Weight, require_finite
from halfbyte.models.walk import Block, Walk
from halfbyte.recipe import SKIPPED, Job, Recipe, resolve, transcoding
from halfbyte.report import build
from halfbyte.solvers import SOLVERS
from halfbyte.solvers.statistics import NotPositive, Statistics, sample_rows
from halfbyte.transforms import TRANSFORMS
from halfbyte.transforms.fold import Finder

Progress = Callable[[str, float, float], None]
"""(what is being done, done so far, of how much)"""
FEWEST_TOKENS = 32
"""An expert that fewer calibration tokens reach is rounded to nearest."""
SAMPLED = 1 << 20
"""Weights that the error of a matrix without calibration is taken over."""


def silent(what: str, done: float, total: float) -> None:
    """No progress shown."""


@dataclass
class Row:
    """What became of one weight, for the report."""

    name: str
    grid: str
    shape: list[int]
    bits_per_weight: float
    error: float
    """Relative error: of the outputs on the calibration tokens, or of the weights where there are none."""
    tokens: int | None = None
    note: str = ""


@dataclass
class Run:
    """A job under way: where its results go and what is known of them."""

    job: Job
    folder: Folder
    progress: Progress
    rows: dict[str, Row] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    """Of every module and kept tensor, as the solver returned it or the source held it."""
    folds: list[dict] = field(default_factory=list)
    windows: calibrate.Windows | None = None

    def put(self, weight: Weight, q: Quantized) -> None:
        for suffix, tensor in self.job.container.pack(q).items():
            self.folder.write(f"{weight.name}.{suffix}", tensor)

    def keep(self, tensor: str, value: Tensor) -> None:
        if self.job.kept[tensor] != SKIPPED:
            require_finite(tensor, value)
        self.digests[tensor] = digest(value)
        self.folder.write(tensor, value)


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
            _walk(run, windows)
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
    return xxhash.xxh3_128_hexdigest(repr((job.recipe.digest, source, windows and windows.digest)).encode())


def digest(value: Quantized | Tensor) -> str:
    """Of every bit of a tensor, or of a matrix on a grid whatever its container."""
    hasher = xxhash.xxh3_128()
    tensors = [value] if isinstance(value, Tensor) else [value.codes, *(value.params[name] for name in sorted(value.params))]
    for tensor in tensors:
        hasher.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        if tensor.numel():
            hasher.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return hasher.hexdigest()


def _stream(run: Run, read: Callable[[Weight], Any], solve: Callable[[Any, Grid], Quantized]) -> None:
    """Without calibration: tensor after tensor at the disk's speed. Reading, solving and writing overlap."""
    job = run.job
    for record in run.folder.journal:
        _recall(run, record)
    notes = {c.weight: c.note for c in job.choices}
    todo = [(w, g) for w, g in job.grids.items() if w.name not in run.rows]
    total = sum(w.shape[0] * w.shape[1] for w, _ in todo)
    seen = 0

    def write(weight: Weight, q: Quantized, row: Row) -> None:
        run.put(weight, q)
        _note(run, [row], {weight.name: digest(q)}, module=weight.name)

    with ThreadPoolExecutor(1) as writer:
        pending = None
        for (weight, grid), w in _ahead(todo, lambda item: read(item[0])):
            q = solve(w, grid)
            row = _row(weight, grid, _weight_error(w, q), None, notes[weight])
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


def _walk(run: Run, windows: calibrate.Windows) -> None:
    """With calibration: block after block, each fed by the blocks before it as they were quantized."""
    job = run.job
    source = job.checkpoint
    walk = Walk(source, windows.tokens, source.dtype, twin=job.method.twin)
    finder = Finder()
    run.progress("embedding", 0, len(walk.blocks))
    walk.start()
    records = {record["block"]: record for record in run.folder.journal if "block" in record}
    inside = {t for block in walk.blocks for t in block.tensors}
    for number, block in enumerate(walk.blocks):
        run.progress(block.name, number, len(walk.blocks))
        block.load(source)
        if block.name in records:
            if walk.original:
                walk.original = [block.run(hidden, batch) for batch, hidden in enumerate(walk.original)]
            _recall(run, records[block.name])
            _restore(run, block)
        else:
            _solve(run, block, finder)
        if number + 1 < len(walk.blocks):
            walk.advance(block)
        block.free()
    run.progress("tensors outside of the blocks", len(walk.blocks), len(walk.blocks))
    outside = [w for w in job.grids if w.tensor not in inside]
    for weight in outside:  # the head, and what the model's forward does not run
        q = SOLVERS["nearest"](source.read_weight(weight), job.grids[weight], None)
        run.put(weight, q)
        run.digests[weight.name] = digest(q)
        run.rows[weight.name] = _row(weight, q.grid, _weight_error(source.read_weight(weight), q), None, "outside of the blocks: rounded to nearest")
    for tensor in job.kept:
        if tensor not in inside and tensor in source.entries:
            run.keep(tensor, source.read(tensor))


def _solve(run: Run, block: Block, finder: Finder) -> None:
    job = run.job
    grids = {w: job.grids[w] for w in block.weights if w in job.grids}
    notes = {c.weight: c.note for c in job.choices}
    statistics = block.collect(set(grids))
    folds = []
    for name in job.method.transforms:
        folds += TRANSFORMS[name](block, finder, grids, statistics)
    rows, digests = [], {}
    for weight, grid in grids.items():
        w, known = block.target(weight), statistics.pop(weight, None)  # the last weight of a group frees its Hessian
        q, note = solve(w, grid, known, job.method.solver)
        decoded = q.decode()
        error = known.error(w, decoded) if known else _weight_error(w, q)
        rows.append(_row(weight, grid, error, known.tokens if known else 0, "; ".join(filter(None, (notes[weight], note)))))
        run.put(weight, q)
        digests[weight.name] = digest(q)
        block.put(weight, decoded)
    for tensor in block.tensors:
        if tensor in job.kept:
            value, now = job.checkpoint.read(tensor), block.view(tensor)
            # A fold may have changed it; if none has, the source's own bytes go out, whatever their precision.
            run.keep(tensor, value if torch.equal(value.to(now.dtype), now) else now.to(value.dtype))
            digests[tensor] = run.digests[tensor]
    run.folds += folds
    _note(run, rows, digests, block=block.name, folds=folds)


def solve(w: Tensor, grid: Grid, statistics: Statistics | None, solver: str) -> tuple[Quantized, str]:
    """The solver's answer, or that of `nearest` and the reason."""
    if statistics is None:
        return SOLVERS["nearest"](w, grid, None), "no calibration token reached it: rounded to nearest"
    if statistics.tokens < FEWEST_TOKENS:
        return SOLVERS["nearest"](w, grid, None), f"only {statistics.tokens} calibration tokens reached it: rounded to nearest"
    try:
        return SOLVERS[solver](w, grid, statistics), ""
    except NotPositive:
        return SOLVERS["nearest"](w, grid, None), "its Hessian could not be factored: rounded to nearest"


def _restore(run: Run, block: Block) -> None:
    """Make the block what an earlier run wrote, so that the next block reads what it would have read."""
    entries = run.folder.entries
    for weight, grid in run.job.grids.items():
        if weight in block.weights:
            block.put(weight, _read_back(run.job.container, entries, weight, grid).decode())
    for tensor in block.tensors:
        if tensor in run.job.kept:
            block.view(tensor).copy_(entries[tensor].read())


def _read_back(container: Container, entries: Mapping, weight: Weight, grid: Grid) -> Quantized:
    tensors = {suffix: entries[f"{weight.name}.{suffix}"].read() for suffix in container.plan(grid, weight.shape)}
    return container.unpack(tensors, grid, weight.shape)


def _finish(run: Run, started: float) -> dict[str, Any]:
    """Small files, the check of what was written, and the report."""
    job, source = run.job, run.job.checkpoint
    kept = [c.weight.name for c in job.choices if not c.grid] + _routers(job)
    if all(w.block for w in job.grids) and "lm_head" not in kept:
        kept.append("lm_head")  # a head that is tied, or has another name in the file, is a linear to engines all the same
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
    return [t.removesuffix(".weight") for t in job.kept if t.endswith(".weight") and t not in weights and len(job.checkpoint.entries[t].shape) == 2 and "embed" not in t]


def verify(run: Run) -> None:
    """Open what was written as any reader would, decode it, and compare it with what the solver returned."""
    written = Checkpoint(run.folder.partial)
    expected = {w.name: g for w, g in run.job.grids.items()}
    found = {module: grid for module, (grid, _) in written.quantized.items()}
    if lost := [n for n in (*run.job.kept, *expected) if n not in run.digests]:
        raise BrokenOutput(f"{len(lost)} tensors of the source are in no part of the output, the first '{lost[0]}'")
    if found.keys() != expected.keys():
        raise BrokenOutput(f"the written folder holds {len(found)} quantized modules, not {len(expected)}")
    for number, (name, was) in enumerate(run.digests.items()):
        run.progress("checking what was written", number, len(run.digests))
        weight = next((w for w in run.job.grids if w.name == name), None) if name in expected else None
        value = _read_back(written.container, written.entries, weight, expected[name]) if weight else written.read(name)
        if digest(value) != was:
            raise BrokenOutput(f"'{name}' reads back as something else than was written; the disk or {run.job.container.name}'s reader is broken")


def _weight_error(w: Tensor | Quantized, q: Quantized) -> float:
    """Relative error of the weights, over evenly spaced rows where there are many."""
    if w is q:
        return 0.0
    rows = sample_rows(q.shape[0], SAMPLED // q.shape[1])
    exact = (w.decode() if isinstance(w, Quantized) else w)[rows].float()
    part = Quantized(q.grid, q.codes[rows], {n: p[rows] if p.shape[0] == q.shape[0] else p for n, p in q.params.items()})
    return ((part.decode() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def _row(weight: Weight, grid: Grid, error: float, tokens: int | None, note: str) -> Row:
    return Row(weight.name, str(grid), list(weight.shape), grid.bits(weight.shape), error, tokens, note)


def _note(run: Run, rows: list[Row], digests: dict[str, str], **step) -> None:
    run.rows |= {row.name: row for row in rows}
    run.digests |= digests
    run.folder.record({**step, "rows": [vars(row) for row in rows], "digests": digests})


def _recall(run: Run, record: dict) -> None:
    run.rows |= {row["name"]: Row(**row) for row in record.get("rows", [])}
    run.digests |= record.get("digests", {})
    run.folds += record.get("folds", [])
