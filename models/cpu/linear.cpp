// Linear layers whose weights lie in the order in which they are read.
//
// Sixty-four rows of a weight, the outputs of one task, are a panel: for each lane of the summed
// axis the sixty-four lanes of its rows. A panel is read once from its first byte to its last. The
// last panel is narrower, and filled with zeros to a whole number of vectors.

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

int64_t padded(int64_t outputs) { return (outputs + kLanes - 1) / kLanes * kLanes; }

// Calls `visit(at in the packed weight, at in the plain one)` for every element that both have.
template <typename T, typename F>
void for_each(int64_t outputs, int64_t inputs, F&& visit) {
  constexpr int kValues = Lane<T>::kValues;
  const int64_t panels = (outputs + kPanel - 1) / kPanel;
  at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end_panel) {
    for (int64_t panel = begin; panel < end_panel; panel++) {
      const int64_t first = panel * kPanel;
      const int64_t count = std::min<int64_t>(kPanel, outputs - first), width = padded(count);
      for (int64_t k = 0; k < inputs; k += kValues)
        for (int64_t n = 0; n < count; n++)
          for (int64_t v = 0; v < kValues; v++)
            visit(first * inputs + k * width + n * kValues + v, (first + n) * inputs + k + v);
    }
  });
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
      const int used = (int)std::min<int64_t>(kPanel, outputs - first_output);
      const int width = (int)padded(used);
      const int count = (int)std::min<int64_t>(kTile, rows - first_row);
      const auto* a = reinterpret_cast<const uint32_t*>(input + first_row * inputs);
      const auto* b = reinterpret_cast<const uint32_t*>(weight + first_output * inputs);
      for (int k = 0; k < depth; k += kDepth)
        multiply<T>(a + k, depth, b + k * width, width, std::min(kDepth, depth - k), sums, kPanel,
                    count, width, k > 0);
      for (int r = 0; r < count; r++)
        for (int n = 0; n < used; n += kLanes) {
          const __mmask16 mask = first_lanes(used - n);
          Vec sum = _mm512_load_ps(sums + r * kPanel + n);
          if (bias) sum = _mm512_add_ps(sum, Lane<T>::load(bias + first_output + n, mask));
          Lane<T>::store(output + (first_row + r) * outputs + first_output + n, sum, mask);
        }
    }
  });
}

void check(const at::Tensor& weight, const at::Tensor& packed) {
  TORCH_CHECK(weight.dim() == 2 && weight.size(1) % 2 == 0,
              "a weight is [outputs, inputs]; allowed: an even number of inputs");
  TORCH_CHECK(packed.dim() == 1 && packed.numel() == padded(weight.size(0)) * weight.size(1) &&
                  packed.is_contiguous() && packed.scalar_type() == weight.scalar_type(),
              "a packed weight has one dimension, whole vectors and the same type");
}

void pack_weight(const at::Tensor& weight, const at::Tensor& packed) {
  check(weight, packed);
  const at::Tensor plain = weight.contiguous();
  with_type(weight, [&]<typename T>() {
    const T* from = plain.const_data_ptr<T>();
    T* to = packed.mutable_data_ptr<T>();
    for_each<T>(weight.size(0), weight.size(1), [&](int64_t packed_at, int64_t plain_at) { to[packed_at] = from[plain_at]; });
  });
}

void unpack_weight(const at::Tensor& packed, const at::Tensor& weight) {
  check(weight, packed);
  TORCH_CHECK(weight.is_contiguous(), "the weight is contiguous");
  with_type(weight, [&]<typename T>() {
    const T* from = packed.const_data_ptr<T>();
    T* to = weight.mutable_data_ptr<T>();
    for_each<T>(weight.size(0), weight.size(1), [&](int64_t packed_at, int64_t plain_at) { to[plain_at] = from[packed_at]; });
  });
}

at::Tensor packed_linear(const at::Tensor& input, const at::Tensor& weight,
                         int64_t outputs, const std::optional<at::Tensor>& bias) {
  const int64_t inputs = input.size(-1);
  TORCH_CHECK(weight.dim() == 1 && weight.is_contiguous() && inputs > 0 && outputs > 0 &&
                  weight.size(0) == inputs * padded(outputs),
              "inputs of width ", inputs, " and ", outputs, " outputs do not fit a packed weight of ",
              weight.numel());
  TORCH_CHECK(input.scalar_type() == weight.scalar_type(), "input and weight have one type");
  TORCH_CHECK(!bias || (bias->numel() == outputs && bias->is_contiguous() &&
                        bias->scalar_type() == input.scalar_type()),
              "the bias has one number for each output, of the type of the input");
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
  library.def("packed_linear(Tensor input, Tensor weight, int outputs, Tensor? bias) -> Tensor");
}

TORCH_LIBRARY_IMPL(headroom, CPU, library) {
  library.impl("pack_weight", &headroom::pack_weight);
  library.impl("unpack_weight", &headroom::unpack_weight);
  library.impl("packed_linear", &headroom::packed_linear);
}
