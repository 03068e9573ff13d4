// What is done to one row between the products of a layer.

#pragma once

#include <cmath>

#include "lanes.h"

namespace headroom {

// x / rms(x) * scale, in float until the end.
template <typename T>
void norm_row(const T* from, const T* scale, int64_t width, float eps, T* to) {
  using L = Lane<T>;
  Vec squares = splat(0.f);
  for (int64_t i = 0; i < width; i += kLanes) {
    const Vec value = L::load(from + i, first_lanes(width - i));
    squares = multiply_add(value, value, squares);
  }
  const float mean = sum_of(squares) / (float)width;
  const Vec factor = splat(1.f / std::sqrt(mean + eps));
  for (int64_t i = 0; i < width; i += kLanes) {
    const Leading lanes = first_lanes(width - i);
    const Vec value = mul(L::load(from + i, lanes), factor);
    L::store(to + i, mul(value, L::load(scale + i, lanes)), lanes);
  }
}

// A row as whole numbers, nearest to 255 that are as far apart as its largest one needs; `kZero` is
// added. Returns what one of them is worth, which is no finite number if one of the row is none.
template <int kZero, typename T, typename Byte>
float quantize_row(const T* from, int64_t width, Byte* to) {
  constexpr float kLeast = 1e-35f;  // of smaller ones 127 / x is infinite
  Vec most = splat(0.f);
  Mask none = no_lanes();
  for (int64_t i = 0; i < width; i += kLanes) {
    const Vec value = Lane<T>::load(from + i, first_lanes(width - i));
    none = either(none, no_numbers(value));
    most = max(most, abs(value));
  }
  const float highest = any(none) ? NAN : max_of(most);
  const Vec factor = splat(highest >= kLeast ? 127.f / highest : 0.f);
  for (int64_t i = 0; i < width; i += kLanes) {
    const Leading lanes = first_lanes(width - i);
    const Ints whole = nearest_ints(mul(Lane<T>::load(from + i, lanes), factor));
    store_bytes(to + i, add(whole, splat_int(kZero)), lanes);
  }
  return highest / 127.f;
}

// silu(first half) times the second half, each of `width` elements.
template <typename T>
void swiglu_row(const T* from, int64_t width, T* to) {
  using L = Lane<T>;
  for (int64_t i = 0; i < width; i += kLanes) {
    const Leading lanes = first_lanes(width - i);
    const Vec gate = L::load(from + i, lanes), value = L::load(from + width + i, lanes);
    const Vec silu = div(gate, add(splat(1.f), exp(sub(splat(0.f), gate))));
    L::store(to + i, mul(silu, value), lanes);
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
      const Leading lanes = first_lanes(left);
      const Vec c = L::load(cos + token * half + i, lanes),
                s = L::load(sin + token * half + i, lanes);
      const Pairs in = interleaved ? L::load_pairs(from + 2 * i, left)
                                   : Pairs{L::load(from + i, lanes), L::load(from + half + i, lanes)};
      const Pairs out{multiply_sub(in.first, c, mul(in.second, s)),
                      multiply_add(in.second, c, mul(in.first, s))};
      if (interleaved) {
        L::store_pairs(to + 2 * i, out, left);
      } else {
        L::store(to + i, out.first, lanes);
        L::store(to + half + i, out.second, lanes);
      }
    }
  }
};

}  // namespace headroom
