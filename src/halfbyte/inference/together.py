"""Several answers in one forward pass: weights are read once for all of them.

Transformers' continuous batching (5.23) runs a packed model too, on CPUs as well; but it has one seed for all requests,
says nothing of the likeliest tokens, and its server refuses logprobs and stream_options.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Float32
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import Cache, DynamicLayer

from halfbyte.inference.generation import CachedSequence
from halfbyte.inference.model import Answering

TRIED = ("It was a dark night, and the wind", "One")
"""Texts of which it is tried whether a model reads several together."""
EXACT, ROUNDED = 1e-3, 0.05
"""What their logits may differ by, of a standard deviation: in float32, and in 16 bits."""


class SideBySide(DynamicLayer):
    """The same layer of several caches, as one of a batch: each goes on by itself, and shorter ones are filled up
    before their beginning."""

    def __init__(self, layers: Sequence[DynamicLayer]):
        super().__init__()
        self._each, self.is_initialized = layers, True

    def get_seq_length(self) -> int:
        """Of the longest."""
        return max(layer.get_seq_length() for layer in self._each)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of all, with one more of each."""
        rows = zip(self._each, key_states.split(1), value_states.split(1), strict=True)
        keys, values = zip(*(layer.update(key, value) for layer, key, value in rows), strict=True)
        return _filled_up(keys), _filled_up(values)


def _filled_up(states: Sequence[Float[Tensor, "1 heads _ width"]]) -> Float[Tensor, "sequences heads longest width"]:
    longest = max(state.shape[-2] for state in states)
    return torch.cat([functional.pad(state, (0, 0, longest - state.shape[-2], 0)) for state in states])


@torch.inference_mode()
def read_together(
    answering: Answering, sequences: Sequence[CachedSequence], tokens: Sequence[int]
) -> Float32[Tensor, "sequences vocabulary"]:
    """A token for each of several sequences, whose caches are plain: logits of what follows."""
    before, caches = zip(*(sequence.lend() for sequence in sequences), strict=True)
    layers = zip(*(cache.layers for cache in caches), strict=True)
    lengths = torch.tensor([[len(read)] for read in before], device=answering.device)
    longest = int(lengths.max())
    logits, _ = sequences[0].forward(
        torch.tensor(tokens, device=answering.device)[:, None],
        Cache(layers=[SideBySide(each) for each in layers]),
        attention_mask=(torch.arange(longest + 1, device=answering.device) >= longest - lengths).long(),
        position_ids=lengths,
    )
    for sequence, read, token, cache in zip(sequences, before, tokens, caches, strict=True):
        sequence.give_back([*read, token], cache)
    return logits.float()


def reads_together(answering: Answering) -> bool:
    """Whether the model computes of tokens that are read together what it computes of each alone: tried on two texts of
    unlike lengths."""
    texts = [answering.encode(text) for text in TRIED]
    together, alone = ([CachedSequence(answering.model) for _ in texts] for _ in range(2))
    for sequence, text in zip((*together, *alone), texts * 2, strict=True):
        sequence.read(text)
    if not all(sequence.is_plain for sequence in together):
        return False
    tokens = [text[-1] for text in texts]
    logits = read_together(answering, together, tokens)
    wanted = torch.stack([sequence.read([token]) for sequence, token in zip(alone, tokens, strict=True)])
    most = EXACT if answering.model.dtype == torch.float32 else ROUNDED
    return bool((logits - wanted).std() <= most * wanted.std())
