// Products of small matrices on CPUs with AVX-512, for all operations of this package.
//
// Compiled twice: for processors that multiply bfloat16 (AVX-512 BF16), and for those that multiply
// floats only, where a pair of bfloat16 is two products.
//
// A 32-bit lane holds one float, or two neighbouring bfloat16, or four whole numbers of 8 bits, of
// the summed axis. Every element of a product is summed in one order, whatever else is computed
// beside it: results do not depend, to the last bit, on how many rows there are.

#pragma once

#include <ATen/ATen.h>
#include <immintrin.h>

#include <algorithm>
#include <cstring>

namespace headroom {

using Vec = __m512;

constexpr int kLanes = 16;

inline Vec splat(float x) { return _mm512_set1_ps(x); }

// The first `count` lanes; all of them where there are more.
inline __mmask16 first_lanes(int64_t count) {
  return (__mmask16)(count >= kLanes ? 0xffff : (1u << count) - 1);
}

// exp(x), relative error below 3e-7; what a float cannot hold is 0 or infinite; NaN stays NaN.
inline Vec exp(Vec x) {
  const Vec bounded = _mm512_min_ps(splat(200.f), _mm512_max_ps(splat(-200.f), x));
  const Vec scaled = _mm512_mul_ps(bounded, splat(1.44269504f));
  const Vec whole = _mm512_roundscale_ps(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vec f = _mm512_sub_ps(scaled, whole);
  Vec p = splat(1.5403530e-4f);
  for (const float c : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f,
                        1.f})
    p = _mm512_fmadd_ps(p, f, splat(c));
  return _mm512_scalef_ps(p, whole);
}

inline float exp(float x) { return _mm512_cvtss_f32(exp(splat(x))); }

// Sixteen neighbouring pairs, apart.
struct Pairs {
  Vec first, second;
};

// Sixteen numbers of 8 bits.
inline Vec widen_bytes(const int8_t* from, __mmask16 mask) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, from)));
}

// One of the four in each lane.
inline Vec widen_byte(__m512i fours, int index) {
  const __m512i on_top = _mm512_sllv_epi32(fours, _mm512_set1_epi32(24 - 8 * index));
  return _mm512_cvtepi32_ps(_mm512_srai_epi32(on_top, 24));
}

// Sixteen floats that are bfloat16, of the second halves of 32 bits and of the first.
inline Vec high_halves(__m512i pairs) {
  return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000)));
}

inline Vec low_halves(__m512i pairs) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
}

#ifdef __AVX512BF16__

// To the nearest bfloat16, to the even one of two.
inline __m256i narrow(Vec x) { return (__m256i)_mm512_cvtneps_pbh(x); }

// `sum` and the products of sixteen pairs with one.
inline Vec add_products(Vec sum, __m512i pairs, int32_t pair) {
  return _mm512_dpbf16_ps(sum, (__m512bh)pairs, (__m512bh)_mm512_set1_epi32(pair));
}

#else

inline __m256i narrow(Vec x) {
  const __m512i bits = _mm512_castps_si512(x), one = _mm512_set1_epi32(1);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
  const __m512i to_nearest = _mm512_add_epi32(_mm512_set1_epi32(0x7fff), odd);
  // Of no number, the bits that are left could be those of infinity: one of them is set.
  const __mmask16 none = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i rounded = _mm512_mask_or_epi32(_mm512_add_epi32(bits, to_nearest), none, bits,
                                               _mm512_set1_epi32(1 << 22));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

inline Vec add_products(Vec sum, __m512i pairs, int32_t pair) {
  const __m512i splatted = _mm512_set1_epi32(pair);
  sum = _mm512_fmadd_ps(low_halves(pairs), low_halves(splatted), sum);
  return _mm512_fmadd_ps(high_halves(pairs), high_halves(splatted), sum);
}

#endif

// What the lanes of a type hold, and the packing that depends on it.
template <typename T>
struct Lane;

struct FloatSums {
  using Sum = Vec;

  static Sum zero() { return _mm512_setzero_ps(); }
  static Sum load_sum(const float* from) { return _mm512_loadu_ps(from); }
  static void store_sum(float* to, Sum sum) { _mm512_storeu_ps(to, sum); }
};

template <>
struct Lane<float> : FloatSums {
  static constexpr int kValues = 1;

  static Vec multiply_add(Vec sum, Vec lanes, const uint32_t* splatted) {
    float value;
    std::memcpy(&value, splatted, sizeof value);
    return _mm512_fmadd_ps(splat(value), lanes, sum);
  }

  // Sixteen weights, for the summed axis of the second product.
  static void store_weights(uint32_t* to, int at, Vec weights) {
    _mm512_storeu_ps(to + at, weights);
  }

  // The value of one key.
  static void pack_values(const float* const* rows, int width, uint32_t* to) {
    for (int d = 0; d < width; d += kLanes)
      _mm512_storeu_ps(to + d, _mm512_maskz_loadu_ps(first_lanes(width - d), rows[0] + d));
  }

  // The same of 8 bits.
  static void pack_values(const int8_t* const* rows, int width, uint32_t* to) {
    for (int d = 0; d < width; d += kLanes)
      _mm512_storeu_ps(to + d, widen_bytes(rows[0] + d, first_lanes(width - d)));
  }

  // Four numbers of 8 bits in each lane, those in the same place to a vector of their own.
  static void spread(__m512i fours, uint32_t* to, int stride) {
    for (int i = 0; i < 4; i++) _mm512_storeu_ps(to + i * stride, widen_byte(fours, i));
  }

  static Vec round(Vec x) { return x; }

  static Vec load(const float* from, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, from); }

  static void store(float* to, Vec x, __mmask16 mask) { _mm512_mask_storeu_ps(to, mask, x); }

  static Pairs load_pairs(const float* from, int64_t count) {
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const Vec low = load(from, first_lanes(2 * count));
    const Vec high = load(from + kLanes, first_lanes(std::max<int64_t>(0, 2 * count - kLanes)));
    return {_mm512_permutex2var_ps(low, even, high),
            _mm512_permutex2var_ps(low, _mm512_add_epi32(even, _mm512_set1_epi32(1)), high)};
  }

  static void store_pairs(float* to, const Pairs& pairs, int64_t count) {
    const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(kLanes / 2));
    store(to, _mm512_permutex2var_ps(pairs.first, low, pairs.second), first_lanes(2 * count));
    store(to + kLanes, _mm512_permutex2var_ps(pairs.first, high, pairs.second),
          first_lanes(std::max<int64_t>(0, 2 * count - kLanes)));
  }
};

template <>
struct Lane<at::BFloat16> : FloatSums {
  static constexpr int kValues = 2;

  static Vec multiply_add(Vec sum, Vec lanes, const uint32_t* splatted) {
    int32_t pair;
    std::memcpy(&pair, splatted, sizeof pair);
    return add_products(sum, _mm512_castps_si512(lanes), pair);
  }

  static void store_weights(uint32_t* to, int at, Vec weights) {
    store(reinterpret_cast<at::BFloat16*>(to) + at, weights, 0xffff);
  }

  // The values of two keys, element beside element.
  static void pack_values(const at::BFloat16* const* rows, int width, uint32_t* to) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40,
                                         8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(kLanes));
    for (int d = 0; d < width; d += 2 * kLanes) {
      const int left = width - d;
      const __mmask32 mask = left >= 2 * kLanes ? ~0u : (1u << left) - 1;
      const __m512i first = _mm512_maskz_loadu_epi16(mask, rows[0] + d);
      const __m512i second = _mm512_maskz_loadu_epi16(mask, rows[1] + d);
      _mm512_storeu_si512(to + d, _mm512_permutex2var_epi16(first, low, second));
      if (left > kLanes)
        _mm512_storeu_si512(to + d + kLanes, _mm512_permutex2var_epi16(first, high, second));
    }
  }

  // The same of 8 bits, which bfloat16 holds as they are: of a float, half the bits are 0.
  static void pack_values(const int8_t* const* rows, int width, uint32_t* to) {
    for (int d = 0; d < width; d += kLanes) {
      const __mmask16 mask = first_lanes(width - d);
      _mm512_storeu_si512(
          to + d, pair(widen_bytes(rows[0] + d, mask), widen_bytes(rows[1] + d, mask)));
    }
  }

  // Four numbers of 8 bits in each lane, neighbours to a vector of pairs.
  static void spread(__m512i fours, uint32_t* to, int stride) {
    for (int i = 0; i < 2; i++)
      _mm512_storeu_si512(to + i * stride,
                          pair(widen_byte(fours, 2 * i), widen_byte(fours, 2 * i + 1)));
  }

  // Of floats that are bfloat16.
  static __m512i pair(Vec first, Vec second) {
    const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(first), 16);
    return _mm512_or_si512(low, _mm512_castps_si512(second));
  }

  static Vec widen(__m256i halves) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }

  static Vec round(Vec x) { return widen(narrow(x)); }

  static Vec load(const at::BFloat16* from, __mmask16 mask) {
    return widen(_mm256_maskz_loadu_epi16(mask, from));
  }

  static void store(at::BFloat16* to, Vec x, __mmask16 mask) {
    _mm256_mask_storeu_epi16(to, mask, narrow(x));
  }

  static Pairs load_pairs(const at::BFloat16* from, int64_t count) {
    const __m512i both = _mm512_maskz_loadu_epi32(first_lanes(count), from);
    return {low_halves(both), high_halves(both)};
  }

  static void store_pairs(at::BFloat16* to, const Pairs& pairs, int64_t count) {
    const __m512i first = _mm512_cvtepu16_epi32(narrow(pairs.first));
    const __m512i second = _mm512_cvtepu16_epi32(narrow(pairs.second));
    _mm512_mask_storeu_epi32(to, first_lanes(count),
                             _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
  }
};

// Whole numbers: unsigned ones are splatted, signed ones are lanes, sums are 32 bits in the place of
// a float.
template <>
struct Lane<int8_t> {
  // What the instruction itself takes: of any other type GCC 12 keeps a block of sums in memory.
  using Sum = int32_t __attribute__((vector_size(64)));
  static constexpr int kValues = 4;

  static Sum zero() { return Sum{}; }
  static Sum load_sum(const float* from) { return (Sum)_mm512_loadu_si512(from); }
  static void store_sum(float* to, Sum sum) { _mm512_storeu_si512(to, (__m512i)sum); }

  static Sum multiply_add(Sum sum, Vec lanes, const uint32_t* splatted) {
    int32_t four;
    std::memcpy(&four, splatted, sizeof four);
    return (Sum)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(four), (__m512i)lanes);
  }
};

// `c[row, column] (+)= sum over k of a[row, k] * b[k, column]`, a block of it in registers.
template <typename T, int kBlockRows, int kBlockVecs>
void multiply_block(const uint32_t* a, int a_stride, const uint32_t* b, int b_stride, int depth,
                    float* c, int c_stride, bool accumulate) {
  using L = Lane<T>;
  typename L::Sum sum[kBlockRows][kBlockVecs];
  for (int r = 0; r < kBlockRows; r++)
    for (int v = 0; v < kBlockVecs; v++)
      sum[r][v] = accumulate ? L::load_sum(c + r * c_stride + v * kLanes) : L::zero();
  for (int k = 0; k < depth; k++) {
    Vec lanes[kBlockVecs];
    for (int v = 0; v < kBlockVecs; v++) lanes[v] = _mm512_loadu_ps(b + k * b_stride + v * kLanes);
    for (int r = 0; r < kBlockRows; r++)
      for (int v = 0; v < kBlockVecs; v++)
        sum[r][v] = L::multiply_add(sum[r][v], lanes[v], a + r * a_stride + k);
  }
  for (int r = 0; r < kBlockRows; r++)
    for (int v = 0; v < kBlockVecs; v++)
      L::store_sum(c + r * c_stride + v * kLanes, sum[r][v]);
}

template <typename T, int kBlockVecs>
void multiply_columns(const uint32_t* a, int a_stride, const uint32_t* b, int b_stride, int depth,
                      float* c, int c_stride, int rows, bool accumulate) {
  int r = 0;
  const auto block = [&]<int kBlockRows>() {
    for (; r + kBlockRows <= rows; r += kBlockRows)
      multiply_block<T, kBlockRows, kBlockVecs>(a + r * a_stride, a_stride, b, b_stride, depth,
                                                c + r * c_stride, c_stride, accumulate);
  };
  block.template operator()<6>();
  block.template operator()<4>();
  block.template operator()<2>();
  block.template operator()<1>();
}

// The whole product; `columns` is a multiple of the lanes of a vector.
template <typename T>
void multiply(const uint32_t* a, int a_stride, const uint32_t* b, int b_stride, int depth,
              float* c, int c_stride, int rows, int columns, bool accumulate) {
  int column = 0;
  const auto block = [&]<int kBlockVecs>() {
    for (; column + kBlockVecs * kLanes <= columns; column += kBlockVecs * kLanes)
      multiply_columns<T, kBlockVecs>(a, a_stride, b + column, b_stride, depth, c + column,
                                      c_stride, rows, accumulate);
  };
  block.template operator()<4>();
  block.template operator()<2>();
  block.template operator()<1>();
}

// Calls a function of the element type of a tensor.
template <typename F>
void with_type(const at::Tensor& tensor, F&& function) {
  if (tensor.scalar_type() == at::kBFloat16)
    function.template operator()<at::BFloat16>();
  else if (tensor.scalar_type() == at::kFloat)
    function.template operator()<float>();
  else
    TORCH_CHECK(false, "the type is ", tensor.scalar_type(), "; allowed: float32, bfloat16");
}

}  // namespace headroom
