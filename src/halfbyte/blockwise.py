"""Quantizing with calibration: block after block, each fed by the blocks before it as they were quantized."""

from collections.abc import Mapping

import torch
from torch import Tensor

from halfbyte.errors import BadRequest, Unsupported
from halfbyte.grids.activations import ActivationQuant, ActivationStats
from halfbyte.grids.grid import Grid, Params
from halfbyte.grids.quantized import AnyScheme, Quantized
from halfbyte.models.calibrate import Windows
from halfbyte.models.checkpoint import Weight, cast
from halfbyte.models.walk import Block, Walk
from halfbyte.progress import RESUMING
from halfbyte.recipe import Method
from halfbyte.report.types import ActivationReport
from halfbyte.run import Run, apart, digest, note, recall, relative, row_of, squares, tell, with_inputs
from halfbyte.solvers import SOLVERS
from halfbyte.solvers.statistics import NotPositive, Statistics
from halfbyte.transforms import TRANSFORMS, Settings
from halfbyte.transforms.fold import Finder, pattern

FEWEST_TOKENS = 32
"""An expert that fewer calibration tokens reach is rounded to nearest."""


def quantize(run: Run, windows: Windows) -> None:
    """Walk the model once; what is done already is read back instead of solved."""
    job = run.job
    source = job.checkpoint
    walk = Walk(source, windows.tokens, source.dtype, twin=job.method.twin, scratch=run.folder.partial.parent)
    inside = {t for block in walk.blocks for t in block.tensors}
    outside = [
        unit for unit in job.units if unit[0].tensor not in inside
    ]  # the head, and what the model's forward does not run
    if unseen := next(
        (w for w, s in job.schemes.items() if w.tensor not in inside and s.activations and s.activations.static), None
    ):
        raise BadRequest(
            f"the model does not run '{unseen.name}', whose inputs are to have a stored scale; --skip it, or round them per token"
        )
    if walk.shared and (job.method.transforms or any(s.activations for s in job.schemes.values())):
        raise Unsupported(
            f"'{source.model_type}' shares weights between blocks, which {job.recipe.method} {job.recipe.grid} would fit to the first of them; "
            "--method gptq with a grid of weights alone does it"
        )
    finder = Finder()
    run.progress("embedding", 0, len(walk.blocks))
    walk.start()
    records = {record["block"]: record for record in run.folder.journal if "block" in record}
    if records:
        run.progress(f"{RESUMING} from block {len(records) + 1} of {len(walk.blocks)}", len(records), len(walk.blocks))
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
    for unit in outside:
        values, scheme = [source.read_weight(weight) for weight in unit], job.schemes[unit[0]]
        q = SOLVERS["nearest"](torch.cat(values), scheme.weight, None)
        for weight, w, part in zip(unit, values, apart(q, unit), strict=True):
            part = with_inputs(part, scheme)
            run.put(weight, part)
            run.digests[weight.name] = digest(part)
            run.rows[weight.name] = row_of(
                weight, scheme, relative([squares(w, part)]), None, "outside of the blocks: rounded to nearest"
            )
    for tensor in job.kept:
        if tensor not in inside:
            run.keep(tensor, source.read(tensor))


def _solve(run: Run, block: Block, finder: Finder) -> None:
    job = run.job
    schemes = {w: job.schemes[w] for w in block.weights if w in job.schemes}
    notes = {c.weight: c.note for c in job.choices}
    statistics = block.collect(set(schemes))
    folds = []
    for name in job.method.transforms:
        folds += TRANSFORMS[name](
            block, finder, schemes, statistics, Settings(job.recipe.alpha, job.recipe.input_range)
        )
    stored, told = inputs_of(block, schemes, statistics, job.recipe.input_range)
    rows, digests = [], {}
    for unit in job.units:
        if unit[0] not in schemes:
            continue
        scheme, known = schemes[unit[0]], statistics.get(unit[0])  # what is one matrix to engines reads one tensor
        for weight in unit:  # the last weight of a group frees its Hessian
            statistics.pop(weight, None)
        targets = [block.target(weight) for weight in unit]
        q, fallback = solve(targets[0] if len(unit) == 1 else torch.cat(targets), scheme.weight, known, job.method)
        for weight, w, part in zip(unit, targets, apart(q, unit), strict=True):
            part = with_inputs(part, scheme, stored.get(weight))
            decoded = part.decode()
            error, worst = relative([squares(w, part)])
            error = known.error(w, decoded) if known else error
            remarks = "; ".join(filter(None, (notes[weight], fallback)))
            rows.append(row_of(weight, scheme, (error, worst), known.tokens if known else 0, remarks, told.get(weight)))
            run.put(weight, part)
            digests[weight.name] = digest(part)
            block.put(weight, decoded)
            block.inputs |= {weight: part.activations} if part.activations else {}
    for tensor in block.tensors:
        if tensor in job.kept:
            value, now = job.checkpoint.read(tensor), block.view(tensor)
            # A fold may have changed it; if none has, the source's own bytes go out, whatever their precision.
            run.keep(
                tensor,
                value
                if torch.equal(value.to(now.dtype), now)
                else cast(tensor, now, value.dtype, "use a method that moves no scales into it, such as gptq"),
            )
            digests[tensor] = run.digests[tensor]
            now.copy_(
                run.edition.restored(run.folder.entries, tensor)
            )  # what a run that is taken up again goes on with
    run.folds += folds
    note(run, rows, digests, block=block.name, folds=folds)


def inputs_of(
    block: Block, schemes: Mapping[Weight, AnyScheme], statistics: Mapping[Weight, Statistics], ranges: str
) -> tuple[dict[Weight, Params], dict[Weight, ActivationReport]]:
    """What is to be stored of the inputs of each weight, and what the report tells of them.

    Engines run all experts of a block as one, with the largest of their scales: all of one kind get what suits them together.
    """
    alike: dict[tuple, list[Weight]] = {}
    for weight, scheme in schemes.items():
        if scheme.activations:
            alike.setdefault((pattern(weight.name, block), scheme.activations), []).append(weight)
    stored, told, done = {}, {}, {}
    for (_, grid), weights in alike.items():
        known = {id(s): s for w in weights if (s := statistics.get(w))}
        if not known and grid.static:
            raise BadRequest(
                f"no calibration token reached {weights[0].name}, whose inputs are to have a stored scale; give more text, or round them per token"
            )
        if not known:
            continue
        key = (grid, *known)  # q, k and v read the same
        if key not in done:
            seen = together([s.activation_stats for s in known.values()])
            params = grid.fit(seen, ranges)
            done[key] = params, tell(ActivationQuant(grid, params), seen)
        stored |= dict.fromkeys(weights, done[key][0])
        told |= dict.fromkeys(weights, done[key][1])
    return stored, told


def together(seen: list[ActivationStats]) -> ActivationStats:
    low, high = torch.stack([s.low for s in seen]).amin(0), torch.stack([s.high for s in seen]).amax(0)
    return ActivationStats(low, high, torch.cat([s.rows for s in seen]))


def solve(w: Tensor, grid: Grid, statistics: Statistics | None, method: Method) -> tuple[Quantized, str]:
    """The solver's answer, or that of `nearest` and the reason."""
    if not method.calibrated:  # the text is there for stored scales of inputs
        return SOLVERS[method.solver](w, grid, None), ""
    if statistics is None:
        return SOLVERS["nearest"](w, grid, None), "no calibration token reached it: rounded to nearest"
    if statistics.tokens < FEWEST_TOKENS:
        return SOLVERS["nearest"](
            w, grid, None
        ), f"only {statistics.tokens} calibration tokens reached it: rounded to nearest"
    try:
        return SOLVERS[method.solver](w, grid, statistics), ""
    except NotPositive:
        return SOLVERS["nearest"](w, grid, None), "its Hessian could not be factored: rounded to nearest"


def _restore(run: Run, block: Block) -> None:
    """Make the block what an earlier run wrote, so that the next block reads what it would have read."""
    entries = run.folder.entries
    for weight, scheme in run.job.schemes.items():
        if weight in block.weights:
            q = run.edition.unpack(entries, weight, scheme)
            block.put(weight, q.decode())
            block.inputs |= {weight: q.activations} if q.activations else {}
    for tensor in block.tensors:
        if tensor in run.job.kept:
            block.view(tensor).copy_(run.edition.restored(entries, tensor))
