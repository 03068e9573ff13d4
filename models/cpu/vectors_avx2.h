// Vectors of processors with AVX2 and FMA, without AVX-512: sixteen lanes are two registers.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace headroom {

constexpr int kLanes = 16;

struct Vec {  // sixteen floats
  __m256 low, high;
};
struct Ints {  // sixteen whole numbers, or pairs of bfloat16
  __m256i low, high;
};
using Halves = __m256i;  // sixteen bfloat16
using Mask = Ints;       // some of the lanes: those with all bits set
struct Leading {         // the first of them
  int count;
};

// Products are summed in registers: how many there are for it, and how many lanes one has. Pairs and
// fours are taken apart in some of them.
using Register = __m256;
constexpr int kRegisterLanes = 8;
template <typename T>
constexpr int kMaxSums = 8;
template <>
constexpr int kMaxSums<float> = 12;

// The first `count` lanes; all of them where there are more.
inline Leading first_lanes(int64_t count) { return {(int)(count >= kLanes ? kLanes : count)}; }

inline __m256i first_of_eight(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0));
}

inline Mask mask_of(Leading lanes) {
  return {first_of_eight(lanes.count), first_of_eight(lanes.count - 8)};
}

inline Vec as_floats(Ints x) { return {_mm256_castsi256_ps(x.low), _mm256_castsi256_ps(x.high)}; }
inline Ints as_ints(Vec x) { return {_mm256_castps_si256(x.low), _mm256_castps_si256(x.high)}; }

inline Vec splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Vec load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
inline Vec load(const float* from, Leading lanes) {
  if (lanes.count == kLanes) return load(from);
  const Mask mask = mask_of(lanes);
  return {_mm256_maskload_ps(from, mask.low), _mm256_maskload_ps(from + 8, mask.high)};
}
inline void store(float* to, Vec x) {
  _mm256_storeu_ps(to, x.low);
  _mm256_storeu_ps(to + 8, x.high);
}
inline void store(float* to, Vec x, Leading lanes) {
  if (lanes.count == kLanes) return store(to, x);
  const Mask mask = mask_of(lanes);
  _mm256_maskstore_ps(to, mask.low, x.low);
  _mm256_maskstore_ps(to + 8, mask.high, x.high);
}

inline Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Vec div(Vec a, Vec b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
inline Vec multiply_add(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Vec multiply_sub(Vec a, Vec b, Vec c) {
  return {_mm256_fmsub_ps(a.low, b.low, c.low), _mm256_fmsub_ps(a.high, b.high, c.high)};
}
// The second where one of both is no number.
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
inline Vec abs(Vec x) {
  const __m256 sign = _mm256_set1_ps(-0.f);
  return {_mm256_andnot_ps(sign, x.low), _mm256_andnot_ps(sign, x.high)};
}
inline Vec round_to_whole(Vec x) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.low, kNearest), _mm256_round_ps(x.high, kNearest)};
}

inline float sum_of(Vec x) {
  const __m256 eight = _mm256_add_ps(x.low, x.high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float max_of(Vec x) {
  const __m256 eight = _mm256_max_ps(x.low, x.high);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
inline float first_of(Vec x) { return _mm256_cvtss_f32(x.low); }

inline Ints splat_int(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline Ints lane_numbers() {
  return {_mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0), _mm256_set_epi32(15, 14, 13, 12, 11, 10, 9, 8)};
}
inline Ints load_ints(const void* from) {
  const auto* at = static_cast<const __m256i*>(from);
  return {_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)};
}
inline Ints load_ints(const void* from, Leading lanes) {
  return as_ints(load(static_cast<const float*>(from), lanes));
}
inline void store_ints(void* to, Ints x) { store(static_cast<float*>(to), as_floats(x)); }
inline void store_ints(void* to, Ints x, Leading lanes) {
  store(static_cast<float*>(to), as_floats(x), lanes);
}
inline Ints add(Ints a, Ints b) {
  return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)};
}
inline Ints sub(Ints a, Ints b) {
  return {_mm256_sub_epi32(a.low, b.low), _mm256_sub_epi32(a.high, b.high)};
}
inline Ints mul(Ints a, Ints b) {
  return {_mm256_mullo_epi32(a.low, b.low), _mm256_mullo_epi32(a.high, b.high)};
}
inline Ints bit_or(Ints a, Ints b) {
  return {_mm256_or_si256(a.low, b.low), _mm256_or_si256(a.high, b.high)};
}
inline Ints bit_and(Ints a, Ints b) {
  return {_mm256_and_si256(a.low, b.low), _mm256_and_si256(a.high, b.high)};
}
template <int kBits>
Ints shift_left(Ints x) {
  return {_mm256_slli_epi32(x.low, kBits), _mm256_slli_epi32(x.high, kBits)};
}
template <int kBits>
Ints shift_right(Ints x) {
  return {_mm256_srli_epi32(x.low, kBits), _mm256_srli_epi32(x.high, kBits)};
}
inline Vec floats_of(Ints x) { return {_mm256_cvtepi32_ps(x.low), _mm256_cvtepi32_ps(x.high)}; }
inline Ints nearest_ints(Vec x) { return {_mm256_cvtps_epi32(x.low), _mm256_cvtps_epi32(x.high)}; }

// x * 2^whole, in two steps: one exponent alone could be too large.
inline Vec scale_by_power(Vec x, Vec whole) {
  const Ints all = nearest_ints(whole);
  const Ints half = {_mm256_srai_epi32(all.low, 1), _mm256_srai_epi32(all.high, 1)};
  const auto power = [](Ints n) { return as_floats(shift_left<23>(add(n, splat_int(127)))); };
  return mul(mul(x, power(half)), power(sub(all, half)));
}

inline Mask no_lanes() { return splat_int(0); }
inline Mask either(Mask a, Mask b) { return bit_or(a, b); }
inline Mask both(Mask a, Mask b) { return bit_and(a, b); }
inline bool any(Mask mask) {
  const __m256i joined = _mm256_or_si256(mask.low, mask.high);
  return !_mm256_testz_si256(joined, joined);
}
inline Mask no_numbers(Vec x) {
  return as_ints(Vec{_mm256_cmp_ps(x.low, x.low, _CMP_UNORD_Q),
                     _mm256_cmp_ps(x.high, x.high, _CMP_UNORD_Q)});
}
inline Mask less(Ints a, Ints b) {
  return {_mm256_cmpgt_epi32(b.low, a.low), _mm256_cmpgt_epi32(b.high, a.high)};
}
inline Mask at_least(Ints a, Ints b) {
  const Mask smaller = less(a, b);
  const __m256i all = _mm256_set1_epi32(-1);
  return {_mm256_andnot_si256(smaller.low, all), _mm256_andnot_si256(smaller.high, all)};
}
inline Mask at_most(Ints a, Ints b) { return at_least(b, a); }
// Zero elsewhere.
inline Vec where(Mask mask, Vec x) { return as_floats(bit_and(mask, as_ints(x))); }
inline Vec choose(Mask mask, Vec yes, Vec no) {
  const Vec by = as_floats(mask);
  return {_mm256_blendv_ps(no.low, yes.low, by.low), _mm256_blendv_ps(no.high, yes.high, by.high)};
}
inline Vec max_where(Mask mask, Vec a, Vec b) { return choose(mask, max(a, b), a); }
inline Vec load_or(Vec others, const float* from, Leading lanes) {
  return lanes.count == kLanes ? load(from) : choose(mask_of(lanes), load(from, lanes), others);
}

inline Halves load_halves(const void* from, Leading lanes) {
  if (lanes.count == kLanes) return _mm256_loadu_si256(static_cast<const __m256i*>(from));
  alignas(32) uint16_t some[kLanes] = {};
  std::memcpy(some, from, lanes.count * sizeof *some);
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(some));
}
inline void store_halves(void* to, Halves x, Leading lanes) {
  if (lanes.count == kLanes) return _mm256_storeu_si256(static_cast<__m256i*>(to), x);
  alignas(32) uint16_t all[kLanes];
  _mm256_store_si256(reinterpret_cast<__m256i*>(all), x);
  std::memcpy(to, all, lanes.count * sizeof *all);
}
inline Ints widen_halves(Halves x) {
  return {_mm256_cvtepu16_epi32(_mm256_castsi256_si128(x)),
          _mm256_cvtepu16_epi32(_mm256_extracti128_si256(x, 1))};
}

// To the nearest bfloat16, to the even one of two.
inline Halves narrow(Vec x) {
  const Ints bits = as_ints(x), odd = bit_and(shift_right<16>(bits), splat_int(1));
  const Vec rounded = as_floats(add(bits, add(splat_int(0x7fff), odd)));
  // Of no number, the bits that are left could be those of infinity: one of them is set.
  const Vec none = as_floats(bit_or(bits, splat_int(1 << 22)));
  const Ints halves = shift_right<16>(as_ints(choose(no_numbers(x), none, rounded)));
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(halves.low, halves.high), 0xd8);
}

// Sixteen numbers of 8 bits.
inline Ints load_bytes(const int8_t* from, Leading lanes) {
  __m128i bytes;
  if (lanes.count == kLanes) {
    bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  } else {
    alignas(16) int8_t some[kLanes] = {};
    std::memcpy(some, from, lanes.count);
    bytes = _mm_load_si128(reinterpret_cast<const __m128i*>(some));
  }
  return {_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))};
}
inline void store_bytes(void* to, Ints x, Leading lanes) {
  const Ints least = bit_and(x, splat_int(0xff));
  const __m256i halves =
      _mm256_permute4x64_epi64(_mm256_packus_epi32(least.low, least.high), 0xd8);
  const __m128i bytes =
      _mm_packus_epi16(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
  alignas(16) int8_t all[kLanes];
  _mm_store_si128(reinterpret_cast<__m128i*>(all), bytes);
  std::memcpy(to, all, lanes.count);
}
// One of the four in each lane.
inline Ints byte_of(Ints fours, int index) {
  const __m256i on_top = _mm256_set1_epi32(24 - 8 * index);
  return {_mm256_srai_epi32(_mm256_sllv_epi32(fours.low, on_top), 24),
          _mm256_srai_epi32(_mm256_sllv_epi32(fours.high, on_top), 24)};
}

// Neighbours in 32 floats, apart, and together again.
inline void separate(Vec low, Vec high, Vec& even, Vec& odd) {
  const auto in_order = [](__m256 x) {
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(x), 0xd8));
  };
  even = {in_order(_mm256_shuffle_ps(low.low, low.high, 0x88)),
          in_order(_mm256_shuffle_ps(high.low, high.high, 0x88))};
  odd = {in_order(_mm256_shuffle_ps(low.low, low.high, 0xdd)),
         in_order(_mm256_shuffle_ps(high.low, high.high, 0xdd))};
}
inline void interleave(Vec even, Vec odd, Vec& low, Vec& high) {
  const auto sixteen = [](__m256 a, __m256 b) {
    const __m256 first = _mm256_unpacklo_ps(a, b), second = _mm256_unpackhi_ps(a, b);
    return Vec{_mm256_permute2f128_ps(first, second, 0x20),
               _mm256_permute2f128_ps(first, second, 0x31)};
  };
  low = sixteen(even.low, odd.low);
  high = sixteen(even.high, odd.high);
}

// Two rows of bfloat16, element beside element.
inline void interleave_rows(const void* first_row, const void* second_row, int width,
                            uint32_t* to) {
  const auto *a = static_cast<const uint16_t*>(first_row),
             *b = static_cast<const uint16_t*>(second_row);
  for (int d = 0; d < width; d += kLanes) {
    const Leading lanes = first_lanes(width - d);
    const Halves first = load_halves(a + d, lanes), second = load_halves(b + d, lanes);
    const __m256i low = _mm256_unpacklo_epi16(first, second);
    const __m256i high = _mm256_unpackhi_epi16(first, second);
    store_ints(to + d, Ints{_mm256_permute2x128_si256(low, high, 0x20),
                            _mm256_permute2x128_si256(low, high, 0x31)});
  }
}

// Eight rows of eight lanes, transposed where they are.
inline void transpose_eight(__m256 (&a)[8]) {
  __m256 b[8];
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
  for (int i = 0; i < 4; i++) {
    b[i] = _mm256_permute2f128_ps(a[i], a[i + 4], 0x20);
    b[i + 4] = _mm256_permute2f128_ps(a[i], a[i + 4], 0x31);
  }
  for (int i = 0; i < 8; i++) a[i] = b[i];
}

// Sixteen rows of up to sixteen lanes each: `to[lane * stride + row] = rows[row][lane]`.
inline void transpose(const uint32_t* const* rows, int num_lanes, uint32_t* to, int stride) {
  for (int first = 0; first < num_lanes && first < kLanes; first += 8) {
    const int count = num_lanes - first < 8 ? num_lanes - first : 8;
    const __m256i mask = first_of_eight(count);
    for (int row = 0; row < kLanes; row += 8) {
      __m256 a[8];
      for (int i = 0; i < 8; i++)
        a[i] = _mm256_maskload_ps(reinterpret_cast<const float*>(rows[row + i]) + first, mask);
      transpose_eight(a);
      for (int i = 0; i < count; i++)
        _mm256_storeu_ps(reinterpret_cast<float*>(to + (first + i) * stride + row), a[i]);
    }
  }
}

// Sums of products of the lanes of a register with one splatted lane.

inline Register load_register(const void* from) {
  return _mm256_loadu_ps(static_cast<const float*>(from));
}
inline void store_register(void* to, Register x) { _mm256_storeu_ps(static_cast<float*>(to), x); }

inline Register add_product(Register sum, Register lanes, const uint32_t* splatted) {
  return _mm256_fmadd_ps(_mm256_broadcast_ss(reinterpret_cast<const float*>(splatted)), lanes, sum);
}

inline __m256i splat_lane(const uint32_t* lane) {
  int32_t bits;
  std::memcpy(&bits, lane, sizeof bits);
  return _mm256_set1_epi32(bits);
}

// Of pairs of bfloat16.
inline Register add_products_of_pairs(Register sum, Register lanes, const uint32_t* splatted) {
  const auto low = [](__m256i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)); };
  const auto high = [](__m256i x) {
    return _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32((int)0xffff0000)));
  };
  const __m256i pairs = _mm256_castps_si256(lanes), by = splat_lane(splatted);
  return _mm256_fmadd_ps(high(pairs), high(by), _mm256_fmadd_ps(low(pairs), low(by), sum));
}

// Of four whole numbers of 8 bits, the splatted ones without a sign: every other one at a time, for
// the sum of two products of 8 bits does not fit 16.
using IntSums = int32_t __attribute__((vector_size(32)));

inline IntSums add_products_of_bytes(IntSums sum, Register lanes, const uint32_t* splatted) {
  const __m256i fours = _mm256_castps_si256(lanes), by = splat_lane(splatted);
  const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(fours, 8), 8);
  const __m256i odd = _mm256_srai_epi16(fours, 8);
  const __m256i by_even = _mm256_and_si256(by, _mm256_set1_epi16(0xff));
  const __m256i by_odd = _mm256_srli_epi16(by, 8);
  const __m256i products =
      _mm256_add_epi32(_mm256_madd_epi16(even, by_even), _mm256_madd_epi16(odd, by_odd));
  return (IntSums)_mm256_add_epi32((__m256i)sum, products);
}

}  // namespace headroom
