"""A scale for each channel, folded wherever the block has room for one. AWQ and SmoothQuant differ in how they choose
it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import NamedTuple

import torch
from jaxtyping import Float32
from torch import Tensor

from halfbyte.grids.quantized import Scheme
from halfbyte.models.block import Block
from halfbyte.models.weight import Weight
from halfbyte.solvers.statistics import Statistics
from halfbyte.transforms.fold import Finder, Fold, divide, only_used, producer_view, weight_of

WORTH = 0.99
"""A searched fold must lower the error to this share of what it was."""


@dataclass(frozen=True)
class TransformSettings:
    """What a recipe says of transforms."""

    alpha: float | None = None
    """SmoothQuant's migration strength; None: searched for each fold."""
    observer: str = "max"
    """What stored scales of inputs span: a key of `halfbyte.grids.activations.OBSERVERS`."""


class ScaleChoice(NamedTuple):
    """A scale per row of the producer, and what says how good it is."""

    scale: Float32[Tensor, " rows"]
    about: dict[str, float]
    """For the report; "error" is the error that is left as a share of that without the fold."""


@dataclass(frozen=True)
class FoldSite:
    """Where a scale is to be chosen: a fold of a block, and what is known of the weights that take part."""

    block: Block
    fold: Fold
    schemes: Mapping[Weight, Scheme]
    statistics: Mapping[Weight, Statistics]
    reference: list[Tensor] = field(default_factory=list)
    """What the block returns before anything is rounded, once a search has run it: folds leave it as it is, so all of a
    block share it."""

    @cached_property
    def readers(self) -> list[Weight]:
        """Those that are to be rounded, and whose inputs were seen."""
        return [
            m.weight for m in self.fold.readers if m.weight and m.weight in self.schemes and m.weight in self.statistics
        ]

    @cached_property
    def producer_weight(self) -> Weight | None:
        """The producer, if it is a linear that is to be rounded."""
        producer_weight = weight_of(self.block, self.fold.producer)
        return producer_weight if producer_weight and producer_weight in self.schemes else None

    def per_row(self, channels: Float32[Tensor, " channels"], reduce: str = "mean") -> Float32[Tensor, " rows"]:
        """Of the channels that a row of the producer makes: several where query heads share values, one elsewhere.

        Relative to their mean, within four orders of magnitude of it.
        """
        channels = (channels / channels.mean().clamp(min=1e-30)).clamp(1e-4, 1e4)
        producer = self.fold.producer
        if producer.rows is None:
            return channels
        ones = torch.ones(producer_view(self.block, producer).shape[0], device=channels.device)
        return ones.scatter_reduce_(
            0, torch.tensor(producer.rows, device=channels.device), channels, reduce, include_self=False
        )

    def even(self, scale: Float32[Tensor, " rows"]) -> Float32[Tensor, " rows"]:
        """As far above 1 as below it. Powers of two, if a matrix that stays in 16 bits takes part: they do not round
        it."""
        scale = scale / (scale.max() * scale.min()).sqrt()
        exact = all(m.weight in self.schemes for m in self.fold.readers) and (
            self.fold.producer.rows is None or self.producer_weight is not None
        )
        return scale if exact else 2.0 ** scale.log2().round()

    def apply(self, scale: Float32[Tensor, " rows"]) -> Float32[Tensor, " channels"]:
        """Norms and what stays in 16 bits change in memory; what a solver will round takes the scale at full precision.

        Returns what the readers' columns are multiplied by: a norm that is rounded to 16 bits has a part in it.
        Where it fails, all is as it was.
        """
        with self.block.whole_or_not(*self._changed):
            channels = self.fold.channels(self._divide(scale))
            for matrix in self.fold.readers:
                if matrix.weight and matrix.weight in self.schemes:
                    self.block.scales.multiply_columns(matrix.weight, channels)
                else:
                    view = self.block.matrix(matrix)
                    view.copy_(view.float() * channels)
            shared = {id(s): s for w in self.readers if (s := self.statistics[w])}.values()
            settle = [statistics.divided(channels) for statistics in shared]
        for divide_statistics in settle:
            divide_statistics()
        return channels

    @property
    def _changed(self) -> list[str]:
        """Tensors that a scale changes in memory."""
        producer, readers = self.fold.producer, self.fold.readers
        tensors = [producer.bias] if self.producer_weight else [producer.tensor, producer.bias]
        return [*tensors, *(m.tensor for m in readers if m.weight is None or m.weight not in self.schemes)]

    def _divide(self, scale: Float32[Tensor, " rows"]) -> Float32[Tensor, " rows"]:
        """Divide the producer. Returns the scale that it really lost."""
        block, producer = self.block, self.fold.producer
        if not self.producer_weight:
            return divide(block, producer, scale)
        scale = only_used(producer, scale)
        block.scales.divide_rows(self.producer_weight, scale)
        if producer.bias in block.tensors:
            bias = block.view(producer.bias)
            bias.copy_(bias.float() / scale)
        return scale


Choose = Callable[[FoldSite, TransformSettings], ScaleChoice | None]


def scaled(
    block: Block,
    finder: Finder,
    schemes: Mapping[Weight, Scheme],
    statistics: Mapping[Weight, Statistics],
    settings: TransformSettings,
    choose: Choose,
) -> list[dict]:
    """Fold what `choose` chooses wherever it is worth it. Returns what was done."""
    done, reference, fitting = [], [], block.walk.fitting
    for fold in fitting(partial(finder.find, block)):
        site = FoldSite(block, fold, schemes, statistics, reference)
        chosen = fitting(partial(choose, site, settings)) if site.readers else None
        if chosen and chosen.about.get("error", 0.0) < WORTH:
            fitting(partial(site.apply, chosen.scale))
            done.append({"producer": fold.producer.tensor, "readers": [m.tensor for m in fold.readers], **chosen.about})
    return done
