// Vectors of processors with AVX-512: sixteen lanes are one register.
//
// Compiled twice: for processors that multiply bfloat16 (AVX-512 BF16), and for those that multiply
// floats only, where a pair of bfloat16 is two products.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace headroom {

constexpr int kLanes = 16;

using Vec = __m512;       // sixteen floats
using Ints = __m512i;     // sixteen whole numbers, or pairs of bfloat16
using Halves = __m256i;   // sixteen bfloat16
using Mask = __mmask16;   // some of the lanes
using Leading = __mmask16;  // the first of them

// Products are summed in registers: how many there are for it, and how many lanes one has.
using Register = __m512;
constexpr int kRegisterLanes = 16;
template <typename T>
constexpr int kMaxSums = 24;

// The first `count` lanes; all of them where there are more.
inline Leading first_lanes(int64_t count) {
  return (__mmask16)(count >= kLanes ? 0xffff : (1u << count) - 1);
}

inline Vec splat(float x) { return _mm512_set1_ps(x); }
inline Vec load(const float* from) { return _mm512_loadu_ps(from); }
inline Vec load(const float* from, Leading lanes) { return _mm512_maskz_loadu_ps(lanes, from); }
inline Vec load_or(Vec others, const float* from, Leading lanes) {
  return _mm512_mask_loadu_ps(others, lanes, from);
}
inline void store(float* to, Vec x) { _mm512_storeu_ps(to, x); }
inline void store(float* to, Vec x, Leading lanes) { _mm512_mask_storeu_ps(to, lanes, x); }

inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec multiply_sub(Vec a, Vec b, Vec c) { return _mm512_fmsub_ps(a, b, c); }
// The second where one of both is no number.
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec abs(Vec x) { return _mm512_abs_ps(x); }
inline Vec round_to_whole(Vec x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// x * 2^whole
inline Vec scale_by_power(Vec x, Vec whole) { return _mm512_scalef_ps(x, whole); }
inline float sum_of(Vec x) { return _mm512_reduce_add_ps(x); }
inline float max_of(Vec x) { return _mm512_reduce_max_ps(x); }
// Of sixteen rows, what is left of each when its lanes are joined by halves, as `sum_of` joins them. Rows
// four apart are joined first, so that all end up in order.
template <typename F>
Vec join_lanes(const Vec* rows, F&& join) {
  Vec eights[8], fours[4], twos[2];
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < 2; j++) {
      const Vec a = rows[i + 8 * j], b = rows[i + 8 * j + 4];
      eights[2 * i + j] =
          join(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    }
  for (int i = 0; i < 4; i++) {
    const Vec a = eights[2 * i], b = eights[2 * i + 1];
    fours[i] = join(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
  for (int i = 0; i < 2; i++) {
    const Vec a = fours[2 * i], b = fours[2 * i + 1];
    twos[i] = join(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  }
  return join(_mm512_shuffle_ps(twos[0], twos[1], 0x88), _mm512_shuffle_ps(twos[0], twos[1], 0xdd));
}
inline float first_of(Vec x) { return _mm512_cvtss_f32(x); }

inline Mask no_lanes() { return 0; }
inline Mask either(Mask a, Mask b) { return a | b; }
inline Mask both(Mask a, Mask b) { return a & b; }
inline bool any(Mask mask) { return mask; }
inline Mask no_numbers(Vec x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q); }
inline Mask at_most(Ints a, Ints b) { return _mm512_cmple_epi32_mask(a, b); }
inline Mask at_least(Ints a, Ints b) { return _mm512_cmpge_epi32_mask(a, b); }
inline Mask less(Ints a, Ints b) { return _mm512_cmplt_epi32_mask(a, b); }
// Zero elsewhere.
inline Vec where(Mask mask, Vec x) { return _mm512_maskz_mov_ps(mask, x); }
inline Vec max_where(Mask mask, Vec a, Vec b) { return _mm512_mask_max_ps(a, mask, a, b); }

inline Ints splat_int(int32_t x) { return _mm512_set1_epi32(x); }
inline Ints lane_numbers() {
  return _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
}
inline Ints load_ints(const void* from) { return _mm512_loadu_si512(from); }
inline Ints load_ints(const void* from, Leading lanes) {
  return _mm512_maskz_loadu_epi32(lanes, from);
}
inline void store_ints(void* to, Ints x) { _mm512_storeu_si512(to, x); }
inline void store_ints(void* to, Ints x, Leading lanes) { _mm512_mask_storeu_epi32(to, lanes, x); }
inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Ints sub(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
inline Ints mul(Ints a, Ints b) { return _mm512_mullo_epi32(a, b); }
inline Ints bit_or(Ints a, Ints b) { return _mm512_or_si512(a, b); }
inline Ints bit_and(Ints a, Ints b) { return _mm512_and_si512(a, b); }
template <int kBits>
Ints shift_left(Ints x) {
  return _mm512_slli_epi32(x, kBits);
}
template <int kBits>
Ints shift_right(Ints x) {
  return _mm512_srli_epi32(x, kBits);
}
inline Vec floats_of(Ints x) { return _mm512_cvtepi32_ps(x); }
inline Ints nearest_ints(Vec x) { return _mm512_cvtps_epi32(x); }
inline Vec as_floats(Ints x) { return _mm512_castsi512_ps(x); }
inline Ints as_ints(Vec x) { return _mm512_castps_si512(x); }

inline Halves load_halves(const void* from, Leading lanes) {
  return _mm256_maskz_loadu_epi16(lanes, from);
}
inline void store_halves(void* to, Halves x, Leading lanes) {
  _mm256_mask_storeu_epi16(to, lanes, x);
}
inline Ints widen_halves(Halves x) { return _mm512_cvtepu16_epi32(x); }

#ifdef __AVX512BF16__

// To the nearest bfloat16, to the even one of two.
inline Halves narrow(Vec x) { return (__m256i)_mm512_cvtneps_pbh(x); }

#else

inline Halves narrow(Vec x) {
  const Ints bits = as_ints(x), odd = bit_and(shift_right<16>(bits), splat_int(1));
  const Ints to_nearest = add(splat_int(0x7fff), odd);
  // Of no number, the bits that are left could be those of infinity: one of them is set.
  const Ints rounded = _mm512_mask_or_epi32(add(bits, to_nearest), no_numbers(x), bits,
                                            splat_int(1 << 22));
  return _mm512_cvtepi32_epi16(shift_right<16>(rounded));
}

#endif

// Sixteen numbers of 8 bits.
inline Ints load_bytes(const int8_t* from, Leading lanes) {
  return _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(lanes, from));
}
inline void store_bytes(void* to, Ints x, Leading lanes) {
  _mm_mask_storeu_epi8(to, lanes, _mm512_cvtepi32_epi8(x));
}
// One of the four in each lane.
inline Ints byte_of(Ints fours, int index) {
  return _mm512_srai_epi32(_mm512_sllv_epi32(fours, _mm512_set1_epi32(24 - 8 * index)), 24);
}

// Neighbours in 32 floats, apart, and together again.
inline void separate(Vec low, Vec high, Vec& even, Vec& odd) {
  const Ints evens = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  even = _mm512_permutex2var_ps(low, evens, high);
  odd = _mm512_permutex2var_ps(low, add(evens, splat_int(1)), high);
}
inline void interleave(Vec even, Vec odd, Vec& low, Vec& high) {
  const Ints first = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  low = _mm512_permutex2var_ps(even, first, odd);
  high = _mm512_permutex2var_ps(even, add(first, splat_int(kLanes / 2)), odd);
}

// Two rows of bfloat16, element beside element.
inline void interleave_rows(const void* first_row, const void* second_row, int width,
                            uint32_t* to) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40,
                                       8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(kLanes));
  const auto *a = static_cast<const uint16_t*>(first_row),
             *b = static_cast<const uint16_t*>(second_row);
  for (int d = 0; d < width; d += 2 * kLanes) {
    const int left = width - d;
    const __mmask32 mask = left >= 2 * kLanes ? ~0u : (1u << left) - 1;
    const __m512i first = _mm512_maskz_loadu_epi16(mask, a + d);
    const __m512i second = _mm512_maskz_loadu_epi16(mask, b + d);
    _mm512_storeu_si512(to + d, _mm512_permutex2var_epi16(first, low, second));
    if (left > kLanes)
      _mm512_storeu_si512(to + d + kLanes, _mm512_permutex2var_epi16(first, high, second));
  }
}

// Sixteen rows of up to sixteen lanes each: `to[lane * stride + row] = rows[row][lane]`.
inline void transpose(const uint32_t* const* rows, int num_lanes, uint32_t* to, int stride) {
  const Leading lanes = first_lanes(num_lanes);
  __m512i a[kLanes], b[kLanes];
  for (int i = 0; i < kLanes; i++) a[i] = _mm512_maskz_loadu_epi32(lanes, rows[i]);
  for (int i = 0; i < kLanes; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < kLanes; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
    b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
    b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
    b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    a[i] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88);
    a[i + 8] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd);
    a[i + 4] = _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88);
    a[i + 12] = _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xdd);
  }
  for (int i = 0; i < (num_lanes < kLanes ? num_lanes : kLanes); i++)
    _mm512_storeu_si512(to + i * stride, a[i]);
}

// Sums of products of the lanes of a register with one splatted lane.

inline Register load_register(const void* from) { return _mm512_loadu_ps(from); }
inline void store_register(void* to, Register x) { _mm512_storeu_ps(to, x); }

inline Register add_product(Register sum, Register lanes, const uint32_t* splatted) {
  float value;
  std::memcpy(&value, splatted, sizeof value);
  return _mm512_fmadd_ps(splat(value), lanes, sum);
}

// Of pairs of bfloat16.
inline Register add_products_of_pairs(Register sum, Register lanes, const uint32_t* splatted) {
  int32_t pair;
  std::memcpy(&pair, splatted, sizeof pair);
  const __m512i pairs = _mm512_castps_si512(lanes), by = _mm512_set1_epi32(pair);
#ifdef __AVX512BF16__
  return _mm512_dpbf16_ps(sum, (__m512bh)pairs, (__m512bh)by);
#else
  const auto low = [](Ints x) { return as_floats(shift_left<16>(x)); };
  const auto high = [](Ints x) { return as_floats(bit_and(x, splat_int((int)0xffff0000))); };
  sum = _mm512_fmadd_ps(low(pairs), low(by), sum);
  return _mm512_fmadd_ps(high(pairs), high(by), sum);
#endif
}

// Of four whole numbers of 8 bits, the splatted ones without a sign. The type is what the
// instruction itself takes: of any other GCC 12 keeps a block of sums in memory.
using IntSums = int32_t __attribute__((vector_size(64)));

inline IntSums add_products_of_bytes(IntSums sum, Register lanes, const uint32_t* splatted) {
  int32_t four;
  std::memcpy(&four, splatted, sizeof four);
  return (IntSums)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(four), (__m512i)lanes);
}

}  // namespace headroom
