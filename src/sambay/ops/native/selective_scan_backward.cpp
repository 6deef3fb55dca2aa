// The selective scan backward: a chunk's states are recomputed from the state at its start, which the
// forward saved, and walked in reverse.
#include <utility>

#include "selective_scan.h"

namespace {

constexpr int STATES_AT_ONCE = 4;

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
             vfloat* states, vfloat* gradient, vfloat* dA, vfloat* dB, vfloat* dC) {
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
      dC[t * Q + q] += dy * s[q];
      dB[t * Q + q] += u * g[q];
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

// Calls run(n, count) for the groups of states that `retreat` takes at once. The sums of a group lie
// together: rows of all N states would map to the same few lines of the first-level cache.
template <typename Run>
void for_states(int64_t states, const Run& run) {
  int64_t n = 0;
  for (; n + STATES_AT_ONCE <= states; n += STATES_AT_ONCE)
    run(n, std::integral_constant<int, STATES_AT_ONCE>{});
  for (; n < states; ++n) run(n, std::integral_constant<int, 1>{});
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
  constexpr int Q = STATES_AT_ONCE;
  Scratch scratch((3 * count * N + N + 2 * count + 2 * p.chunk * N + (2 * Q + 8) * p.chunk + Q) * LANES);
  auto* A = scratch.take<vfloat>(count * N);
  auto* gradient = scratch.take<vfloat>(count * N);
  auto* dA = scratch.take<vfloat>(count * N);
  auto* start = scratch.take<vfloat>(N);
  auto* dD = scratch.take<vfloat>(count);
  auto* dbias = scratch.take<vfloat>(count);
  auto* dB = scratch.take<vfloat>(p.chunk * N);
  auto* dC = scratch.take<vfloat>(p.chunk * N);
  auto* sums = scratch.take<float>(LANES * p.chunk);
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
    std::fill(dB, dB + p.chunk * N, vfloat{});
    std::fill(dC, dC + p.chunk * N, vfloat{});
    for (int64_t j = 0; j < count; ++j) {
      const Channels at = channels_of(p, first + j);
      const vfloat D = load(p.D + at.first, at.lanes), bias = load(p.bias + at.first, at.lanes);
      if (chunk > 0) {
        const float* saved = d.saved + (b * (p.chunks() - 1) + chunk - 1) * N * p.channels + at.first;
        for (int64_t n = 0; n < N; ++n) {
          __builtin_prefetch(saved + n * p.channels + LANES);
          start[n] = load(saved + n * p.channels, at.lanes);
        }
      } else if (p.initial) {
        at.gather(p.initial + b * p.channels * N, start, N, 1.0f);
      } else {
        std::fill(start, start + N, vfloat{});
      }
      // A channel block is one cache line per token, too far apart for the processor to foresee. The
      // block that comes next is that of the neighbouring channels, or of the tokens before.
      const bool last = j + 1 == count;
      const int64_t soon = last ? from - p.chunk : from, next = (last ? first : first + j + 1) * LANES;
      for (int64_t t = 0; t < steps; ++t) {
        __builtin_prefetch(p.delta.at(b, soon + t) + next);
        __builtin_prefetch(p.x.at(b, soon + t) + next);
        __builtin_prefetch(d.dy.at(b, soon + t) + next);
        __builtin_prefetch(d.x + (b * p.length + soon + t) * p.channels + next, 1);
        __builtin_prefetch(d.delta + (b * p.length + soon + t) * p.channels + next, 1);
        const vfloat z = load(p.delta.at(b, from + t) + at.first, at.lanes) + bias;
        k.x[t] = load(p.x.at(b, from + t) + at.first, at.lanes);
        k.dy[t] = load(d.dy.at(b, from + t) + at.first, at.lanes);
        k.dt[t] = softplus(z);
        k.slope[t] = sigmoid(z);
        k.u[t] = k.dt[t] * k.x[t];
        k.du[t] = k.ddt[t] = vfloat{};
      }
      for_states(N, [&](int64_t n, auto count) {
        retreat<decltype(count)::value>(
            steps, A + j * N + n, start + n, k, p.B.at(b, from) + n, p.B.step, p.C.at(b, from) + n,
            p.C.step, resets, decay, states, gradient + j * N + n, dA + j * N + n,
            dB + n * p.chunk, dC + n * p.chunk);
      });
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
    for_states(N, [&](int64_t n, auto count) {
      constexpr int taken = decltype(count)::value;
      for (auto [lanes, out] : {std::pair{dB, d.B}, std::pair{dC, d.C}}) {
        sum_lanes(lanes + n * p.chunk, sums, steps * taken);
        for (int64_t t = 0; t < steps; ++t)
          for (int q = 0; q < taken; ++q) out[token + t * N + n + q] = sums[t * taken + q];
      }
    });
  }
  for (int64_t j = 0; j < count; ++j) {
    const Channels at = channels_of(p, first + j);
    at.scatter(dA + j * N, d.A + b * p.channels * N, N);
    store(d.D + b * p.channels + at.first, dD[j], at.lanes);
    store(d.bias + b * p.channels + at.first, dbias[j], at.lanes);
    if (d.initial) at.scatter(gradient + j * N, d.initial + b * p.channels * N, N);
  }
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

EXPORT int64_t sambay_scan_workspace(int64_t batch, int64_t length, int64_t channels, int64_t states) {
  const int64_t blocks = (channels + LANES - 1) / LANES, group = blocks_per_task(batch, blocks);
  const int64_t groups = (blocks + group - 1) / group;
  return batch * (channels * (states + 2) + 2 * groups * length * states);
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
