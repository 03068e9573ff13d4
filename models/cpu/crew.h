// The threads of a call, which stay together from its first piece of work to its last.
//
// To begin and end a parallel region for each piece takes time, and whoever has to wait leaves the
// memory idle, which is what few rows are bound by: meanwhile a thread asks for its share of the
// weight that comes next.

#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <utility>

#include "lanes.h"

namespace headroom {

// From where to where one of `count` that divide `size` pieces evenly has to go.
struct Share {
  int64_t begin, end;

  static Share of(int64_t number, int64_t count, int64_t size) {
    return {number * size / count, (number + 1) * size / count};
  }
};

// Memory that will be read, in pieces of which each thread first reads those of its own share.
struct Upcoming {
  const char* at = nullptr;
  int64_t bytes_of_piece = 0, pieces = 0;
};

class Crew {
 public:
  // Calls `drive()` on this thread, with a crew for all that it shares.
  template <typename F>
  static void gather(F&& drive) {
    if (of_this_thread) return drive();
    Crew crew(at::get_num_threads());
    at::parallel_for(0, crew.size_, 1, [&](int64_t number, int64_t) {
      if (number > 0) return crew.serve((int)number);
      of_this_thread = &crew;
      const Dismissal dismissal{crew};
      drive();
    });
  }

  // Calls `work(number)` on this thread, whose number is 0, and on others with numbers below `threads`,
  // if they come before it is done: nobody waits for one that the system does not let run.
  template <typename F>
  static void share(int64_t threads, F&& work) {
    if (threads <= 1) return work(0);
    if (!of_this_thread) return gather([&] { share(threads, work); });
    of_this_thread->run((int)threads, [](const void* function, int number) {
      (*static_cast<std::remove_reference_t<F>*>(const_cast<void*>(function)))(number);
    }, &work);
  }

  // What will be read after the next piece of work.
  static void expect(const Upcoming& upcoming) {
    if (of_this_thread) of_this_thread->upcoming_ = upcoming;
  }

 private:
  using Work = void (*)(const void* function, int number);

  // A job: its number, whether it is open to those who come, how many may, and how many are at work.
  static constexpr int kNumber = 32, kLimit = 16;
  static constexpr uint64_t kOpen = 1ull << 31, kAtWork = (1 << kLimit) - 1, kDone = ~0ull;
  static constexpr int64_t kMostAhead = 512 << 10;  // bytes of a thread, a part of a second-level cache
  static constexpr int kLinesAtOnce = 4;
  static constexpr int kTurns = 1 << 14;  // before a thread lets others run; about a millisecond

  // What a thread asks for while it waits.
  struct Asking {
    const char* from = nullptr;  // of all threads
    const char *at = nullptr, *end = nullptr;

    void begin(const Upcoming& upcoming, int number, int size) {
      if (upcoming.at == from) return;
      from = upcoming.at;
      const Share own = Share::of(number, size, upcoming.pieces);
      at = upcoming.at + own.begin * upcoming.bytes_of_piece;
      end = std::min(at + kMostAhead, upcoming.at + own.end * upcoming.bytes_of_piece);
    }

    // Whether there was something to ask for.
    bool ask() {
      for (int line = 0; line < kLinesAtOnce && at < end; line++, at += 64) prefetch(at);
      return at < end;
    }
  };

  struct Dismissal {
    Crew& crew;

    ~Dismissal() {
      of_this_thread = nullptr;
      crew.state_.store(kDone);
      crew.state_.notify_all();
    }
  };

  explicit Crew(int size) : size_(size) {}

  // Waits until `arrived(state)`.
  template <typename F>
  uint64_t wait_until(Asking& asking, F&& arrived) {
    for (int turn = 0;;) {
      const uint64_t state = state_.load(std::memory_order_acquire);
      if (arrived(state)) return state;
      if (asking.ask()) continue;
      pause();
      if (++turn > kTurns) state_.wait(state);
    }
  }

  static void pause() { asm volatile("pause"); }

  void run(int threads, Work work, const void* function) {
    work_ = work;
    function_ = function;
    const uint64_t number = ++number_;
    state_.store(number << kNumber | kOpen | (uint64_t)threads << kLimit);
    state_.notify_all();
    do_work(0);
    state_.fetch_and(~kOpen);
    asking_.begin(upcoming_, 0, size_);
    wait_until(asking_, [](uint64_t state) { return !(state & kAtWork); });
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

  void do_work(int number) {
    try {
      work_(function_, number);
    } catch (...) {
      const std::lock_guard lock(error_lock_);
      error_ = std::current_exception();
    }
  }

  void serve(int number) {
    Asking asking;
    for (uint64_t last = 0;;) {
      uint64_t state =
          wait_until(asking, [&](uint64_t state) { return state >> kNumber != last; });
      if (state == kDone) return;
      last = state >> kNumber;
      while (state >> kNumber == last && state & kOpen &&
             number < (int)(state >> kLimit & (kAtWork >> 1))) {
        if (!state_.compare_exchange_weak(state, state + 1)) continue;
        do_work(number);
        asking.begin(upcoming_, number, size_);
        state_.fetch_sub(1);
        state_.notify_all();
        break;
      }
    }
  }

  static thread_local inline Crew* of_this_thread = nullptr;

  const int size_;
  std::atomic<uint64_t> state_{0};
  uint64_t number_ = 0;
  // These change only while nobody is at work.
  Work work_ = nullptr;
  const void* function_ = nullptr;
  Upcoming upcoming_;
  std::exception_ptr error_;
  std::mutex error_lock_;
  Asking asking_;  // of the thread that drives
};

// So many threads are kept busy by so many products of lanes for longer than they take to start and to
// wait for each other, which on a busy machine is long.
inline int64_t threads_for(int64_t products) {
  constexpr int64_t kWorthAThread = 1 << 16;
  return std::clamp<int64_t>(products / kWorthAThread, 1, at::get_num_threads());
}

// Calls `work(begin, end)` for parts of so many rows of this width.
template <typename F>
void for_rows(int64_t rows, int64_t width, F&& work) {
  constexpr int64_t kWorthAThread = 32768;  // elements
  const int64_t parts =
      std::clamp<int64_t>(rows * width / kWorthAThread, 1, std::min<int64_t>(std::max<int64_t>(rows, 1), at::get_num_threads()));
  std::atomic<int64_t> next{0};
  Crew::share(parts, [&](int) {
    for (int64_t part; (part = next.fetch_add(1)) < parts;) {
      const Share own = Share::of(part, parts, rows);
      if (own.begin < own.end) work(own.begin, own.end);
    }
  });
}

}  // namespace headroom
