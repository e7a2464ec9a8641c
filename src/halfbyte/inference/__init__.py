"""Running what was made: a checkpoint that answers."""
