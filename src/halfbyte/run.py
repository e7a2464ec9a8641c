"""A job under way: where its results go, and what is known of them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

import torch
import xxhash
from torch import Tensor

from halfbyte.containers.folder import Folder
from halfbyte.editions import Edition
from halfbyte.grids.grid import AnyScheme, Inputs, Params, Quantized, Seen, same_rows, split_rows
from halfbyte.jobs import SKIPPED, Job
from halfbyte.models.calibrate import Windows
from halfbyte.models.checkpoint import Weight, require_finite

Progress = Callable[[str, float, float], None]
"""(what is being done, done so far, of how much)"""
SAMPLED = 1 << 18
"""Weights that the error of a matrix without calibration is taken over."""
Squares = tuple[float, float]
"""Sums of squares: of what rounded weights miss, and of the weights."""


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
    input: dict[str, Any] | None = None
    """How what it reads is rounded, where calibration saw that."""


@dataclass
class Run:
    """A job under way: where its results go and what is known of them."""

    job: Job
    edition: Edition
    folder: Folder
    progress: Progress
    rows: dict[str, Row] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    """Of every module and kept tensor, as the solver returned it or the source held it; of each piece, where it was written in pieces."""
    folds: list[dict] = field(default_factory=list)
    windows: Windows | None = None

    def put(self, weight: Weight, q: Quantized) -> None:
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


def weight_error(w: Tensor | Quantized, q: Quantized) -> float:
    """Relative error of the weights, over evenly spaced rows where there are many."""
    return relative([squares(w, q)])


def relative(parts: Iterable[Squares]) -> float:
    """The error of a matrix, from those of its pieces."""
    missed, size = (sum(numbers) for numbers in zip(*parts, strict=True))
    return sqrt(missed / max(size, 1e-60))


def squares(w: Tensor | Quantized, q: Quantized, sampled: int = SAMPLED) -> Squares:
    """Over evenly spaced rows, of some `sampled` weights in all."""
    if w is q:
        return 0.0, 0.0
    rows = slice(0, q.shape[0], max(1, q.shape[0] * q.shape[1] // max(sampled, 1)))
    exact = (w.decode() if isinstance(w, Quantized) else w)[rows].float()
    # Where rows share parameters (a tensor's one scale, blocks of 128 x 128, nested scales), a part of them cannot be decoded alone.
    apart = all(p.shape[0] == q.shape[0] for p in q.params.values())
    rounded = same_rows(q, rows).decode() if apart else q.decode()[rows]
    return (rounded - exact).norm().item() ** 2, exact.norm().item() ** 2


def apart(q: Quantized, unit: list[Weight]) -> list[Quantized]:
    """What became of each of the weights that were rounded as one matrix."""
    return split_rows(q, [w.shape[0] for w in unit]) if len(unit) > 1 else [q]


def with_inputs(q: Quantized, scheme: AnyScheme, params: Params | None = None) -> Quantized:
    """The matrix as its scheme has it: with how its inputs are rounded, and what is stored of that."""
    return q._replace(input=Inputs(scheme.input, params or {})) if scheme.input and not q.input else q


def row_of(weight: Weight, scheme: AnyScheme, error: float, tokens: int | None, note: str, read: dict[str, Any] | None = None) -> Row:
    return Row(weight.name, str(scheme), list(weight.shape), scheme.weight.bits(weight.shape), error, tokens, note, read)


def tell(inputs: Inputs, seen: Seen) -> dict[str, Any]:
    """What is to be known of rounded inputs: what is stored, the error on the tokens seen, and how many of their values are cut."""
    low, high = inputs.grid.limits(inputs.params)
    cut = int(((seen.rows < low) | (seen.rows > high)).sum())
    error = (inputs.round(seen.rows) - seen.rows).norm() / seen.rows.norm().clamp(min=1e-30)
    return {
        "grid": str(inputs.grid),
        **{name: value.item() for name, value in inputs.params.items()},
        "low": seen.low.min().item(),
        "high": seen.high.max().item(),
        "error": error.item(),
        "values": seen.rows.numel(),
        "saturated": cut,
        "clipped": cut / seen.rows.numel(),
    }


def note(run: Run, rows: list[Row], digests: dict[str, str], **step) -> None:
    run.rows |= {row.name: row for row in rows}
    run.digests |= digests
    run.folder.record({**step, "rows": [vars(row) for row in rows], "digests": digests})


def recall(run: Run, record: dict) -> None:
    run.rows |= {row["name"]: Row(**row) for row in record.get("rows", [])}
    run.digests |= record.get("digests", {})
    run.folds += record.get("folds", [])
