// Products of small matrices, for all operations of this package, and what its rows are made of.
//
// A 32-bit lane holds one float, or two neighbouring bfloat16, or four whole numbers of 8 bits, of
// the summed axis. Every element of a product is summed in one order, whatever else is computed
// beside it: results do not depend, to the last bit, on how many rows there are.

#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstring>

#ifdef __AVX512F__
#include "vectors_avx512.h"
#else
#include "vectors_avx2.h"
#endif

namespace headroom {

constexpr float kLog2E = 1.44269504f;  // exp(x) is 2 to the power of so many x

// 2^x, relative error below 3e-7; what a float cannot hold is 0 or infinite; NaN stays NaN.
inline Vec exp2(Vec x) {
  const Vec bounded = min(splat(160.f), max(splat(-160.f), x));
  const Vec whole = round_to_whole(bounded);
  const Vec f = sub(bounded, whole);
  Vec p = splat(1.5403530e-4f);
  for (const float c : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f,
                        1.f})
    p = multiply_add(p, f, splat(c));
  return scale_by_power(p, whole);
}

inline Vec exp(Vec x) { return exp2(mul(x, splat(kLog2E))); }

inline float exp2(float x) { return first_of(exp2(splat(x))); }

// What becomes of each row, in a lane of its own; `join` does to two rows what `of_one` does to the lanes of
// one, in the same order.
template <typename One, typename Join>
Vec of_rows(const Vec* rows, int count, One&& of_one, [[maybe_unused]] Join&& join) {
#ifdef __AVX512F__
  constexpr int kFew = 4;  // for which the network takes longer
  if (count > kFew) return join_lanes(rows, join);
#endif
  alignas(64) float each[kLanes] = {};
  for (int r = 0; r < count; r++) each[r] = of_one(rows[r]);
  return load(each);
}

// Of up to sixteen rows; there are sixteen to read.
inline Vec sums_of(const Vec* rows, int count) {
  return of_rows(rows, count, [](Vec row) { return sum_of(row); },
                 [](Vec a, Vec b) { return add(a, b); });
}
inline Vec maxima_of(const Vec* rows, int count) {
  return of_rows(rows, count, [](Vec row) { return max_of(row); },
                 [](Vec a, Vec b) { return max(a, b); });
}

// Asks for a line of memory, into the second-level cache. Not by an intrinsic: GCC takes a function
// that only prefetches for one without effect, and drops its calls.
inline void prefetch(const void* line) {
  asm volatile("prefetcht1 %0" ::"m"(*static_cast<const char*>(line)));
}
// Into the first-level cache.
inline void prefetch_nearer(const void* line) {
  asm volatile("prefetcht0 %0" ::"m"(*static_cast<const char*>(line)));
}

// Sixteen neighbouring pairs, apart.
struct Pairs {
  Vec first, second;
};

// Sixteen floats that are bfloat16, of the second halves of 32 bits and of the first.
inline Vec high_halves(Ints pairs) {
  return as_floats(bit_and(pairs, splat_int((int)0xffff0000)));
}

inline Vec low_halves(Ints pairs) { return as_floats(shift_left<16>(pairs)); }

// What the lanes of a type hold, and the packing that depends on it.
template <typename T>
struct Lane;

struct FloatSums {
  using Sum = Register;

  static Sum zero() { return Sum{}; }
  static Sum load_sum(const float* from) { return load_register(from); }
  static void store_sum(float* to, Sum sum) { store_register(to, sum); }
};

template <>
struct Lane<float> : FloatSums {
  static constexpr int kValues = 1;

  static Register multiply_add(Register sum, Register lanes, const uint32_t* splatted) {
    return add_product(sum, lanes, splatted);
  }

  // Sixteen weights, for the summed axis of the second product.
  static void store_weights(uint32_t* to, int at, Vec weights) {
    store_ints(to + at, as_ints(weights));
  }

  // The value of one key.
  static void pack_values(const float* const* rows, int width, uint32_t* to) {
    for (int d = 0; d < width; d += kLanes)
      store_ints(to + d, as_ints(load(rows[0] + d, first_lanes(width - d))));
  }

  // The same of 8 bits.
  static void pack_values(const int8_t* const* rows, int width, uint32_t* to) {
    for (int d = 0; d < width; d += kLanes)
      store_ints(to + d, as_ints(floats_of(load_bytes(rows[0] + d, first_lanes(width - d)))));
  }

  // Four numbers of 8 bits in each lane, those in the same place to a vector of their own.
  static void spread(Ints fours, uint32_t* to, int stride) {
    for (int i = 0; i < 4; i++) store_ints(to + i * stride, as_ints(floats_of(byte_of(fours, i))));
  }

  static Vec round(Vec x) { return x; }

  static Vec load(const float* from, Leading lanes) { return headroom::load(from, lanes); }

  static void store(float* to, Vec x, Leading lanes) { headroom::store(to, x, lanes); }

  static Pairs load_pairs(const float* from, int64_t count) {
    const Vec low = load(from, first_lanes(2 * count));
    const Vec high = load(from + kLanes, first_lanes(std::max<int64_t>(0, 2 * count - kLanes)));
    Pairs pairs;
    separate(low, high, pairs.first, pairs.second);
    return pairs;
  }

  static void store_pairs(float* to, const Pairs& pairs, int64_t count) {
    Vec low, high;
    interleave(pairs.first, pairs.second, low, high);
    store(to, low, first_lanes(2 * count));
    store(to + kLanes, high, first_lanes(std::max<int64_t>(0, 2 * count - kLanes)));
  }
};

template <>
struct Lane<at::BFloat16> : FloatSums {
  static constexpr int kValues = 2;

  static Register multiply_add(Register sum, Register lanes, const uint32_t* splatted) {
    return add_products_of_pairs(sum, lanes, splatted);
  }

  static void store_weights(uint32_t* to, int at, Vec weights) {
    store(reinterpret_cast<at::BFloat16*>(to) + at, weights, first_lanes(kLanes));
  }

  // The values of two keys, element beside element.
  static void pack_values(const at::BFloat16* const* rows, int width, uint32_t* to) {
    interleave_rows(rows[0], rows[1], width, to);
  }

  // The same of 8 bits, which bfloat16 holds as they are: of a float, half the bits are 0.
  static void pack_values(const int8_t* const* rows, int width, uint32_t* to) {
    for (int d = 0; d < width; d += kLanes) {
      const Leading lanes = first_lanes(width - d);
      store_ints(to + d, pair(load_bytes(rows[0] + d, lanes), load_bytes(rows[1] + d, lanes)));
    }
  }

  // Four numbers of 8 bits in each lane, neighbours to a vector of pairs.
  static void spread(Ints fours, uint32_t* to, int stride) {
    for (int i = 0; i < 2; i++)
      store_ints(to + i * stride, pair(byte_of(fours, 2 * i), byte_of(fours, 2 * i + 1)));
  }

  // Of whole numbers that bfloat16 holds.
  static Ints pair(Ints first, Ints second) {
    return bit_or(shift_right<16>(as_ints(floats_of(first))), as_ints(floats_of(second)));
  }

  static Vec widen(Halves halves) { return as_floats(shift_left<16>(widen_halves(halves))); }

  static Vec round(Vec x) { return widen(narrow(x)); }

  static Vec load(const at::BFloat16* from, Leading lanes) {
    return widen(load_halves(from, lanes));
  }

  static void store(at::BFloat16* to, Vec x, Leading lanes) {
    store_halves(to, narrow(x), lanes);
  }

  static Pairs load_pairs(const at::BFloat16* from, int64_t count) {
    const Ints both = load_ints(from, first_lanes(count));
    return {low_halves(both), high_halves(both)};
  }

  static void store_pairs(at::BFloat16* to, const Pairs& pairs, int64_t count) {
    const Ints first = widen_halves(narrow(pairs.first));
    const Ints second = widen_halves(narrow(pairs.second));
    store_ints(to, bit_or(first, shift_left<16>(second)), first_lanes(count));
  }
};

// Whole numbers: unsigned ones are splatted, signed ones are lanes, sums are 32 bits in the place of
// a float.
template <>
struct Lane<int8_t> {
  using Sum = IntSums;
  static constexpr int kValues = 4;

  static Sum zero() { return Sum{}; }
  static Sum load_sum(const float* from) { return (Sum)load_register(from); }
  static void store_sum(float* to, Sum sum) { store_register(to, (Register)sum); }

  static Sum multiply_add(Sum sum, Register lanes, const uint32_t* splatted) {
    return add_products_of_bytes(sum, lanes, splatted);
  }
};

// `c[row, column] (+)= sum over k of a[row, k] * b[k, column]`, a block of it in registers.
template <typename T, int kBlockRows, int kRegisters>
void multiply_block(const uint32_t* a, int a_stride, const uint32_t* b, int b_stride, int depth,
                    float* c, int c_stride, bool accumulate) {
  using L = Lane<T>;
  typename L::Sum sum[kBlockRows][kRegisters];
  for (int r = 0; r < kBlockRows; r++)
    for (int v = 0; v < kRegisters; v++)
      sum[r][v] = accumulate ? L::load_sum(c + r * c_stride + v * kRegisterLanes) : L::zero();
  for (int k = 0; k < depth; k++) {
    Register lanes[kRegisters];
    for (int v = 0; v < kRegisters; v++) lanes[v] = load_register(b + k * b_stride + v * kRegisterLanes);
    for (int r = 0; r < kBlockRows; r++)
      for (int v = 0; v < kRegisters; v++)
        sum[r][v] = L::multiply_add(sum[r][v], lanes[v], a + r * a_stride + k);
  }
  for (int r = 0; r < kBlockRows; r++)
    for (int v = 0; v < kRegisters; v++)
      L::store_sum(c + r * c_stride + v * kRegisterLanes, sum[r][v]);
}

template <typename T, int kRegisters>
void multiply_columns(const uint32_t* a, int a_stride, const uint32_t* b, int b_stride, int depth,
                      float* c, int c_stride, int rows, bool accumulate) {
  int r = 0;
  const auto block = [&]<int kBlockRows>() {
    if constexpr (kBlockRows * kRegisters <= kMaxSums<T>)
      for (; r + kBlockRows <= rows; r += kBlockRows)
        multiply_block<T, kBlockRows, kRegisters>(a + r * a_stride, a_stride, b, b_stride, depth,
                                                  c + r * c_stride, c_stride, accumulate);
  };
  block.template operator()<6>();
  block.template operator()<4>();
  block.template operator()<2>();
  block.template operator()<1>();
}

// The whole product; `columns` is a multiple of the lanes of a vector. Few rows leave registers for
// more columns.
template <typename T>
void multiply(const uint32_t* a, int a_stride, const uint32_t* b, int b_stride, int depth,
              float* c, int c_stride, int rows, int columns, bool accumulate) {
  constexpr int kVec = kLanes / kRegisterLanes, kMostRows = std::min(6, kMaxSums<T> / kVec);
  const int most = kMaxSums<T> / std::min(std::max(rows, 1), kMostRows);
  int column = 0;
  const auto block = [&]<int kBlockVecs>() {
    if (kBlockVecs * kVec > most) return;
    for (; column + kBlockVecs * kLanes <= columns; column += kBlockVecs * kLanes)
      multiply_columns<T, kBlockVecs * kVec>(a, a_stride, b + column, b_stride, depth, c + column,
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
