// Phases of tasks for the short calls of a decode step, by threads that never have to be waited for.
//
// A region of OpenMP ends when all its threads have come, also those that found nothing to do: where
// other processes want the cores, each of the hundred calls of a step waits for the scheduler. Here the
// caller is finished as soon as all tasks are, and helpers join if they come in time. They stay awake
// for a moment after a call, since the next one follows soon, then sleep.
#pragma once

#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>

#include "parallel.h"

#if defined(__x86_64__)
static inline void relax() { __builtin_ia32_pause(); }
#else
static inline void relax() {}
#endif

class Team {
 public:
  using Body = void (*)(const void* data);

  // The team of this process: a fork has none of its parent's threads.
  static Team& ours() {
    static std::atomic<Team*> team{nullptr};
    Team* found = team.load(std::memory_order_acquire);
    if (found && found->process_ == getpid()) return *found;
    auto* made = new Team;  // never destroyed: helpers may outlive everything else
    return team.compare_exchange_strong(found, made) ? *made : (delete made, *team.load());
  }

  // body(data) by the caller and whichever helpers come; true unless another call is using the team.
  bool run(int64_t threads, Body body, const void* data) {
    if (busy_.exchange(true, std::memory_order_acquire)) return false;
    try {
      for (; helpers_ < threads - 1; ++helpers_) std::thread(&Team::help, this, helpers_).detach();
    } catch (const std::system_error&) {
      // No more threads are to be had here; those there are suffice.
    }
    body_ = body;
    data_ = data;
    wanted_.store(threads - 1, std::memory_order_relaxed);
    gate_.store(0, std::memory_order_release);
    calls_.fetch_add(1);
    if (asleep_.load() > 0) {
      std::lock_guard<std::mutex> lock(mutex_);
      wake_.notify_all();
    }
    body(data);
    gate_.fetch_or(CLOSED, std::memory_order_acq_rel);
    for (int spins = 0; gate_.load(std::memory_order_acquire) != CLOSED; ++spins)
      spins < 1024 ? relax() : std::this_thread::yield();
    busy_.store(false, std::memory_order_release);
    return true;
  }

 private:
  static constexpr int64_t CLOSED = int64_t{1} << 32;  // above the number of helpers inside
  static constexpr auto AWAKE = std::chrono::microseconds(200);

  void help(int64_t number) {
    uint64_t seen = 0;
    for (;;) {
      await(seen);
      seen = calls_.load(std::memory_order_acquire);
      int64_t gate = gate_.load(std::memory_order_acquire);
      while (gate < CLOSED && !gate_.compare_exchange_weak(gate, gate + 1, std::memory_order_acq_rel)) {
      }
      if (gate >= CLOSED) continue;
      if (number < wanted_.load(std::memory_order_relaxed)) body_(data_);
      gate_.fetch_sub(1, std::memory_order_acq_rel);
    }
  }

  void await(uint64_t seen) {
    const auto since = std::chrono::steady_clock::now();
    while (std::chrono::steady_clock::now() - since < AWAKE)
      for (int spins = 0; spins < 64; ++spins, relax())
        if (calls_.load(std::memory_order_acquire) != seen) return;
    std::unique_lock<std::mutex> lock(mutex_);
    asleep_.fetch_add(1);
    wake_.wait(lock, [&] { return calls_.load() != seen; });
    asleep_.fetch_sub(1);
  }

  const pid_t process_ = getpid();
  std::atomic<bool> busy_{false};
  std::atomic<int64_t> gate_{CLOSED}, wanted_{0}, asleep_{0};
  std::atomic<uint64_t> calls_{0};
  int64_t helpers_ = 0;
  Body body_ = nullptr;
  const void* data_ = nullptr;
  std::mutex mutex_;
  std::condition_variable wake_;
};

// One step of several that must follow each other: run(task) for every task in [0, tasks). Which thread
// takes which task is left to chance, so a task must own what it writes.
template <typename Run>
struct Phase {
  Phase(int64_t tasks, const Run& run) : tasks(tasks), run(run) {}
  // Takes tasks until none is left, then waits for those that others have taken.
  void work() const {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      run(task);
      done.fetch_add(1, std::memory_order_acq_rel);
    }
    // The owner of a task may have lost its core to another process: waiting must not keep it.
    for (int spins = 0; done.load(std::memory_order_acquire) < tasks; ++spins)
      spins < 1024 ? relax() : std::this_thread::yield();
  }
  const int64_t tasks;
  const Run& run;
  mutable std::atomic<int64_t> next{0}, done{0};
};

// All phases one after another, with the threads called once for all of them.
template <typename... Run>
void run_phases(int64_t threads, const Phase<Run>&... phases) {
  auto all = [&] { (phases.work(), ...); };
  using All = decltype(all);
  const int64_t most = std::max({phases.tasks...});
  if (threads > most) threads = most;
  const Team::Body body = [](const void* data) { (*static_cast<const All*>(data))(); };
  if (threads <= 1 || !Team::ours().run(threads, body, &all)) all();
}
