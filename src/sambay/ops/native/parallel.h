// A parallel loop over independent tasks, run by the OpenMP runtime that torch has already loaded.
//
// Nothing here is compiled with -fopenmp: a second OpenMP runtime in the process would start its own
// threads and fight for the cores. Python hands over the address of GOMP_parallel instead, which
// GNU's, LLVM's and Intel's runtimes all export. Without one, plain threads are started per call.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <thread>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

using GompParallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
inline GompParallel gomp_parallel = nullptr;

// Calls run(task) for every task in [0, tasks); which thread takes which task is left to chance, so
// a task must own what it writes.
template <typename Run>
void parallel_for(int64_t tasks, int64_t threads, const Run& run) {
  struct Shared {
    std::atomic<int64_t> next;
    int64_t tasks;
    const Run* run;
  } shared{{0}, tasks, &run};
  auto body = [](void* data) {
    Shared& work = *static_cast<Shared*>(data);
    for (int64_t task; (task = work.next.fetch_add(1)) < work.tasks;) (*work.run)(task);
  };
  if (threads > tasks) threads = tasks;
  if (threads <= 1) {
    body(&shared);
  } else if (gomp_parallel) {
    gomp_parallel(body, &shared, static_cast<unsigned>(threads), 0);
  } else {
    std::vector<std::thread> helpers;
    for (int64_t i = 1; i < threads; ++i) helpers.emplace_back(body, &shared);
    body(&shared);
    for (auto& helper : helpers) helper.join();
  }
}

// Scratch memory of one task, aligned for vectors, handed out piece by piece.
class Scratch {
 public:
  explicit Scratch(int64_t floats) {
    const size_t bytes = (static_cast<size_t>(floats) * 4 + 63) / 64 * 64;
    memory_ = static_cast<float*>(std::aligned_alloc(64, bytes ? bytes : 64));
    if (!memory_) std::abort();
    next_ = memory_;
  }
  ~Scratch() { std::free(memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <typename Element>
  Element* take(int64_t count) {
    auto* piece = reinterpret_cast<Element*>(next_);
    next_ += count * static_cast<int64_t>(sizeof(Element) / 4);
    return piece;
  }

 private:
  float* memory_;
  float* next_;
};

// out[i] = sum over p of parts[p][i], always added in the same order, so that the result does not
// depend on the number of threads.
inline void sum_parts(const float* parts, float* out, int64_t count, int64_t size, int64_t threads) {
  constexpr int64_t PIECE = 4096;
  parallel_for((size + PIECE - 1) / PIECE, threads, [=](int64_t task) {
    const int64_t begin = task * PIECE;
    const int64_t end = begin + PIECE < size ? begin + PIECE : size;
    for (int64_t i = begin; i < end; ++i) out[i] = parts[i];
    for (int64_t part = 1; part < count; ++part)
      for (int64_t i = begin; i < end; ++i) out[i] += parts[part * size + i];
  });
}
