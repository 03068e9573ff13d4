"""Operations in C++ for processors with AVX2 or AVX-512, where they were compiled."""
