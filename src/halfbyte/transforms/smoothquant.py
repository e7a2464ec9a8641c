"""SmoothQuant (Xiao et al., 2211.10438): channels that carry large inputs hand a part of their size to the weights that
read them.

The scale of a channel is its largest input to the power of alpha, over its largest weight to the rest: x^a / w^(1 - a).
Both sides are rounded, so both count: alpha is searched for the least squared error of what the block returns when the
fold's weights and what they read are rounded.
"""

import torch
from jaxtyping import Float32
from torch import Tensor

from halfbyte.grids.activations import ActivationQuant, ActivationStats
from halfbyte.models.weight import Weight
from halfbyte.solvers.nearest import nearest
from halfbyte.solvers.statistics import Diagonal
from halfbyte.transforms.scale import FoldSite, ScaleChoice, TransformSettings

COARSE, STEP = (0.5, 0.7, 0.9), 0.1
"""Strengths that are tried first, and how far the best one's neighbours lie from it: a search that is right where the
error has one valley. Half steps win nothing
(KL of bookworm-6m with outliers, int8-channel/int8-token: .00052 and .00053, standard error .00001)."""
BATCH = 1
"""Of calibration tokens: the first after the probe, one window of text. Four windows choose nearly the same (KL of the
same model, w8a8: .000447 and .000449 with gptq, .00051 and .00049 without, standard error .00001) and take longer than
all of gptq."""


def smoothquant(site: FoldSite, settings: TransformSettings) -> ScaleChoice | None:
    """The scale at the alpha asked for, or at the best one; None where no input is rounded."""
    readers = [w for w in site.readers if site.schemes[w].activations]
    if not readers:
        return None
    x = site.per_row(torch.stack([_largest(site.statistics[w].activation_stats) for w in readers]).amax(0), "amax")
    w = site.per_row(torch.stack([site.block.target(w).float().abs().amax(0) for w in readers]).amax(0), "amax")

    def at(alpha: float) -> Float32[Tensor, " rows"]:
        return site.even(x**alpha / w ** (1 - alpha))

    if settings.alpha is not None:
        return ScaleChoice(at(settings.alpha), {"alpha": settings.alpha})
    if not site.reference:
        site.reference.append(_output(site, None, None))

    def lost(scale: Float32[Tensor, " rows"] | None) -> float:
        return (_output(site, scale, settings.observer) - site.reference[0]).square().sum().item()

    errors = {alpha: lost(at(alpha)) for alpha in COARSE}
    valley = min(errors, key=errors.__getitem__)
    errors |= {alpha: lost(at(alpha)) for alpha in (round(valley - STEP, 1), round(valley + STEP, 1))}
    best = min(errors, key=errors.__getitem__)
    return ScaleChoice(at(best), {"alpha": best, "error": errors[best] / max(lost(None), 1e-30)})


def _largest(seen: ActivationStats) -> Float32[Tensor, " in"]:
    """The largest size of each in-feature."""
    return torch.maximum(seen.low.abs(), seen.high.abs())


def _output(site: FoldSite, scale: Float32[Tensor, " rows"] | None, observer: str | None) -> Tensor:
    """What the block returns on a batch under a scale, in float32; with `observer`, its readers' inputs and all weights
    of the fold are rounded to nearest, without a search for scales. The block is as it was afterwards."""
    block, fold = site.block, site.fold
    takes_part = {*site.readers, *([site.producer_weight] if site.producer_weight else [])}
    moved = takes_part | block.scales.weights  # scales of earlier folds are not in memory yet
    changed = [fold.producer.tensor, fold.producer.bias, *(m.tensor for m in fold.readers), *(w.tensor for w in moved)]
    with block.trial(*changed):
        channels = torch.ones(()) if scale is None else FoldSite(block, fold, site.schemes, {}).apply(scale)
        for weight in moved:
            w = block.target(weight)
            if observer and weight in takes_part:
                w = _rounded(site, weight, w, channels)
            block.put(weight, w)
        if observer:
            block.activations |= {w: i for w in site.readers if (i := _activation_quant(site, w, channels, observer))}
        return block.run(block.walk.inputs[BATCH], BATCH).float()


def _rounded(site: FoldSite, weight: Weight, w: Tensor, channels: Tensor) -> Float32[Tensor, "out in"]:
    """The weight rounded to nearest, weighted by what it reads under the scale."""
    statistics = site.statistics.get(weight)
    scale = channels if weight in site.readers else torch.ones(())
    return nearest(
        w,
        site.schemes[weight].weight,
        Diagonal(statistics.importance / scale.square()) if statistics else None,
        search=False,
    ).decode()


def _activation_quant(site: FoldSite, weight: Weight, channels: Tensor, observer: str) -> ActivationQuant | None:
    """How the inputs are rounded that `weight` reads under the scale."""
    grid, seen = site.schemes[weight].activations, site.statistics[weight].activation_stats
    return (
        ActivationQuant(grid, grid.fit(ActivationStats(*(part / channels for part in seen)), observer))
        if grid
        else None
    )
