"""A plan under way: what becomes of a weight once it is solved, where it goes, and what is known of it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import sqrt
from typing import NamedTuple

import torch
import xxhash
from torch import Tensor

from halfbyte.containers.folder import OutputFolder
from halfbyte.grids.activations import ActivationQuant, ActivationStats
from halfbyte.grids.grid import Params
from halfbyte.grids.quantized import Quantized, Scheme, select_rows, split_rows
from halfbyte.models.calibrate import Samples
from halfbyte.models.placement import CPU, chunk_size
from halfbyte.models.precision import cast, require_finite
from halfbyte.models.weight import Weight
from halfbyte.progress import Progress
from halfbyte.report.distributions import Sample, distribution, sample
from halfbyte.report.types import ActivationDistribution, ActivationReport, PolishReport, Resources, WeightReport
from halfbyte.sizing.run import Meter
from halfbyte.targets.plan import SKIPPED, Plan
from halfbyte.targets.target import CheckpointWriter

SAMPLED = 1 << 18
"""Weights that the error of a matrix without calibration is taken over."""


class SquaredError(NamedTuple):
    """Over some rows of a matrix."""

    squared_error: float
    """Sum of squares of what rounded weights miss."""
    squared_norm: float
    """Sum of squares of the weights."""
    worst: float = 0.0
    """The largest relative error of a row, those among them that are likeliest to have overflown or vanished."""


class Committed(NamedTuple):
    """What became of a matrix, or of a chunk of its rows."""

    error: SquaredError
    digest: "Future[str]"
    """Of every bit of it, once it is written."""
    sample: Sample | None = None
    """Of its values before; None where these were on a grid."""


@dataclass
class Run:
    """A plan under way: where its results go and what is known of them."""

    plan: Plan
    checkpoint_writer: CheckpointWriter
    folder: OutputFolder
    progress: Progress
    planned: Resources
    """What it is to take."""
    meter: Meter
    """What it takes."""
    rows: dict[str, WeightReport] = field(default_factory=dict)
    digests: dict[str, list[str]] = field(default_factory=dict)
    """Of every module and unquantized tensor, as the solver returned it or the source held it; one for each chunk of
    rows it was written in."""
    folds: list[dict] = field(default_factory=list)
    samples: Samples | None = None
    device: torch.device = CPU
    """Where is solved."""
    writer: Executor = field(default_factory=lambda: _Inline())
    """Who writes."""
    spilled_bytes: int = 0
    """Of hidden states in files."""
    polished: PolishReport | None = None
    """What tuning the whole model has won."""

    def row_chunks(self, weight: Weight) -> list[Weight]:
        """Runs of a matrix's rows that can be read, rounded and written each by itself, in order."""
        return self.checkpoint_writer.row_chunks(weight, chunk_size(self.device))

    def put(self, weight: Weight, q: Quantized) -> str:
        """Pack and write a matrix; its digest."""
        q = _on_cpu(q)
        for name, values in q.params.items():
            require_finite(f"{weight.name} ({name} of {q.grid})", values)
        for part in self.checkpoint_writer.pack(weight, q):
            self.folder.write(*part)
        return digest(q)

    def write_unquantized(self, tensor: str, value: Tensor, dtype: torch.dtype | None = None) -> None:
        """Write a tensor that is not quantized in the precision planned, which that of a decoded one is not, or in
        another one (`CheckpointWriter.precision`)."""
        value = cast(tensor, value, dtype or self.plan.spec(tensor).dtype, self.plan.wider)
        if self.plan.unquantized[tensor] != SKIPPED:
            require_finite(tensor, value)
        parts = list(self.checkpoint_writer.pack_unquantized(tensor, value))
        self.digests[tensor] = [digest([part.tensor for part in parts])]
        for part in parts:
            self.folder.write(*part)


def digest(value: Quantized | list[Tensor]) -> str:
    """Of every bit of some tensors, or of a matrix on a grid whatever its container."""
    hasher = xxhash.xxh3_128()
    tensors = value if isinstance(value, list) else [value.tensors[name] for name in sorted(value.tensors)]
    for tensor in tensors:
        hasher.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        if tensor.numel():
            hasher.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def relative(parts: Iterable[SquaredError]) -> tuple[float, float]:
    """The relative error of a matrix, and of the worst of its rows, from those of its chunks."""
    missed, norms, worst = zip(*parts, strict=True)
    return sqrt(sum(missed) / max(sum(norms), 1e-60)), max(worst)


def squared_error(w: Tensor | Quantized, q: Quantized, sampled: int = SAMPLED) -> SquaredError:
    """Over evenly spaced rows, of some `sampled` weights in all."""
    if w is q:
        return SquaredError(0.0, 0.0)
    even = torch.arange(0, q.shape[0], max(1, q.shape[0] * q.shape[1] // max(sampled, 1)))
    # Where rows share parameters (a tensor's one scale, blocks of 128 x 128, nested scales), a part of them cannot be
    # decoded alone.
    alone = q.params.keys() <= q.grid.row_params(q.shape)
    rows = (torch.cat([even, _extreme(q)]) if alone else even).to(q.codes.device)
    exact = (w.decode() if isinstance(w, Quantized) else w)[rows].float()
    rounded = select_rows(q, rows).decode() if alone else q.decode()[rows]
    # On the CPU, since not every device has numbers of 64 bits.
    missed, norms = (torch.linalg.vector_norm(m.cpu(), dim=1, dtype=torch.float64) for m in (rounded - exact, exact))
    worst = (missed / norms).where(norms > 0, 0).max().item()
    return SquaredError(missed[: len(even)].square().sum().item(), norms[: len(even)].square().sum().item(), worst)


def _extreme(q: Quantized) -> Tensor:
    """The rows with the largest and the smallest scales, where these would first be too large or too small for what
    holds them."""
    rows = []
    for values in q.params.values():
        most = (values.float() if values.is_floating_point() else values).abs().reshape(len(values), -1).amax(1)
        rows += [most.argmax().view(1), most.argmin().view(1)]
    return torch.cat(rows).cpu() if rows else torch.empty(0, dtype=torch.long)


def commit(
    run: Run,
    weights: Sequence[Weight],
    q: Quantized,
    originals: Sequence[Tensor | Quantized],
    scheme: Scheme,
    activations: Mapping[Weight, Params] | None = None,
    sampled: int = SAMPLED,
) -> list[Committed]:
    """Everything that becomes of a solved matrix: its rows are split into the weights (or chunks of one) that were
    solved together, each is told how its activations are rounded, compared with its original, packed, written and
    digested."""
    parts = split_rows(q, [w.shape[0] for w in weights]) if len(weights) > 1 else [q]
    done = []
    for weight, part, original in zip(weights, parts, originals, strict=True):
        part = with_activations(part, scheme, (activations or {}).get(weight))
        error = squared_error(original, part, sampled)
        looked_at = sample(original, sampled >> 4) if isinstance(original, Tensor) else None
        done.append(Committed(error, run.writer.submit(run.put, weight, part), looked_at))
    return done


def weight_report(
    weight: Weight,
    scheme: Scheme,
    chunks: Sequence[Committed],
    note: str,
    tokens: int | None = None,
    error: float | None = None,
    activations: ActivationReport | None = None,
    read: ActivationDistribution | None = None,
) -> WeightReport:
    """`error`: of the outputs, where it is known; else that of the weights is told. `read`: how what it is multiplied
    by is spread."""
    of_weights, worst = relative(chunk.error for chunk in chunks)
    return WeightReport(
        name=weight.name,
        grid=str(scheme),
        shape=weight.shape,
        bits_per_weight=scheme.weight.bits(weight.shape),
        error=of_weights if error is None else error,
        tokens=tokens,
        note=note,
        activations=activations,
        worst_row=worst,
        distribution=distribution([chunk.sample for chunk in chunks if chunk.sample]),
        activation_distribution=read,
    )


def with_activations(q: Quantized, scheme: Scheme, params: Params | None = None) -> Quantized:
    """The matrix as its scheme has it: with how its activations are rounded, and what is stored of that."""
    return (
        q._replace(activations=ActivationQuant(scheme.activations, params or {}))
        if scheme.activations and not q.activations
        else q
    )


def activation_report(inputs: ActivationQuant, seen: ActivationStats) -> ActivationReport:
    """Of rounded activations: what is stored, the error on the tokens seen, and how many of their values are cut."""
    low, high = inputs.grid.limits(inputs.params)
    cut = int(((seen.rows < low) | (seen.rows > high)).sum())
    error = (inputs.round(seen.rows) - seen.rows).norm() / seen.rows.norm().clamp(min=1e-30)
    return ActivationReport(
        grid=str(inputs.grid),
        **{name: value.item() for name, value in inputs.params.items()},
        low=seen.low.min().item(),
        high=seen.high.max().item(),
        error=error.item(),
        values=seen.rows.numel(),
        saturated=cut,
        clipped=cut / seen.rows.numel(),
    )


def record_step(
    run: Run, reports: Iterable[WeightReport], digests: Mapping[str, Sequence["str | Future[str]"]], **step
) -> None:
    """Note a step as done, in the report and in the journal."""
    resolved = {name: [d if isinstance(d, str) else d.result() for d in pieces] for name, pieces in digests.items()}
    reports = list(reports)
    run.rows |= {report.name: report for report in reports}
    run.digests |= resolved
    run.folder.record({**step, "rows": [report.as_dict() for report in reports], "digests": resolved})


def restore_step(run: Run, record: dict) -> None:
    """What a step of an earlier run has found."""
    run.rows |= {row["name"]: WeightReport(**row) for row in record.get("rows", [])}
    run.digests |= record.get("digests", {})
    run.folds += record.get("folds", [])
    if "polish" in record:
        run.polished = PolishReport(**record["polish"])


class _Inline(Executor):
    """Does at once what it is given."""

    def submit(self, fn: Callable, /, *args, **kwargs) -> Future:
        """Call it now; the future is done."""
        done: Future = Future()
        done.set_result(fn(*args, **kwargs))
        return done


@contextmanager
def writing_beside(run: Run, beside: bool) -> Iterator[None]:
    """While this lasts, a thread writes what is committed, one thing after another, while a device computes the
    next."""
    if not beside:
        yield
        return
    with ThreadPoolExecutor(1) as run.writer:
        yield
    run.writer = _Inline()


def _on_cpu(q: Quantized) -> Quantized:
    """The same matrix in the CPU's memory."""
    activations = q.activations and ActivationQuant(
        q.activations.grid, {name: p.cpu() for name, p in q.activations.params.items()}
    )
    return q._replace(
        codes=q.codes.cpu(), params={name: p.cpu() for name, p in q.params.items()}, activations=activations
    )
