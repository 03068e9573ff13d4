// Linear layers whose weights lie in the order in which they are read.
//
// Sixty-four rows of a weight, the outputs of one task, are a panel: for each lane of the summed
// axis the sixty-four lanes of its rows. A panel is read once from its first byte to its last. The
// last panel is narrower, and filled with zeros to a whole number of vectors.
//
// Weights of 8 bits have a scale for each output; inputs get one for each row, so that what a token
// becomes does not depend on its batch mates, and sums of whole numbers are exact.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "crew.h"
#include "operations.h"
#include "rows.h"
#include "units.h"

namespace headroom {
namespace {

constexpr int kPanel = 64;         // outputs of a task
// So few rows are multiplied faster than their weight is read; what comes next is asked for only so many
// lanes of the summed axis ahead.
constexpr int kFewInputs = kLanes;
constexpr int kLeadOfFew = 64;
constexpr int kZeroPoint = 128;    // what the whole number of an input is more than its value

int64_t padded(int64_t outputs) { return (outputs + kLanes - 1) / kLanes * kLanes; }

int64_t panels_of(int64_t outputs) { return (outputs + kPanel - 1) / kPanel; }

// Calls `visit(at in the packed weight, at in the plain one)` for every element that both have.
template <typename T, typename F>
void for_each(int64_t outputs, int64_t inputs, F&& visit) {
  constexpr int kValues = Lane<T>::kValues;
  const int64_t panels = panels_of(outputs);
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

// How a product is divided among threads. A task is a panel and as many rows as stay in a cache beside
// it while all panels go by, so that one thread alone reads a panel from memory, unless that leaves
// threads without a task. Each thread begins with neighbouring panels of its own; one that has none
// left helps another from its end.
class Shares {
 public:
  struct Task {
    int64_t panel, first_row;
  };

  Shares(int64_t rows, int64_t outputs, int64_t depth, int64_t most_rows, int64_t threads)
      : panels_(panels_of(outputs)), own_(threads) {
    const int64_t tiles = (rows + most_rows - 1) / most_rows;
    const int64_t for_threads = (kTasksPerThread * threads + panels_ - 1) / panels_;
    const int64_t for_cache = (rows * depth + kLanesOfRows - 1) / kLanesOfRows;
    const int64_t parts = std::clamp(std::max(for_threads, for_cache), (int64_t)1, tiles);
    rows_of_task = (tiles + parts - 1) / parts * most_rows;
    const int64_t tasks_of_panel = (rows + rows_of_task - 1) / rows_of_task;
    for (int64_t number = 0; number < threads; number++) {
      const Part panels = own_panels(number);
      own_[number].left = (uint64_t)((panels.end - panels.begin) * tasks_of_panel);
    }
  }

  // What a thread does next, if anything is left.
  std::optional<Task> take(int number) { return find<true>(number); }

  // What it will do after that, unless another comes first.
  std::optional<Task> expected(int number) { return find<false>(number); }

  int64_t rows_of_task;

 private:
  static constexpr int64_t kTasksPerThread = 4;
  static constexpr int64_t kLanesOfRows = 1 << 18;  // half of a small second-level cache

  // The first and the end of what is left of a thread's tasks.
  static constexpr uint64_t kFirst = 1ull << 32;
  static int64_t first_of(uint64_t left) { return (int64_t)(left / kFirst); }
  static int64_t end_of(uint64_t left) { return (int64_t)(left % kFirst); }

  struct alignas(64) Own {
    std::atomic<uint64_t> left{0};
  };

  // The first task of a thread's own, or else the last of another's.
  template <bool kTake>
  std::optional<Task> find(int number) {
    const int threads = (int)own_.size();
    for (int other = 0; other < threads; other++) {
      const int owner = (number + other) % threads;
      std::atomic<uint64_t>& left = own_[owner].left;
      for (uint64_t now = left; first_of(now) < end_of(now);) {
        const int64_t index = other ? end_of(now) - 1 : first_of(now);
        if (!kTake || left.compare_exchange_weak(now, other ? now - 1 : now + kFirst))
          return task(owner, index);
      }
    }
    return {};
  }

  Part own_panels(int64_t number) const { return Part::of(number, (int64_t)own_.size(), panels_); }

  Task task(int64_t owner, int64_t index) const {
    const Part panels = own_panels(owner);
    const int64_t count = panels.end - panels.begin;
    return {panels.begin + index % count, index / count * rows_of_task};
  }

  const int64_t panels_;
  std::vector<Own> own_;
};

// Calls `finish(row, first output, number of outputs, their sums)` for every row and panel. The
// numbers of a row begin `stride` lanes after those of the row before.
//
// While a part of a weight is multiplied, the next one comes to a cache, of the same panel or of
// the one that this thread will probably take, and, by tiles, the rows before are finished.
template <typename T, typename F>
void multiply_panels(const uint32_t* input, int stride, int64_t rows, int depth, const T* weight,
                     int64_t outputs, F&& finish) {
  if (rows == 0) return;
  const auto start_of = [&](int64_t panel) {
    return reinterpret_cast<const uint32_t*>(weight) + panel * kPanel * depth;
  };
  const auto width_of = [&](int64_t panel) {
    return (int)padded(std::min<int64_t>(kPanel, outputs - panel * kPanel));
  };
  with_unit<T>([&]<typename Product>() {
    constexpr int kRows = Product::kRows;
    const bool few = rows <= kFewInputs;
    const int most = few || rows > kRows ? Product::kDepth : Product::kDepthOfOneBlock;
    // What is asked for while a part is multiplied begins so many lanes of the summed axis later.
    const int lead = few ? kLeadOfFew : most;
    const int64_t threads = threads_for(rows * outputs * depth);
    Shares shares(rows, outputs, depth, kRows, threads);
    Crew::advance();
    Crew::share(threads, [&](int number) {
      alignas(64) float sums_of_two[2][kRows * kPanel];
      float *sums = sums_of_two[0], *sums_before = sums_of_two[1];
      struct {
        int64_t row, first_output;
        int used, rows, finished;
      } before{};
      const auto finish_before = [&](int most_rows) {
        const int end = std::min(before.rows, before.finished + most_rows);
        for (int& r = before.finished; r < end; r++)
          finish(before.row + r, before.first_output, before.used, sums_before + r * kPanel);
      };
      Product product;
      while (const auto task = shares.take(number)) {
        const auto expected = shares.expected(number);
        const int64_t panel = task->panel, first_row = task->first_row;
        const int width = width_of(panel);
        const int used = (int)std::min<int64_t>(kPanel, outputs - panel * kPanel);
        const auto* b = start_of(panel);
        const int64_t end_row = std::min(rows, first_row + shares.rows_of_task);
        Ahead ahead;
        for (int64_t row = first_row; row < end_row; row += kRows) {
          const int count = (int)std::min<int64_t>(kRows, end_row - row);
          const auto* a = input + row * stride;
          const int steps = (int)blocks_of(count, width) * (depth / kLanes);
          const int at_once = steps ? (before.rows + steps - 1) / steps : 0;
          const auto meanwhile = [&] {
            ahead.ask_for_a_share();
            finish_before(at_once);
          };
          for (int k = 0; k < depth; k += most) {
            const int lanes = std::min(most, depth - k);
            if (row == first_row) {
              ahead = {};
              ahead.add(b + std::min(k + lead, depth) * width,
                        b + std::min(k + lead + lanes, depth) * width);
              if (k + lanes == depth && expected) {
                const auto* next = start_of(expected->panel);
                ahead.add(next, next + std::min(lead, depth) * width_of(expected->panel));
              }
              const int64_t rows_left = k + lanes == depth ? end_row - row : count;
              ahead.steps = blocks_of(count, width) * (lanes / kLanes) +
                            blocks_of((int)rows_left - count, width) * (depth / kLanes);
            }
            product.template multiply<T>(meanwhile, a + k, stride, b + k * width, width, lanes, sums,
                                         kPanel, count, width, k > 0);
          }
          finish_before(kRows);
          before = {row, panel * kPanel, used, count, 0};
          std::swap(sums, sums_before);
        }
      }
      finish_before(kRows);
    });
  });
}

// For tests: a child that answers, or dies of a signal first.
bool answer_of_child(bool answer, int64_t dies_of) {
  return says_in_child([&] { return dies_of ? raise((int)dies_of) == 0 : answer; });
}

void multiply_by(const std::string& name) {
  const std::pair<const char*, Unit> known[] = {
      {"vectors", Unit::kVectors}, {"amx", Unit::kAmx}, {"emulated_amx", Unit::kEmulatedAmx}};
  for (const auto& [own, value] : known)
    if (name == own) return unit_in_use.store(value);
  TORCH_CHECK(false, "the unit is ", name, "; allowed: vectors, amx, emulated_amx");
}

// A linear layer, with what comes right before and after it.
struct Layer {
  const at::Tensor& input;
  const std::optional<at::Tensor>& bias;
  const std::optional<at::Tensor>& norm;  // of the weights of a norm; excludes the next
  double eps;
  bool swiglu;
  const std::optional<at::Tensor>& residual;

  int64_t inputs() const { return swiglu ? input.size(-1) / 2 : input.size(-1); }
  int64_t rows() const { return input.size(-1) ? input.numel() / input.size(-1) : 0; }

  at::Tensor output(int64_t outputs) const {
    auto shape = input.sizes().vec();
    shape.back() = outputs;
    return at::empty(shape, input.options());
  }

  void check(int64_t outputs) const {
    const auto fits = [&](const std::optional<at::Tensor>& vector, int64_t size) {
      return !vector || (vector->numel() == size && vector->is_contiguous() &&
                         vector->scalar_type() == input.scalar_type());
    };
    TORCH_CHECK(fits(bias, outputs),
                "the bias has one number for each output, of the type of the input");
    TORCH_CHECK(fits(norm, inputs()) && !(norm && swiglu) &&
                    (!swiglu || input.size(-1) % 2 == 0),
                "before it comes a norm with one number for each input, of their type, or SwiGLU");
    auto shape = input.sizes().vec();
    shape.back() = outputs;
    TORCH_CHECK(fits(residual, rows() * outputs) && (!residual || residual->sizes() == shape),
                "the residual is what the output is");
  }
};

// From one row to the next, in elements: an odd number of cache lines. Of an even one many rows would
// share few places of a cache.
template <typename T>
int64_t stride_of(int64_t inputs) {
  constexpr int64_t kLine = Ahead::kLine / sizeof(T);
  return ((inputs + kLine - 1) / kLine | 1) * kLine;
}

// The rows that are multiplied.
template <typename T>
class Rows {
 public:
  explicit Rows(const Layer& layer)
      : plain_(layer.input.contiguous()), stride_(layer.inputs()) {
    const int64_t inputs = layer.inputs(), rows = layer.rows();
    data_ = plain_.const_data_ptr<T>();
    if (!layer.norm && !layer.swiglu) return;
    stride_ = stride_of<T>(inputs);
    own_ = at::empty({rows, stride_}, plain_.options());
    T* own = own_.mutable_data_ptr<T>();
    const T* scale = layer.norm ? layer.norm->const_data_ptr<T>() : nullptr;
    for_rows(rows, inputs, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row++)
        if (scale)
          norm_row(data_ + row * inputs, scale, inputs, (float)layer.eps, own + row * stride_);
        else
          swiglu_row(data_ + 2 * row * inputs, inputs, own + row * stride_);
    });
    data_ = own;
  }

  const T* row(int64_t number) const { return data_ + number * stride_; }
  int stride_in_lanes() const { return (int)(stride_ / Lane<T>::kValues); }

 private:
  at::Tensor plain_;
  int64_t stride_;
  at::Tensor own_;  // from the start of a cache line on, as tensors are
  const T* data_;
};

// What becomes of sums.
template <typename T>
class Finish {
 public:
  Finish(const Layer& layer, const at::Tensor& output)
      : bias_(layer.bias ? layer.bias->const_data_ptr<T>() : nullptr),
        residual_(layer.residual ? layer.residual->const_data_ptr<T>() : nullptr),
        output_(output.mutable_data_ptr<T>()),
        outputs_(output.size(-1)) {}

  // Of `used` neighbouring outputs of a row, whose sums `sums(n, lanes)` gives sixteen at once.
  template <typename F>
  void operator()(int64_t row, int64_t first, int used, F&& sums) const {
    using L = Lane<T>;
    const int64_t at = row * outputs_ + first;
    const T* bias = bias_ ? bias_ + first : nullptr;
    const T* residual = residual_ ? residual_ + at : nullptr;
    T* to = output_ + at;
    for (int n = 0; n < used; n += kLanes) {
      const Leading lanes = first_lanes(used - n);
      Vec sum = sums(n, lanes);
      if (bias) sum = add(sum, L::load(bias + n, lanes));
      // Rounded twice, as it is in two operations.
      if (residual) sum = add(L::round(sum), L::load(residual + n, lanes));
      L::store(to + n, sum, lanes);
    }
  }

 private:
  const T *bias_, *residual_;
  T* output_;
  int64_t outputs_;
};

template <typename T>
void apply(const Layer& layer, const T* weight, const at::Tensor& output) {
  const Rows<T> rows(layer);
  const Finish<T> finish(layer, output);
  multiply_panels<T>(reinterpret_cast<const uint32_t*>(rows.row(0)), rows.stride_in_lanes(),
                     layer.rows(),
                     (int)(layer.inputs() / Lane<T>::kValues), weight, output.size(-1),
                     [&](int64_t row, int64_t first, int used, const float* sums) {
                       finish(row, first, used, [&](int n, Leading) { return load(sums + n); });
                     });
}

template <typename T>
void apply_int8(const Layer& layer, const int8_t* weight, const float* scale,
                const int32_t* row_sums, const at::Tensor& output) {
  const int64_t inputs = layer.inputs(), num_rows = layer.rows();
  const int64_t stride = stride_of<int8_t>(inputs);
  const Rows<T> rows(layer);
  const Finish<T> finish(layer, output);
  const at::Tensor quantized = at::empty({num_rows, stride}, layer.input.options().dtype(at::kByte));
  auto* bytes = quantized.mutable_data_ptr<uint8_t>();
  const auto input_scale = std::make_unique_for_overwrite<float[]>(num_rows);
  for_rows(num_rows, inputs, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++)
      input_scale[row] = quantize_row<kZeroPoint>(rows.row(row), inputs, bytes + row * stride);
  });
  multiply_panels<int8_t>(
      reinterpret_cast<const uint32_t*>(bytes), (int)(stride / Lane<int8_t>::kValues),
      num_rows, (int)(inputs / Lane<int8_t>::kValues), weight, output.size(-1),
      [&](int64_t row, int64_t first, int used, const float* sums) {
        finish(row, first, used, [&](int n, Leading lanes) {
          const Ints zero = mul(load_ints(row_sums + first + n, lanes), splat_int(kZeroPoint));
          const Vec worth = mul(load(scale + first + n, lanes), splat(input_scale[row]));
          return mul(floats_of(sub(load_ints(sums + n), zero)), worth);
        });
      });
}

// Calls a function of the element type of a weight.
template <typename F>
void with_weight_type(const at::Tensor& weight, F&& function) {
  if (weight.scalar_type() == at::kChar)
    function.template operator()<int8_t>();
  else
    with_type(weight, function);
}

void check(const at::Tensor& weight, const at::Tensor& packed) {
  int64_t together = 1;
  with_weight_type(weight, [&]<typename T>() { together = Lane<T>::kValues; });
  TORCH_CHECK(weight.dim() == 2 && weight.size(1) % together == 0, "a weight is [outputs, inputs]; ",
              "allowed: inputs that are a multiple of ", together);
  TORCH_CHECK(packed.dim() == 1 && packed.numel() == padded(weight.size(0)) * weight.size(1) &&
                  packed.is_contiguous() && packed.scalar_type() == weight.scalar_type(),
              "a packed weight has one dimension, whole vectors and the same type");
}

void pack_weight(const at::Tensor& weight, const at::Tensor& packed) {
  check(weight, packed);
  const at::Tensor plain = weight.contiguous();
  with_weight_type(weight, [&]<typename T>() {
    const T* from = plain.const_data_ptr<T>();
    T* to = packed.mutable_data_ptr<T>();
    for_each<T>(weight.size(0), weight.size(1),
                [&](int64_t packed_at, int64_t plain_at) { to[packed_at] = from[plain_at]; });
  });
}

void unpack_weight(const at::Tensor& packed, const at::Tensor& weight) {
  check(weight, packed);
  TORCH_CHECK(weight.is_contiguous(), "the weight is contiguous");
  with_weight_type(weight, [&]<typename T>() {
    const T* from = packed.const_data_ptr<T>();
    T* to = weight.mutable_data_ptr<T>();
    for_each<T>(weight.size(0), weight.size(1),
                [&](int64_t packed_at, int64_t plain_at) { to[plain_at] = from[packed_at]; });
  });
}

}  // namespace

Upcoming upcoming(const at::Tensor& weight, int64_t outputs, int64_t rows) {
  const int64_t bytes_of_output = (int64_t)weight.nbytes() / padded(outputs);
  return {static_cast<const char*>(weight.const_data_ptr()), kPanel * bytes_of_output,
          panels_of(outputs),
          threads_for(rows * outputs * bytes_of_output / (int64_t)sizeof(uint32_t))};
}

at::Tensor packed_linear(const at::Tensor& input, const at::Tensor& weight, int64_t outputs,
                         const std::optional<at::Tensor>& bias,
                         const std::optional<at::Tensor>& norm, double eps, bool swiglu,
                         const std::optional<at::Tensor>& residual) {
  const Layer layer{input, bias, norm, eps, swiglu, residual};
  TORCH_CHECK(weight.dim() == 1 && weight.is_contiguous() && layer.inputs() > 0 && outputs > 0 &&
                  weight.size(0) == layer.inputs() * padded(outputs),
              "inputs of width ", layer.inputs(), " and ", outputs,
              " outputs do not fit a packed weight of ", weight.numel());
  TORCH_CHECK(input.scalar_type() == weight.scalar_type(), "input and weight have one type");
  with_type(input, [&]<typename T>() {
    TORCH_CHECK(layer.inputs() % Lane<T>::kValues == 0, "inputs fill whole lanes");
  });
  layer.check(outputs);
  const at::Tensor output = layer.output(outputs);
  with_type(input, [&]<typename T>() { apply<T>(layer, weight.const_data_ptr<T>(), output); });
  return output;
}

at::Tensor int8_linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& scale,
                       const at::Tensor& row_sums, const std::optional<at::Tensor>& bias,
                       const std::optional<at::Tensor>& norm, double eps, bool swiglu,
                       const std::optional<at::Tensor>& residual) {
  const Layer layer{input, bias, norm, eps, swiglu, residual};
  const int64_t outputs = scale.numel();
  TORCH_CHECK(weight.dim() == 1 && weight.is_contiguous() && layer.inputs() > 0 &&
                  layer.inputs() % 4 == 0 && outputs > 0 && weight.scalar_type() == at::kChar &&
                  weight.size(0) == layer.inputs() * padded(outputs),
              "inputs of width ", layer.inputs(), " and ", outputs,
              " outputs do not fit a packed weight of ", weight.numel());
  TORCH_CHECK(scale.is_contiguous() && scale.scalar_type() == at::kFloat &&
                  row_sums.is_contiguous() && row_sums.scalar_type() == at::kInt &&
                  row_sums.numel() == outputs,
              "a scale and a sum for each output");
  layer.check(outputs);
  const at::Tensor output = layer.output(outputs);
  with_type(input, [&]<typename T>() {
    apply_int8<T>(layer, weight.const_data_ptr<int8_t>(), scale.const_data_ptr<float>(),
                  row_sums.const_data_ptr<int32_t>(), output);
  });
  return output;
}

}  // namespace headroom

TORCH_LIBRARY_FRAGMENT(headroom, library) {
  library.def("amx_works() -> bool", &headroom::amx_works);
  library.def("answer_of_child(bool answer, int dies_of) -> bool", &headroom::answer_of_child);
  library.def("multiply_by(str unit) -> ()", &headroom::multiply_by);
  library.def("pack_weight(Tensor weight, Tensor(a!) packed) -> ()");
  library.def("unpack_weight(Tensor packed, Tensor(a!) weight) -> ()");
  library.def(
      "packed_linear(Tensor input, Tensor weight, int outputs, Tensor? bias, Tensor? norm, "
      "float eps, bool swiglu, Tensor? residual) -> Tensor");
  library.def(
      "int8_linear(Tensor input, Tensor weight, Tensor scale, Tensor row_sums, Tensor? bias, "
      "Tensor? norm, float eps, bool swiglu, Tensor? residual) -> Tensor");
}

TORCH_LIBRARY_IMPL(headroom, CPU, library) {
  library.impl("pack_weight", &headroom::pack_weight);
  library.impl("unpack_weight", &headroom::unpack_weight);
  library.impl("packed_linear", &headroom::packed_linear);
  library.impl("int8_linear", &headroom::int8_linear);
}
