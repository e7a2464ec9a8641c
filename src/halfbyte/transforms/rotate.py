"""A checkpoint whose hidden states are rotated: the same function, and weights and inputs without outliers
(QuaRot, Ashkboos et al., 2404.00456; SpinQuant, Liu et al., 2405.16406, without what runs online)."""

from functools import partial

from halfbyte.errors import Unsupported
from halfbyte.models import heads
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.transforms.turned import Found, Turned

SEED = 0
"""Of the signs of a rotation."""


def rotated(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint as it reads with its hidden states rotated, its head a tensor of its own. What that does to each
    tensor is found, and proved, when the first one is read; then it raises Unsupported for a model that does not bear
    it."""
    if checkpoint.kv:
        raise Unsupported(
            "rotate: the source has scales of its KV cache, which are those of values that are not rotated"
        )
    own = untied(checkpoint)
    return own.replaced(rotation=Turned(own, checkpoint, partial(_find, own), SEED))


def _find(checkpoint: Checkpoint) -> Found:
    from halfbyte.transforms import residual  # needs the model's code

    return residual.find(checkpoint, SEED)


def untied(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with a head of its own: the gain of the last norm goes into it alone."""
    if not checkpoint.tied:
        return checkpoint
    embedding, head = heads.tie(checkpoint)
    if embedding not in checkpoint.entries or not checkpoint.splits_stacks:
        raise Unsupported(
            f"rotate: the head of {checkpoint.path} is its embedding, in a file in which it gets no tensor of its own; "
            "write it in 16 bits first, with halfbyte dequantize"
        )
    entries = {**checkpoint.entries, head: checkpoint.entries[embedding]}
    return heads.settled_as(checkpoint, tied=False).replaced(entries=entries)
