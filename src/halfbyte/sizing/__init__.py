"""What fits where, how fast at most, and what is best: known before any weight is read."""
