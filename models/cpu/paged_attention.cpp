// Attention over the paged cache for CPUs with AVX-512 (BF16), read where it lies.
//
// Both products of attention are one small matrix product (see lanes.h). Keys and values are
// packed so that sixteen lanes of one vector belong to sixteen keys, or to sixteen elements of a
// value.
//
// The softmax runs along with the keys (Milakov & Gimelshein 2018; Dao et al. 2022) in chunks at
// fixed positions, and spans of chunks are joined in order. What a query reads therefore does not
// depend, to the last bit, on the other queries of the step, on how a prompt is cut, or on how
// many threads there are.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "lanes.h"

namespace headroom {
namespace {

constexpr int kChunk = 64;  // keys between two updates of a running softmax
constexpr int kSpan = 4;    // chunks that one task may compute by itself
constexpr int kRows = 48;   // queries that share packed keys and values
constexpr int kMaxHeadDim = 256;
constexpr float kNothing = -3e38f;  // the running maximum before any key is seen

// How many tasks a thread should find at least; with fewer, sequences are cut into spans.
constexpr int64_t kTasksPerThread = 4;

alignas(64) const uint32_t kZeros[kMaxHeadDim] = {};  // stands for keys that nobody sees

Vec tanh(Vec x) {
  const Vec two = splat(2.f), one = splat(1.f);
  const Vec bounded = _mm512_min_ps(splat(20.f), x);
  const Vec e = exp(_mm512_mul_ps(two, bounded));
  return _mm512_sub_ps(one, _mm512_div_ps(two, _mm512_add_ps(e, one)));
}

// Sixteen rows of up to sixteen lanes each: `to[lane * stride + row] = rows[row][lane]`.
void transpose(const uint32_t* const* rows, int num_lanes, uint32_t* to, int stride) {
  const __mmask16 mask = first_lanes(num_lanes);
  __m512i a[kLanes], b[kLanes];
  for (int i = 0; i < kLanes; i++) a[i] = _mm512_maskz_loadu_epi32(mask, rows[i]);
  for (int i = 0; i < kLanes; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < kLanes; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
    b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
    b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
    b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    a[i] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88);
    a[i + 8] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd);
    a[i + 4] = _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88);
    a[i + 12] = _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xdd);
  }
  for (int i = 0; i < std::min(num_lanes, kLanes); i++) _mm512_storeu_si512(to + i * stride, a[i]);
}

// Everything that one call says; plain pointers, so that threads share it without counting.
template <typename T>
struct Call {
  const T* query;
  int64_t query_token_stride, query_head_stride;
  const T* pool;
  const int32_t* block_tables;
  int64_t max_blocks;
  const int32_t* query_start;
  const int32_t* num_computed;
  int64_t num_seqs, num_heads, num_kv_heads, head_dim;
  int64_t offset, page_elements, block_elements, blocks_per_page, block_size;
  const double* scale;    // of each head, as are the next three
  const int64_t* window;  // keys nearer than this are seen
  const double* slopes;   // of a bias that grows with the position of a key; may be null
  const double* sinks;    // logits that take part in the softmax; may be null
  int32_t sink_tokens;    // keys before this one are seen in spite of the window
  float softcap;          // 0 is none
  T* output;

  int64_t group() const { return num_heads / num_kv_heads; }
  int64_t width() const { return (head_dim + kLanes - 1) / kLanes * kLanes; }
};

// Some queries of one sequence that share a key/value head, and the chunks of keys they read here.
struct Task {
  int32_t seq, kv_head, first_row, num_rows, first_chunk, end_chunk;
  int64_t partial;  // where an unfinished result goes; -1 if this task is all of it
};

// A running softmax of each row: the largest score, the sum of the weights, the weighted values.
struct Running {
  float* highest;
  float* sum;
  float* read;  // [rows, width]

  static int64_t size(int64_t rows, int64_t width) { return rows * (width + 2); }

  static Running at(float* memory, int64_t rows) {
    return {memory, memory + rows, memory + 2 * rows};
  }

  void clear(int64_t rows, int64_t width) const {
    std::fill(highest, highest + rows, kNothing);
    std::fill(sum, sum + rows, 0.f);
    std::fill(read, read + rows * width, 0.f);
  }
};

void scale_row(float* row, int64_t width, float factor) {
  for (int64_t d = 0; d < width; d += kLanes)
    _mm512_storeu_ps(row + d, _mm512_mul_ps(_mm512_loadu_ps(row + d), splat(factor)));
}

// Add what later keys gave to what earlier ones gave.
void join(const Running& total, const Running& part, int64_t rows, int64_t width) {
  for (int64_t r = 0; r < rows; r++) {
    const float highest = std::max(total.highest[r], part.highest[r]);
    const float keep = exp(total.highest[r] - highest), add = exp(part.highest[r] - highest);
    total.highest[r] = highest;
    total.sum[r] = total.sum[r] * keep + part.sum[r] * add;
    float *to = total.read + r * width, *from = part.read + r * width;
    for (int64_t d = 0; d < width; d += kLanes) {
      const Vec kept = _mm512_mul_ps(_mm512_loadu_ps(to + d), splat(keep));
      _mm512_storeu_ps(to + d, _mm512_fmadd_ps(_mm512_loadu_ps(from + d), splat(add), kept));
    }
  }
}

// What a thread works with.
struct Workspace {
  std::vector<float> running, total;
  alignas(64) uint32_t query[kRows * kMaxHeadDim];
  alignas(64) uint32_t keys[kMaxHeadDim * kChunk];
  alignas(64) uint32_t values[kMaxHeadDim * kChunk];
  alignas(64) float scores[kRows * kChunk];
  alignas(64) uint32_t weights[kRows * kChunk];
  int32_t position[kRows], first_seen[kRows], head[kRows];
};

template <typename T>
class Worker {
  using L = Lane<T>;

 public:
  Worker(const Call<T>& call, Workspace& space)
      : call_(call),
        space_(space),
        head_dim_((int)call.head_dim),
        depth_(head_dim_ / L::kValues),
        width_((int)call.width()) {
    const int64_t size = Running::size(kRows, width_);
    space.running.resize(size);
    space.total.resize(size);
  }

  // `following` is what this thread will do afterwards; null if nothing.
  void run(const Task& task, const Task* following, float* partials) {
    take_queries(task);
    if (!is_located_) locate(task, task.first_chunk, located_[current_]);
    is_located_ = following != nullptr;
    const Running total = task.partial < 0
                              ? Running::at(space_.total.data(), task.num_rows)
                              : Running::at(partials + task.partial, task.num_rows);
    total.clear(task.num_rows, width_);
    const Running span = Running::at(space_.running.data(), task.num_rows);
    for (int first = task.first_chunk; first < task.end_chunk;) {
      const int end = std::min(task.end_chunk, (first / kSpan + 1) * kSpan);
      span.clear(task.num_rows, width_);
      for (int chunk = first; chunk < end; chunk++) {
        const bool is_last = chunk + 1 == task.end_chunk;
        if (!is_last)
          locate(task, chunk + 1, located_[1 - current_]);
        else if (following)
          locate(*following, following->first_chunk, located_[1 - current_]);
        if (is_seen(task, chunk)) attend_chunk(task, chunk, span);
        current_ = 1 - current_;
      }
      join(total, span, task.num_rows, width_);
      first = end;
    }
    if (task.partial < 0) finish(task, total);
  }

  // Take the sink into the sum and write the output.
  void finish(const Task& task, const Running& total) const {
    const int64_t group = call_.group();
    for (int r = 0; r < task.num_rows; r++) {
      const int64_t row = task.first_row + r, head = task.kv_head * group + row % group;
      const int64_t token = call_.query_start[task.seq] + row / group;
      float sum = total.sum[r], keep = 1.f;
      if (call_.sinks) {
        const float sink = (float)call_.sinks[head], highest = std::max(total.highest[r], sink);
        keep = exp(total.highest[r] - highest);
        sum = sum * keep + exp(sink - highest);
      }
      const float factor = sum == 0.f ? 0.f : keep / sum;  // who sees nothing reads nothing
      T* to = call_.output + (token * call_.num_heads + head) * head_dim_;
      for (int d = 0; d < head_dim_; d += kLanes)
        L::store(to + d, _mm512_mul_ps(_mm512_loadu_ps(total.read + r * width_ + d), splat(factor)),
                 first_lanes(head_dim_ - d));
    }
  }

 private:
  void take_queries(const Task& task) {
    const int64_t group = call_.group();
    for (int r = 0; r < task.num_rows; r++) {
      const int64_t row = task.first_row + r, in_seq = row / group;
      const int64_t token = call_.query_start[task.seq] + in_seq;
      const int32_t head = (int32_t)(task.kv_head * group + row % group);
      const int32_t position = call_.num_computed[task.seq] + (int32_t)in_seq;
      space_.head[r] = head;
      space_.position[r] = position;
      space_.first_seen[r] = (int32_t)std::max<int64_t>(0, position - call_.window[head] + 1);
      std::memcpy(space_.query + r * depth_,
                  call_.query + token * call_.query_token_stride + head * call_.query_head_stride,
                  head_dim_ * sizeof(T));
    }
    first_seen_ = *std::min_element(space_.first_seen, space_.first_seen + task.num_rows);
  }

  bool is_seen(const Task& task, int chunk) const {
    const int first = chunk * kChunk;
    return first + kChunk > first_seen_ || first < call_.sink_tokens;
  }

  const T* block(int32_t number, int kv_head) const {
    const int64_t page = number / call_.blocks_per_page, within = number % call_.blocks_per_page;
    return call_.pool + call_.offset + page * call_.page_elements + within * call_.block_elements +
           kv_head * call_.block_size * head_dim_;
  }

  // Where the keys and values of a chunk lie; zeros for positions that nobody sees.
  struct Located {
    const T *keys[kChunk], *values[kChunk];
  };

  // One after the last position that a task reads.
  int end_of(const Task& task) const {
    const int64_t last_row = task.first_row + task.num_rows - 1;
    return call_.num_computed[task.seq] + (int)(last_row / call_.group()) + 1;
  }

  void locate(const Task& task, int chunk, Located& located) const {
    const int first = chunk * kChunk, end = end_of(task);
    const int32_t* table = call_.block_tables + task.seq * call_.max_blocks;
    const int64_t to_values = call_.num_kv_heads * call_.block_size * head_dim_;
    const T* zeros = reinterpret_cast<const T*>(kZeros);
    for (int i = 0; i < kChunk;) {
      const int64_t index = (first + i) / call_.block_size;
      int64_t within = (first + i) % call_.block_size;
      const bool missing = first + i >= end || table[index] < 0;
      const T* start = missing ? zeros : block(table[index], task.kv_head);
      for (; i < kChunk && within < call_.block_size; i++, within++) {
        const bool hidden = missing || first + i >= end;
        located.keys[i] = hidden ? zeros : start + within * head_dim_;
        located.values[i] = hidden ? zeros : located.keys[i] + to_values;
      }
    }
  }

  static void prefetch(const void* at) { _mm_prefetch((const char*)at, _MM_HINT_T1); }

  // Memory is asked for a whole step ahead: values while keys are packed, the next keys while
  // values are. A line holds as many bytes as a vector.
  void attend_chunk(const Task& task, int chunk, const Running& running) {
    const int first = chunk * kChunk, rows = task.num_rows;
    const int used = std::min(kChunk, end_of(task) - first);
    const int padded = (used + kLanes - 1) / kLanes * kLanes;
    const Located &here = located_[current_], &next = located_[1 - current_];
    for (int i = 0; i < padded; i += kLanes)
      for (int d = 0; d < depth_; d += kLanes) {
        const uint32_t* tile[kLanes];
        for (int k = 0; k < kLanes; k++) {
          tile[k] = reinterpret_cast<const uint32_t*>(here.keys[i + k]) + d;
          prefetch(next.values[i + k] + d * L::kValues);
        }
        transpose(tile, depth_ - d, space_.keys + d * kChunk + i, kChunk);
      }
    multiply<T>(space_.query, depth_, space_.keys, kChunk, depth_, space_.scores, kChunk, rows,
                padded, false);
    for (int r = 0; r < rows; r++) weigh(r, first, padded / kLanes, running);
    for (int i = 0; i < padded; i += L::kValues) {
      L::pack_values(here.values + i, head_dim_, space_.values + i / L::kValues * width_);
      for (int k = i; k < i + L::kValues; k++)
        for (int d = 0; d < depth_; d += kLanes) prefetch(next.keys[k] + d * L::kValues);
    }
    multiply<T>(space_.weights, kChunk / L::kValues, space_.values, width_, padded / L::kValues,
                running.read, width_, rows, width_, true);
  }

  // Scores of a row to weights, and its running softmax moved on.
  void weigh(int r, int first, int vecs, const Running& running) {
    float* scores = space_.scores + r * kChunk;
    const int32_t head = space_.head[r], position = space_.position[r];
    const int32_t first_seen = space_.first_seen[r];
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __mmask16 seen[kChunk / kLanes];
    Vec highest = splat(running.highest[r]);
    for (int v = 0; v < vecs; v++) {
      const __m512i keys = _mm512_add_epi32(lane, _mm512_set1_epi32(first + v * kLanes));
      seen[v] = _mm512_cmple_epi32_mask(keys, _mm512_set1_epi32(position)) &
                (_mm512_cmpge_epi32_mask(keys, _mm512_set1_epi32(first_seen)) |
                 _mm512_cmplt_epi32_mask(keys, _mm512_set1_epi32(call_.sink_tokens)));
      Vec score = _mm512_mul_ps(_mm512_loadu_ps(scores + v * kLanes), splat((float)call_.scale[head]));
      if (call_.softcap > 0.f) {
        const Vec cap = splat(call_.softcap);
        score = _mm512_mul_ps(cap, tanh(_mm512_div_ps(score, cap)));
      }
      if (call_.slopes)
        score = _mm512_fmadd_ps(splat((float)call_.slopes[head]), _mm512_cvtepi32_ps(keys), score);
      _mm512_storeu_ps(scores + v * kLanes, score);
      highest = _mm512_mask_max_ps(highest, seen[v], highest, score);
    }
    const float peak = _mm512_reduce_max_ps(highest), before = running.highest[r];
    Vec sum = splat(0.f);
    for (int v = 0; v < vecs; v++) {
      const Vec shifted = _mm512_sub_ps(_mm512_loadu_ps(scores + v * kLanes), splat(peak));
      const Vec weights = _mm512_maskz_mov_ps(seen[v], exp(shifted));
      sum = _mm512_add_ps(sum, weights);
      L::store_weights(space_.weights + r * (kChunk / L::kValues), v * kLanes, weights);
    }
    if (peak > before) {
      const float keep = exp(before - peak);
      running.sum[r] *= keep;
      scale_row(running.read + r * width_, width_, keep);
      running.highest[r] = peak;
    }
    running.sum[r] += _mm512_reduce_add_ps(sum);
  }

  const Call<T>& call_;
  Workspace& space_;
  const int head_dim_, depth_;  // elements of a head, and the lanes that they fill
  const int width_;             // elements of a head, rounded up to whole vectors
  int32_t first_seen_ = 0;
  Located located_[2];  // the chunk at hand and the one after it
  int current_ = 0;
  bool is_located_ = false;  // whether the first chunk of the next task is
};

// Spans that were computed apart: tasks `first` to `end` are the same rows.
struct Pieces {
  int64_t first, end;
};

template <typename T>
void cut(const Call<T>& call, std::vector<Task>& tasks, std::vector<Pieces>& pieces,
         int64_t& partial_size) {
  const int64_t group = call.group();
  std::vector<Task> whole;
  for (int64_t seq = 0; seq < call.num_seqs; seq++) {
    const int32_t num_new = call.query_start[seq + 1] - call.query_start[seq];
    for (int32_t kv_head = 0; kv_head < call.num_kv_heads; kv_head++)
      for (int32_t row = 0; row < num_new * group; row += kRows) {
        const int32_t rows = (int32_t)std::min<int64_t>(kRows, num_new * group - row);
        const int32_t first = call.num_computed[seq] + row / group;
        const int32_t last = call.num_computed[seq] + (int32_t)((row + rows - 1) / group);
        int32_t first_chunk = 0;
        if (call.sink_tokens == 0) {
          const int64_t* window = call.window + kv_head * group;
          const int64_t widest = *std::max_element(window, window + group);
          first_chunk = (int32_t)(std::max<int64_t>(0, first - widest + 1) / kChunk);
        }
        whole.push_back({(int32_t)seq, kv_head, row, rows, first_chunk, last / kChunk + 1, -1});
      }
  }
  if ((int64_t)whole.size() >= kTasksPerThread * at::get_num_threads()) {
    tasks = std::move(whole);
    return;
  }
  for (Task& task : whole) {
    const int64_t begin = (int64_t)tasks.size();
    for (int first = task.first_chunk; first < task.end_chunk;) {
      Task piece = task;
      piece.first_chunk = first;
      piece.end_chunk = first = std::min(task.end_chunk, (first / kSpan + 1) * kSpan);
      tasks.push_back(piece);
    }
    if ((int64_t)tasks.size() == begin + 1) continue;
    for (int64_t i = begin; i < (int64_t)tasks.size(); i++) {
      tasks[i].partial = partial_size;
      partial_size += Running::size(task.num_rows, call.width());
    }
    pieces.push_back({begin, (int64_t)tasks.size()});
  }
}

template <typename T>
void attend(const Call<T>& call) {
  std::vector<Task> tasks;
  std::vector<Pieces> pieces;
  int64_t partial_size = 0;
  cut(call, tasks, pieces, partial_size);
  std::vector<float> partials(partial_size);
  const auto in_parallel = [&](int64_t count, auto&& work) {
    std::atomic<int64_t> next{0};
    at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
      thread_local Workspace space;
      Worker<T> worker(call, space);
      for (int64_t at = next.fetch_add(1), after; at < count; at = after) {
        after = next.fetch_add(1);
        work(worker, at, after);
      }
    });
  };
  const int64_t num_tasks = (int64_t)tasks.size();
  in_parallel(num_tasks, [&](Worker<T>& worker, int64_t at, int64_t after) {
    worker.run(tasks[at], after < num_tasks ? &tasks[after] : nullptr, partials.data());
  });
  if (pieces.empty()) return;
  in_parallel((int64_t)pieces.size(), [&](Worker<T>& worker, int64_t at, int64_t) {
    const Task& task = tasks[pieces[at].first];
    std::vector<float> memory(Running::size(task.num_rows, call.width()));
    const Running total = Running::at(memory.data(), task.num_rows);
    total.clear(task.num_rows, call.width());
    for (int64_t piece = pieces[at].first; piece < pieces[at].end; piece++)
      join(total, Running::at(partials.data() + tasks[piece].partial, task.num_rows),
           task.num_rows, call.width());
    worker.finish(task, total);
  });
}

at::Tensor paged_attention(const at::Tensor& query, const at::Tensor& pool,
                           const at::Tensor& block_tables, const at::Tensor& query_start,
                           const at::Tensor& num_computed, at::IntArrayRef layout,
                           at::ArrayRef<double> scale, at::IntArrayRef window,
                           at::ArrayRef<double> slopes, at::ArrayRef<double> sinks,
                           int64_t sink_tokens, double softcap) {
  TORCH_CHECK(layout.size() == 6, "layout has 6 numbers");
  TORCH_CHECK(query.dim() == 3 && query.stride(2) == 1, "queries are [tokens, heads, head_dim]");
  const int64_t num_heads = query.size(1), head_dim = query.size(2);
  TORCH_CHECK(head_dim <= kMaxHeadDim, "head_dim is ", head_dim, "; allowed: up to 256");
  TORCH_CHECK(query.scalar_type() == at::kFloat || head_dim % 2 == 0,
              "head_dim is ", head_dim, "; allowed in bfloat16: even numbers");
  TORCH_CHECK(query.scalar_type() == pool.scalar_type(), "queries and cache have one type");
  TORCH_CHECK(layout[4] > 0 && num_heads % layout[4] == 0, "num_kv_heads is ", layout[4],
              "; allowed: a divisor of ", num_heads);
  const auto of_heads = [&](size_t size) { return size == (size_t)num_heads; };
  TORCH_CHECK(of_heads(scale.size()) && of_heads(window.size()) &&
                  (slopes.empty() || of_heads(slopes.size())) &&
                  (sinks.empty() || of_heads(sinks.size())),
              "scale, window, slopes and sinks have one number for each head");
  const at::Tensor output = at::empty(query.sizes(), query.options());
  with_type(query, [&]<typename T>() {
    attend<T>({query.const_data_ptr<T>(), query.stride(0), query.stride(1),
               pool.const_data_ptr<T>(), block_tables.const_data_ptr<int32_t>(),
               block_tables.size(1), query_start.const_data_ptr<int32_t>(),
               num_computed.const_data_ptr<int32_t>(), num_computed.size(0), num_heads, layout[4],
               head_dim, layout[0], layout[1], layout[2], layout[3], layout[5], scale.data(),
               window.data(), slopes.empty() ? nullptr : slopes.data(),
               sinks.empty() ? nullptr : sinks.data(), (int32_t)sink_tokens, (float)softcap,
               output.mutable_data_ptr<T>()});
  });
  return output;
}

}  // namespace
}  // namespace headroom

TORCH_LIBRARY_FRAGMENT(headroom, library) {
  library.def(
      "paged_attention(Tensor query, Tensor pool, Tensor block_tables, Tensor query_start, "
      "Tensor num_computed, int[] layout, float[] scale, int[] window, float[] slopes, "
      "float[] sinks, int sink_tokens, float softcap) -> Tensor");
}

TORCH_LIBRARY_IMPL(headroom, CPU, library) { library.impl("paged_attention", &headroom::paged_attention); }
