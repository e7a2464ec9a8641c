"""What was lost: perplexity, and divergence from the original on the same tokens."""

from halfbyte.evaluate.divergence import compare

__all__ = ["compare"]
