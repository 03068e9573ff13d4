"""Operations in Triton, for GPUs; without one, through Triton's interpreter."""
