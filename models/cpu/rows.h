// What is done to one row between the products of a layer.

#pragma once

#include <algorithm>
#include <cmath>

#include "lanes.h"

namespace headroom {

// Rows of this width that are worth a second thread.
inline int64_t grain(int64_t width) {
  return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, width));
}

// x / rms(x) * scale, in float until the end.
template <typename T>
void norm_row(const T* from, const T* scale, int64_t width, float eps, T* to) {
  using L = Lane<T>;
  Vec squares = splat(0.f);
  for (int64_t i = 0; i < width; i += kLanes) {
    const Vec value = L::load(from + i, first_lanes(width - i));
    squares = _mm512_fmadd_ps(value, value, squares);
  }
  const float mean = _mm512_reduce_add_ps(squares) / (float)width;
  const Vec factor = splat(1.f / std::sqrt(mean + eps));
  for (int64_t i = 0; i < width; i += kLanes) {
    const __mmask16 mask = first_lanes(width - i);
    const Vec value = _mm512_mul_ps(L::load(from + i, mask), factor);
    L::store(to + i, _mm512_mul_ps(value, L::load(scale + i, mask)), mask);
  }
}

// A row as whole numbers, nearest to 255 that are as far apart as its largest one needs; `kZero` is
// added. Returns what one of them is worth, which is no finite number if one of the row is none.
template <int kZero, typename T, typename Byte>
float quantize_row(const T* from, int64_t width, Byte* to) {
  constexpr float kLeast = 1e-35f;  // of smaller ones 127 / x is infinite
  Vec most = splat(0.f);
  __mmask16 none = 0;
  for (int64_t i = 0; i < width; i += kLanes) {
    const Vec value = Lane<T>::load(from + i, first_lanes(width - i));
    none |= _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    most = _mm512_max_ps(most, _mm512_abs_ps(value));
  }
  const float highest = none ? NAN : _mm512_reduce_max_ps(most);
  const Vec factor = splat(highest >= kLeast ? 127.f / highest : 0.f);
  for (int64_t i = 0; i < width; i += kLanes) {
    const __mmask16 mask = first_lanes(width - i);
    const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(Lane<T>::load(from + i, mask), factor));
    _mm_mask_storeu_epi8(to + i, mask,
                         _mm512_cvtepi32_epi8(_mm512_add_epi32(whole, _mm512_set1_epi32(kZero))));
  }
  return highest / 127.f;
}

// silu(first half) times the second half, each of `width` elements.
template <typename T>
void swiglu_row(const T* from, int64_t width, T* to) {
  using L = Lane<T>;
  for (int64_t i = 0; i < width; i += kLanes) {
    const __mmask16 mask = first_lanes(width - i);
    const Vec gate = L::load(from + i, mask), value = L::load(from + width + i, mask);
    const Vec e = exp(_mm512_sub_ps(splat(0.f), gate));
    const Vec silu = _mm512_div_ps(gate, _mm512_add_ps(splat(1.f), e));
    L::store(to + i, _mm512_mul_ps(silu, value), mask);
  }
}

// Cosines and sines `[tokens, 1, half]` of what is rotated; half is 0 where nothing is.
template <typename T>
struct Rotation {
  const T *cos = nullptr, *sin = nullptr;
  int64_t half = 0;
  bool interleaved = false;  // pairs are (2i, 2i + 1), not (i, i + half)

  // Rotates the first elements of one head of a token; `to` may be `from`.
  void turn(const T* from, int64_t token, T* to) const {
    using L = Lane<T>;
    for (int64_t i = 0; i < half; i += kLanes) {
      const int64_t left = half - i;
      const __mmask16 mask = first_lanes(left);
      const Vec c = L::load(cos + token * half + i, mask), s = L::load(sin + token * half + i, mask);
      const Pairs in = interleaved ? L::load_pairs(from + 2 * i, left)
                                   : Pairs{L::load(from + i, mask), L::load(from + half + i, mask)};
      const Pairs out{_mm512_fmsub_ps(in.first, c, _mm512_mul_ps(in.second, s)),
                      _mm512_fmadd_ps(in.second, c, _mm512_mul_ps(in.first, s))};
      if (interleaved) {
        L::store_pairs(to + 2 * i, out, left);
      } else {
        L::store(to + i, out.first, mask);
        L::store(to + half + i, out.second, mask);
      }
    }
  }
};

}  // namespace headroom
