"""Rounding without calibration: chunk after chunk of rows at the disk's speed, as many side by side as there are
cores."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from halfbyte.devices import kind_of, release
from halfbyte.errors import OutOfMemory
from halfbyte.grids.quantized import Quantized, Scheme
from halfbyte.models.placement import CPU, tasks_together
from halfbyte.models.weight import Weight
from halfbyte.progress import RESUMING
from halfbyte.run import SAMPLED, Committed, Run, commit, record_step, restore_step, weight_report
from halfbyte.sizing.run import fitting_bytes


def stream(
    run: Run,
    fused_groups: Iterable[Sequence[Weight]],
    unquantized: Collection[str],
    read: Callable[[Weight], Any],
    solve: Callable[[Weight, Any, Scheme], Quantized],
    remark: str = "",
) -> None:
    """Solve and write these matrices, and write tensors that stay unquantized. What an earlier run has done of it is
    read back instead. `remark`: what the report says of each matrix, beside the plan's note."""
    plan = run.plan
    done = [record for record in run.folder.journal if "module" in record]
    for record in done:
        restore_step(run, record)
    if done:
        run.progress(
            f"{RESUMING}: {len(run.rows)} of {len(plan.schemes)} matrices are done", len(run.rows), len(plan.schemes)
        )
    notes = {c.weight: "; ".join(filter(None, (c.note, remark))) for c in plan.weights}
    todo = [group for group in fused_groups if any(w.name not in run.rows for w in group)]
    cut = [[group] if len(group) > 1 else [[rows] for rows in run.row_chunks(group[0])] for group in todo]
    total = sum(map(size_of, todo))
    seen = 0

    def write(group: Sequence[Weight], chunk: Sequence[Weight], sampled: int) -> list[Committed]:
        values = [read(rows) for rows in chunk]
        scheme = plan.schemes[group[0]]
        try:
            q = solve(group[0], values[0] if len(values) == 1 else torch.cat(values), scheme)
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(
                f"{run.device} has too little memory to round {group[0].name} to {scheme.weight}; --device cpu"
            ) from error
        return commit(run, chunk, q, values, scheme, sampled=sampled)

    def write_unquantized(tensor: str) -> None:
        run.write_unquantized(tensor, plan.checkpoint.read(tensor))

    largest = max((size_of(chunk) for tasks in cut for chunk in tasks), default=1)
    with workers(largest, run.device, fitting_bytes(plan)) as pool:
        written = [
            [pool.submit(write, group, chunk, SAMPLED // len(tasks)) for chunk in tasks]
            for group, tasks in zip(todo, cut, strict=True)
        ]
        for group, tasks in zip(todo, written, strict=True):
            reports, digests = [], {}
            for weight, chunks in zip(group, zip(*(task.result() for task in tasks), strict=True), strict=True):
                reports.append(weight_report(weight, plan.schemes[weight], chunks, notes[weight]))
                digests[weight.name] = [chunk.digest for chunk in chunks]
            record_step(run, reports, digests, module=group[0].name)
            seen += size_of(group)
            run.progress(group[-1].name, seen, total)
        release(CPU)
        left = [tensor for tensor in unquantized if tensor not in run.digests]
        for number, _ in enumerate(pool.map(write_unquantized, left)):
            run.progress("tensors that are not quantized", number, len(left))


def size_of(weights: Sequence[Weight]) -> int:
    """Weights in all of them."""
    return sum(w.shape[0] * w.shape[1] for w in weights)


@contextmanager
def workers(largest: int, device: torch.device = CPU, each: int = 0) -> Iterator[Executor]:
    """Threads that share the cores out, for tasks of at most so many weights, each of so many bytes on a GPU: the fewer
    cores a task has, the less they wait for one another.

    There is one thread more than that takes, since some wait for the disk; but not where a GPU's memory is what is
    shared out.
    """
    cores, together = torch.get_num_threads(), tasks_together(largest, device, each)
    threads = together + 1 if kind_of(device).is_host else together
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(cores // together,)) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(cores)
