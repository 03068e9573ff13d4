// The attention of a step, and how it is divided among threads.

#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "cache.h"
#include "running.h"

namespace headroom {

constexpr int kChunk = 64;  // keys between two updates of a running softmax
constexpr int kSpan = 4;    // chunks that are joined to what was before in one piece

// How many tasks a thread should find at least; with fewer, sequences are cut into spans, unless
// their unfinished results would take more memory than this many floats.
constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kMaxPartial = 4 << 20;

// How many tasks a thread should still find where one takes several heads.
constexpr int64_t kTasksOfHeads = 8;

// Everything that one call says; plain pointers, so that threads share it without counting. Keys and
// values are kept as `Kept`.
template <typename T, typename Kept>
struct Call {
  const T* query;
  int64_t query_token_stride, query_head_stride;
  const Kept* pool;
  Places places;
  const int32_t* block_tables;
  int64_t max_blocks;
  const int32_t* query_start;
  const int32_t* num_computed;
  int64_t num_seqs, num_heads, head_dim;
  const double* scale;    // of each head, as are the next three
  const int64_t* window;  // keys nearer than this are seen
  const double* slopes;   // of a bias that grows with the position of a key; may be null
  const double* sinks;    // logits that take part in the softmax; may be null
  int32_t sink_tokens;    // keys before this one are seen in spite of the window
  float softcap;          // 0 is none
  T* output;

  int64_t group() const { return num_heads / places.num_kv_heads; }
  int64_t width() const { return (head_dim + kLanes - 1) / kLanes * kLanes; }
};

// Some queries of one sequence, the same of each of some key/value heads, and the chunks of keys they
// read here.
struct Task {
  int32_t seq, kv_head, num_kv_heads;
  int32_t first_row, num_rows;  // of each of them
  int32_t first_chunk, end_chunk;
  int64_t partial = -1;  // where an unfinished result goes; -1 if this task is all of it

  int all_rows() const { return num_kv_heads * num_rows; }
};

// Tasks `first` to `end` are the spans of one.
struct Pieces {
  int64_t first, end;
};

struct Division {
  std::vector<Task> tasks;
  std::vector<Pieces> pieces;
  int64_t partial_size = 0;  // floats
};

// How many key/value heads a task of few queries should take. Neighbours lie side by side in a block, so
// that what is read in turn is long, and the processor sees what will be read next.
template <typename AnyCall>
int64_t heads_together(const AnyCall& call) {
  const int64_t* windows = call.window;
  if (std::any_of(windows, windows + call.num_heads,
                  [&](int64_t window) { return window != windows[0]; }))
    return 1;
  const int64_t tasks = call.num_seqs * call.places.num_kv_heads;
  return std::max<int64_t>(1, tasks / (kTasksOfHeads * at::get_num_threads()));
}

// Tasks that each read all their keys, of at most so many queries.
template <typename AnyCall>
std::vector<Task> whole_tasks(const AnyCall& call, int64_t most_rows) {
  const int64_t group = call.group(), num_kv_heads = call.places.num_kv_heads;
  const int64_t together = heads_together(call);
  std::vector<Task> tasks;
  for (int32_t seq = 0; seq < call.num_seqs; seq++) {
    const int64_t rows = (call.query_start[seq + 1] - call.query_start[seq]) * group;
    if (rows == 0) continue;
    const int64_t step = std::clamp<int64_t>(most_rows / rows, 1, together);
    for (int64_t kv_head = 0; kv_head < num_kv_heads; kv_head += step) {
      const int64_t heads = std::min(step, num_kv_heads - kv_head);
      for (int64_t row = 0; row < rows; row += most_rows) {
        const int64_t count = std::min(most_rows, rows - row);
        const int64_t first = call.num_computed[seq] + row / group;
        const int64_t last = call.num_computed[seq] + (row + count - 1) / group;
        int64_t first_chunk = 0;
        if (call.sink_tokens == 0) {
          const int64_t* window = call.window + kv_head * group;
          const int64_t widest = *std::max_element(window, window + heads * group);
          first_chunk = std::max<int64_t>(0, first - widest + 1) / kChunk;
        }
        tasks.push_back({seq, (int32_t)kv_head, (int32_t)heads, (int32_t)row, (int32_t)count,
                         (int32_t)first_chunk, (int32_t)(last / kChunk + 1)});
      }
    }
  }
  return tasks;
}

template <typename AnyCall>
Division divide(const AnyCall& call, int64_t most_rows) {
  Division whole{whole_tasks(call, most_rows), {}};
  if ((int64_t)whole.tasks.size() >= kTasksPerThread * at::get_num_threads()) return whole;
  Division cut;
  for (const Task& task : whole.tasks) {
    const int64_t begin = (int64_t)cut.tasks.size();
    for (int first = task.first_chunk; first < task.end_chunk;) {
      Task piece = task;
      piece.first_chunk = first;
      piece.end_chunk = first = std::min(task.end_chunk, (first / kSpan + 1) * kSpan);
      cut.tasks.push_back(piece);
    }
    const int64_t end = (int64_t)cut.tasks.size();
    if (end == begin + 1) continue;
    for (int64_t piece = begin; piece < end; piece++) {
      cut.tasks[piece].partial = cut.partial_size;
      cut.partial_size += Running::size(task.all_rows(), call.width());
    }
    cut.pieces.push_back({begin, end});
  }
  return cut.partial_size > kMaxPartial ? whole : cut;
}

}  // namespace headroom
