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
  for (int64_t r = 0; r < rows; r++) {
    const float highest = std::max(total.highest[r], part.highest[r]);
    const float keep = exp2(total.highest[r] - highest), theirs = exp2(part.highest[r] - highest);
    total.highest[r] = highest;
    total.sum[r] = total.sum[r] * keep + part.sum[r] * theirs;
    float *to = total.read + r * width, *from = part.read + r * width;
    for (int64_t d = 0; d < width; d += kLanes) {
      const Vec kept = mul(load(to + d), splat(keep));
      store(to + d, multiply_add(load(from + d), splat(theirs), kept));
    }
  }
}

}  // namespace headroom
