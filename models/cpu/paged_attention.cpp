// Attention over the paged cache, read where it lies.
//
// Both products of attention are one small matrix product (see lanes.h). Keys and values are
// packed so that sixteen lanes of one vector belong to sixteen keys, or to sixteen elements of a
// value; unless tiles, for up to sixteen queries, take them as they lie.
//
// The softmax runs along with the keys (Milakov & Gimelshein 2018; Dao et al. 2022) in chunks at
// fixed positions, and spans of chunks are joined in order. What a query reads therefore does not
// depend, to the last bit, on the other queries of the step, on how a prompt is cut, or on how
// many threads there are.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "crew.h"
#include "operations.h"
#include "tasks.h"
#include "units.h"

namespace headroom {
namespace {

constexpr int kMaxHeadDim = 256;
constexpr int64_t kBatches = 8;    // of tasks for each thread, if there are enough
constexpr int64_t kMaxBatch = 16;  // tasks that one thread takes at once, at most

alignas(64) const uint32_t kZeros[kLanes * kMaxHeadDim] = {};  // stands for keys that nobody sees

Vec tanh(Vec x) {
  const Vec two = splat(2.f), one = splat(1.f);
  const Vec e = exp(mul(two, min(splat(20.f), x)));
  return sub(one, div(two, add(e, one)));
}

// What a thread works with.
struct Workspace {
  std::vector<float> running, total;
  std::vector<uint32_t> columns;  // queries, of each head `[depth, 16]`
  alignas(64) uint32_t query[kMostRows * kMaxHeadDim];
  alignas(64) uint32_t keys[kMaxHeadDim * kChunk];
  alignas(64) uint32_t values[2][kMaxHeadDim * kChunk];  // of the step at hand and the next
  alignas(64) float scores[kMostRows * kChunk];
  alignas(64) float arranged[kLanes * kChunk];
  alignas(64) float unpacked_weights[kFewRows * kChunk];
  alignas(64) uint32_t last_values[2][kLanes * kMaxHeadDim / 2];  // of the step at hand and the next
  alignas(64) float read[kLanes * kMaxHeadDim];
  alignas(64) uint32_t weights[kMostRows * kChunk];
  alignas(64) float key_scale[kChunk], value_scale[kChunk];  // of 8 bits
  int32_t position[kMostRows], first_seen[kMostRows], head[kMostRows];
  float factor[kMostRows];  // of what becomes a power of two
};

Workspace& workspace() {
  thread_local Workspace space;
  return space;
}

template <typename T, typename Kept, typename Product>
class Worker {
  using L = Lane<T>;
  // Keys are padded to whole steps of a product over them: how it adds what a query sees may not
  // depend on what others of its task see.
  static constexpr int kKeyStep = std::max(kLanes, Product::kStep * L::kValues);
  static constexpr bool kScaled = !std::is_same_v<T, Kept>;
  static constexpr bool kInPlace = Product::kHasTiles && !kScaled;
  static constexpr int kTiles = kChunk / kLanes;
  // More than the three steps that are known, and even: what neighbours of them hold is in two buffers.
  static constexpr int kLocated = 4;

 public:
  Worker(const Call<T, Kept>& call, Workspace& space)
      : call_(call),
        space_(space),
        head_dim_((int)call.head_dim),
        depth_(head_dim_ / L::kValues),
        kept_lanes_(head_dim_ * (int)sizeof(Kept) / 4),
        plain_(!kScaled && call.softcap == 0.f && !call.slopes &&
               std::all_of(call.scale, call.scale + call.num_heads,
                           [](double scale) { return scale > 0.; })),
        has_rows_of_tiles_(kInPlace && depth_ % kLanes == 0 &&
                           call.places.block_size % kLanes == 0),
        group_((int)call.group()),
        block_size_((int)call.places.block_size),
        width_((int)call.width()) {
    const int64_t size = Running::size(Product::kRows, width_);
    space.running.resize(size);
    space.total.resize(size);
  }

  // `expected` is what this thread will probably do afterwards; null if nothing.
  void run(const Task& task, const Task* expected, float* partials) {
    take_queries(task);
    const int rows = task.all_rows();
    const Running total = task.partial < 0 ? Running::in(space_.total.data(), rows)
                                           : Running::in(partials + task.partial, rows);
    total.clear(rows, width_);
    const Running span = Running::in(space_.running.data(), rows);
    int of_span = -1;
    Step step = first_of(task);
    locate(step, at(0), at(0));
    locate(following(step, expected), at(1), at(0));
    if (step.is_in(task)) {
      pack_keys(at(0));
      score(at(0), at(1));
    }
    while (step.is_in(task)) {
      const Step next = following(step, expected);
      locate(next, at(1), at(0));
      locate(following(next, expected), at(2), at(1));
      if (step.chunk / kSpan != of_span) {
        of_span = step.chunk / kSpan;
        span.clear(rows, width_);
      }
      weigh(at(0), of(at(0), span));
      // Tiles wait for what was written a moment ago, so between packing and products there is something
      // else, where there is.
      if (next.is_in(task)) pack_keys(at(1));
      pack_values(at(0), at(2));
      if (next.is_in(task)) score(at(1), at(2));
      read_values(at(0), at(2), of(at(0), span).read);
      if (!next.is_in(task) || next.chunk / kSpan != of_span) join(total, span, rows, width_);
      step = next;
      current_ = (current_ + 1) % kLocated;
    }
    if (task.partial < 0) finish(task, total);
  }

  // Take the sink into the sum and write the output.
  void finish(const Task& task, const Running& total) const {
    const int64_t group = call_.group();
    for (int r = 0; r < task.all_rows(); r++) {
      const int64_t row = task.first_row + r % task.num_rows;
      const int64_t head = (task.kv_head + r / task.num_rows) * group + row % group;
      const int64_t token = call_.query_start[task.seq] + row / group;
      float sum = total.sum[r], keep = 1.f;
      if (call_.sinks) {
        const float sink = (float)call_.sinks[head] * kLog2E, highest = std::max(total.highest[r], sink);
        keep = exp2(total.highest[r] - highest);
        sum = sum * keep + exp2(sink - highest);
      }
      const float factor = sum == 0.f ? 0.f : keep / sum;  // who sees nothing reads nothing
      T* to = call_.output + (token * call_.num_heads + head) * head_dim_;
      for (int d = 0; d < head_dim_; d += kLanes)
        L::store(to + d, mul(load(total.read + r * width_ + d), splat(factor)),
                 first_lanes(head_dim_ - d));
    }
  }

 private:
  void take_queries(const Task& task) {
    const int64_t group = call_.group();
    const int rows = task.all_rows();
    for (int r = 0; r < rows; r++) {
      const int64_t row = task.first_row + r % task.num_rows, in_seq = row / group;
      const int64_t token = call_.query_start[task.seq] + in_seq;
      const auto head = (int32_t)((task.kv_head + r / task.num_rows) * group + row % group);
      const int32_t position = call_.num_computed[task.seq] + (int32_t)in_seq;
      space_.head[r] = head;
      space_.position[r] = position;
      space_.factor[r] = plain_ ? (float)call_.scale[head] * kLog2E : kLog2E;
      space_.first_seen[r] = (int32_t)std::max<int64_t>(0, position - call_.window[head] + 1);
      std::memcpy(space_.query + r * depth_,
                  call_.query + token * call_.query_token_stride + head * call_.query_head_stride,
                  head_dim_ * sizeof(T));
    }
    const auto [least, most] =
        std::minmax_element(space_.first_seen, space_.first_seen + rows);
    first_seen_ = *least;
    all_seen_from_ = *most;
    if (reads_in_place(task)) lay_out_columns(task);
  }

  // Whether keys are rows of tiles where they lie, and queries columns: to pack keys would take
  // longer than few queries do.
  bool reads_in_place(const Task& task) const {
    return has_rows_of_tiles_ && task.num_rows <= kLanes;
  }

  static int columns_of(int rows) { return rows == 1 ? 1 : kLanes; }

  void lay_out_columns(const Task& task) {
    const int rows = task.num_rows, columns = columns_of(rows);
    space_.columns.resize(task.num_kv_heads * columns * depth_);
    for (int r = 0; r < task.all_rows(); r++) {
      uint32_t* to = space_.columns.data() + r / rows * columns * depth_ + r % rows;
      for (int lane = 0; lane < depth_; lane++)
        to[lane * columns] = space_.query[r * depth_ + lane];
    }
  }

  // A chunk of keys of one head of a task; none, if there is no task.
  struct Step {
    const Task* task = nullptr;
    int head = 0, chunk = 0;

    bool is_in(const Task& other) const { return task == &other; }
    bool operator==(const Step&) const = default;
  };

  Step first_of(const Task& task) const {
    const int chunk = seen_from(task, task.first_chunk);
    return chunk < task.end_chunk ? Step{&task, 0, chunk} : Step{};
  }

  // In the expected task, what is seen is not known yet: its memory is asked for, no more.
  Step following(const Step& step, const Task* expected) const {
    if (!step.task) return {};
    if (step.head + 1 < step.task->num_kv_heads) return {step.task, step.head + 1, step.chunk};
    const int chunk = seen_from(*step.task, step.chunk + 1);
    if (chunk < step.task->end_chunk) return {step.task, 0, chunk};
    return !expected || step.is_in(*expected) ? Step{} : Step{expected, 0, expected->first_chunk};
  }

  // The first chunk from this one on with a key that a query sees, or the end.
  int seen_from(const Task& task, int chunk) const {
    while (chunk < task.end_chunk && (chunk + 1) * kChunk <= first_seen_ &&
           chunk * kChunk >= call_.sink_tokens)
      chunk++;
    return chunk;
  }

  // Keys and values that lie side by side, from the `at`-th of a chunk on.
  struct Run {
    int at, count;
    const float *key_scales, *value_scales;  // of 8 bits
  };

  // Where the keys and values of a step lie: each of them, or, read in place, each sixteen of them;
  // zeros for positions that nobody sees.
  struct Located {
    Step step;
    bool in_place = false;
    int used = 0;  // of positions
    const Kept *keys[kChunk], *values[kChunk];
    Run runs[kChunk];
    int num_runs = 0;
  };

  Located& at(int ahead) { return located_[(current_ + ahead) % kLocated]; }

  // One after the last position that a task reads.
  int end_of(const Task& task) const {
    const int64_t last_row = task.first_row + task.num_rows - 1;
    return call_.num_computed[task.seq] + (int)last_row / group_ + 1;
  }

  void locate(const Step& step, Located& located, const Located& before) const {
    if (step == located.step && step.task) return;
    const Kept* zeros = reinterpret_cast<const Kept*>(kZeros);
    if (before.in_place && step == Step{before.step.task, before.step.head + 1, before.step.chunk}) {
      located.step = step;
      located.in_place = true;
      located.used = before.used;
      for (int tile = 0; tile < kTiles; tile++) {
        const int64_t to_next_head = before.keys[tile] == zeros ? 0 : block_size_ * head_dim_;
        located.keys[tile] = before.keys[tile] + to_next_head;
        located.values[tile] = before.values[tile] + to_next_head;
      }
      return;
    }
    located.step = step;
    located.num_runs = 0;
    located.in_place = !step.task || reads_in_place(*step.task);
    if (!step.task) {
      std::fill(located.keys, located.keys + kTiles, zeros);
      std::fill(located.values, located.values + kTiles, zeros);
      return;
    }
    const Task& task = *step.task;
    const int first = step.chunk * kChunk, end = end_of(task);
    located.used = std::min(kChunk, end - first);
    const int64_t to_value = call_.places.to_value(head_dim_);
    const int32_t* table = call_.block_tables + task.seq * call_.max_blocks;
    const auto key_of = [&](int index, int within) {
      const int64_t at = (task.kv_head + step.head) * (int64_t)block_size_ + within;
      return call_.pool + call_.places.block(table[index]) + at * head_dim_;
    };
    if (located.in_place) {
      for (int tile = 0; tile < kTiles; tile++) {
        const int position = first + tile * kLanes, index = position / block_size_;
        const bool missing = position >= end || table[index] < 0;
        const Kept* key = missing ? zeros : key_of(index, position % block_size_);
        located.keys[tile] = key;
        located.values[tile] = missing ? zeros : key + to_value;
      }
      return;
    }
    int within = first % block_size_;
    for (int i = 0, index = first / block_size_; i < kChunk; index++, within = 0) {
      const int in_block = std::min(block_size_ - within, kChunk - i);
      const bool missing = first + i >= end || table[index] < 0;
      const int count = missing ? 0 : std::min(in_block, end - (first + i));
      if (count) {
        const Kept* key = key_of(index, within);
        for (int k = 0; k < count; k++) {
          located.keys[i + k] = key + k * head_dim_;
          located.values[i + k] = key + k * head_dim_ + to_value;
        }
        Run& run = located.runs[located.num_runs++] = {i, count, nullptr, nullptr};
        if constexpr (kScaled) {
          const int64_t at = (task.kv_head + step.head) * (int64_t)block_size_ + within;
          const Kept* scales = key - at * head_dim_ + call_.places.to_scales(head_dim_);
          run.key_scales = reinterpret_cast<const float*>(scales) + at;
          run.value_scales = run.key_scales + to_value / head_dim_;
          prefetch(run.key_scales);
          prefetch(run.value_scales);
        }
      }
      for (int k = count; k < in_block; k++) located.keys[i + k] = located.values[i + k] = zeros;
      i += in_block;
    }
  }

  // Lanes of a row as it is kept.
  static const uint32_t* lanes(const Kept* row, int lane) {
    return reinterpret_cast<const uint32_t*>(row) + lane;
  }

  // What a later step reads is asked for, into the second-level cache: the first is full of what is
  // packed.
  void ask_for(const Located& later, const Kept* const* rows, int i) const {
    const Kept* row = later.in_place ? rows[i / kLanes] + i % kLanes * head_dim_ : rows[i];
    for (int d = 0; d < kept_lanes_; d += kLanes) prefetch(lanes(row, d));
  }

  // How many keys of a step are multiplied.
  static int padded_of(const Located& here) {
    return (here.used + kKeyStep - 1) / kKeyStep * kKeyStep;
  }

  // Products of queries and keys, `[rows, kChunk]`, or, in place, of keys and queries; values that will be
  // read in place are made ready as well.
  void score(Located& here, const Located& later) {
    const Step& step = here.step;
    const int rows = step.task->num_rows, padded = padded_of(here);
    if constexpr (kInPlace) {
      if (here.in_place) {
        hide_what_is_no_value(here);
        score_in_place(here, later, rows);
        if (rows > kFewRows) pack_values_in_place(here, later, padded);
        return;
      }
    }
    product_.template multiply_cached<T>(space_.query + step.head * rows * depth_, depth_, space_.keys,
                                         kChunk, depth_, space_.scores, kChunk, rows, padded, false);
  }

  // What a block holds after the last value may be no number, which no weight makes 0.
  void hide_what_is_no_value(Located& here) {
    const int tile = here.used / kLanes, count = here.used % kLanes * head_dim_;
    if (count == 0) return;
    Kept* own = reinterpret_cast<Kept*>(space_.last_values[(&here - located_) % 2]);
    std::copy_n(here.values[tile], count, own);
    std::fill(own + count, own + kLanes * head_dim_, Kept(0));
    here.values[tile] = own;
  }

  // Products of keys and queries, `[kChunk, columns]`.
  void score_in_place(const Located& here, const Located& later, int rows) {
    const uint32_t* keys[kTiles];
    for (int tile = 0; tile < kTiles; tile++) keys[tile] = lanes(here.keys[tile], 0);
    const int columns = columns_of(rows);
    multiply_rows<T>(product_.unit, keys, depth_,
                     space_.columns.data() + here.step.head * columns * depth_, columns, depth_,
                     space_.scores, [&](int k, int count, int tile) {
                       if (!later.in_place) return;
                       const uint32_t* values = lanes(later.values[tile], k * kLanes);
                       for (int line = 0; line < count; line++) prefetch(values + line * kLanes);
                     });
  }

  // Tiles cannot load what was written a moment ago before it is in a cache, so this is done a step
  // before it is needed.
  void pack_values_in_place(const Located& here, const Located& later, int padded) {
    uint32_t* packed = packed_in_place(here);
    for (int tile = 0; tile * kLanes < padded; tile++) {
      const Kept* row = here.values[tile];
      const Kept* asked = later.in_place ? later.keys[tile] : nullptr;
      for (int k = 0; k < kLanes; k += 2, row += 2 * head_dim_, packed += width_) {
        if (asked)
          for (int line = 0; line < depth_ / 8; line++, asked += 2 * kLanes) prefetch(asked);
        interleave_rows(row, row + head_dim_, head_dim_, packed);
      }
    }
  }

  uint32_t* packed_in_place(const Located& here) { return space_.values[(&here - located_) % 2]; }

  void pack_keys(const Located& here) {
    if (here.in_place) return;
    for (int i = 0, padded = padded_of(here); i < padded; i += kLanes) pack_sixteen_keys(here, i);
  }

  // From the i-th of a chunk on, sixteen lanes at a time.
  void pack_sixteen_keys(const Located& here, int i) {
    for (int d = 0; d < kept_lanes_; d += kLanes) {
      const uint32_t* tile[kLanes];
      for (int k = 0; k < kLanes; k++) {
        tile[k] = lanes(here.keys[i + k], d);
        prefetch(lanes(here.values[i + k], d));
      }
      if constexpr (kScaled) {
        alignas(64) uint32_t fours[kLanes * kLanes];
        constexpr int kSpread = 4 / L::kValues;
        transpose(tile, kept_lanes_ - d, fours, kLanes);
        for (int lane = 0; lane < std::min(kLanes, kept_lanes_ - d); lane++)
          L::spread(load_ints(fours + lane * kLanes),
                    space_.keys + (d + lane) * kSpread * kChunk + i, kChunk);
      } else {
        transpose(tile, kept_lanes_ - d, space_.keys + d * kChunk + i, kChunk);
      }
    }
  }

  // Of the rows of a step.
  Running of(const Located& here, const Running& all) const {
    const int row = here.step.head * here.step.task->num_rows;
    return {all.highest + row, all.sum + row, all.read + row * width_};
  }

  // `[kChunk, 16]` to `[rows, kChunk]`.
  float* arrange(const float* of_keys, int rows, int padded) {
    for (int i = 0; i < padded; i += kLanes, of_keys += kLanes * kLanes) {
      const uint32_t* of_key[kLanes];
      for (int k = 0; k < kLanes; k++)
        of_key[k] = reinterpret_cast<const uint32_t*>(of_keys) + k * kLanes;
      transpose(of_key, rows, reinterpret_cast<uint32_t*>(space_.arranged) + i, kChunk);
    }
    return space_.arranged;
  }

  // Scores of a step to weights.
  void weigh(const Located& here, const Running& running) {
    const Step& step = here.step;
    const int first = step.chunk * kChunk, rows = step.task->num_rows, row = step.head * rows;
    const int padded = padded_of(here);
    const bool all_seen = first + padded - 1 <= space_.position[row] && first >= all_seen_from_;
    if constexpr (kInPlace) {
      if (here.in_place && rows > kFewRows && plain_) {
        return all_seen ? weigh_columns<true>(row, rows, first, padded, running)
                        : weigh_columns<false>(row, rows, first, padded, running);
      }
    }
    const bool few = here.in_place && rows <= kFewRows;
    float* scores = here.in_place && rows > 1 ? arrange(space_.scores, rows, padded) : space_.scores;
    if constexpr (kScaled) {
      std::fill(space_.key_scale, space_.key_scale + kChunk, 0.f);
      std::fill(space_.value_scale, space_.value_scale + kChunk, 0.f);
      for (const Run* run = here.runs; run < here.runs + here.num_runs; run++) {
        std::copy_n(run->key_scales, run->count, space_.key_scale + run->at);
        std::copy_n(run->value_scales, run->count, space_.value_scale + run->at);
      }
    }
    const int vecs = padded / kLanes;
    if (!plain_)
      weigh<false, false>(row, rows, first, vecs, running, scores, few);
    else if (all_seen)
      weigh<true, true>(row, rows, first, vecs, running, scores, few);
    else
      weigh<true, false>(row, rows, first, vecs, running, scores, few);
  }

  // Rows of floats are what they would be packed to.
  bool packs_values(const Located& here) const {
    return !here.in_place && !(std::is_same_v<Kept, float> && width_ == head_dim_);
  }

  void pack_values(const Located& here, const Located& later) {
    if (!packs_values(here)) return;
    for (int i = 0, padded = padded_of(here); i < padded; i += L::kValues) {
      L::pack_values(here.values + i, head_dim_, space_.values[0] + i / L::kValues * width_);
      for (int k = i; k < i + L::kValues; k++) ask_for(later, later.keys, k);
    }
  }

  // Adds the weighted values of a step.
  void read_values(const Located& here, const Located& later, float* read) {
    const int rows = here.step.task->num_rows, padded = padded_of(here);
    if constexpr (kInPlace) {
      if (here.in_place) return read_in_place(here, later, padded, rows, read);
    }
    if (packs_values(here)) {
      product_.template multiply_cached<T>(space_.weights, kChunk / L::kValues, space_.values[0],
                                           width_, padded / L::kValues, read, width_, rows, width_,
                                           true);
      return;
    }
    if constexpr (std::is_same_v<Kept, float>) {
      for (const Run* run = here.runs; run < here.runs + here.num_runs; run++) {
        for (int k = run->at; k < run->at + run->count; k++) ask_for(later, later.keys, k);
        product_.template multiply_cached<T>(space_.weights + run->at, kChunk,
                                             lanes(here.values[run->at], 0), head_dim_, run->count,
                                             read, width_, rows, width_, true);
      }
    }
  }

  // To few queries vectors add values where they lie. To others tiles do, of as many rows as there are
  // columns of scores: to load other shapes takes long.
  void read_in_place(const Located& here, const Located& later, int padded, int rows, float* read) {
    if (rows <= kFewRows)
      return add_weighted_rows(space_.unpacked_weights, kChunk, rows, here.values, head_dim_, padded, read,
                               width_, later.in_place ? later.keys : nullptr);
    std::copy_n(read, rows * width_, space_.read);
    product_.template multiply<T>([] {}, space_.weights, kChunk / L::kValues, packed_in_place(here),
                                  width_, padded / L::kValues, space_.read, width_, kLanes, width_,
                                  true);
    std::copy_n(space_.read, rows * width_, read);
  }

  // Which of sixteen keys a row sees.
  Mask seen_by(int r, Ints keys) const {
    const Mask near = either(at_least(keys, splat_int(space_.first_seen[r])),
                             less(keys, splat_int(call_.sink_tokens)));
    return both(at_most(keys, splat_int(space_.position[r])), near);
  }

  // A score of what a product is, where it takes more than a factor.
  Vec score_of(int r, int v, Vec product, Ints keys) const {
    const int32_t head = space_.head[r];
    Vec score = mul(product, splat((float)call_.scale[head]));
    if constexpr (kScaled) score = mul(score, load(space_.key_scale + v * kLanes));
    if (call_.softcap > 0.f) {
      const Vec cap = splat(call_.softcap);
      score = mul(cap, tanh(div(score, cap)));
    }
    if (call_.slopes)
      score = multiply_add(splat((float)call_.slopes[head]), floats_of(keys), score);
    return score;
  }

  // Products of some rows of the task to weights, and their running softmax moved on. What a row
  // sees has the same bits whether or not it is known beforehand that all is seen.
  template <bool kPlain, bool kAllSeen>
  void weigh(int first_row, int rows, int first, int vecs, const Running& running, float* all_scores,
             bool unpacked_weights) {
    const auto keys_of = [&](int v) { return add(lane_numbers(), splat_int(first + v * kLanes)); };
    for (int begin = 0; begin < rows; begin += kLanes) {
      const int end = std::min(rows, begin + kLanes), count = end - begin;
      const Leading lanes = first_lanes(count);
      Vec of_row[kLanes];
      std::fill(of_row, of_row + kLanes, splat(0.f));
      for (int r = begin; r < end; r++) {
        float* scores = all_scores + r * kChunk;
        Vec highest = splat(-std::numeric_limits<float>::infinity());
        for (int v = 0; v < vecs; v++) {
          Vec score = load(scores + v * kLanes);
          if constexpr (!kPlain) {
            score = score_of(first_row + r, v, score, keys_of(v));
            store(scores + v * kLanes, score);
          }
          if constexpr (kAllSeen)
            highest = max(highest, score);
          else
            highest = max_where(seen_by(first_row + r, keys_of(v)), highest, score);
        }
        of_row[r - begin] = highest;
      }
      const Vec before = load(running.highest + begin, lanes);
      const Vec factors = load(space_.factor + first_row + begin, lanes);
      const Vec peak = max(mul(maxima_of(of_row, count), factors), before);
      const Vec keep = exp2(sub(before, peak));
      alignas(64) float peaks[kLanes], kept[kLanes];
      store(peaks, peak);
      store(kept, keep);
      for (int r = begin; r < end; r++) {
        const Vec factor = splat(space_.factor[first_row + r]), highest = splat(peaks[r - begin]);
        Vec sum = splat(0.f);
        for (int v = 0; v < vecs; v++) {
          const Vec score = load(all_scores + r * kChunk + v * kLanes);
          Vec weights = exp2(multiply_sub(score, factor, highest));
          if constexpr (!kAllSeen) weights = where(seen_by(first_row + r, keys_of(v)), weights);
          sum = add(sum, weights);
          if constexpr (kScaled)
            weights = where(seen_by(first_row + r, keys_of(v)),
                            mul(weights, load(space_.value_scale + v * kLanes)));
          if (unpacked_weights)
            store(space_.unpacked_weights + r * kChunk + v * kLanes, L::round(weights));
          else
            L::store_weights(space_.weights + r * (kChunk / L::kValues), v * kLanes, weights);
        }
        of_row[r - begin] = sum;
      }
      const Vec sums = multiply_add(load(running.sum + begin, lanes), keep, sums_of(of_row, count));
      store(running.sum + begin, sums, lanes);
      store(running.highest + begin, peak, lanes);
      for (int r = begin; r < end; r++)
        if (kept[r - begin] != 1.f) scale_row(running.read + r * width_, width_, kept[r - begin]);
    }
  }

  // The same of `[kChunk, 16]` scores that are plain: rows are lanes, so that nothing is added across
  // them; what is added is added in the same order.
  template <bool kAllSeen>
  void weigh_columns(int first_row, int rows, int first, int padded, const Running& running) {
    const Leading lanes = first_lanes(rows);
    const Ints position = load_ints(space_.position + first_row, lanes);
    const Ints first_seen = load_ints(space_.first_seen + first_row, lanes);
    const auto seen = [&](int key) {
      const Ints keys = splat_int(key);
      return both(at_most(keys, position),
                  either(at_least(keys, first_seen), less(keys, splat_int(call_.sink_tokens))));
    };
    Vec highest = splat(-std::numeric_limits<float>::infinity());
    for (int k = 0; k < padded; k++) {
      const Vec score = load(space_.scores + k * kLanes);
      if constexpr (kAllSeen)
        highest = max(highest, score);
      else
        highest = max_where(seen(first + k), highest, score);
    }
    const Vec factor = load(space_.factor + first_row, lanes), before = load(running.highest, lanes);
    const Vec peak = max(mul(highest, factor), before), keep = exp2(sub(before, peak));
    const auto weight_of = [&](int k) {
      const Vec weight = exp2(multiply_sub(load(space_.scores + k * kLanes), factor, peak));
      if constexpr (kAllSeen)
        return weight;
      else
        return where(seen(first + k), weight);
    };
    alignas(64) uint32_t pairs[kChunk / 2 * kLanes];
    Vec sum[kLanes];
    for (int lane = 0; lane < kLanes; lane += 2) {
      sum[lane] = sum[lane + 1] = splat(0.f);
      for (int k = lane; k < padded; k += kLanes) {
        const Vec even = weight_of(k), odd = weight_of(k + 1);
        sum[lane] = add(sum[lane], even);
        sum[lane + 1] = add(sum[lane + 1], odd);
        L::store_pairs(reinterpret_cast<T*>(pairs + k / 2 * kLanes), {even, odd}, kLanes);
      }
    }
    for (int half = kLanes / 2; half > 0; half /= 2)
      for (int lane = 0; lane < half; lane++) sum[lane] = add(sum[lane], sum[lane + half]);
    for (int k = 0; k < padded / 2; k += kLanes) {
      const uint32_t* of_pair[kLanes];
      for (int pair = 0; pair < kLanes; pair++) of_pair[pair] = pairs + (k + pair) * kLanes;
      transpose(of_pair, rows, space_.weights + k, kChunk / L::kValues);
    }
    store(running.sum, multiply_add(load(running.sum, lanes), keep, sum[0]), lanes);
    store(running.highest, peak, lanes);
    alignas(64) float kept[kLanes];
    store(kept, keep);
    for (int r = 0; r < rows; r++)
      if (kept[r] != 1.f) scale_row(running.read + r * width_, width_, kept[r]);
  }

  const Call<T, Kept>& call_;
  Workspace& space_;
  Product product_;
  const int head_dim_, depth_;  // elements of a head, and the lanes that they fill
  const int kept_lanes_;        // that a key fills in the cache
  const bool plain_;            // a score is a product times a factor, which is positive
  const bool has_rows_of_tiles_;  // sixteen keys of the cache are a tile
  const int group_, block_size_;
  const int width_;             // elements of a head, rounded up to whole vectors
  int32_t first_seen_ = 0;      // by any row of the task
  int32_t all_seen_from_ = 0;   // by all of them
  Located located_[kLocated];  // the step at hand and the two after it
  int current_ = 0;
};

// Calls `work(worker, index, next index)`, on as many threads as are worth it, until all are done.
// Neighbours stay on one thread for a while: they lie side by side in memory, and a thread knows what
// it will do next.
template <typename AnyWorker, typename T, typename Kept, typename F>
void in_parallel(const Call<T, Kept>& call, int64_t count, int64_t products, F&& work) {
  const int64_t num_threads = at::get_num_threads();
  const int64_t batch = std::clamp<int64_t>(count / (num_threads * kBatches), 1, kMaxBatch);
  std::atomic<int64_t> next{0};
  Crew::share(threads_for(products), [&](int) {
    AnyWorker worker(call, workspace());
    for (int64_t index; (index = next.fetch_add(batch)) < count;) {
      const int64_t end = std::min(count, index + batch);
      for (; index + 1 < end; index++) work(worker, index, index + 1);
      work(worker, index, next.load());
    }
  });
}

template <typename T, typename Kept, typename Product>
void attend(const Call<T, Kept>& call) {
  using OwnWorker = Worker<T, Kept, Product>;
  const Division division = divide(call, Product::kRows);
  const std::vector<Task>& tasks = division.tasks;
  const auto partials = std::make_unique_for_overwrite<float[]>(division.partial_size);
  int64_t products = 0;  // of both products; once more for what is packed, or waited for
  for (const Task& task : tasks)
    products += 2 * (task.num_rows + 1) * task.num_kv_heads *
                (task.end_chunk - task.first_chunk) * kChunk * call.width();
  const auto run = [&](OwnWorker& worker, int64_t index, int64_t next) {
    const Task* expected = next < (int64_t)tasks.size() ? &tasks[next] : nullptr;
    worker.run(tasks[index], expected, partials.get());
  };
  in_parallel<OwnWorker>(call, (int64_t)tasks.size(), products, run);
  if (division.pieces.empty()) return;
  const auto join_pieces = [&](OwnWorker& worker, int64_t index, int64_t) {
    const auto [first, end] = division.pieces[index];
    const Task& task = tasks[first];
    const Running total = Running::in(partials.get() + task.partial, task.all_rows());
    for (int64_t piece = first + 1; piece < end; piece++)
      join(total, Running::in(partials.get() + tasks[piece].partial, task.all_rows()),
           task.all_rows(), call.width());
    worker.finish(task, total);
  };
  in_parallel<OwnWorker>(call, (int64_t)division.pieces.size(), division.partial_size,
                         join_pieces);
}

// Everything that is read without looking is checked here.
void check_tables(const at::Tensor& query, const at::Tensor& pool, const at::Tensor& block_tables,
                  const at::Tensor& query_start, const at::Tensor& num_computed,
                  const Places& places) {
  const int64_t num_seqs = num_computed.numel();
  TORCH_CHECK(block_tables.dim() == 2 && block_tables.size(0) == num_seqs &&
                  query_start.numel() == num_seqs + 1 && block_tables.is_contiguous() &&
                  query_start.is_contiguous() && num_computed.is_contiguous(),
              "a row of blocks, a start and a number of computed tokens for each sequence");
  const auto *start = query_start.const_data_ptr<int32_t>(),
             *computed = num_computed.const_data_ptr<int32_t>(),
             *tables = block_tables.const_data_ptr<int32_t>();
  const int64_t num_blocks = places.num_blocks(pool);
  TORCH_CHECK(start[0] == 0 && start[num_seqs] == query.size(0), "all queries are of a sequence");
  for (int64_t seq = 0; seq < num_seqs; seq++) {
    const int64_t num_new = start[seq + 1] - start[seq], length = computed[seq] + num_new;
    const int64_t used = (length + places.block_size - 1) / places.block_size;
    TORCH_CHECK(num_new >= 0 && computed[seq] >= 0 && used <= block_tables.size(1),
                "sequence ", seq, " has ", length, " tokens and ", block_tables.size(1), " blocks");
    const int32_t* table = tables + seq * block_tables.size(1);
    for (int64_t index = 0; index < used; index++)
      TORCH_CHECK(table[index] >= -1 && table[index] < num_blocks, "block ", table[index],
                  " of sequence ", seq, "; allowed: -1 to ", num_blocks - 1);
  }
}

}  // namespace

at::Tensor paged_attention(const at::Tensor& query, const at::Tensor& pool,
                           const at::Tensor& block_tables, const at::Tensor& query_start,
                           const at::Tensor& num_computed, at::IntArrayRef places,
                           at::ArrayRef<double> scale, at::IntArrayRef window,
                           at::ArrayRef<double> slopes, at::ArrayRef<double> sinks,
                           int64_t sink_tokens, double softcap) {
  const Places in_pool = Places::of(places);
  TORCH_CHECK(query.dim() == 3 && query.stride(2) == 1, "queries are [tokens, heads, head_dim]");
  const int64_t num_heads = query.size(1), head_dim = query.size(2);
  TORCH_CHECK(head_dim <= kMaxHeadDim, "head_dim is ", head_dim, "; allowed: up to 256");
  TORCH_CHECK(query.scalar_type() == at::kFloat || head_dim % 2 == 0,
              "head_dim is ", head_dim, "; allowed in bfloat16: even numbers");
  TORCH_CHECK(num_heads % in_pool.num_kv_heads == 0, "num_kv_heads is ", in_pool.num_kv_heads,
              "; allowed: a divisor of ", num_heads);
  check_tables(query, pool, block_tables, query_start, num_computed, in_pool);
  const auto of_heads = [&](size_t size) { return size == (size_t)num_heads; };
  TORCH_CHECK(of_heads(scale.size()) && of_heads(window.size()) &&
                  (slopes.empty() || of_heads(slopes.size())) &&
                  (sinks.empty() || of_heads(sinks.size())),
              "scale, window, slopes and sinks have one number for each head");
  TORCH_CHECK(std::all_of(window.begin(), window.end(), [](int64_t size) { return size > 0; }),
              "windows are 1 or more");
  const at::Tensor output = at::empty(query.sizes(), query.options());
  with_types(query, pool, [&]<typename T, typename Kept>() {
    const Call<T, Kept> call{query.const_data_ptr<T>(), query.stride(0), query.stride(1),
                             pool.const_data_ptr<Kept>(), in_pool,
                             block_tables.const_data_ptr<int32_t>(), block_tables.size(1),
                             query_start.const_data_ptr<int32_t>(),
                             num_computed.const_data_ptr<int32_t>(), num_computed.numel(),
                             num_heads, head_dim, scale.data(), window.data(),
                             slopes.empty() ? nullptr : slopes.data(),
                             sinks.empty() ? nullptr : sinks.data(), (int32_t)sink_tokens,
                             (float)softcap, output.mutable_data_ptr<T>()};
    with_unit<T>([&]<typename Product>() { attend<T, Kept, Product>(call); });
  });
  return output;
}

}  // namespace headroom

TORCH_LIBRARY_FRAGMENT(headroom, library) {
  library.def(
      "paged_attention(Tensor query, Tensor pool, Tensor block_tables, Tensor query_start, "
      "Tensor num_computed, int[] places, float[] scale, int[] window, float[] slopes, "
      "float[] sinks, int sink_tokens, float softcap) -> Tensor");
}

TORCH_LIBRARY_IMPL(headroom, CPU, library) { library.impl("paged_attention", &headroom::paged_attention); }
