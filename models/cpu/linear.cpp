// Linear layers whose weights lie in the order in which they are read.
//
// Sixty-four rows of a weight, the outputs of one task, are a panel: for each lane of the summed
// axis the sixty-four lanes of its rows. A panel is read once from its first byte to its last.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>

#include "lanes.h"

namespace headroom {
namespace {

constexpr int kPanel = 64;   // outputs of a task
constexpr int kTile = 48;    // rows of input of a task
constexpr int kDepth = 256;  // lanes of the summed axis at once, so that a panel's part stays in a cache

// Calls `visit(at in the packed weight, at in the plain one)` for every element, in packed order.
template <typename T, typename F>
void for_each(int64_t outputs, int64_t inputs, F&& visit) {
  constexpr int kValues = Lane<T>::kValues;
  int64_t packed = 0;
  for (int64_t first = 0; first < outputs; first += kPanel) {
    const int64_t end = std::min<int64_t>(outputs, first + kPanel);
    for (int64_t k = 0; k < inputs; k += kValues)
      for (int64_t n = first; n < end; n++)
        for (int64_t v = 0; v < kValues; v++) visit(packed++, n * inputs + k + v);
  }
}

template <typename T>
void apply(const T* input, int64_t rows, int64_t inputs, const T* weight, int64_t outputs,
           const T* bias, T* output) {
  const int depth = (int)(inputs / Lane<T>::kValues);
  const int64_t panels = (outputs + kPanel - 1) / kPanel, tiles = (rows + kTile - 1) / kTile;
  std::atomic<int64_t> next{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    alignas(64) float sums[kTile * kPanel];
    for (int64_t task; (task = next.fetch_add(1)) < panels * tiles;) {
      const int64_t first_output = task / tiles * kPanel, first_row = task % tiles * kTile;
      const int width = (int)std::min<int64_t>(kPanel, outputs - first_output);
      const int count = (int)std::min<int64_t>(kTile, rows - first_row);
      const auto* a = reinterpret_cast<const uint32_t*>(input + first_row * inputs);
      const auto* b = reinterpret_cast<const uint32_t*>(weight + first_output * inputs);
      for (int k = 0; k < depth; k += kDepth)
        multiply<T>(a + k, depth, b + k * width, width, std::min(kDepth, depth - k), sums, kPanel,
                    count, width, k > 0);
      for (int r = 0; r < count; r++)
        for (int n = 0; n < width; n += kLanes) {
          Vec sum = _mm512_load_ps(sums + r * kPanel + n);
          if (bias) sum = _mm512_add_ps(sum, Lane<T>::load(bias + first_output + n, 0xffff));
          Lane<T>::store(output + (first_row + r) * outputs + first_output + n, sum, 0xffff);
        }
    }
  });
}

void check(const at::Tensor& weight, const at::Tensor& packed) {
  TORCH_CHECK(weight.dim() == 2 && weight.size(0) % kLanes == 0 && weight.size(1) % 2 == 0,
              "a weight is [outputs, inputs]; allowed: multiples of 16, and of 2");
  TORCH_CHECK(packed.dim() == 1 && packed.numel() == weight.numel() && packed.is_contiguous() &&
                  packed.scalar_type() == weight.scalar_type(),
              "a packed weight has one dimension, as many elements and the same type");
}

void pack_weight(const at::Tensor& weight, const at::Tensor& packed) {
  check(weight, packed);
  const at::Tensor plain = weight.contiguous();
  with_type(weight, [&]<typename T>() {
    const T* from = plain.const_data_ptr<T>();
    T* to = packed.mutable_data_ptr<T>();
    for_each<T>(weight.size(0), weight.size(1), [&](int64_t at, int64_t in) { to[at] = from[in]; });
  });
}

void unpack_weight(const at::Tensor& packed, const at::Tensor& weight) {
  check(weight, packed);
  TORCH_CHECK(weight.is_contiguous(), "the weight is contiguous");
  with_type(weight, [&]<typename T>() {
    const T* from = packed.const_data_ptr<T>();
    T* to = weight.mutable_data_ptr<T>();
    for_each<T>(weight.size(0), weight.size(1), [&](int64_t at, int64_t in) { to[in] = from[at]; });
  });
}

at::Tensor packed_linear(const at::Tensor& input, const at::Tensor& weight,
                         const std::optional<at::Tensor>& bias) {
  const int64_t inputs = input.size(-1);
  TORCH_CHECK(weight.dim() == 1 && inputs > 0 && weight.size(0) % (inputs * kLanes) == 0,
              "inputs of width ", inputs, " do not fit a packed weight of ", weight.numel());
  TORCH_CHECK(input.scalar_type() == weight.scalar_type(), "input and weight have one type");
  const int64_t outputs = weight.size(0) / inputs;
  TORCH_CHECK(!bias || bias->numel() == outputs, "the bias has one number for each output");
  const at::Tensor rows = input.contiguous();
  auto shape = input.sizes().vec();
  shape.back() = outputs;
  const at::Tensor output = at::empty(shape, input.options());
  with_type(input, [&]<typename T>() {
    apply<T>(rows.const_data_ptr<T>(), rows.numel() / inputs, inputs, weight.const_data_ptr<T>(),
             outputs, bias ? bias->const_data_ptr<T>() : nullptr, output.mutable_data_ptr<T>());
  });
  return output;
}

}  // namespace
}  // namespace headroom

TORCH_LIBRARY_FRAGMENT(headroom, library) {
  library.def("pack_weight(Tensor weight, Tensor(a!) packed) -> ()");
  library.def("unpack_weight(Tensor packed, Tensor(a!) weight) -> ()");
  library.def("packed_linear(Tensor input, Tensor weight, Tensor? bias) -> Tensor");
}

TORCH_LIBRARY_IMPL(headroom, CPU, library) {
  library.impl("pack_weight", &headroom::pack_weight);
  library.impl("unpack_weight", &headroom::unpack_weight);
  library.impl("packed_linear", &headroom::packed_linear);
}
