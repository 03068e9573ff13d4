// The layers of a decoder as one call.
//
// While a layer is computed its weights go through the caches of the processor, and what Python needs
// between two operations is not in them any more: in each of these pauses it waits for memory.

#include <ATen/ATen.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "crew.h"
#include "operations.h"

namespace headroom {
namespace {

using Tensors = std::vector<at::Tensor>;
using MaybeTensor = std::optional<at::Tensor>;

// A packed weight: its data; of 8 bits also what one is worth and the sums of rows.
struct Weight {
  Tensors parts;
  int64_t outputs;
  MaybeTensor bias;

  // It is read after the next product.
  void expect(int64_t rows) const { Crew::expect(upcoming(parts[0], outputs, rows)); }

  at::Tensor multiply(const at::Tensor& input, const MaybeTensor& norm, double eps, bool swiglu,
                      const MaybeTensor& residual) const {
    if (parts.size() == 1)
      return packed_linear(input, parts[0], outputs, bias, norm, eps, swiglu, residual);
    return int8_linear(input, parts[0], parts[1], parts[2], bias, norm, eps, swiglu, residual);
  }
};

// The heads of a layer, as `rotate_and_store` and `paged_attention` are told of them.
struct Heads {
  int64_t num_heads, rope, group;  // which of the rotations, -1 for none; which of the groups
  bool interleaved;
  at::Tensor pool;
  std::vector<int64_t> places, window;
  std::vector<double> scale, slopes;
  MaybeTensor sinks;
  int64_t sink_tokens;
  double softcap;
};

struct DecoderLayer {
  Heads heads;
  Weight qkv, output, up, down;
  at::Tensor attention_norm, mlp_norm;
  double attention_eps, mlp_eps;
};

// Of each rotation cosines and sines, of each group of layers that remember the same the others.
struct Step {
  const Tensors &cos, &sin, &slots, &block_tables, &query_start, &num_computed;
};

at::Tensor attend(const Heads& heads, const at::Tensor& projected, const Step& step) {
  const int64_t kv_heads = heads.places.at(4), rows = heads.num_heads + 2 * kv_heads;
  TORCH_CHECK(projected.size(1) % rows == 0, projected.size(1), " outputs are not ", rows, " heads");
  const at::Tensor each = projected.view({projected.size(0), rows, projected.size(1) / rows});
  const at::Tensor query = each.narrow(1, 0, heads.num_heads);
  MaybeTensor cos, sin;
  if (heads.rope >= 0) {
    cos = step.cos.at(heads.rope);
    sin = step.sin.at(heads.rope);
  }
  rotate_and_store(query, each.narrow(1, heads.num_heads, kv_heads),
                   each.narrow(1, heads.num_heads + kv_heads, kv_heads), cos, sin,
                   heads.interleaved, heads.pool, step.slots.at(heads.group), heads.places);
  std::vector<double> sinks;
  if (heads.sinks) {
    const at::Tensor numbers = heads.sinks->to(at::kDouble).contiguous();
    sinks.assign(numbers.const_data_ptr<double>(), numbers.const_data_ptr<double>() + numbers.numel());
  }
  return paged_attention(query, heads.pool, step.block_tables.at(heads.group),
                         step.query_start.at(heads.group), step.num_computed.at(heads.group),
                         heads.places, heads.scale, heads.window, heads.slopes, sinks,
                         heads.sink_tokens, heads.softcap)
      .flatten(1);
}

class DecoderStack : public torch::CustomClassHolder {
 public:
  // The next layer. Weights are those of the projections of queries, keys and values, of what heads
  // read, of gate and up, and of down: first all their data, then, of 8 bits, all scales and all sums.
  void add_layer(Tensors data, Tensors scales, Tensors row_sums, std::vector<int64_t> outputs,
                 std::vector<MaybeTensor> biases, Tensors norms, std::vector<double> eps,
                 int64_t num_heads, int64_t rope, bool interleaved, int64_t group, at::Tensor pool,
                 std::vector<int64_t> places, std::vector<double> scale,
                 std::vector<int64_t> window, std::vector<double> slopes, MaybeTensor sinks,
                 int64_t sink_tokens, double softcap) {
    TORCH_CHECK(data.size() == 4 && outputs.size() == 4 && biases.size() == 4 &&
                    (scales.empty() || scales.size() == 4) && row_sums.size() == scales.size() &&
                    norms.size() == 2 && eps.size() == 2,
                "a layer has 4 weights and 2 norms");
    TORCH_CHECK(pool.is_cpu(), "the cache is on ", pool.device(), "; allowed: cpu");
    const auto weight = [&](int i) {
      Tensors parts{data[i]};
      if (!scales.empty()) parts.insert(parts.end(), {scales[i], row_sums[i]});
      most_lanes_ = std::max(most_lanes_, (int64_t)data[i].nbytes() / (int64_t)sizeof(uint32_t));
      return Weight{std::move(parts), outputs[i], biases[i]};
    };
    layers_.push_back({{num_heads, rope, group, interleaved, std::move(pool), std::move(places),
                        std::move(window), std::move(scale), std::move(slopes), std::move(sinks),
                        sink_tokens, softcap},
                       weight(0), weight(1), weight(2), weight(3),
                       norms[0], norms[1], eps[0], eps[1]});
  }

  // Hidden states `[tokens, hidden]` before the first layer to those after the last.
  at::Tensor run(at::Tensor hidden, Tensors cos, Tensors sin, Tensors slots, Tensors block_tables,
                 Tensors query_start, Tensors num_computed) const {
    TORCH_CHECK(hidden.dim() == 2, "hidden states are [tokens, hidden]");
    for (const Tensors* each : {&cos, &sin, &slots, &block_tables, &query_start, &num_computed})
      for (const at::Tensor& tensor : *each)
        TORCH_CHECK(tensor.is_cpu(), "a step is on ", tensor.device(), "; allowed: cpu");
    const Step step{cos, sin, slots, block_tables, query_start, num_computed};
    // With products so small that one thread is enough, others would be waited for and do nothing.
    const bool alone = threads_for(hidden.size(0) * most_lanes_) == 1;
    Crew::gather(alone ? 1 : Crew::most_threads(), [&] {
      for (size_t i = 0; i < layers_.size(); i++) {
        const DecoderLayer& layer = layers_[i];
        layer.output.expect(hidden.size(0));
        const at::Tensor projected = layer.qkv.multiply(hidden, layer.attention_norm,
                                                        layer.attention_eps, false, std::nullopt);
        const at::Tensor read = attend(layer.heads, projected, step);
        layer.up.expect(hidden.size(0));
        hidden = layer.output.multiply(read, std::nullopt, 0., false, hidden);
        layer.down.expect(hidden.size(0));
        const at::Tensor wide =
            layer.up.multiply(hidden, layer.mlp_norm, layer.mlp_eps, false, std::nullopt);
        if (i + 1 < layers_.size()) layers_[i + 1].qkv.expect(hidden.size(0));
        hidden = layer.down.multiply(wide, std::nullopt, 0., true, hidden);
      }
    });
    return hidden;
  }

 private:
  std::vector<DecoderLayer> layers_;
  int64_t most_lanes_ = 0;  // of a weight
};

}  // namespace
}  // namespace headroom

TORCH_LIBRARY_FRAGMENT(headroom, library) {
  library.class_<headroom::DecoderStack>("DecoderStack")
      .def(torch::init<>())
      .def("add_layer", &headroom::DecoderStack::add_layer)
      .def("run", &headroom::DecoderStack::run);
}
