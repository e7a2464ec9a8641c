"""Whether a model fits in memory to answer, known before it is loaded; and how long a text it can hold there."""

from bisect import bisect_right
from collections.abc import Callable

import torch

from halfbyte import nn
from halfbyte.devices import kind_of
from halfbyte.errors import BadRequest, Unsupported
from halfbyte.models import calibrate
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.memory import RUNNING, hidden_size
from halfbyte.report.summary import size
from halfbyte.sizing.cache import CacheType, cache_bytes, layers_of

SHORTEST = 512
"""Tokens of context that there has to be memory for, where nobody says how many."""
UNLIMITED = 1 << 20
"""Tokens, of a model whose config sets no limit."""
LOGITS = 12
"""Bytes for each token that there is, of predictions: in float32, as they are sorted and drawn from."""


def context_within(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, asked: int | None = None, sequences: int = 1
) -> tuple[int, tuple[str, ...]]:
    """Tokens of each of so many sequences that there is memory for beside the weights: as many as are asked for, or as
    the model reads; and what is to be said of it. Raises BadRequest where there is too little memory."""
    longest = calibrate.longest(checkpoint, UNLIMITED)
    if asked and asked > longest:
        raise BadRequest(f"the model reads at most {longest} tokens at once, not {asked}; give a smaller --context")
    free, weights, beside = (
        kind_of(device).free_bytes(device),
        nn.loaded_bytes(checkpoint, dtype),
        _beside(checkpoint, dtype, sequences),
    )
    wanted = asked or longest
    least = asked or min(SHORTEST, longest)
    fits = bisect_right(range(wanted + 1), free - weights, key=beside) - 1
    if fits < least:
        raise BadRequest(
            f"{checkpoint.path} takes {size(weights)} of memory, and {size(beside(least))} with a context of {least} "
            f"tokens, and {size(free)} of {device} are free; {_instead(checkpoint, device, free, fits)}"
        )
    if fits < wanted:
        return fits, (f"there is memory for {fits} tokens of context, and the model reads {longest}",)
    return wanted, ()


def _beside(checkpoint: Checkpoint, dtype: torch.dtype, sequences: int) -> Callable[[int], int]:
    """Bytes beside weights, by how many tokens each sequence has: their caches, and what is computed when all tokens of
    one are read at once."""
    try:
        layers = layers_of(checkpoint.config)
    except Unsupported:
        layers = ()  # of a kind that nobody has described: what it keeps is not counted
    kind = CacheType("as computed", 8 * dtype.itemsize, 0, "")
    widest = max(
        (max(weight.shape) for weight in checkpoint.weights() if weight.block), default=hidden_size(checkpoint)
    )
    vocabulary = checkpoint.text_config.get("vocab_size")
    logits = LOGITS * vocabulary if isinstance(vocabulary, int) else 0
    return lambda tokens: (
        cache_bytes(layers, tokens, sequences, kind) + tokens * RUNNING * widest * dtype.itemsize + logits
    )


def _instead(checkpoint: Checkpoint, device: torch.device, free: int, fits: int) -> str:
    """What would fit."""
    if fits >= 1:
        return f"--context {fits} would fit"
    again = " --requantize" if checkpoint.container else ""
    smaller = (
        f"a smaller one would: halfbyte quantize {checkpoint.path} -o OUT --fit {size(free).replace(' ', '')}{again}"
    )
    return smaller if kind_of(device).is_host else f"{smaller}; or --device cpu"
