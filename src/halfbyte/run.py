"""A job under way: where its results go, and what is known of them."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import sqrt
from typing import NamedTuple

import torch
import xxhash
from torch import Tensor

from halfbyte.containers.folder import Folder
from halfbyte.grids.activations import ActivationQuant, ActivationStats
from halfbyte.grids.grid import Params
from halfbyte.grids.quantized import AnyScheme, Quantized, select_rows, split_rows
from halfbyte.models.calibrate import Windows
from halfbyte.models.checkpoint import Weight, require_finite
from halfbyte.plan import SKIPPED, Job
from halfbyte.progress import Progress
from halfbyte.report.types import ActivationReport, WeightReport
from halfbyte.targets.table import Edition

SAMPLED = 1 << 18
"""Weights that the error of a matrix without calibration is taken over."""


class Squares(NamedTuple):
    """Sums of squares, over some rows of a matrix."""

    missed: float
    """Of what rounded weights miss."""
    size: float
    """Of the weights."""
    worst: float = 0.0
    """The largest relative error of a row, those among them that are likeliest to have overflown or vanished."""


@dataclass
class Run:
    """A job under way: where its results go and what is known of them."""

    job: Job
    edition: Edition
    folder: Folder
    progress: Progress
    rows: dict[str, WeightReport] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    """Of every module and kept tensor, as the solver returned it or the source held it; of each piece, where it was written in pieces."""
    folds: list[dict] = field(default_factory=list)
    windows: Windows | None = None

    def put(self, weight: Weight, q: Quantized) -> None:
        for name, values in q.params.items():
            require_finite(f"{weight.name} ({name} of {q.grid})", values)
        for part in self.edition.pack(weight, q):
            self.folder.write(*part)

    def keep(self, tensor: str, value: Tensor) -> None:
        if self.job.kept[tensor] != SKIPPED:
            require_finite(tensor, value)
        parts = list(self.edition.keep(tensor, value))
        self.digests[tensor] = digest([part.tensor for part in parts])
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


def relative(parts: Iterable[Squares]) -> tuple[float, float]:
    """The error of a matrix, and of the worst of its rows, from those of its pieces."""
    missed, size, worst = zip(*parts, strict=True)
    return sqrt(sum(missed) / max(sum(size), 1e-60)), max(worst)


def squares(w: Tensor | Quantized, q: Quantized, sampled: int = SAMPLED) -> Squares:
    """Over evenly spaced rows, of some `sampled` weights in all."""
    if w is q:
        return Squares(0.0, 0.0)
    even = torch.arange(0, q.shape[0], max(1, q.shape[0] * q.shape[1] // max(sampled, 1)))
    # Where rows share parameters (a tensor's one scale, blocks of 128 x 128, nested scales), a part of them cannot be decoded alone.
    alone = all(p.shape[0] == q.shape[0] for p in q.params.values())
    rows = torch.cat([even, _extreme(q)]) if alone else even
    exact = (w.decode() if isinstance(w, Quantized) else w)[rows].float()
    rounded = select_rows(q, rows).decode() if alone else q.decode()[rows]
    missed, size = (torch.linalg.vector_norm(m, dim=1, dtype=torch.float64) for m in (rounded - exact, exact))
    worst = (missed / size).where(size > 0, 0).max().item()
    return Squares(missed[: len(even)].square().sum().item(), size[: len(even)].square().sum().item(), worst)


def _extreme(q: Quantized) -> Tensor:
    """The rows with the largest and the smallest scales, where these would first be too large or too small for what holds them."""
    found = []
    for values in q.params.values():
        most = (values.float() if values.is_floating_point() else values).abs().reshape(len(values), -1).amax(1)
        found += [most.argmax().view(1), most.argmin().view(1)]
    return torch.cat(found).cpu() if found else torch.empty(0, dtype=torch.long)


def apart(q: Quantized, unit: list[Weight]) -> list[Quantized]:
    """What became of each of the weights that were rounded as one matrix."""
    return split_rows(q, [w.shape[0] for w in unit]) if len(unit) > 1 else [q]


def with_inputs(q: Quantized, scheme: AnyScheme, params: Params | None = None) -> Quantized:
    """The matrix as its scheme has it: with how its inputs are rounded, and what is stored of that."""
    return (
        q._replace(activations=ActivationQuant(scheme.activations, params or {}))
        if scheme.activations and not q.activations
        else q
    )


def row_of(
    weight: Weight,
    scheme: AnyScheme,
    errors: tuple[float, float],
    tokens: int | None,
    note: str,
    activations: ActivationReport | None = None,
) -> WeightReport:
    """`errors`: of the matrix, and of the worst of its rows."""
    error, worst = errors
    return WeightReport(
        name=weight.name,
        grid=str(scheme),
        shape=weight.shape,
        bits_per_weight=scheme.weight.bits(weight.shape),
        error=error,
        tokens=tokens,
        note=note,
        input=activations,
        worst_row=worst,
    )


def tell(inputs: ActivationQuant, seen: ActivationStats) -> ActivationReport:
    """Of rounded inputs: what is stored, the error on the tokens seen, and how many of their values are cut."""
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


def note(run: Run, rows: list[WeightReport], digests: dict[str, str], **step) -> None:
    run.rows |= {row.name: row for row in rows}
    run.digests |= digests
    run.folder.record({**step, "rows": [row.as_dict() for row in rows], "digests": digests})


def recall(run: Run, record: dict) -> None:
    run.rows |= {row["name"]: WeightReport(**row) for row in record.get("rows", [])}
    run.digests |= record.get("digests", {})
    run.folds += record.get("folds", [])
