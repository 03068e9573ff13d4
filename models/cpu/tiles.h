// Products by the matrix unit of processors with AMX: tiles of sixteen rows of sixteen lanes.
//
// A packed weight lies as this unit wants it: each lane of the summed axis is a row, whose lanes
// belong to sixteen outputs. As with vectors, every element is summed in one order, whatever else is
// computed beside it.

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
#include <cstdint>
#include <cstring>
#include <type_traits>

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
  void configure(TileRows rows) {
    if (rows.first == now_.first && rows.second == now_.second) return;
    Config config{};
    config.palette = 1;
    const int second = rows.second ? rows.second : rows.first;
    const int of[8] = {rows.first, rows.first, second, second, rows.first, second, kLanes, kLanes};
    for (int tile = 0; tile < 8; tile++) {
      config.rows[tile] = (uint8_t)of[tile];
      config.bytes[tile] = kLanes * sizeof(float);
    }
    asm volatile("ldtilecfg %0" ::"m"(config));
    now_ = rows;
  }

  ~Amx() {
    if (now_.first) asm volatile("tilerelease");
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

  // Adds the products of sixteen lanes of the summed axis.
  template <typename T>
  void multiply_add(const uint32_t* a, int a_stride, const uint32_t* b, int b_stride,
                    int columns) const {
    HEADROOM_LOAD(4, a, a_stride);
    HEADROOM_LOAD(6, b, b_stride);
    HEADROOM_MULTIPLY_ADD(0, 4, 6);
    if (now_.second) {
      HEADROOM_LOAD(5, a + kLanes * a_stride, a_stride);
      HEADROOM_MULTIPLY_ADD(2, 5, 6);
    }
    if (columns <= kLanes) return;
    HEADROOM_LOAD(7, b + kLanes, b_stride);
    HEADROOM_MULTIPLY_ADD(1, 4, 7);
    if (now_.second) {
      HEADROOM_MULTIPLY_ADD(3, 5, 7);
      return;
    }
    if (columns <= 2 * kLanes) return;
    HEADROOM_LOAD(6, b + 2 * kLanes, b_stride);
    HEADROOM_MULTIPLY_ADD(2, 4, 6);
    if (columns <= 3 * kLanes) return;
    HEADROOM_LOAD(7, b + 3 * kLanes, b_stride);
    HEADROOM_MULTIPLY_ADD(3, 4, 7);
  }

#undef HEADROOM_LOAD
#undef HEADROOM_STORE
#undef HEADROOM_MULTIPLY_ADD

 private:
  struct Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];  // of a row
    uint8_t rows[16];
  };

  TileRows now_{0, 0};
};

// What the unit does, in plain words: for processors without it, so that its use can be tested.
class EmulatedAmx {
 public:
  void configure(TileRows rows) { rows_ = rows; }

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
  void multiply_add(const uint32_t* a, int a_stride, const uint32_t* b, int b_stride, int columns) {
    for (int row = 0; row < num_rows(); row++)
      for (int column = 0; column < columns; column++)
        for (int lane = 0; lane < kLanes; lane++)
          add<T>(sums_[row][column], a[row * a_stride + lane], b[lane * b_stride + column]);
  }

 private:
  int num_rows() const { return rows_.first + rows_.second; }

  template <typename T>
  static void add(uint32_t& sum, uint32_t a, uint32_t b) {
    if constexpr (std::is_same_v<T, int8_t>) {
      for (int i = 0; i < 32; i += 8) sum += (uint32_t)((int)(a >> i & 0xff) * (int8_t)(b >> i));
    } else {
      float total;
      std::memcpy(&total, &sum, sizeof total);
      for (int i = 0; i < 32; i += 16) total += number(a >> i) * number(b >> i);
      std::memcpy(&sum, &total, sizeof total);
    }
  }

  static float number(uint32_t bfloat16) {
    const uint32_t bits = bfloat16 << 16;
    float number;
    std::memcpy(&number, &bits, sizeof number);
    return number;
  }

  TileRows rows_{0, 0};
  uint32_t sums_[2 * kLanes][4 * kLanes];
};

// `multiply` of lanes.h, for types of 16 and 8 bits, by a unit.
template <typename T, typename Unit>
void multiply_tiles(Unit& unit, const uint32_t* a, int a_stride, const uint32_t* b, int b_stride,
                    int depth, float* c, int c_stride, int rows, int columns, bool accumulate) {
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
      for (int k = 0; k < whole; k += kLanes)
        unit.template multiply_add<T>(a + r * a_stride + k, a_stride, b + k * b_stride + n,
                                      b_stride, width);
      unit.store(sums, c_stride, width);
    }
  }
  if (whole < depth)
    multiply<T>(a + whole, a_stride, b + whole * b_stride, b_stride, depth - whole, c, c_stride,
                rows, columns, accumulate || whole > 0);
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

// Whether tiles compute what they should, in blocks of all kinds.
inline bool amx_agrees_with_its_description() {
  constexpr int kMaxRows = 37, kMaxColumns = 64, kDepth = 37;
  constexpr int kShapes[][2] = {{21, 48}, {5, 64}, {16, 48}, {37, 64}, {1, 16}};
  uint32_t a[kMaxRows * kDepth], b[kDepth * kMaxColumns];
  float real[kMaxRows * kMaxColumns], emulated[kMaxRows * kMaxColumns];
  Amx amx;
  EmulatedAmx emulator;
  const auto agree = [&]<typename T>(uint32_t base, uint32_t step, uint32_t steps) {
    for (int i = 0; i < kMaxRows * kDepth; i++) a[i] = base + (uint32_t)(i * 7 % steps) * step;
    for (int i = 0; i < kDepth * kMaxColumns; i++) b[i] = base + (uint32_t)(i * 5 % steps) * step;
    for (const auto& [rows, columns] : kShapes) {
      for (const bool accumulate : {false, true}) {
        multiply_tiles<T>(amx, a, kDepth, b, columns, kDepth, real, columns, rows, columns,
                          accumulate);
        multiply_tiles<T>(emulator, a, kDepth, b, columns, kDepth, emulated, columns, rows, columns,
                          accumulate);
      }
      if (std::memcmp(real, emulated, sizeof(float) * rows * columns) != 0) return false;
    }
    return true;
  };
  // Whole numbers of 8 bits, and pairs of bfloat16 from 1 to 14 whose sums are exact.
  return agree.template operator()<int8_t>(0x80ff017f, 0x01030507, 251) &&
         agree.template operator()<at::BFloat16>(0x3f803f80, 0x00100020, 16);
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
