"""Quantizing with calibration: block after block, each fed by the blocks before it as they were quantized."""

import torch
from torch import Tensor

from halfbyte.grids.grid import Grid, Quantized
from halfbyte.models.calibrate import Windows
from halfbyte.models.walk import Block, Walk
from halfbyte.run import Run, digest, note, recall, row_of, weight_error
from halfbyte.solvers import SOLVERS
from halfbyte.solvers.statistics import NotPositive, Statistics
from halfbyte.transforms import TRANSFORMS
from halfbyte.transforms.fold import Finder

FEWEST_TOKENS = 32
"""An expert that fewer calibration tokens reach is rounded to nearest."""


def quantize(run: Run, windows: Windows) -> None:
    """Walk the model once; what is done already is read back instead of solved."""
    job = run.job
    source = job.checkpoint
    walk = Walk(source, windows.tokens, source.dtype, twin=job.method.twin, scratch=run.folder.partial)
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
                walk.original = [walk.kept(block.run(hidden, batch)) for batch, hidden in enumerate(walk.original)]
            recall(run, records[block.name])
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
        run.rows[weight.name] = row_of(weight, q.grid, weight_error(source.read_weight(weight), q), None, "outside of the blocks: rounded to nearest")
    for tensor in job.kept:
        if tensor not in inside:
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
        q, fallback = solve(w, grid, known, job.method.solver)
        decoded = q.decode()
        error = known.error(w, decoded) if known else weight_error(w, q)
        rows.append(row_of(weight, grid, error, known.tokens if known else 0, "; ".join(filter(None, (notes[weight], fallback)))))
        run.put(weight, q)
        digests[weight.name] = digest(q)
        block.put(weight, decoded)
    for tensor in block.tensors:
        if tensor in job.kept:
            value, now = job.checkpoint.read(tensor), block.view(tensor)
            # A fold may have changed it; if none has, the source's own bytes go out, whatever their precision.
            run.keep(tensor, value if torch.equal(value.to(now.dtype), now) else now.to(value.dtype))
            digests[tensor] = run.digests[tensor]
            now.copy_(run.edition.restored(run.folder.entries, tensor))  # what a run that is taken up again goes on with
    run.folds += folds
    note(run, rows, digests, block=block.name, folds=folds)


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
            block.put(weight, run.edition.unpack(entries, weight, grid).decode())
    for tensor in block.tensors:
        if tensor in run.job.kept:
            block.view(tensor).copy_(run.edition.restored(entries, tensor))
