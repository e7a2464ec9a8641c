"""AWQ (Lin et al., 2306.00978): channels that carry large inputs get larger weights, and so a finer grid.

The scale of a channel is its root mean square input to a power, over the size of the weights that read it to the rest:
x^a / w^(1 - a) or x^a. The exponent is searched for the least squared error of the readers' outputs, which the Hessian
gives without running anything: tr(E H E^T).
"""

import torch
from jaxtyping import Float32
from torch import Tensor

from halfbyte.models.weight import Weight
from halfbyte.solvers.statistics import ERROR_PRODUCTS, sample_rows
from halfbyte.transforms.scale import FoldSite, ScaleChoice, TransformSettings

EXPONENTS = [k / 10 for k in range(11)]


def awq(site: FoldSite, settings: TransformSettings) -> ScaleChoice:
    """The scale under which the readers' weights lose least."""
    importance = (
        torch.stack([site.statistics[w].importance * site.statistics[w].tokens for w in site.readers]).sum(0).sqrt()
    )
    size = torch.stack([site.block.target(w).float().abs().mean(0) for w in site.readers]).amax(0)
    x, s = site.per_row(importance), site.per_row(size)
    best, best_error, plain = torch.ones_like(x), float("inf"), 0.0
    candidates = [x**a for a in EXPONENTS] + [x**a / s ** (1 - a) for a in EXPONENTS]
    for number, candidate in enumerate(map(site.even, candidates)):
        error = sum(_error(site, w, site.fold.channels(candidate)) for w in site.readers)
        plain = error if number == 0 else plain  # exponent 0 is no scale at all
        if error < best_error:
            best, best_error = candidate, error
    return ScaleChoice(best, {"error": best_error / max(plain, 1e-30)})


def _error(site: FoldSite, weight: Weight, scale: Float32[Tensor, " in"]) -> float:
    grid, statistics = site.schemes[weight].weight, site.statistics[weight]
    w = site.block.target(weight)
    every = w.shape[0]
    w = w[sample_rows(every, ERROR_PRODUCTS // w.shape[1] ** 2)].float()
    params = grid.fit(w * scale, statistics.importance / scale.square())
    delta = grid.decode(grid.encode(w * scale, params), params) / scale - w
    return ((delta @ statistics.hessian) * delta).sum().item() / (delta.shape[0] / every)
