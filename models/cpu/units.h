// What small products are computed by: vectors, or the matrix unit of a processor.

#pragma once

#include <algorithm>
#include <atomic>

#include "tiles.h"

namespace headroom {

enum class Unit { kVectors, kAmx, kEmulatedAmx };

// Of numbers of 16 and 8 bits, in all calls from now on.
inline std::atomic<Unit> unit_in_use{Unit::kVectors};

constexpr int kMostRows = 64;  // of a task, by any unit

struct ByVectors {
  static constexpr bool kHasTiles = false;
  static constexpr int kRows = 48;  // of a task, which share what is packed
  static constexpr int kStep = 1;   // lanes of the summed axis at once
  // Of those of a weight, so that its part stays in a cache.
  static constexpr int kDepth = 256, kDepthOfOneBlock = kDepth;

  // Of a weight in memory; tiles leave time for something else.
  template <typename T, typename F, typename... Args>
  void multiply(F&&, Args... args) {
    headroom::multiply<T>(args...);
  }

  // Of what lies in a cache.
  template <typename T, typename... Args>
  void multiply_cached(Args... args) {
    headroom::multiply<T>(args...);
  }
};

template <typename TileUnit>
struct ByTiles {
  static constexpr bool kHasTiles = true;
  static constexpr int kRows = kMostRows;
  static constexpr int kStep = kLanes;
  // Of a weight, so that a panel's part stays in the second-level cache; where one block is all there is,
  // and memory the limit, in the first-level cache, from which its second half of rows reads it.
  static constexpr int kDepth = 1024, kDepthOfOneBlock = 64;

  template <typename T, typename F, typename... Args>
  void multiply(F&& meanwhile, Args... args) {
    multiply_tiles<T>(unit, args..., meanwhile);
  }

  template <typename T, typename... Args>
  void multiply_cached(Args... args) {
    multiply_cached_tiles<T>(unit, args...);
  }

  TileUnit unit;
};

// Calls a function of the unit that products of lanes of this type are computed by.
template <typename T, typename F>
void with_unit(F&& function) {
  if constexpr (Lane<T>::kValues > 1) {
    const Unit by = unit_in_use;
    if (by == Unit::kAmx) return function.template operator()<ByTiles<Amx>>();
    if (by == Unit::kEmulatedAmx) return function.template operator()<ByTiles<EmulatedAmx>>();
  }
  function.template operator()<ByVectors>();
}

}  // namespace headroom
