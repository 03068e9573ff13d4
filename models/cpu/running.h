// A softmax that runs along with the keys.

#pragma once

#include <algorithm>

#include "lanes.h"

namespace headroom {

constexpr float kNothing = -3e38f;  // the running maximum before any key is seen

// Of each row: the largest score, the sum of the weights, the weighted values. Scores are such that a
// weight is 2 to the power of one.
struct Running {
  float* highest;
  float* sum;
  float* read;  // [rows, width]

  static int64_t size(int64_t rows, int64_t width) { return rows * (width + 2); }

  static Running in(float* memory, int64_t rows) {
    return {memory, memory + rows, memory + 2 * rows};
  }

  void clear(int64_t rows, int64_t width) const {
    std::fill(highest, highest + rows, kNothing);
    std::fill(sum, sum + rows, 0.f);
    std::fill(read, read + rows * width, 0.f);
  }
};

inline void scale_row(float* row, int64_t width, float factor) {
  for (int64_t d = 0; d < width; d += kLanes)
    store(row + d, mul(load(row + d), splat(factor)));
}

// Add what later keys gave to what earlier ones gave.
inline void join(const Running& total, const Running& part, int64_t rows, int64_t width) {
  for (int64_t first = 0; first < rows; first += kLanes) {
    const Leading lanes = first_lanes(rows - first);
    const Vec before = load(total.highest + first, lanes), now = load(part.highest + first, lanes);
    const Vec highest = max(now, before), keep = exp2(sub(before, highest)), take = exp2(sub(now, highest));
    alignas(64) float kept[kLanes], taken[kLanes];
    store(kept, keep);
    store(taken, take);
    store(total.highest + first, highest, lanes);
    store(total.sum + first,
          add(mul(load(total.sum + first, lanes), keep), mul(load(part.sum + first, lanes), take)), lanes);
    for (int64_t r = first; r < std::min(rows, first + kLanes); r++) {
      float *to = total.read + r * width, *from = part.read + r * width;
      for (int64_t d = 0; d < width; d += kLanes) {
        const Vec own = mul(load(to + d), splat(kept[r - first]));
        store(to + d, multiply_add(load(from + d), splat(taken[r - first]), own));
      }
    }
  }
}

}  // namespace headroom
