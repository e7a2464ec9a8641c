"""AWQ (Lin et al., 2306.00978): channels that carry large inputs get larger weights, and so a finer grid.

The scale of a channel is its root mean square input to a power, over the size of the weights that read it to the rest:
x^a / w^(1 - a) or x^a. The exponent is searched for the least squared error of the readers' outputs, which the Hessian
gives without running anything: tr(E H E^T).
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float32
from torch import Tensor

from halfbyte.grids.grid import Grid
from halfbyte.models.checkpoint import Weight
from halfbyte.models.walk import Block
from halfbyte.solvers.statistics import ERROR_PRODUCTS, Statistics, sample_rows
from halfbyte.transforms.fold import Finder, Fold, divide, only_used, producer_view, weight_of

EXPONENTS = [k / 10 for k in range(11)]
WORTH = 0.99
"""A fold must lower the error to this share of what it was."""


def awq(block: Block, finder: Finder, grids: Mapping[Weight, Grid], statistics: Mapping[Weight, Statistics]) -> list[dict]:
    """Fold a searched scale wherever the block has room for one."""
    done = []
    for fold in finder.find(block):
        readers = [m.weight for m in fold.readers if m.weight and m.weight in grids and m.weight in statistics]
        if readers:
            scale, gain = search(block, fold, readers, grids, statistics)
            if gain < WORTH:
                apply(block, fold, scale, grids, statistics)
                done.append({"producer": fold.producer.tensor, "readers": [m.tensor for m in fold.readers], "error": gain})
    return done


def search(
    block: Block, fold: Fold, readers: list[Weight], grids: Mapping[Weight, Grid], statistics: Mapping[Weight, Statistics]
) -> tuple[Float32[Tensor, " rows"], float]:
    """The best scale per row of the producer, and the error that is left as a share of the error without it."""
    importance = torch.stack([statistics[w].importance * statistics[w].tokens for w in readers]).sum(0).sqrt()
    size = torch.stack([block.weight(w).float().abs().mean(0) for w in readers]).amax(0)
    producer_rows = producer_view(block, fold.producer).shape[0]
    x, s = (_per_row(fold, v / v.mean().clamp(min=1e-30), producer_rows).clamp(1e-4, 1e4) for v in (importance, size))
    exact = all(m.weight in grids for m in fold.readers) and (fold.producer.rows is None or weight_of(block, fold.producer) in grids)
    candidates = [x**a for a in EXPONENTS] + [x**a / s ** (1 - a) for a in EXPONENTS]
    best, best_error, plain = torch.ones_like(x), float("inf"), 0.0
    for number, candidate in enumerate(candidates):
        candidate = candidate / (candidate.max() * candidate.min()).sqrt()
        if not exact:  # a matrix that stays in 16 bits takes the scale too, and powers of two do not round it
            candidate = 2.0 ** candidate.log2().round()
        error = sum(_error(block, w, fold.channels(candidate), grids[w], statistics[w]) for w in readers)
        plain = error if number == 0 else plain  # exponent 0 is no scale at all
        if error < best_error:
            best, best_error = candidate, error
    return best, best_error / max(plain, 1e-30)


def _per_row(fold: Fold, channels: Tensor, rows: int) -> Tensor:
    """Mean over the channels that a row of the producer makes: several where query heads share values."""
    if fold.producer.rows is None:
        return channels
    index = torch.tensor(fold.producer.rows, device=channels.device)
    total, count = (torch.zeros(rows, device=channels.device).index_add_(0, index, v) for v in (channels, torch.ones_like(channels)))
    return torch.where(count > 0, total / count.clamp(min=1), 1.0)


def _error(block: Block, weight: Weight, scale: Tensor, grid: Grid, statistics: Statistics) -> float:
    w = block.weight(weight)
    w = w[sample_rows(w.shape[0], ERROR_PRODUCTS // w.shape[1] ** 2)].float()
    params = grid.fit(w * scale, statistics.importance / scale.square())
    delta = grid.decode(grid.encode(w * scale, params), params) / scale - w
    return ((delta @ statistics.hessian) * delta).sum().item() / (delta.shape[0] / block.weight(weight).shape[0])


def apply(block: Block, fold: Fold, scale: Tensor, grids: Mapping[Weight, Grid], statistics: Mapping[Weight, Statistics]) -> None:
    """Norms and what stays in 16 bits change in memory; what a solver will round takes the scale at full precision."""
    producer = fold.producer
    made = weight_of(block, producer)
    if made and made in grids:
        scale = only_used(producer, scale)
        block.rows[made] = block.rows.get(made, 1.0) / scale
        if producer.bias in block.tensors:
            bias = block.view(producer.bias)
            bias.copy_(bias.float() / scale)
    else:
        scale = divide(block, producer, scale)
    seen: set[int] = set()
    for m in fold.readers:
        channels = fold.channels(scale)
        if m.weight and m.weight in grids:
            block.columns[m.weight] = block.columns.get(m.weight, 1.0) * channels
        else:
            matrix = block.matrix(m)
            matrix.copy_(matrix.float() * channels)
        if m.weight and m.weight in statistics and id(statistics[m.weight]) not in seen:
            seen.add(id(statistics[m.weight]))
            statistics[m.weight].divide(channels)
