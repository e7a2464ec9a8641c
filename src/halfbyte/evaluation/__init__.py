"""What was lost: perplexity, and divergence from the original on the same tokens."""
