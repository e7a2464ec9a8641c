"""Quantizing with calibration: block after block, each fed by the blocks before it as they were quantized."""

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import torch

from halfbyte.block_solvers import BlockSolver, BlockTask, Solution
from halfbyte.errors import BadRequest, Unsupported
from halfbyte.grids.activations import ActivationQuant, ActivationStats
from halfbyte.grids.grid import Params
from halfbyte.grids.quantized import Scheme
from halfbyte.models.block import Block
from halfbyte.models.calibrate import Samples
from halfbyte.models.guidance import output_hessians
from halfbyte.models.placement import Placement
from halfbyte.models.precision import cast
from halfbyte.models.walk import Walk
from halfbyte.models.weight import Weight
from halfbyte.polish import polish
from halfbyte.progress import RESUMING
from halfbyte.refinements import block_solver
from halfbyte.report.distributions import activation_distribution
from halfbyte.report.types import ActivationDistribution, ActivationReport
from halfbyte.run import Run, activation_report, commit, record_step, restore_step, weight_report, writing_beside
from halfbyte.solvers import SOLVERS
from halfbyte.solvers.outputs import OutputHessian
from halfbyte.streaming import stream
from halfbyte.transforms import TRANSFORMS, TransformSettings
from halfbyte.transforms.fold import Finder, pattern

MODEL_STAGES: dict[str, Callable[[Run, Walk], None]] = {"polish": polish}
"""By the name of a refinement: what it does after the last tensor, when all of the model can be seen, and what was
written can be committed anew (`halfbyte.run.commit`). It records what it did as a step, `stage` its name."""


def quantize(run: Run, samples: Samples) -> None:
    """Walk the model once; what is done already is read back instead of solved."""
    plan = run.plan
    source = plan.checkpoint
    placement = Placement.on(run.device, run.folder.partial.parent)
    walk = Walk(
        source,
        samples.tokens,
        source.dtype,
        placement,
        full_precision=plan.method.full_precision,
        to_the_end=not MODEL_STAGES.keys().isdisjoint(plan.method.refinements),
        trials=plan.method.trials,
        gradients=plan.method.gradients,
        progress=run.progress,
    )
    inside = {t for block in walk.blocks for t in block.tensors}
    _require_runnable(run, walk, inside)
    records = {record["block"]: record for record in run.folder.journal if "block" in record}
    outputs = _output_hessians(run, samples, placement, inside, records.keys()) if plan.method.guided else {}
    if records:
        run.progress(f"{RESUMING} from block {len(records) + 1} of {len(walk.blocks)}", len(records), len(walk.blocks))
    finder, solver = Finder(), block_solver(plan.method)
    with writing_beside(run, placement.reads_ahead):
        written: Future = Future()
        written.set_result(None)
        for block in walk:
            if block.name in records:
                walk.run_full_precision(block)
                restore_step(run, records[block.name])
                _restore(run, block)
                continue
            solved = _solve(run, walk, block, finder, solver, outputs)
            written.result()  # so that one block at most waits to be written
            written = _commit(run, block, solved)
            del solved  # its codes take half of what the next block does
        written.result()
    run.spilled_bytes = walk.spilled_bytes
    run.progress("tensors outside of the blocks", len(walk.blocks), len(walk.blocks))
    stages = {record["stage"]: record for record in run.folder.journal if "stage" in record}
    for record in stages.values():
        restore_step(run, record)
    _finish_outside(run, inside)
    for name in plan.method.refinements:
        if name in MODEL_STAGES and name not in stages:
            MODEL_STAGES[name](run, walk)


def _output_hessians(
    run: Run, samples: Samples, placement: Placement, inside: set[str], done: Collection[str]
) -> dict[Weight, OutputHessian]:
    """Of the weights that are left to solve."""
    left = [weight for weight in run.plan.schemes if weight.tensor in inside and weight.block not in done]

    def progress(what: str, number: float, total: float) -> None:
        run.progress(f"{what}, to see what its outputs count for", number, total)

    return output_hessians(run.plan.checkpoint, samples.tokens, left, placement, progress)


def _require_runnable(run: Run, walk: Walk, inside: set[str]) -> None:
    """Raise where the walk does not see what the plan needs."""
    plan = run.plan
    static = (w for w, s in plan.schemes.items() if w.tensor not in inside and s.activations and s.activations.static)
    if unseen := next(static, None):
        raise BadRequest(
            f"the model does not run '{unseen.name}', whose inputs are to have a stored scale; --skip it, or round "
            "them per token"
        )
    if plan.method.gradients and walk.batches.windows < 2:
        raise BadRequest(
            f"{plan.recipe.method} tunes to one part of the calibration samples and is judged by another; give "
            "--samples 2 or more"
        )
    if walk.shared and plan.method.gradients:
        raise Unsupported(
            f"'{walk.checkpoint.model_type}' shares weights between blocks, through which no gradients are followed; "
            "--method gptq does it"
        )
    to_first = plan.method.transforms or plan.method.guided or any(s.activations for s in plan.schemes.values())
    if walk.shared and to_first:
        raise Unsupported(
            f"'{walk.checkpoint.model_type}' shares weights between blocks, which {plan.recipe.method} "
            f"{plan.recipe.grid} would fit "
            "to the first of them; --method gptq with a grid of weights alone does it"
        )


def _finish_outside(run: Run, inside: set[str]) -> None:
    """The head, and what the model's forward does not run."""
    plan, source = run.plan, run.plan.checkpoint
    stream(
        run,
        [weights for weights in plan.fused_groups if weights[0].tensor not in inside],
        [tensor for tensor in plan.unquantized if tensor not in inside],
        lambda weight: source.read_weight(weight).to(run.device),
        lambda weight, w, scheme: SOLVERS["nearest"](w, scheme.weight, None),
        "outside of the blocks: rounded to nearest",
    )


class _Solved(NamedTuple):
    """What is to become of a block."""

    schemes: Mapping[Weight, Scheme]
    solutions: Sequence[Solution]
    folds: list[dict]
    activations: Mapping[Weight, Params]
    """What is stored of those of each weight."""
    activation_reports: Mapping[Weight, ActivationReport]
    """What the report says of them."""
    read: Mapping[Weight, ActivationDistribution | None]
    """How they are spread before they are rounded."""


def _solve(
    run: Run, walk: Walk, block: Block, finder: Finder, solver: BlockSolver, outputs: Mapping[Weight, OutputHessian]
) -> _Solved:
    """Transforms, then the solver."""
    plan = run.plan
    planned = plan.schemes
    schemes = {w: planned[w] for w in block.weights if w in planned}
    task = BlockTask(walk, block, [weights for weights in plan.fused_groups if weights[0] in schemes], schemes)
    task.outputs = outputs
    folds = []
    for name in plan.method.transforms:
        settings = TransformSettings(plan.recipe.alpha, plan.recipe.observer)
        folds += TRANSFORMS[name](block, finder, schemes, task.statistics or task.collect_all(), settings)
    solutions = list(solver(task))
    walk.run_full_precision(block)
    read = {key: activation_distribution(stats) for key, stats in {id(s): s for s in task.sampled.values()}.items()}
    stored, activation_reports = _activations_of(block, schemes, task.seen, plan.recipe.observer)
    return _Solved(
        schemes, solutions, folds, stored, activation_reports, {w: read[id(s)] for w, s in task.sampled.items()}
    )


def _commit(run: Run, block: Block, solved: _Solved) -> Future:
    """Everything that becomes of the block's tensors; from now on it computes with what is written. Returns when that
    is."""
    notes = {c.weight: c.note for c in run.plan.weights}
    reports, digests = [], {}
    for weights, q, errors, tokens, remark in solved.solutions:
        scheme = solved.schemes[weights[0]]
        originals = [block.target(weight) for weight in weights]
        done = commit(run, weights, q, originals, scheme, solved.activations)
        decoded = q.decode().split([weight.shape[0] for weight in weights])
        for number, (weight, one, rounded) in enumerate(zip(weights, done, decoded, strict=True)):
            note = "; ".join(filter(None, (notes[weight], remark)))
            error = errors[number] if errors else None
            reported, read = solved.activation_reports.get(weight), solved.read.get(weight)
            reports.append(weight_report(weight, scheme, [one], note, tokens, error, reported, read))
            digests[weight.name] = [one.digest]
            block.put(weight, rounded)
            if scheme.activations:
                block.round_activations(weight, ActivationQuant(scheme.activations, solved.activations.get(weight, {})))
    unquantized = run.plan.unquantized
    digests |= {tensor: _write_unquantized(run, block, tensor) for tensor in block.tensors if tensor in unquantized}
    run.folds += solved.folds
    return run.writer.submit(record_step, run, reports, digests, block=block.name, folds=solved.folds)


def _write_unquantized(run: Run, block: Block, tensor: str) -> list[str]:
    """Write a tensor that is not quantized, and have the block compute with what a reader will find."""
    value, now = run.plan.checkpoint.read(tensor), block.view(tensor)
    here = now.cpu()
    if not torch.equal(value.to(here.dtype), here):  # a fold has changed it; if none has, the source's own bytes go out
        value = cast(tensor, here, value.dtype, "use a method that moves no scales into it, such as gptq")
    run.write_unquantized(tensor, value)
    now.copy_(
        run.checkpoint_writer.restored(run.folder.entries, tensor)
    )  # what a run that is taken up again goes on with
    return run.digests[tensor]


def _activations_of(
    block: Block, schemes: Mapping[Weight, Scheme], seen: Mapping[Weight, ActivationStats], observer: str
) -> tuple[dict[Weight, Params], dict[Weight, ActivationReport]]:
    """What is to be stored of the activations that each weight reads, and what the report tells of them.

    Engines run all experts of a block as one, with the largest of their scales: all of one kind get what suits them
    together.
    """
    alike: dict[tuple, list[Weight]] = {}
    for weight, scheme in schemes.items():
        if scheme.activations:
            alike.setdefault((pattern(weight.name, block), scheme.activations), []).append(weight)
    stored, activation_reports, done = {}, {}, {}
    for (_, grid), weights in alike.items():
        distinct = {id(s): s for w in weights if (s := seen.get(w))}
        if not distinct and grid.static:
            raise BadRequest(
                f"no calibration token reached {weights[0].name}, whose inputs are to have a stored scale; "
                "give more text, "
                "or round them per token"
            )
        if not distinct:
            continue
        key = (grid, *distinct)  # q, k and v read the same
        if key not in done:
            together = _merged(list(distinct.values()))
            params = grid.fit(together, observer)
            done[key] = params, activation_report(ActivationQuant(grid, params), together)
        stored |= dict.fromkeys(weights, done[key][0])
        activation_reports |= dict.fromkeys(weights, done[key][1])
    return stored, activation_reports


def _merged(seen: Sequence[ActivationStats]) -> ActivationStats:
    """What several weights have seen, as one."""
    low, high = torch.stack([s.low for s in seen]).amin(0), torch.stack([s.high for s in seen]).amax(0)
    return ActivationStats(low, high, torch.cat([s.rows for s in seen]))


def _restore(run: Run, block: Block) -> None:
    """Make the block what an earlier run wrote, so that the next block reads what it would have read."""
    entries = run.folder.entries
    for weight, scheme in run.plan.schemes.items():
        if weight in block.weights:
            q = run.checkpoint_writer.unpack(entries, weight, scheme)
            block.put(weight, q.decode())
            if q.activations:
                block.round_activations(weight, q.activations)
    for tensor in block.tensors:
        if tensor in run.plan.unquantized:
            block.view(tensor).copy_(run.checkpoint_writer.restored(entries, tensor))
