"""Operations in Triton, for GPUs; where it is not installed, and for all other operations, torch runs there."""
