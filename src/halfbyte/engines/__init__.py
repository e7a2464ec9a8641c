"""What a run will need and what it will give, told before any weight is read."""
