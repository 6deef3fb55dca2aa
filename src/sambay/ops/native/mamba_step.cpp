// What a Mamba-1 mixer does with one more token between its two projections: the convolution with SiLU,
// the projections to the time step, B and C, and the update of the state, all in float32. Three phases
// follow each other while the threads are awake; the state updates are those of step.cpp.
#include "packed.h"
#include "rows.h"
#include "team.h"

namespace {

constexpr int64_t CHANNELS = 64;  // channels of one task

struct Call {
  FewRows u;
  int64_t u_row;
  FewRows conv_weight, conv_bias;        // (E, W), (E)
  const void *x_proj, *dt_proj;          // (R + 2 N, E), (E, R), in the dtype of u
  const float *dt_bias, *A_log, *D;
  float *conv_state, *state;  // (B, W - 1, E), (B, E, N)
  Output y;
  int64_t rows, channels, width, states, rank;
};

// Convolves channels [first, first + count), at most CHANNELS, of all rows into x (B, E), and moves the
// inputs on.
inline void convolve(const Call& call, int64_t first, int64_t count, float* x) {
  const int64_t width = call.width, E = call.channels;
  Scratch scratch(CHANNELS * (2 * width + 2));
  auto* packed = scratch.take<float>(CHANNELS * width);  // as they lie in memory
  auto* weight = scratch.take<float>(CHANNELS * width);  // (W, CHANNELS)
  auto* bias = scratch.take<float>(CHANNELS);
  auto* now = scratch.take<float>(CHANNELS);
  call.conv_weight.arrange_as<float>(first * width, count * width, 1.0f, packed);
  call.conv_bias.arrange_as<float>(first, count, 1.0f, bias);
  for (int64_t e = 0; e < count; ++e)
    for (int64_t w = 0; w < width; ++w) weight[w * CHANNELS + e] = packed[e * width + w];
  for (int64_t b = 0; b < call.rows; ++b) {
    call.u.arrange_as<float>(b * call.u_row + first, count, 1.0f, now);
    for (int64_t e = 0; e < count; e += LANES) {
      const int lanes = static_cast<int>(std::min<int64_t>(LANES, count - e));
      float* earlier = call.conv_state + b * (width - 1) * E + first + e;
      const vfloat current = load(now + e, lanes);
      vfloat sum = load(bias + e, lanes) + load(weight + (width - 1) * CHANNELS + e, lanes) * current;
      for (int64_t w = 0; w < width - 1; ++w) {
        const vfloat value = load(earlier + w * E, lanes);
        sum += load(weight + w * CHANNELS + e, lanes) * value;
        if (w > 0) store(earlier + (w - 1) * E, value, lanes);
      }
      if (width > 1) store(earlier + (width - 2) * E, current, lanes);
      store(x + b * E + first + e, sum * sigmoid(sum), lanes);
    }
  }
}

// Updates the states of channels [e, e + lanes) of a row; C . s + D x.
inline vfloat advance(const Call& call, int64_t b, int64_t e, int lanes, const vfloat* A, vfloat dt,
                      vfloat x, const float* B, const float* C) {
  const int64_t N = call.states, blocks = (N + LANES - 1) / LANES;
  const vfloat u = dt * x;
  vfloat products[LANES] = {}, y;
  for (int lane = 0; lane < lanes; ++lane) {
    float* state = call.state + (b * call.channels + e + lane) * N;
    for (int64_t i = 0; i < blocks; ++i) {
      const int some = static_cast<int>(std::min<int64_t>(LANES, N - i * LANES));
      float* place = state + i * LANES;
      const vfloat s = exp2v(dt[lane] * A[lane * blocks + i]) * load(place, some) +
                       u[lane] * load(B + i * LANES, some);
      store(place, s, some);
      products[lane] += s * load(C + i * LANES, some);
    }
  }
  sum_lanes(products, reinterpret_cast<float*>(&y), LANES);
  return y + load(call.D + e, lanes) * x;
}

template <typename W>
void step(const Call& call, int64_t threads) {
  const int64_t E = call.channels, N = call.states, R = call.rank, features = R + 2 * N;
  const int64_t tiles = (E + CHANNELS - 1) / CHANNELS;
  const auto* x_proj = static_cast<const W*>(call.x_proj);
  const auto* dt_proj = static_cast<const W*>(call.dt_proj);
  Scratch scratch(call.rows * (2 * E + features));
  auto* x = scratch.take<float>(call.rows * E);
  auto* arranged = scratch.take<float>(call.rows * E);  // as x_proj's rows are loaded
  auto* inputs = scratch.take<float>(call.rows * features);  // time step, B and C of every row

  auto convolve_tile = [&](int64_t tile) {
    const int64_t first = tile * CHANNELS, count = std::min(CHANNELS, E - first);
    convolve(call, first, count, x);
    // Whole tiles are whole pairs of vectors, so each can be arranged on its own.
    for (int64_t b = 0; b < call.rows; ++b)
      arrange<W>(x + b * E + first, count, 1.0f, arranged + b * E + first);
  };
  auto project = [&](int64_t task) {
    const int64_t first = task * STREAMS, count = std::min<int64_t>(STREAMS, features - first);
    Scratch wide(MANY * E);
    all_products(x_proj + first * E, E, count, arranged, E, call.rows, E, wide.take<float>(MANY * E),
                 [&](int64_t f, int64_t b, float value) { inputs[b * features + first + f] = value; });
  };
  auto advance_tile = [&](int64_t tile) {
    const int64_t first = tile * CHANNELS, count = std::min(CHANNELS, E - first);
    const int64_t blocks = (N + LANES - 1) / LANES;
    Scratch room(LANES * blocks * LANES + call.rows * (R + CHANNELS) + MANY * R);
    auto* A = room.take<vfloat>(LANES * blocks);
    auto* time = room.take<float>(call.rows * CHANNELS);
    auto* few = room.take<float>(call.rows * R);
    for (int64_t b = 0; b < call.rows; ++b) arrange<W>(inputs + b * features, R, 1.0f, few + b * R);
    all_products(dt_proj + first * R, R, count, few, R, call.rows, R, room.take<float>(MANY * R),
                 [&](int64_t e, int64_t b, float value) { time[b * CHANNELS + e] = value; });
    for (int64_t i = 0; i < count; i += LANES) {
      const int64_t e = first + i;
      const int lanes = static_cast<int>(std::min<int64_t>(LANES, count - i));
      for (int lane = 0; lane < lanes; ++lane)
        for (int64_t n = 0; n < N; n += LANES) {
          const int some = static_cast<int>(std::min<int64_t>(LANES, N - n));
          A[lane * blocks + n / LANES] = -LOG2_E * expv(load(call.A_log + (e + lane) * N + n, some));
        }
      for (int64_t b = 0; b < call.rows; ++b) {
        const vfloat dt = softplus(load(time + b * CHANNELS + i, lanes) + load(call.dt_bias + e, lanes));
        const float* B = inputs + b * features + R;
        float out[LANES];
        store(out, advance(call, b, e, lanes, A, dt, load(x + b * E + e, lanes), B, B + N));
        call.y.write(b * E + e, out, lanes);
      }
    }
  };
  run_phases(threads, Phase(tiles, convolve_tile), Phase((features + STREAMS - 1) / STREAMS, project),
                  Phase(tiles, advance_tile));
}

}  // namespace

EXPORT void sambay_mamba_step(const void* u, int64_t u_row, const void* conv_weight,
                              const void* conv_bias, const void* x_proj, const void* dt_proj,
                              const float* dt_bias, const float* A_log, const float* D, float* conv_state,
                              float* state, void* y, int64_t rows, int64_t channels, int64_t width,
                              int64_t states, int64_t rank, int64_t is_bfloat16, int64_t threads) {
  const bool narrow = is_bfloat16 != 0;
  const Call call{{u, narrow}, u_row, {conv_weight, narrow}, {conv_bias, narrow}, x_proj, dt_proj, dt_bias, A_log, D,
                  conv_state, state, {y, narrow}, rows, channels, width, states, rank};
  narrow ? step<bfloat16>(call, threads) : step<float>(call, threads);
}
PACKED(sambay_mamba_step)
