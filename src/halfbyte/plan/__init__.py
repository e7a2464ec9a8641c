"""Words to a plan: what becomes of every tensor of a checkpoint, settled before any weight is read."""

from halfbyte.plan.resolve import decoding, resolve, transcoding

__all__ = ["decoding", "resolve", "transcoding"]
