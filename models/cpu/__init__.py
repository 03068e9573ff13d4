"""Operations in C++ for processors with AVX-512 BF16, where the package was compiled with them."""
