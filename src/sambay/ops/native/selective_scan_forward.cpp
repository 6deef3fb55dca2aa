// The selective scan forward, for float32 and bfloat16 activations.
#include "selective_scan.h"

namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int STATES_AT_ONCE = 16;  // there are 32 vector registers
#else
constexpr int STATES_AT_ONCE = 8;
#endif

// Moves `Q` states over a chunk, adding C . s to y.
template <int Q>
void advance(int64_t steps, const vfloat* A, vfloat* state, const vfloat* dt, const vfloat* u,
             const float* B, int64_t B_step, const float* C, int64_t C_step, const uint8_t* resets,
             vfloat* y) {
  vfloat s[Q];
  for (int q = 0; q < Q; ++q) s[q] = state[q];
  for (int64_t t = 0; t < steps; ++t, B += B_step, C += C_step) {
    if (resets && resets[t])
      for (int q = 0; q < Q; ++q) s[q] = vfloat{};
    vfloat sums[2] = {y[t], vfloat{}};  // two, so that one addition need not wait for the last
#pragma GCC unroll 16
    for (int q = 0; q < Q; ++q) {
      s[q] = exp2v(dt[t] * A[q]) * s[q] + u[t] * B[q];
      sums[q & 1] += s[q] * C[q];
    }
    y[t] = sums[0] + sums[1];
  }
  for (int q = 0; q < Q; ++q) state[q] = s[q];
}

template <typename T>
void forward_task(const Scan<T>& p, int64_t task, T* y, float* final_state, float* saved) {
  const int64_t b = task / p.blocks(), N = p.states;
  const Channels at = channels_of(p, task % p.blocks());
  Scratch scratch((2 * N + 3 * p.chunk) * LANES);
  auto* A = scratch.take<vfloat>(N);
  auto* state = scratch.take<vfloat>(N);
  auto* dt = scratch.take<vfloat>(p.chunk);
  auto* u = scratch.take<vfloat>(p.chunk);
  auto* out = scratch.take<vfloat>(p.chunk);
  at.gather(p.A, A, N, LOG2_E);
  if (p.initial)
    at.gather(p.initial + b * p.channels * N, state, N, 1.0f);
  else
    std::fill(state, state + N, vfloat{});
  const vfloat D = load(p.D + at.first, at.lanes), bias = load(p.bias + at.first, at.lanes);

  for (int64_t start = 0; start < p.length; start += p.chunk) {
    const int64_t steps = std::min(p.chunk, p.length - start);
    if (saved && start > 0) {
      float* to = saved + (b * (p.chunks() - 1) + start / p.chunk - 1) * N * p.channels + at.first;
      for (int64_t n = 0; n < N; ++n) store(to + n * p.channels, state[n], at.lanes);
    }
    for (int64_t t = 0; t < steps; ++t) {
      __builtin_prefetch(p.x.at(b, start + p.chunk + t) + at.first);
      __builtin_prefetch(p.delta.at(b, start + p.chunk + t) + at.first);
      const vfloat x = load(p.x.at(b, start + t) + at.first, at.lanes);
      dt[t] = softplus(load(p.delta.at(b, start + t) + at.first, at.lanes) + bias);
      u[t] = dt[t] * x;
      out[t] = D * x;
    }
    const uint8_t* resets = p.resets ? p.resets + b * p.length + start : nullptr;
    int64_t n = 0;
    auto advance_by = [&](auto count) {
      constexpr int Q = decltype(count)::value;
      for (; n + Q <= N; n += Q)
        advance<Q>(steps, A + n, state + n, dt, u, p.B.at(b, start) + n, p.B.step,
                   p.C.at(b, start) + n, p.C.step, resets, out);
    };
    advance_by(std::integral_constant<int, STATES_AT_ONCE>{});
    advance_by(std::integral_constant<int, 1>{});
    for (int64_t t = 0; t < steps; ++t)
      store(y + (b * p.length + start + t) * p.channels + at.first, out[t], at.lanes);
  }
  at.scatter(state, final_state + b * p.channels * N, N);
}

template <typename T>
void forward(const Scan<T>& p, T* y, float* final_state, float* saved, int64_t threads) {
  parallel_for(p.batch * p.blocks(), threads,
               [&](int64_t task) { forward_task(p, task, y, final_state, saved); });
}

}  // namespace

EXPORT void sambay_scan_forward(SCAN_PARAMETERS, void* y, float* final_state, float* saved) {
  if (is_bfloat16)
    forward(SCAN(bfloat16), static_cast<bfloat16*>(y), final_state, saved, threads);
  else
    forward(SCAN(float), static_cast<float*>(y), final_state, saved, threads);
}
