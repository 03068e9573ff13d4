// What lies between the products of a layer, each in one pass over its rows.

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "cache.h"
#include "crew.h"
#include "operations.h"
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
    for_rows(input.numel() / width, width, [&](int64_t begin, int64_t end) {
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
    for_rows(output.numel() / width, width, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row++)
        swiglu_row(from + 2 * row * width, width, to + row * width);
    });
  });
  return output;
}

// A row of less than a vector; the lanes that are left are the least of numbers.
template <typename T>
Vec load_few(const T* row, int64_t count) {
  float few[kLanes];
  std::fill(few, few + kLanes, -INFINITY);
  std::copy_n(row, count, few);
  return load(few);
}

// The largest number of each row and where it is first; no number where one of the row is none.
template <typename T>
void largest_of_rows(const T* from, int64_t rows, int64_t width, T* value, int64_t* place) {
  using L = Lane<T>;
  constexpr int64_t kPart = 1024;  // of a row, where its largest is looked for once more
  for_rows(rows, width, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      const T* row = from + r * width;
      float highest = -INFINITY;
      int64_t its_part = 0;
      Mask none = no_lanes();
      for (int64_t part = 0; part < width; part += kPart) {
        const int64_t last = std::min(width, part + kPart);
        Vec most = splat(-INFINITY);
        for (int64_t i = part; i < last; i += kLanes) {
          // The last vector may begin before its turn: what is looked at twice changes nothing.
          const int64_t at = std::max<int64_t>(0, std::min(i, last - kLanes));
          const Vec numbers = width < kLanes ? load_few(row, width)
                                             : L::load(row + at, first_lanes(kLanes));
          none = either(none, no_numbers(numbers));
          most = max(most, numbers);
        }
        if (const float of_part = max_of(most); of_part > highest) {
          highest = of_part;
          its_part = part;
        }
      }
      value[r] = any(none) ? NAN : highest;
      place[r] = any(none) ? 0 : std::find(row + its_part, row + width, (T)highest) - row;
    }
  });
}

std::tuple<at::Tensor, at::Tensor> largest(const at::Tensor& x) {
  TORCH_CHECK(x.dim() == 2 && x.size(1) > 0, "rows of elements");
  const at::Tensor input = x.contiguous();
  const at::Tensor values = at::empty({x.size(0)}, x.options());
  const at::Tensor places = at::empty({x.size(0)}, x.options().dtype(at::kLong));
  with_type(x, [&]<typename T>() {
    largest_of_rows(input.const_data_ptr<T>(), x.size(0), x.size(1), values.mutable_data_ptr<T>(),
                    places.mutable_data_ptr<int64_t>());
  });
  return {values, places};
}

template <typename T>
Rotation<T> rotation_of(const at::Tensor& cos, const at::Tensor& sin, bool interleaved,
                        const at::Tensor& heads) {
  const int64_t tokens = heads.size(0), head_dim = heads.size(2), half = cos.size(-1);
  TORCH_CHECK(2 * half <= head_dim && cos.numel() == tokens * half && sin.sizes() == cos.sizes() &&
                  cos.is_contiguous() && sin.is_contiguous() &&
                  cos.scalar_type() == heads.scalar_type() &&
                  sin.scalar_type() == heads.scalar_type(),
              "a cosine and a sine for each pair, of the type of the heads");
  return {cos.const_data_ptr<T>(), sin.const_data_ptr<T>(), half, interleaved};
}

// Rotates the first elements of each head in pairs; the others stay.
at::Tensor rope(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
                bool interleaved) {
  const int64_t tokens = x.size(0), heads = x.size(1), head_dim = x.size(2);
  TORCH_CHECK(x.stride(2) == 1, "heads are whole rows");
  const at::Tensor output = at::empty(x.sizes(), x.options());
  with_type(x, [&]<typename T>() {
    const Rotation<T> rotation = rotation_of<T>(cos, sin, interleaved, x);
    const int64_t turned = 2 * rotation.half;
    const T* from = x.const_data_ptr<T>();
    T* to = output.mutable_data_ptr<T>();
    for_rows(tokens, heads * head_dim, [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; token++)
        for (int64_t head = 0; head < heads; head++) {
          const T* in = from + token * x.stride(0) + head * x.stride(1);
          T* out = to + (token * heads + head) * head_dim;
          rotation.turn(in, token, out);
          std::memcpy(out + turned, in + turned, (head_dim - turned) * sizeof(T));
        }
    });
  });
  return output;
}

// One row to its place in a block, as it is.
template <typename T>
void keep(const T* row, int64_t at, int64_t head_dim, T* block, const T*) {
  std::memcpy(block + at * head_dim, row, head_dim * sizeof(T));
}

// The same with 8 bits and a scale.
template <typename T>
void keep(const T* row, int64_t at, int64_t head_dim, int8_t* block, int8_t* scales) {
  reinterpret_cast<float*>(scales)[at] = quantize_row<0>(row, head_dim, block + at * head_dim);
}

}  // namespace

// Rotates queries `[tokens, heads, head_dim]` where they are, and writes rotated keys and values
// `[tokens, kv_heads, head_dim]` to their slots; `places` as in CachePart.
void rotate_and_store(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                      const std::optional<at::Tensor>& cos, const std::optional<at::Tensor>& sin,
                      bool interleaved, const at::Tensor& pool, const at::Tensor& slots,
                      at::IntArrayRef places) {
  const Places in_pool = Places::of(places);
  const int64_t tokens = key.size(0), kv_heads = key.size(1), head_dim = key.size(2);
  TORCH_CHECK(query.stride(2) == 1 && key.stride(2) == 1 && value.stride(2) == 1 &&
                  query.size(0) == tokens && query.size(2) == head_dim &&
                  key.sizes() == value.sizes() && kv_heads == in_pool.num_kv_heads &&
                  slots.numel() == tokens && slots.is_contiguous(),
              "queries, a key, a value and a slot for each token");
  TORCH_CHECK(query.scalar_type() == key.scalar_type() && value.scalar_type() == key.scalar_type(),
              "heads have one type");
  TORCH_CHECK(cos.has_value() == sin.has_value(), "a sine for each cosine");
  const int64_t block_size = in_pool.block_size;
  const int64_t num_slots = in_pool.num_blocks(pool) * block_size;
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  for (int64_t token = 0; token < tokens; token++)
    TORCH_CHECK(slot[token] >= 0 && slot[token] < num_slots, "slot ", slot[token],
                "; allowed: 0 to ", num_slots - 1);
  with_types(key, pool, [&]<typename T, typename Kept>() {
    const Rotation<T> rotation =
        cos ? rotation_of<T>(*cos, *sin, interleaved, key) : Rotation<T>{};
    const int64_t turned = 2 * rotation.half, heads = query.size(1);
    const T *keys = key.const_data_ptr<T>(), *values = value.const_data_ptr<T>();
    T* queries = query.mutable_data_ptr<T>();
    Kept* memory = pool.mutable_data_ptr<Kept>();
    const int64_t width = (heads + 2 * kv_heads) * head_dim;
    for_rows(tokens, width, [&](int64_t begin, int64_t end) {
      std::vector<T> rotated(head_dim);
      for (int64_t token = begin; token < end; token++) {
        for (int64_t head = 0; head < heads; head++) {
          T* q = queries + token * query.stride(0) + head * query.stride(1);
          rotation.turn(q, token, q);
        }
        const int64_t block = slot[token] / block_size, within = slot[token] % block_size;
        Kept* to = memory + in_pool.block(block);
        for (int64_t head = 0; head < kv_heads; head++) {
          const T* k = keys + token * key.stride(0) + head * key.stride(1);
          const T* v = values + token * value.stride(0) + head * value.stride(1);
          rotation.turn(k, token, rotated.data());
          std::memcpy(rotated.data() + turned, k + turned, (head_dim - turned) * sizeof(T));
          keep(rotated.data(), head * block_size + within, head_dim, to,
               to + in_pool.to_scales(head_dim));
          keep(v, (kv_heads + head) * block_size + within, head_dim, to,
               to + in_pool.to_scales(head_dim));
        }
      }
    });
  });
}

}  // namespace headroom

TORCH_LIBRARY_FRAGMENT(headroom, library) {
  library.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  library.def("silu_mul(Tensor x) -> Tensor");
  library.def("largest(Tensor x) -> (Tensor, Tensor)");
  library.def("rope(Tensor x, Tensor cos, Tensor sin, bool interleaved) -> Tensor");
  library.def(
      "rotate_and_store(Tensor(a!) query, Tensor key, Tensor value, Tensor? cos, Tensor? sin, "
      "bool interleaved, Tensor(b!) pool, Tensor slots, int[] places) -> ()");
}

TORCH_LIBRARY_IMPL(headroom, CPU, library) {
  library.impl("rms_norm", &headroom::rms_norm);
  library.impl("silu_mul", &headroom::silu_mul);
  library.impl("largest", &headroom::largest);
  library.impl("rope", &headroom::rope);
  library.impl("rotate_and_store", &headroom::rotate_and_store);
}
