// Where keys and values lie in the pool: `models.kv_cache.CachePart.places`.

#pragma once

#include <cstdint>

#include "lanes.h"

namespace headroom {

struct Places {
  int64_t offset, page_elements, block_elements, blocks_per_page, num_kv_heads, block_size;

  static Places of(at::IntArrayRef numbers) {
    TORCH_CHECK(numbers.size() == 6, "places are 6 numbers, not ", numbers.size());
    const Places places{numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5]};
    TORCH_CHECK(places.offset >= 0 && places.blocks_per_page > 0 && places.num_kv_heads > 0 &&
                    places.block_size > 0,
                "places are positive");
    return places;
  }

  // Elements from the start of the pool to the first key of a block.
  int64_t block(int64_t number) const {
    return offset + number / blocks_per_page * page_elements +
           number % blocks_per_page * block_elements;
  }

  // Elements from a key to its value.
  int64_t to_value(int64_t head_dim) const { return num_kv_heads * block_size * head_dim; }

  // Of 8 bits: elements from a block's first key to the scales, of all keys, then of all values.
  int64_t to_scales(int64_t head_dim) const { return 2 * to_value(head_dim); }

  int64_t num_blocks(const at::Tensor& pool) const {
    return page_elements ? pool.numel() / page_elements * blocks_per_page : 0;
  }
};

// Calls a function of the element types of queries and of the cache: the same, or 8 bits.
template <typename F>
void with_types(const at::Tensor& query, const at::Tensor& pool, F&& function) {
  TORCH_CHECK(pool.is_contiguous(), "the cache lies in one piece");
  with_type(query, [&]<typename T>() {
    if (pool.scalar_type() == at::kChar) {
      TORCH_CHECK(query.size(-1) % 4 == 0, "head_dim is ", query.size(-1),
                  "; allowed with a cache of 8 bits: multiples of 4");
      function.template operator()<T, int8_t>();
    } else {
      TORCH_CHECK(query.scalar_type() == pool.scalar_type(), "heads and the cache have one type");
      function.template operator()<T, T>();
    }
  });
}

}  // namespace headroom
