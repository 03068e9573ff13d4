// Products by the matrix unit of processors with AMX: tiles of sixteen rows of sixteen lanes.
//
// A packed weight lies as this unit wants it: each lane of the summed axis is a row, whose lanes
// belong to sixteen outputs. As with vectors, every element is summed in one order, whatever else is
// computed beside it: pairs of bfloat16 in sixteen lanes become two sums, of their first and of their
// second numbers, whose sum is added to what there is, all rounded to nearest, and what is too small
// for a normal number is 0 (Intel's manual, TDPBF16PS).

#pragma once

#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "lanes.h"

namespace headroom {

// How many rows of `a` a block has: `first` and `second` tiles beside each other on two column tiles,
// or, where there is no second, one on up to four column tiles.
struct TileRows {
  int first, second;
};

// The unit itself. Its registers are those of the thread; other code may use them before and after.
//
// Registers: 0 to 3 are sums, 4 and 5 rows of `a`, 6 and 7 columns of `b`.
class Amx {
 public:
  void configure(TileRows rows, int columns = kLanes) {
    now_ = rows;
    const int second = rows.second ? rows.second : rows.first;
    const Shape shape{rows.first, second, columns};
    if (shape == loaded_) return;
    loaded_ = shape;
    Config config{};
    config.palette = 1;
    const int of[8] = {rows.first, rows.first, second, second, rows.first, second, kLanes, kLanes};
    for (int tile = 0; tile < 8; tile++) {
      const bool is_input = tile == 4 || tile == 5;
      config.rows[tile] = (uint8_t)of[tile];
      config.bytes[tile] = (uint16_t)((is_input ? kLanes : columns) * sizeof(float));
    }
    asm volatile("ldtilecfg %0" ::"m"(config));
  }

  ~Amx() {
    if (loaded_.first) asm volatile("tilerelease");
  }

  // As `load`, a barrier: the compiler does not know what tiles read.
  void clear() const {
    asm volatile("tilezero %%tmm0\n\ttilezero %%tmm1\n\ttilezero %%tmm2\n\ttilezero %%tmm3" ::
                     : "memory");
  }

#define HEADROOM_LOAD(tile, from, stride)                                  \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(from), "r"((int64_t)(stride) * 4))
#define HEADROOM_STORE(tile, to, stride)                                                    \
  asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(to), "r"((int64_t)(stride) * 4) \
               : "memory")
#define HEADROOM_MULTIPLY_ADD(sum, a, b)                            \
  if constexpr (std::is_same_v<T, int8_t>)                          \
    asm volatile("tdpbusd %tmm" #b ", %tmm" #a ", %tmm" #sum);      \
  else                                                              \
    asm volatile("tdpbf16ps %tmm" #b ", %tmm" #a ", %tmm" #sum)

  // Sums `[first + second, 32]`, or `[first, 64]`; `columns` of them, a multiple of 16.
  void load(const float* c, int stride, int columns) const {
    asm volatile("" ::: "memory");
    HEADROOM_LOAD(0, c, stride);
    if (columns > kLanes) HEADROOM_LOAD(1, c + kLanes, stride);
    if (now_.second) {
      HEADROOM_LOAD(2, c + kLanes * stride, stride);
      if (columns > kLanes) HEADROOM_LOAD(3, c + kLanes * stride + kLanes, stride);
    } else {
      if (columns > 2 * kLanes) HEADROOM_LOAD(2, c + 2 * kLanes, stride);
      if (columns > 3 * kLanes) HEADROOM_LOAD(3, c + 3 * kLanes, stride);
    }
  }

  void store(float* c, int stride, int columns) const {
    HEADROOM_STORE(0, c, stride);
    if (columns > kLanes) HEADROOM_STORE(1, c + kLanes, stride);
    if (now_.second) {
      HEADROOM_STORE(2, c + kLanes * stride, stride);
      if (columns > kLanes) HEADROOM_STORE(3, c + kLanes * stride + kLanes, stride);
    } else {
      if (columns > 2 * kLanes) HEADROOM_STORE(2, c + 2 * kLanes, stride);
      if (columns > 3 * kLanes) HEADROOM_STORE(3, c + 3 * kLanes, stride);
    }
  }

  // Adds the products of sixteen lanes of the summed axis. Where there are four, the tiles of the next step
  // come to the first-level cache meanwhile. On a core that a thread has for itself its loads overtake
  // products; on one that it shares too few of them do, and would take their time after each other.
  template <typename T>
  void multiply_add(const uint32_t* a, int a_stride, const uint32_t* b, int b_stride,
                    int columns, const uint32_t* next_a, const uint32_t* next_b) const {
    HEADROOM_LOAD(4, a, a_stride);
    HEADROOM_LOAD(6, b, b_stride);
    if (now_.second && columns > kLanes) {
      HEADROOM_LOAD(5, a + kLanes * a_stride, a_stride);
      HEADROOM_LOAD(7, b + kLanes, b_stride);
      HEADROOM_MULTIPLY_ADD(0, 4, 6);
      ask_for_tile(next_a, a_stride);
      HEADROOM_MULTIPLY_ADD(2, 5, 6);
      ask_for_tile(next_a + kLanes * a_stride, a_stride);
      HEADROOM_MULTIPLY_ADD(1, 4, 7);
      ask_for_tile(next_b, b_stride);
      HEADROOM_MULTIPLY_ADD(3, 5, 7);
      ask_for_tile(next_b + kLanes, b_stride);
      return;
    }
    HEADROOM_MULTIPLY_ADD(0, 4, 6);
    if (now_.second) {
      HEADROOM_LOAD(5, a + kLanes * a_stride, a_stride);
      HEADROOM_MULTIPLY_ADD(2, 5, 6);
      return;
    }
    if (columns <= kLanes) return;
    HEADROOM_LOAD(7, b + kLanes, b_stride);
    HEADROOM_MULTIPLY_ADD(1, 4, 7);
    if (columns <= 2 * kLanes) return;
    HEADROOM_LOAD(6, b + 2 * kLanes, b_stride);
    HEADROOM_MULTIPLY_ADD(2, 4, 6);
    if (columns <= 3 * kLanes) return;
    HEADROOM_LOAD(7, b + 3 * kLanes, b_stride);
    HEADROOM_MULTIPLY_ADD(3, 4, 7);
  }

  // The four sums are of sixteen rows each, wherever these lie, and of the same sixteen columns or less.
  // Adds the products of sixteen lanes, or of thirty-two; `between` is called before each tile.
  template <typename T, typename F>
  void multiply_add_rows(const uint32_t* const* a, int a_stride, const uint32_t* b, int b_stride,
                         int lanes, F&& between) const {
    const bool two = lanes > kLanes;
    HEADROOM_LOAD(6, b, b_stride);
    if (two) HEADROOM_LOAD(7, b + kLanes * b_stride, b_stride);
#define HEADROOM_MULTIPLY_ADD_ROWS(sum)             \
  between(sum);                                     \
  HEADROOM_LOAD(4, a[sum], a_stride);               \
  HEADROOM_MULTIPLY_ADD(sum, 4, 6);                 \
  if (two) {                                        \
    HEADROOM_LOAD(5, a[sum] + kLanes, a_stride);    \
    HEADROOM_MULTIPLY_ADD(sum, 5, 7);               \
  }
    HEADROOM_MULTIPLY_ADD_ROWS(0)
    HEADROOM_MULTIPLY_ADD_ROWS(1)
    HEADROOM_MULTIPLY_ADD_ROWS(2)
    HEADROOM_MULTIPLY_ADD_ROWS(3)
#undef HEADROOM_MULTIPLY_ADD_ROWS
  }

  // Such sums, `[64, 16]`.
  void store_rows(float* c) const {
    const int columns = loaded_.columns;
    HEADROOM_STORE(0, c, columns);
    HEADROOM_STORE(1, c + kLanes * columns, columns);
    HEADROOM_STORE(2, c + 2 * kLanes * columns, columns);
    HEADROOM_STORE(3, c + 3 * kLanes * columns, columns);
  }

#undef HEADROOM_LOAD
#undef HEADROOM_STORE
#undef HEADROOM_MULTIPLY_ADD

 private:
  static void ask_for_tile(const uint32_t* rows, int stride) {
    for (int row = 0; row < kLanes; row++) prefetch_nearer(rows + row * stride);
  }

  struct Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];  // of a row
    uint8_t rows[16];
  };

  // Of the tiles; to load one takes as long as many products.
  struct Shape {
    int first, second, columns;

    bool operator==(const Shape&) const = default;
  };

  TileRows now_{0, 0};
  Shape loaded_{0, 0, 0};
};

// Within it, numbers too small to be normal are 0, as they are to the unit.
class SmallIsZero {
 public:
  SmallIsZero() : before_(_mm_getcsr()) { _mm_setcsr(before_ | kInputs | kResults); }
  ~SmallIsZero() { _mm_setcsr(before_); }
  SmallIsZero(const SmallIsZero&) = delete;
  SmallIsZero& operator=(const SmallIsZero&) = delete;

 private:
  static constexpr unsigned kInputs = 0x40, kResults = 0x8000;
  const unsigned before_;
};

// What the unit does, in plain words: for processors without it, so that its use can be tested.
class EmulatedAmx {
 public:
  void configure(TileRows rows, int columns = kLanes) {
    rows_ = rows;
    columns_ = columns;
  }

  void clear() { std::memset(sums_, 0, sizeof sums_); }

  void load(const float* c, int stride, int columns) {
    for (int row = 0; row < num_rows(); row++)
      std::memcpy(sums_[row], c + row * stride, columns * sizeof(float));
  }

  void store(float* c, int stride, int columns) const {
    for (int row = 0; row < num_rows(); row++)
      std::memcpy(c + row * stride, sums_[row], columns * sizeof(float));
  }

  template <typename T>
  void multiply_add(const uint32_t* a, int a_stride, const uint32_t* b, int b_stride, int columns,
                    const uint32_t*, const uint32_t*) {
    const SmallIsZero small;
    for (int row = 0; row < num_rows(); row++)
      for (int column = 0; column < columns; column++)
        add<T>(sums_[row][column], a + row * a_stride, b + column, b_stride);
  }

  template <typename T, typename F>
  void multiply_add_rows(const uint32_t* const* a, int a_stride, const uint32_t* b, int b_stride,
                         int lanes, F&& between) {
    const SmallIsZero small;
    for (int tile = 0; tile < 4; tile++) {
      between(tile);
      for (int k = 0; k < lanes; k += kLanes)
        for (int row = 0; row < kLanes; row++)
          for (int column = 0; column < columns_; column++)
            add<T>(sums_[row][tile * kLanes + column], a[tile] + row * a_stride + k,
                   b + k * b_stride + column, b_stride);
    }
  }

  void store_rows(float* c) const {
    for (int tile = 0; tile < 4; tile++)
      for (int row = 0; row < kLanes; row++)
        std::memcpy(c + (tile * kLanes + row) * columns_, &sums_[row][tile * kLanes],
                    columns_ * sizeof(float));
  }

 private:
  int num_rows() const { return rows_.first + rows_.second; }

  template <typename T>
  static void add(uint32_t& sum, const uint32_t* a, const uint32_t* b, int b_stride) {
    if constexpr (std::is_same_v<T, int8_t>) {
      for (int lane = 0; lane < kLanes; lane++)
        for (int i = 0; i < 32; i += 8)
          sum += (uint32_t)((int)(a[lane] >> i & 0xff) * (int8_t)(b[lane * b_stride] >> i));
    } else {
      float sums[2] = {}, total;
      for (int lane = 0; lane < kLanes; lane++)
        for (int i = 0; i < 2; i++)
          sums[i] = std::fma(number(a[lane], i), number(b[lane * b_stride], i), sums[i]);
      std::memcpy(&total, &sum, sizeof total);
      total += sums[0] + sums[1];
      std::memcpy(&sum, &total, sizeof total);
    }
  }

  // One of a pair of bfloat16.
  static float number(uint32_t pair, int which) {
    const uint32_t bits = which ? pair & 0xffff0000 : pair << 16;
    float number;
    std::memcpy(&number, &bits, sizeof number);
    return number;
  }

  TileRows rows_{0, 0};
  int columns_ = 0;
  uint32_t sums_[2 * kLanes][4 * kLanes];
};

// How many blocks a product has: of so many rows and columns together.
inline int64_t blocks_of(int rows, int columns) {
  int64_t blocks = 0;
  for (int r = 0; r < rows; r += 2 * kLanes) {
    const int together = (rows - r > kLanes ? 2 : 4) * kLanes;
    blocks += (columns + together - 1) / together;
  }
  return blocks;
}

// Memory that will be read next, asked for while there is something to compute: at most two stretches, in
// equal shares by so many steps, of sixteen lanes of the summed axis of one block.
struct Ahead {
  int64_t steps = 0;

  void add(const void* begin, const void* end) {
    Stretch& stretch = now_.at == now_.end ? now_ : then_;
    stretch = {static_cast<const char*>(begin), static_cast<const char*>(end)};
  }

  void ask_for_a_share() {
    if (steps <= 0) return;
    const int64_t left = now_.end - now_.at + then_.end - then_.at;
    int64_t lines = (left / kLine + steps - 1) / steps;
    for (steps--; lines > 0; lines--, now_.at += kLine) {
      if (now_.at >= now_.end) now_ = std::exchange(then_, {});
      if (now_.at >= now_.end) return;
      prefetch(now_.at);
    }
  }

  static constexpr int kLine = 64;

 private:
  struct Stretch {
    const char *at = nullptr, *end = nullptr;
  };

  Stretch now_, then_;
};

// `multiply` of lanes.h, for types of 16 and 8 bits, by a unit. Calls `meanwhile` after each step of
// sixteen lanes of the summed axis of one block, for what vectors do while the unit multiplies.
template <typename T, typename Unit, typename F>
void multiply_tiles(Unit& unit, const uint32_t* a, int a_stride, const uint32_t* b, int b_stride,
                    int depth, float* c, int c_stride, int rows, int columns, bool accumulate,
                    F&& meanwhile) {
  const int whole = depth / kLanes * kLanes;  // of what is left, vectors are quicker
  for (int r = 0; whole && r < rows; r += 2 * kLanes) {
    const int first = std::min(kLanes, rows - r);
    const int second = std::clamp(rows - r - kLanes, 0, kLanes);
    unit.configure({first, second});
    const int together = (second ? 2 : 4) * kLanes;
    for (int n = 0; n < columns; n += together) {
      const int width = std::min(together, columns - n);
      float* sums = c + r * c_stride + n;
      if (accumulate)
        unit.load(sums, c_stride, width);
      else
        unit.clear();
      const bool same_rows = n + together < columns;
      const uint32_t *own_rows = a + r * a_stride, *own_columns = b + n;
      for (int k = 0; k < whole; k += kLanes) {
        const bool last = k + kLanes == whole;
        const uint32_t* next_rows =
            last ? a + (same_rows ? r : r + 2 * kLanes) * a_stride : own_rows + k + kLanes;
        const uint32_t* next_columns =
            last ? b + (same_rows ? n + together : 0) : own_columns + (k + kLanes) * b_stride;
        unit.template multiply_add<T>(own_rows + k, a_stride, own_columns + k * b_stride, b_stride,
                                      width, next_rows, next_columns);
        meanwhile();
      }
      unit.store(sums, c_stride, width);
    }
  }
  if (whole < depth)
    multiply<T>(a + whole, a_stride, b + whole * b_stride, b_stride, depth - whole, c, c_stride,
                rows, columns, accumulate || whole > 0);
}

// What tiles compute of pairs of bfloat16, to the bit, by vectors; `depth` in whole tiles.
template <int kRows, int kVecs>
void multiply_pairs_as_tiles(const uint32_t* a, int a_stride, const uint32_t* b, int b_stride,
                             int depth, float* c, int c_stride, bool accumulate) {
  Vec total[kRows][kVecs];
  for (int r = 0; r < kRows; r++)
    for (int v = 0; v < kVecs; v++)
      total[r][v] = accumulate ? load(c + r * c_stride + v * kLanes) : splat(0.f);
  for (int tile = 0; tile < depth; tile += kLanes) {
    Vec first[kRows][kVecs], second[kRows][kVecs];
    for (int r = 0; r < kRows; r++)
      for (int v = 0; v < kVecs; v++) first[r][v] = second[r][v] = splat(0.f);
    for (int k = tile; k < tile + kLanes; k++) {
      Ints pairs[kVecs];
      for (int v = 0; v < kVecs; v++) pairs[v] = load_ints(b + k * b_stride + v * kLanes);
      for (int r = 0; r < kRows; r++) {
        const Ints own = splat_int((int32_t)a[r * a_stride + k]);
        for (int v = 0; v < kVecs; v++) {
          first[r][v] = multiply_add(low_halves(own), low_halves(pairs[v]), first[r][v]);
          second[r][v] = multiply_add(high_halves(own), high_halves(pairs[v]), second[r][v]);
        }
      }
    }
    for (int r = 0; r < kRows; r++)
      for (int v = 0; v < kVecs; v++)
        total[r][v] = add(total[r][v], add(first[r][v], second[r][v]));
  }
  for (int r = 0; r < kRows; r++)
    for (int v = 0; v < kVecs; v++) store(c + r * c_stride + v * kLanes, total[r][v]);
}

constexpr int kFewRows = 3;  // for so many vectors are as quick as tiles

// As `multiply_tiles`, to the bit, of what lies in a cache: of few rows vectors are quicker there,
// since a tile takes as long to load for one row as for sixteen.
template <typename T, typename Unit>
void multiply_cached_tiles(Unit& unit, const uint32_t* a, int a_stride, const uint32_t* b,
                           int b_stride, int depth, float* c, int c_stride, int rows, int columns,
                           bool accumulate) {
  const int whole = depth / kLanes * kLanes;
  const auto by_vectors = [&]<int kRows>() {
    const SmallIsZero small;
    int n = 0;
    for (; n + 2 * kLanes <= columns; n += 2 * kLanes)
      multiply_pairs_as_tiles<kRows, 2>(a, a_stride, b + n, b_stride, whole, c + n, c_stride,
                                        accumulate);
    if (n < columns)
      multiply_pairs_as_tiles<kRows, 1>(a, a_stride, b + n, b_stride, whole, c + n, c_stride,
                                        accumulate);
  };
  if (!std::is_same_v<T, at::BFloat16> || rows > kFewRows || !whole) {
    return multiply_tiles<T>(unit, a, a_stride, b, b_stride, depth, c, c_stride, rows, columns,
                             accumulate, [] {});
  }
  if (rows == 1) by_vectors.template operator()<1>();
  if (rows == 2) by_vectors.template operator()<2>();
  if (rows == 3) by_vectors.template operator()<3>();
  if (whole < depth)
    multiply<T>(a + whole, a_stride, b + whole * b_stride, b_stride, depth - whole, c, c_stride,
                rows, columns, true);
}

// `c[row, column] = sum over k of a[row, k] * b[k, column]` of sixty-four rows, sixteen after each of
// four pointers, and of sixteen columns or less; `depth` in whole tiles. Calls `between(k, lanes, tile)`
// before each tile of `a`.
template <typename T, typename Unit, typename F>
void multiply_rows(Unit& unit, const uint32_t* const (&a)[4], int a_stride, const uint32_t* b,
                   int columns, int depth, float* c, F&& between) {
  unit.configure({kLanes, kLanes}, columns);
  unit.clear();
  for (int k = 0; k < depth; k += 2 * kLanes) {
    const int lanes = std::min(2 * kLanes, depth - k);
    const uint32_t* const at[4] = {a[0] + k, a[1] + k, a[2] + k, a[3] + k};
    unit.template multiply_add_rows<T>(at, a_stride, b + k * columns, columns, lanes,
                                       [&](int tile) { between(k, lanes, tile); });
  }
  unit.store_rows(c);
}

// As tiles add, to the bit: `c[row] += sum over k of a[row, k] * b[k]`, where `a` are weights that
// bfloat16 holds and `b` rows of bfloat16, sixteen after each pointer; there are `count` of them, a
// multiple of 32. Of the rows of `b` a part, of `kPairs` times 32 numbers. As many rows after the
// pointers `ahead`, if there are any, are asked for.
template <int kRows, int kPairs>
void add_weighted_part(const float* a, int a_stride, const at::BFloat16* const* b, int b_stride,
                       int count, int part, float* c, int c_stride,
                       const at::BFloat16* const* ahead) {
  constexpr int kTile = 2 * kLanes;
  Vec total[kRows][kPairs][2];  // of even elements, of odd ones
  for (int r = 0; r < kRows; r++)
    for (int p = 0; p < kPairs; p++) {
      const float* from = c + r * c_stride + part + p * kTile;
      separate(load(from), load(from + kLanes), total[r][p][0], total[r][p][1]);
    }
  for (int tile = 0; tile < count; tile += kTile) {
    Vec first[kRows][kPairs][2], second[kRows][kPairs][2];
    for (int r = 0; r < kRows; r++)
      for (int p = 0; p < kPairs; p++)
        for (int i = 0; i < 2; i++) first[r][p][i] = second[r][p][i] = splat(0.f);
    for (int half = tile; half < tile + kTile; half += kLanes) {
      const at::BFloat16* at = b[half / kLanes] + part;
      const at::BFloat16* asked = ahead ? ahead[half / kLanes] + part * kLanes : nullptr;
      for (int k = half; k < half + kLanes; k += 2, at += 2 * b_stride) {
        if (asked)
          for (int line = 0; line < 2 * kPairs; line++, asked += kTile) prefetch(asked);
        for (int p = 0; p < kPairs; p++) {
          const Ints even = load_ints(at + p * kTile), odd = load_ints(at + b_stride + p * kTile);
          for (int r = 0; r < kRows; r++) {
            const float* by = a + r * a_stride + k;
            const Vec by_even = splat(by[0]), by_odd = splat(by[1]);
            first[r][p][0] = multiply_add(by_even, low_halves(even), first[r][p][0]);
            first[r][p][1] = multiply_add(by_even, high_halves(even), first[r][p][1]);
            second[r][p][0] = multiply_add(by_odd, low_halves(odd), second[r][p][0]);
            second[r][p][1] = multiply_add(by_odd, high_halves(odd), second[r][p][1]);
          }
        }
      }
    }
    for (int r = 0; r < kRows; r++)
      for (int p = 0; p < kPairs; p++)
        for (int i = 0; i < 2; i++)
          total[r][p][i] = add(total[r][p][i], add(first[r][p][i], second[r][p][i]));
  }
  for (int r = 0; r < kRows; r++)
    for (int p = 0; p < kPairs; p++) {
      Vec low, high;
      interleave(total[r][p][0], total[r][p][1], low, high);
      store(c + r * c_stride + part + p * kTile, low);
      store(c + r * c_stride + part + p * kTile + kLanes, high);
    }
}

// The whole of rows of `width` numbers, a multiple of 32.
inline void add_weighted_rows(const float* a, int a_stride, int rows, const at::BFloat16* const* b,
                              int width, int count, float* c, int c_stride,
                              const at::BFloat16* const* ahead) {
  const SmallIsZero small;
  const auto add = [&]<int kRows>() {
    int part = 0;
    for (; part + 4 * kLanes <= width; part += 4 * kLanes)
      add_weighted_part<kRows, 2>(a, a_stride, b, width, count, part, c, c_stride, ahead);
    if (part < width)
      add_weighted_part<kRows, 1>(a, a_stride, b, width, count, part, c, c_stride, ahead);
  };
  if (rows == 1) add.template operator()<1>();
  if (rows == 2) add.template operator()<2>();
  if (rows == 3) add.template operator()<3>();
}

// What a function says in a child process; no, if the child does not survive it.
template <typename F>
bool says_in_child(F&& function) {
  void* shared =
      mmap(nullptr, sizeof(bool), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (shared == MAP_FAILED) return false;
  // Not its exit status: where nobody waits for children, the system does not keep it.
  auto* answer = static_cast<volatile bool*>(shared);
  const pid_t child = fork();
  if (child == 0) {
    // Handlers of the parent may print, or wait for what another of its threads holds.
    sigset_t all;
    sigfillset(&all);
    sigprocmask(SIG_UNBLOCK, &all, nullptr);
    for (const int number : {SIGILL, SIGSEGV, SIGBUS, SIGFPE, SIGABRT, SIGALRM})
      signal(number, SIG_DFL);
    prctl(PR_SET_DUMPABLE, 0);  // leave no core file
    alarm(10);
    *answer = function();
    _exit(0);
  }
  while (child > 0 && waitpid(child, nullptr, 0) < 0 && errno == EINTR) {
  }
  const bool said = child > 0 && *answer;
  munmap(shared, sizeof(bool));
  return said;
}

// Whether tiles compute what they should, in blocks of all kinds, and vectors the same.
inline bool amx_agrees_with_its_description() {
  constexpr int kMaxRows = 37, kMaxColumns = 64, kDepth = 37;
  constexpr int kShapes[][2] = {{21, 48}, {5, 64}, {16, 48}, {37, 64}, {1, 16}, {2, 48}, {3, 64}};
  uint32_t a[kMaxRows * kDepth], b[kDepth * kMaxColumns];
  float real[kMaxRows * kMaxColumns], emulated[kMaxRows * kMaxColumns];
  float by_vectors[kMaxRows * kMaxColumns];
  Amx amx;
  EmulatedAmx emulator;
  const auto nothing = [] {};
  const auto agree = [&]<typename T>(uint32_t bits, uint32_t always) {
    // As good as random, but for the bits that every number has.
    for (int i = 0; i < kMaxRows * kDepth; i++) a[i] = (i * 2654435761u & bits) | always;
    for (int i = 0; i < kDepth * kMaxColumns; i++) b[i] = (i * 2246822519u & bits) | always;
    for (const auto& [rows, columns] : kShapes) {
      for (const bool accumulate : {false, true}) {
        multiply_tiles<T>(amx, a, kDepth, b, columns, kDepth, real, columns, rows, columns,
                          accumulate, nothing);
        multiply_tiles<T>(emulator, a, kDepth, b, columns, kDepth, emulated, columns, rows, columns,
                          accumulate, nothing);
        multiply_cached_tiles<T>(amx, a, kDepth, b, columns, kDepth, by_vectors, columns, rows,
                                 columns, accumulate);
      }
      const size_t size = sizeof(float) * rows * columns;
      if (std::memcmp(real, emulated, size) != 0 || std::memcmp(real, by_vectors, size) != 0)
        return false;
    }
    return true;
  };
  // Rows where they lie, of one column and of sixteen, of half a step of lanes and of one and a half.
  const auto agree_on_rows = [&] {
    constexpr int kStride = 3 * kLanes, kRows = 4 * kLanes;
    static uint32_t rows[kRows * kStride];
    static float by_amx[kRows * kLanes], by_emulator[kRows * kLanes];
    for (int i = 0; i < kRows * kStride; i++) rows[i] = (i * 2654435761u & 0x807f807f) | 0x3f003f00;
    const auto nothing_between = [](int, int, int) {};
    const uint32_t* const at[4] = {rows, rows + 2 * kLanes * kStride, rows + kLanes * kStride,
                                   rows + 3 * kLanes * kStride};
    for (const int columns : {1, kLanes}) {
      for (const int depth : {kLanes, 3 * kLanes}) {
        multiply_rows<at::BFloat16>(amx, at, kStride, b, columns, depth, by_amx, nothing_between);
        multiply_rows<at::BFloat16>(emulator, at, kStride, b, columns, depth, by_emulator,
                                    nothing_between);
        if (std::memcmp(by_amx, by_emulator, sizeof(float) * kRows * columns) != 0) return false;
      }
    }
    return true;
  };
  // Bytes, and pairs of bfloat16 of either sign: between a half and 1, so small that some sums are no
  // normal numbers, and no normal numbers themselves.
  return agree.template operator()<int8_t>(0xffffffff, 0) &&
         agree.template operator()<at::BFloat16>(0x807f807f, 0x3f003f00) && agree_on_rows() &&
         agree.template operator()<at::BFloat16>(0x807f807f, 0x20002000) &&
         agree.template operator()<at::BFloat16>(0x807f807f, 0);
}

// Whether the system lets this process use the unit, and it computes what it should. A processor may
// have it and the system, or what emulates one, may not know: a child finds out, since an
// instruction that is not allowed ends its process.
inline bool amx_works() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0 &&
         says_in_child(amx_agrees_with_its_description);
}

}  // namespace headroom
