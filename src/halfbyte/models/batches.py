"""Samples in batches, each of which runs at once, or in parts where memory is short."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Int64
from torch import Tensor

from halfbyte.models.block import PROBE

PROBE_TOKENS = 64
Tokens = Int64[Tensor, "samples length"]


class Batches(Sequence[Tokens]):
    """The tokens of each batch. The first is a probe, small enough to be run again and again."""

    def __init__(
        self, samples: Tokens, held_out: Int64[Tensor, "held_out length"] | None, batch_tokens: int, trials: bool
    ):
        """`held_out`: samples in batches of their own. `trials`: the first batch but the probe is a single sample."""
        per_batch = max(1, batch_tokens // samples.shape[1])
        first = 1 if trials else per_batch
        rest = samples[first:].split(per_batch) if len(samples) > first else ()
        self._tokens = [samples[:1, :PROBE_TOKENS], samples[:first], *rest]
        self.calibrating = range(PROBE + 1, len(self._tokens))
        self._tokens += held_out.split(per_batch) if held_out is not None else []
        self.checking = range(self.calibrating.stop, len(self._tokens))
        """The numbers of the batches of `samples`, and of those that are held out."""
        self.parts = [[slice(None)] for _ in self._tokens]
        """Samples of each batch that run at once."""

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, number):
        return self._tokens[number]

    @property
    def windows(self) -> int:
        """How many samples there are, those held out aside."""
        return sum(len(self._tokens[number]) for number in self.calibrating)

    @property
    def tokens(self) -> int:
        """Of all samples."""
        return sum(batch.numel() for batch in self._tokens)

    def halve(self, carried: dict[int, list[Sequence[Any]]]) -> bool:
        """Have half as many samples run at once, with what blocks returned of them beside hidden states; False where
        none runs with another."""
        halves = [
            [half for part in parts for half in _halved(part, len(tokens))]
            for parts, tokens in zip(self.parts, self._tokens, strict=True)
        ]
        if halves == self.parts:
            return False
        for batch, others in carried.items():
            carried[batch] = _divided(others, self.parts[batch], halves[batch], len(self._tokens[batch]))
        self.parts = halves
        return True


def _halved(part: slice, samples: int) -> list[slice]:
    first, last, _ = part.indices(samples)
    middle = (first + last + 1) // 2
    return [part] if last - first < 2 else [slice(first, middle), slice(middle, last)]


def _divided(others: list[Sequence[Any]], parts: list[slice], halves: list[slice], samples: int) -> list[Sequence[Any]]:
    """What blocks returned of parts of a batch, as of their halves: tensors of as many samples are divided, others are
    of all of them."""
    divided = []
    for half in halves:
        first, last, _ = half.indices(samples)
        at, (start, stop, _) = next(
            (i, p.indices(samples))
            for i, p in enumerate(parts)
            if p.indices(samples)[0] <= first < p.indices(samples)[1]
        )
        divided.append(
            [
                x[first - start : last - start] if isinstance(x, Tensor) and x.dim() and len(x) == stop - start else x
                for x in others[at]
            ]
        )
    return divided
