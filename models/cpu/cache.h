// Where keys and values lie in the pool: `models.kv_cache.CachePart.places`.

#pragma once

#include <ATen/ATen.h>

#include <cstdint>

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

  int64_t num_blocks(const at::Tensor& pool) const {
    return page_elements ? pool.numel() / page_elements * blocks_per_page : 0;
  }
};

}  // namespace headroom
