"""How the values of a weight, and of what it reads, are spread: a few numbers of each."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from halfbyte.grids.activations import ActivationStats
from halfbyte.report.types import ActivationDistribution, Distribution, OutlierChannel

SHARES = {"p0_1": 0.001, "p1": 0.01, "p25": 0.25, "median": 0.5, "p75": 0.75, "p99": 0.99, "p99_9": 0.999}
OUTLIER, MOST = 8, 8
"""A channel is told of whose largest value is so many times that of the median channel; so many at most."""


class Sample(NamedTuple):
    """Of a matrix, or of a chunk of its rows: the exact extremes, and evenly spaced values."""

    low: float
    high: float
    values: Tensor


def sample(w: Tensor, count: int) -> Sample:
    """Some `count` values. An odd step meets all columns of a matrix whose width is a power of two."""
    low, high = torch.aminmax(w)
    values = w.reshape(-1)[:: max(1, w.numel() // max(count, 1)) | 1]
    return Sample(low.item(), high.item(), values.float().cpu())


def distribution(samples: Sequence[Sample]) -> Distribution | None:
    """Of a matrix, from the samples of its chunks; None where nothing was looked at."""
    if not samples:
        return None
    values = torch.cat([s.values for s in samples])
    return Distribution(**_spread(values, min(s.low for s in samples), max(s.high for s in samples)))


def activation_distribution(stats: ActivationStats) -> ActivationDistribution | None:
    """Of what linears read: percentiles of the tokens that were kept, extremes and channels of all. None where values
    overflow, of which a solver makes a note."""
    largest = torch.maximum(stats.low.abs(), stats.high.abs()).cpu()
    if not (largest.isfinite().all() and stats.rows.isfinite().all()):
        return None
    typical = largest.median().item()
    top = largest.topk(min(MOST, len(largest)))
    outliers = [
        OutlierChannel(channel=channel, largest=_short(value))
        for value, channel in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        if value >= OUTLIER * typical > 0
    ]
    spread = _spread(stats.rows.float().cpu().reshape(-1), stats.low.min().item(), stats.high.max().item())
    return ActivationDistribution(**spread, median_channel=_short(typical), outliers=outliers)


def _spread(values: Tensor, low: float, high: float) -> dict[str, Any]:
    places = {name: int(share * (len(values) - 1)) for name, share in SHARES.items()}
    ordered = np.partition(values.numpy(), list(places.values()))
    percentiles = {name: float(ordered[place]) for name, place in places.items()}
    return {name: _short(value) for name, value in {"low": low, **percentiles, "high": high}.items()}


def _short(value: float) -> float:
    """Of a sample, more digits say nothing."""
    return float(f"{value:.5g}")
