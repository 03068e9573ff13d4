// What lies between the products of a layer, each in one pass over its rows.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>

#include "cache.h"
#include "rows.h"

namespace headroom {
namespace {

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  const int64_t width = x.size(-1);
  TORCH_CHECK(weight.dim() == 1 && weight.size(0) == width && weight.is_contiguous() &&
                  weight.scalar_type() == x.scalar_type(),
              "the weight has one number for each of ", width, " elements, of their type");
  const at::Tensor input = x.contiguous(), output = at::empty_like(input);
  if (!width) return output;
  with_type(x, [&]<typename T>() {
    const T *from = input.const_data_ptr<T>(), *scale = weight.const_data_ptr<T>();
    T* to = output.mutable_data_ptr<T>();
    at::parallel_for(0, input.numel() / width, grain(width), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row++)
        norm_row(from + row * width, scale, width, (float)eps, to + row * width);
    });
  });
  return output;
}

// silu(first half) times the second half of each row.
at::Tensor silu_mul(const at::Tensor& x) {
  const int64_t width = x.size(-1) / 2;
  TORCH_CHECK(x.size(-1) % 2 == 0, "a gate and as many values");
  const at::Tensor input = x.contiguous();
  auto shape = x.sizes().vec();
  shape.back() = width;
  const at::Tensor output = at::empty(shape, x.options());
  if (!width) return output;
  with_type(x, [&]<typename T>() {
    const T* from = input.const_data_ptr<T>();
    T* to = output.mutable_data_ptr<T>();
    at::parallel_for(0, output.numel() / width, grain(width), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row++)
        swiglu_row(from + 2 * row * width, width, to + row * width);
    });
  });
  return output;
}

// Rotates the first elements of each head in pairs (i, i + half of them); the others stay.
at::Tensor rope(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
  const int64_t tokens = x.size(0), heads = x.size(1), head_dim = x.size(2), half = cos.size(-1);
  TORCH_CHECK(x.stride(2) == 1 && 2 * half <= head_dim, "heads are whole rows");
  TORCH_CHECK(cos.numel() == tokens * half && sin.numel() == tokens * half &&
                  cos.is_contiguous() && sin.is_contiguous() &&
                  cos.scalar_type() == x.scalar_type() && sin.scalar_type() == x.scalar_type(),
              "a cosine and a sine for each pair, of the type of the heads");
  const at::Tensor output = at::empty(x.sizes(), x.options());
  with_type(x, [&]<typename T>() {
    using L = Lane<T>;
    const T *from = x.const_data_ptr<T>(), *cosines = cos.const_data_ptr<T>();
    const T* sines = sin.const_data_ptr<T>();
    T* to = output.mutable_data_ptr<T>();
    at::parallel_for(0, tokens, grain(heads * head_dim), [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; token++)
        for (int64_t head = 0; head < heads; head++) {
          const T* in = from + token * x.stride(0) + head * x.stride(1);
          T* out = to + (token * heads + head) * head_dim;
          for (int64_t i = 0; i < half; i += kLanes) {
            const __mmask16 mask = first_lanes(half - i);
            const Vec c = L::load(cosines + token * half + i, mask);
            const Vec s = L::load(sines + token * half + i, mask);
            const Vec a = L::load(in + i, mask), b = L::load(in + half + i, mask);
            L::store(out + i, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)), mask);
            L::store(out + half + i, _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s)), mask);
          }
          std::memcpy(out + 2 * half, in + 2 * half, (head_dim - 2 * half) * sizeof(T));
        }
    });
  });
  return output;
}

// Keys and values `[tokens, kv_heads, head_dim]` to their slots; `places` as in CachePart.
void store_kv(const at::Tensor& key, const at::Tensor& value, const at::Tensor& pool,
              const at::Tensor& slots, at::IntArrayRef places) {
  const Places in_pool = Places::of(places);
  TORCH_CHECK(key.stride(2) == 1 && value.stride(2) == 1 && key.sizes() == value.sizes() &&
                  key.size(1) == in_pool.num_kv_heads && slots.numel() == key.size(0) &&
                  slots.is_contiguous() && pool.is_contiguous(),
              "a key, a value and a slot for each token");
  TORCH_CHECK(key.scalar_type() == pool.scalar_type() && value.scalar_type() == pool.scalar_type(),
              "keys, values and the cache have one type");
  const int64_t heads = key.size(1), head_dim = key.size(2), block_size = in_pool.block_size;
  const int64_t num_slots = in_pool.num_blocks(pool) * block_size;
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  for (int64_t token = 0; token < key.size(0); token++)
    TORCH_CHECK(slot[token] >= 0 && slot[token] < num_slots, "slot ", slot[token],
                "; allowed: 0 to ", num_slots - 1);
  with_type(key, [&]<typename T>() {
    const T *keys = key.const_data_ptr<T>(), *values = value.const_data_ptr<T>();
    T* memory = pool.mutable_data_ptr<T>();
    at::parallel_for(0, key.size(0), grain(heads * head_dim), [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; token++) {
        const int64_t block = slot[token] / block_size, within = slot[token] % block_size;
        T* to = memory + in_pool.block(block) + within * head_dim;
        for (int64_t head = 0; head < heads; head++, to += block_size * head_dim) {
          const T* k = keys + token * key.stride(0) + head * key.stride(1);
          const T* v = values + token * value.stride(0) + head * value.stride(1);
          std::memcpy(to, k, head_dim * sizeof(T));
          std::memcpy(to + in_pool.to_value(head_dim), v, head_dim * sizeof(T));
        }
      }
    });
  });
}

}  // namespace
}  // namespace headroom

TORCH_LIBRARY_FRAGMENT(headroom, library) {
  library.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  library.def("silu_mul(Tensor x) -> Tensor");
  library.def("rope(Tensor x, Tensor cos, Tensor sin) -> Tensor");
  library.def(
      "store_kv(Tensor key, Tensor value, Tensor(a!) pool, Tensor slots, int[] places) -> ()");
}

TORCH_LIBRARY_IMPL(headroom, CPU, library) {
  library.impl("rms_norm", &headroom::rms_norm);
  library.impl("silu_mul", &headroom::silu_mul);
  library.impl("rope", &headroom::rope);
  library.impl("store_kv", &headroom::store_kv);
}
