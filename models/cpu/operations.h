// Operations that others are made of; each is described where it is defined.

#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "crew.h"

namespace headroom {

// A packed weight that so many rows will be multiplied by, as what is read next.
Upcoming upcoming(const at::Tensor& weight, int64_t outputs, int64_t rows);

at::Tensor packed_linear(const at::Tensor& input, const at::Tensor& weight, int64_t outputs,
                         const std::optional<at::Tensor>& bias,
                         const std::optional<at::Tensor>& norm, double eps, bool swiglu,
                         const std::optional<at::Tensor>& residual);

at::Tensor int8_linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& scale,
                       const at::Tensor& row_sums, const std::optional<at::Tensor>& bias,
                       const std::optional<at::Tensor>& norm, double eps, bool swiglu,
                       const std::optional<at::Tensor>& residual);

void rotate_and_store(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                      const std::optional<at::Tensor>& cos, const std::optional<at::Tensor>& sin,
                      bool interleaved, const at::Tensor& pool, const at::Tensor& slots,
                      at::IntArrayRef places);

at::Tensor paged_attention(const at::Tensor& query, const at::Tensor& pool,
                           const at::Tensor& block_tables, const at::Tensor& query_start,
                           const at::Tensor& num_computed, at::IntArrayRef places,
                           at::ArrayRef<double> scale, at::IntArrayRef window,
                           at::ArrayRef<double> slopes, at::ArrayRef<double> sinks,
                           int64_t sink_tokens, double softcap);

}  // namespace headroom
