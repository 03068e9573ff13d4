// The threads of a call, which stay together from its first piece of work to its last.
//
// A parallel region for each piece takes time to begin and to end, and while a thread waits for the
// others memory is idle, which is what products of few rows are bound by. Here a thread that waits
// asks for its part of the weight that comes next.

#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <type_traits>
#include <utility>

#include "lanes.h"

namespace headroom {

// One of `count` neighbouring parts of `size` pieces, as even as they can be.
struct Part {
  int64_t begin, end;

  static Part of(int64_t number, int64_t count, int64_t size) {
    return {number * size / count, (number + 1) * size / count};
  }
};

// Memory that so many threads will read, in pieces of which each begins with its part.
struct Upcoming {
  const char* at = nullptr;
  int64_t bytes_of_piece = 0, pieces = 0, threads = 0;
};

class Crew {
 public:
  // Calls `drive()` on this thread, and has a crew of so many threads for all that it shares. At the end
  // it waits until the system has let each of them run, which has to be worth it.
  template <typename F>
  static void gather(int64_t threads, F&& drive) {
    if (threads <= 1 || of_this_thread) return drive();
    Crew crew(threads);
    at::parallel_for(0, crew.size_, 1, [&](int64_t number, int64_t) {
      if (number > 0) return crew.serve((int)number);
      of_this_thread = &crew;
      const Dismissal dismissal{crew};
      drive();
    });
  }

  // Calls `work(number)` on this thread, whose number is 0, and on those with numbers below `threads`
  // that come while this one is at it: before the end of a crew nobody waits for one that the system
  // does not let run. So what there is to do must not be tied to a number. Throws what one of them throws.
  template <typename F>
  static void share(int64_t threads, F&& work) {
    if (threads <= 1) return work(0);
    if (!of_this_thread) return gather(threads, [&] { share(threads, work); });
    using Function = std::remove_reference_t<F>;
    const auto call = [](void* function, int number) { (*static_cast<Function*>(function))(number); };
    of_this_thread->run((int)threads, {call, &work});
  }

  // What will be read after the next `advance`.
  static void expect(const Upcoming& upcoming) {
    if (of_this_thread) of_this_thread->expected_ = upcoming;
  }

  // The work that is shared next reads what threads asked for until now. When they are done with it they
  // ask for what is expected.
  static void advance() {
    if (of_this_thread) of_this_thread->upcoming_ = std::exchange(of_this_thread->expected_, {});
  }

  // How many threads there can be.
  static int64_t most_threads() {
    return of_this_thread ? of_this_thread->size_ : at::get_num_threads();
  }

 private:
  struct Work {
    void (*call)(void* function, int number);
    void* function;
  };

  // What a thread asks for while it waits.
  class Asking {
   public:
    // Begins with the part of a thread, unless that is what it asks for already.
    void turn_to(const Upcoming& upcoming, int number) {
      if (std::exchange(of_, upcoming.at) == upcoming.at) return;
      at_ = end_ = nullptr;
      if (number >= upcoming.threads) return;
      const Part own = Part::of(number, upcoming.threads, upcoming.pieces);
      at_ = upcoming.at + own.begin * upcoming.bytes_of_piece;
      end_ = std::min(at_ + kMost, upcoming.at + own.end * upcoming.bytes_of_piece);
    }

    // Asks for a little; false if there is nothing left.
    bool ask() {
      for (int line = 0; line < kLinesAtOnce && at_ < end_; line++, at_ += kLine) prefetch(at_);
      return at_ < end_;
    }

   private:
    static constexpr int64_t kMost = 512 << 10;  // bytes, a part of a second-level cache
    static constexpr int kLine = 64, kLinesAtOnce = 4;

    const char *of_ = nullptr, *at_ = nullptr, *end_ = nullptr;
  };

  struct Dismissal {
    Crew& crew;

    ~Dismissal() {
      of_this_thread = nullptr;
      crew.state_ = kDone;
      crew.state_.notify_all();
    }
  };

  // The state of the crew: the number of the last job, whether it is open to who comes, how many threads
  // may take part, and how many others are at it.
  static constexpr int kNumber = 32, kThreads = 16;
  static constexpr uint64_t kOpen = 1ull << 31, kMostThreads = (1 << 15) - 1;
  static constexpr uint64_t kAtWork = (1 << kThreads) - 1, kDone = ~0ull;

  static constexpr int kTurns = 1 << 14;  // of waiting before a thread sleeps: a millisecond or less

  explicit Crew(int64_t size) : size_((int)std::min<int64_t>(size, kMostThreads)) {}

  void run(int threads, const Work& work) {
    work_ = work;
    state_ = ++number_ << kNumber | kOpen | (uint64_t)std::min(threads, size_) << kThreads;
    state_.notify_all();
    of_this_thread = nullptr;  // what it shares meanwhile is not of this crew
    take_part(0);
    of_this_thread = this;
    state_.fetch_and(~kOpen);
    asking_.turn_to(upcoming_, 0);
    wait_until([](uint64_t state) { return !(state & kAtWork); }, asking_);
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

  void serve(int number) {
    Asking asking;
    for (uint64_t last = 0;;) {
      uint64_t state =
          wait_until([&](uint64_t state) { return state >> kNumber != last; }, asking);
      if (state == kDone) return;
      last = state >> kNumber;
      const auto may_come = [&] {
        return state >> kNumber == last && state & kOpen &&
               number < (int)(state >> kThreads & kMostThreads);
      };
      while (may_come()) {
        if (!state_.compare_exchange_weak(state, state + 1)) continue;
        take_part(number);
        asking.turn_to(upcoming_, number);
        state_.fetch_sub(1);
        state_.notify_all();
        break;
      }
    }
  }

  void take_part(int number) {
    try {
      work_.call(work_.function, number);
    } catch (...) {
      const std::lock_guard lock(error_lock_);
      error_ = std::current_exception();
    }
  }

  template <typename F>
  uint64_t wait_until(F&& arrived, Asking& asking) {
    for (int turn = 0;;) {
      const uint64_t state = state_;
      if (arrived(state)) return state;
      if (asking.ask()) continue;
      asm volatile("pause");
      if (++turn > kTurns) state_.wait(state);
    }
  }

  static thread_local inline Crew* of_this_thread = nullptr;

  alignas(64) std::atomic<uint64_t> state_{0};  // in a line of a cache that waiting threads only read
  alignas(64) const int size_;
  uint64_t number_ = 0;
  Asking asking_;  // of the thread that drives
  Upcoming expected_;
  // These are written while nobody else is at work, and read by those who are.
  Work work_{};
  Upcoming upcoming_;
  std::exception_ptr error_;
  std::mutex error_lock_;
};

// So many threads are kept busy by so many products of lanes for longer than they take to come
// and to wait for each other, which on a busy machine is long.
inline int64_t threads_for(int64_t products) {
  constexpr int64_t kWorthAThread = 1 << 16;
  return std::clamp<int64_t>(products / kWorthAThread, 1, Crew::most_threads());
}

// Calls `work(begin, end)` until it was called for all of so many rows of this width.
template <typename F>
void for_rows(int64_t rows, int64_t width, F&& work) {
  constexpr int64_t kWorthAThread = 1 << 15;  // elements
  const int64_t most = std::clamp<int64_t>(rows, 1, Crew::most_threads());
  const int64_t parts =
      std::clamp<int64_t>((rows * width + kWorthAThread - 1) / kWorthAThread, 1, most);
  std::atomic<int64_t> next{0};
  Crew::share(parts, [&](int) {
    for (int64_t number; (number = next++) < parts;) {
      const Part part = Part::of(number, parts, rows);
      work(part.begin, part.end);
    }
  });
}

}  // namespace headroom
