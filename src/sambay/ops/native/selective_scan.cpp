// Mamba-1 selective scan, forward and backward, for float32 and bfloat16 activations.
//
//   s_t = exp(dt_t A) s_{t-1} + dt_t B_t x_t     y_t = C_t . s_t + D x_t     dt = softplus(delta + bias)
//
// One vector holds one state index n of LANES neighbouring channels, so a step needs no sum across
// lanes. A task walks a row's time in chunks: first everything that exists once per channel (dt,
// dt*x), then the recurrence for a few n at a time with their states in registers. The backward
// recomputes a chunk's states from the state at its start, which the forward saved.
//
// B batch, T positions, E channels, N states per channel. Activations are (B, T, E) and (B, T, N)
// with any strides but a contiguous last axis; everything else is contiguous.
#include <algorithm>
#include <type_traits>

#include "parallel.h"
#include "vector.h"

namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int FORWARD_STATES = 16;  // 32 vector registers
#else
constexpr int FORWARD_STATES = 8;
#endif
constexpr int BACKWARD_STATES = 4;

// An activation: element (b, t, i) is at data[b * row + t * step + i].
template <typename T>
struct Sequence {
  T* data;
  int64_t row, step;
  T* at(int64_t b, int64_t t) const { return data + b * row + t * step; }
};

template <typename T>
struct Scan {
  Sequence<const T> x, delta;
  const float* A;  // (E, N)
  Sequence<const float> B, C;
  const float *D, *bias;        // (E)
  const float* initial;         // (B, E, N) or null
  const uint8_t* resets;        // (B, T) or null
  int64_t batch, length, channels, states, chunk;

  int64_t blocks() const { return (channels + LANES - 1) / LANES; }
  int64_t chunks() const { return (length + chunk - 1) / chunk; }
};

// The LANES channels a task works on: gathers and scatters of (E, N) tables as N vectors.
struct Channels {
  int64_t first;
  int lanes;

  void gather(const float* table, vfloat* to, int64_t states, float factor) const {
    for (int64_t n = 0; n < states; ++n) {
      vfloat value = {};
      for (int lane = 0; lane < lanes; ++lane) value[lane] = table[(first + lane) * states + n] * factor;
      to[n] = value;
    }
  }
  void scatter(const vfloat* from, float* table, int64_t states) const {
    for (int64_t n = 0; n < states; ++n)
      for (int lane = 0; lane < lanes; ++lane) table[(first + lane) * states + n] = from[n][lane];
  }
};

template <typename T>
Channels channels_of(const Scan<T>& p, int64_t block) {
  return {block * LANES, static_cast<int>(std::min<int64_t>(LANES, p.channels - block * LANES))};
}

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
    advance_by(std::integral_constant<int, FORWARD_STATES>{});
    advance_by(std::integral_constant<int, 1>{});
    for (int64_t t = 0; t < steps; ++t)
      store(y + (b * p.length + start + t) * p.channels + at.first, out[t], at.lanes);
  }
  at.scatter(state, final_state + b * p.channels * N, N);
}

// What the backward keeps of one chunk of LANES channels, per token.
struct Tokens {
  vfloat *x, *dt, *u, *dy, *slope, *du, *ddt;
};

// Recomputes `Q` states of a chunk, then walks it backwards. `gradient` is dL/ds at the end on entry
// and dL/ds at the start on return; dB and dC collect one vector per token and state. What a token
// needs repeatedly is copied to locals: the compiler must assume that stores to dB change the rest.
template <int Q>
void retreat(int64_t steps, const vfloat* A_of, const vfloat* start, const Tokens& k, const float* B,
             int64_t B_step, const float* C, int64_t C_step, const uint8_t* resets, vfloat* decay,
             vfloat* states, vfloat* gradient, vfloat* dA, vfloat* dB, vfloat* dC, int64_t d_step) {
  vfloat A[Q], s[Q], g[Q], sum[Q];
  for (int q = 0; q < Q; ++q) A[q] = A_of[q], states[q] = s[q] = start[q];
  for (int64_t t = 0; t < steps; ++t) {
    const vfloat dt = k.dt[t], u = k.u[t];
    const bool reset = resets && resets[t];
    if (reset)
      for (int q = 0; q < Q; ++q) s[q] = vfloat{};
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) {
      const vfloat a = exp2v(dt * A[q]);
      s[q] = a * s[q] + u * B[t * B_step + q];
      decay[t * Q + q] = a;
      states[(t + 1) * Q + q] = s[q];
    }
    if (reset)  // nothing flows back across
      for (int q = 0; q < Q; ++q) decay[t * Q + q] = vfloat{};
  }
  for (int q = 0; q < Q; ++q) g[q] = gradient[q], sum[q] = dA[q];
  for (int64_t t = steps - 1; t >= 0; --t) {
    const vfloat dt = k.dt[t], u = k.u[t], dy = k.dy[t];
    vfloat du = k.du[t], ddt = k.ddt[t];
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) {
      const vfloat before = states[t * Q + q];
      g[q] += dy * C[t * C_step + q];
      dC[t * d_step + q] += dy * s[q];
      dB[t * d_step + q] += u * g[q];
      du += g[q] * B[t * B_step + q];
      g[q] *= decay[t * Q + q];
      s[q] = before;
      const vfloat product = g[q] * before;
      ddt += product * A[q];
      sum[q] += product * dt;
    }
    k.du[t] = du;
    k.ddt[t] = ddt;
  }
  for (int q = 0; q < Q; ++q) gradient[q] = g[q], dA[q] = sum[q];
}

template <typename T>
struct Gradients {
  Sequence<const T> dy;
  const float* final_state;  // (B, E, N) or null
  const float* saved;        // (B, chunks - 1, N, E)
  T *x, *delta;              // (B, T, E)
  float* initial;            // (B, E, N) or null
  float *A, *D, *bias;       // (B, E, N), (B, E), (B, E): still to be summed over rows
  float *B, *C;              // (groups, B, T, N): still to be summed over groups
};

// How many blocks of channels one task of the backward takes: many save work on dB and dC, few keep
// many cores busy. It depends on the shape alone, so that sums are grouped alike on any machine.
int64_t blocks_per_task(int64_t batch, int64_t blocks) {
  int64_t group = 8;
  while (group > 1 && batch * ((blocks + group - 1) / group) < 16) group /= 2;
  return group;
}

template <typename T>
int64_t groups_of(const Scan<T>& p) {
  const int64_t group = blocks_per_task(p.batch, p.blocks());
  return (p.blocks() + group - 1) / group;
}

// One row and one group of channel blocks: the sums over channels that dB and dC need are first
// taken over the blocks, lane by lane, and only then across lanes.
template <typename T>
void backward_task(const Scan<T>& p, const Gradients<T>& d, int64_t task) {
  const int64_t N = p.states, groups = groups_of(p), size = blocks_per_task(p.batch, p.blocks());
  const int64_t b = task / groups, group = task % groups;
  const int64_t first = group * size, count = std::min(size, p.blocks() - first);
  constexpr int Q = BACKWARD_STATES;
  Scratch scratch((3 * count * N + N + 2 * count + 2 * p.chunk * N + (2 * Q + 7) * p.chunk + Q) * LANES);
  auto* A = scratch.take<vfloat>(count * N);
  auto* gradient = scratch.take<vfloat>(count * N);
  auto* dA = scratch.take<vfloat>(count * N);
  auto* start = scratch.take<vfloat>(N);
  auto* dD = scratch.take<vfloat>(count);
  auto* dbias = scratch.take<vfloat>(count);
  auto* dB = scratch.take<vfloat>(p.chunk * N);
  auto* dC = scratch.take<vfloat>(p.chunk * N);
  auto* decay = scratch.take<vfloat>(Q * p.chunk);
  auto* states = scratch.take<vfloat>(Q * p.chunk + Q);
  Tokens k;
  for (vfloat** part : {&k.x, &k.dt, &k.u, &k.dy, &k.slope, &k.du, &k.ddt})
    *part = scratch.take<vfloat>(p.chunk);
  std::fill(dA, dA + count * N, vfloat{});
  std::fill(dD, dD + count, vfloat{});
  std::fill(dbias, dbias + count, vfloat{});
  for (int64_t j = 0; j < count; ++j) {
    const Channels at = channels_of(p, first + j);
    at.gather(p.A, A + j * N, N, LOG2_E);
    if (d.final_state)
      at.gather(d.final_state + b * p.channels * N, gradient + j * N, N, 1.0f);
    else
      std::fill(gradient + j * N, gradient + j * N + N, vfloat{});
  }

  for (int64_t chunk = p.chunks() - 1; chunk >= 0; --chunk) {
    const int64_t from = chunk * p.chunk, steps = std::min(p.chunk, p.length - from);
    const uint8_t* resets = p.resets ? p.resets + b * p.length + from : nullptr;
    std::fill(dB, dB + steps * N, vfloat{});
    std::fill(dC, dC + steps * N, vfloat{});
    for (int64_t j = 0; j < count; ++j) {
      const Channels at = channels_of(p, first + j);
      const vfloat D = load(p.D + at.first, at.lanes), bias = load(p.bias + at.first, at.lanes);
      if (chunk > 0) {
        const float* saved = d.saved + (b * (p.chunks() - 1) + chunk - 1) * N * p.channels + at.first;
        for (int64_t n = 0; n < N; ++n) start[n] = load(saved + n * p.channels, at.lanes);
      } else if (p.initial) {
        at.gather(p.initial + b * p.channels * N, start, N, 1.0f);
      } else {
        std::fill(start, start + N, vfloat{});
      }
      for (int64_t t = 0; t < steps; ++t) {
        const vfloat z = load(p.delta.at(b, from + t) + at.first, at.lanes) + bias;
        k.x[t] = load(p.x.at(b, from + t) + at.first, at.lanes);
        k.dy[t] = load(d.dy.at(b, from + t) + at.first, at.lanes);
        k.dt[t] = softplus(z);
        k.slope[t] = sigmoid(z);
        k.u[t] = k.dt[t] * k.x[t];
        k.du[t] = k.ddt[t] = vfloat{};
      }
      int64_t n = 0;
      auto retreat_by = [&](auto count) {
        constexpr int Q = decltype(count)::value;
        for (; n + Q <= N; n += Q)
          retreat<Q>(steps, A + j * N + n, start + n, k, p.B.at(b, from) + n, p.B.step,
                     p.C.at(b, from) + n, p.C.step, resets, decay, states, gradient + j * N + n,
                     dA + j * N + n, dB + n, dC + n, N);
      };
      retreat_by(std::integral_constant<int, BACKWARD_STATES>{});
      retreat_by(std::integral_constant<int, 1>{});
      for (int64_t t = 0; t < steps; ++t) {
        const int64_t token = (b * p.length + from + t) * p.channels + at.first;
        // A was scaled by log2(e) for exp2; LN_2 takes that out of its share of the gradient.
        const vfloat ddelta = (k.ddt[t] * LN_2 + k.du[t] * k.x[t]) * k.slope[t];
        store(d.x + token, k.du[t] * k.dt[t] + D * k.dy[t], at.lanes);
        store(d.delta + token, ddelta, at.lanes);
        dD[j] += k.dy[t] * k.x[t];
        dbias[j] += ddelta;
      }
    }
    const int64_t token = ((group * p.batch + b) * p.length + from) * N;
    sum_lanes(dB, d.B + token, steps * N);
    sum_lanes(dC, d.C + token, steps * N);
  }
  for (int64_t j = 0; j < count; ++j) {
    const Channels at = channels_of(p, first + j);
    at.scatter(dA + j * N, d.A + b * p.channels * N, N);
    store(d.D + b * p.channels + at.first, dD[j], at.lanes);
    store(d.bias + b * p.channels + at.first, dbias[j], at.lanes);
    if (d.initial) at.scatter(gradient + j * N, d.initial + b * p.channels * N, N);
  }
}

template <typename T>
void forward(const Scan<T>& p, T* y, float* final_state, float* saved, int64_t threads) {
  parallel_for(p.batch * p.blocks(), threads,
               [&](int64_t task) { forward_task(p, task, y, final_state, saved); });
}

// Where the summed gradients of the parameters go.
struct Sums {
  float *A, *D, *bias, *B, *C;
};

template <typename T>
void backward(const Scan<T>& p, Gradients<T> d, const Sums& sums, float* workspace, int64_t threads) {
  const int64_t channels = p.batch * p.channels, tokens = p.batch * p.length * p.states;
  const int64_t groups = groups_of(p);
  d.A = workspace;
  d.D = d.A + channels * p.states;
  d.bias = d.D + channels;
  d.B = d.bias + channels;
  d.C = d.B + groups * tokens;
  parallel_for(p.batch * groups, threads, [&](int64_t task) { backward_task(p, d, task); });
  sum_parts(d.A, sums.A, p.batch, p.channels * p.states, threads);
  sum_parts(d.D, sums.D, p.batch, p.channels, threads);
  sum_parts(d.bias, sums.bias, p.batch, p.channels, threads);
  sum_parts(d.B, sums.B, groups, tokens, threads);
  sum_parts(d.C, sums.C, groups, tokens, threads);
}

}  // namespace

#define SCAN_PARAMETERS                                                                               \
  const void *x, int64_t x_row, int64_t x_step, const void *delta, int64_t delta_row,                   \
      int64_t delta_step, const float *A, const float *B, int64_t B_row, int64_t B_step, const float *C, \
      int64_t C_row, int64_t C_step, const float *D, const float *bias, const float *initial,           \
      const uint8_t *resets, int64_t batch, int64_t length, int64_t channels, int64_t states,           \
      int64_t chunk, int64_t is_bfloat16, int64_t threads
#define SCAN(T)                                                                                       \
  Scan<T> {                                                                                           \
    {static_cast<const T*>(x), x_row, x_step}, {static_cast<const T*>(delta), delta_row, delta_step},  \
        A, {B, B_row, B_step}, {C, C_row, C_step}, D, bias, initial, resets, batch, length, channels,  \
        states, chunk                                                                                 \
  }

EXPORT int64_t sambay_scan_workspace(int64_t batch, int64_t length, int64_t channels, int64_t states) {
  const int64_t blocks = (channels + LANES - 1) / LANES, group = blocks_per_task(batch, blocks);
  const int64_t groups = (blocks + group - 1) / group;
  return batch * (channels * (states + 2) + 2 * groups * length * states);
}

EXPORT void sambay_scan_forward(SCAN_PARAMETERS, void* y, float* final_state, float* saved) {
  if (is_bfloat16)
    forward(SCAN(bfloat16), static_cast<bfloat16*>(y), final_state, saved, threads);
  else
    forward(SCAN(float), static_cast<float*>(y), final_state, saved, threads);
}

EXPORT void sambay_scan_backward(SCAN_PARAMETERS, const void* dy, int64_t dy_row, int64_t dy_step,
                                 const float* dfinal, const float* saved, void* dx, void* ddelta,
                                 float* dA, float* dB, float* dC, float* dD, float* dbias,
                                 float* dinitial, float* workspace) {
  const Sums sums{dA, dD, dbias, dB, dC};
  auto run = [&](const auto& scan, auto kind) {
    using T = decltype(kind);
    const Sequence<const T> output{static_cast<const T*>(dy), dy_row, dy_step};
    backward<T>(scan, {output, dfinal, saved, static_cast<T*>(dx), static_cast<T*>(ddelta), dinitial,
                       nullptr, nullptr, nullptr, nullptr, nullptr},
                sums, workspace, threads);
  };
  if (is_bfloat16)
    run(SCAN(bfloat16), bfloat16{});
  else
    run(SCAN(float), float{});
}
