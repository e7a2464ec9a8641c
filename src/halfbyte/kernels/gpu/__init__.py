"""Operations in Triton, for GPUs; where it or a C compiler is not installed, and for all other operations, torch runs
there."""
