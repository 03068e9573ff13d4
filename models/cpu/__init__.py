"""Operations in C++ for processors with AVX-512, where the package was compiled with them."""
