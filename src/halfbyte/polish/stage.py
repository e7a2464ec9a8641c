"""After the last block: all that may change while codes stay (scales, minima, norms, biases) is tuned to what the
original predicts, and written anew."""

from collections.abc import Sequence
from concurrent.futures import Future
from itertools import chain

import torch

from halfbyte.block_solvers import BlockTask
from halfbyte.models.batches import Tokens
from halfbyte.models.block import Block
from halfbyte.models.placement import Placement
from halfbyte.models.student import Student
from halfbyte.models.walk import Walk
from halfbyte.polish import tuning
from halfbyte.polish.tuning import Best, Tuning
from halfbyte.polish.written import Written
from halfbyte.report.types import PolishReport, WeightReport
from halfbyte.run import Run, commit, record_step, weight_report

Digests = dict[str, Sequence["str | Future[str]"]]
FOLDED = "its error is from before scales were tuned"


def polish(run: Run, walk: Walk) -> None:
    """Tune what is written, and write it anew. A run that was killed goes on from the last look at the windows held
    out; or with writing, all of which is done again."""
    samples = torch.cat([walk.batches[number] for number in walk.batches.calibrating])
    placement = Placement.on(run.device, run.folder.partial.parent)
    parameters = dict(walk.model.named_parameters())
    written = Written(run, walk.weight_map, parameters, placement.statistics_bytes)
    state, windows = run.folder.scratch("polish"), tuning.shuffled(samples)
    student = Student(run.plan.checkpoint, windows, tuning.together(len(windows)), written, placement, run.progress)
    best = Tuning(student, written, run.progress).run(state)
    held_out = sum(len(student.walk.batches[batch]) for batch in tuning.divided(student.batches)[1])
    del student
    written.take(best.numbers)
    run.polished = _report(run, written, best, len(windows) - held_out, held_out)
    reports, digests = ([], {}) if best.is_first else _rewritten(run, written, samples, placement)
    record_step(run, reports, digests, stage="polish", polish=run.polished.as_dict())


def _report(run: Run, written: Written, best: Best, windows: int, held_out: int) -> PolishReport:
    source = run.plan.checkpoint
    changed = [
        tensor for tensor in written.vectors if not torch.equal(written.read(tensor), source.read(tensor).float())
    ]
    return PolishReport(
        kl_before=best.first,
        kl=best.kl,
        steps=best.step,
        windows=windows,
        held_out=held_out,
        numbers=sum(value.numel() for value in written.numbers.values()),
        unquantized=changed,
    )


def _rewritten(run: Run, written: Written, samples: Tokens, placement: Placement) -> tuple[list[WeightReport], Digests]:
    """What the report says of each weight now, and digests of all that was written."""
    plan, reports, digests = run.plan, list[WeightReport](), Digests()
    if plan.method.transforms:  # what was rounded is nowhere any more
        for weight in filter(lambda weight: weight.block, plan.schemes):
            before = run.rows[weight.name]
            reports.append(before.model_copy(update={"note": "; ".join(filter(None, (before.note, FOLDED)))}))
            digests[weight.name] = [run.put(weight, written.quantized(weight))]
    else:
        source = plan.checkpoint
        walk = Walk(source, samples, source.dtype, placement, to_the_end=False, progress=run.progress)
        for block in walk:
            for report, digest in _block_rewritten(run, walk, block, written):
                reports.append(report)
                digests[report.name] = [digest]
    for tensor in written.vectors:
        run.write_unquantized(tensor, written.vector(tensor), run.checkpoint_writer.precision(tensor))
        digests[tensor] = run.digests[tensor]
    return reports, digests


def _block_rewritten(run: Run, walk: Walk, block: Block, written: Written) -> list[tuple[WeightReport, "Future[str]"]]:
    """The matrices of a block, with the errors that they have now; the block computes with them from now on."""
    for tensor in filter(written.numbers.__contains__, block.tensors):
        block.view(tensor).copy_(written.vector(tensor))
    schemes = {weight: run.plan.schemes[weight] for weight in block.weights if weight in run.plan.schemes}
    task = BlockTask(walk, block, [group for group in run.plan.fused_groups if group[0] in schemes], schemes)
    done = []
    for groups, statistics in task.parts():
        for weight in chain(*groups):
            q, original, seen = written.quantized(weight), block.target(weight), statistics.pop(weight, None)
            (committed,) = commit(run, [weight], q, [original], schemes[weight])
            before, error = run.rows[weight.name], seen.error(original, q.decode()) if seen else None
            report = weight_report(
                weight, schemes[weight], [committed], before.note, before.tokens, error, before.activations,
                before.activation_distribution,
            )  # fmt: skip
            done.append((report, committed.digest))
    for weight in schemes:
        block.put(weight, (q := written.quantized(weight)).decode())
        if q.activations:
            block.round_activations(weight, q.activations)
    return done
