// One token of the selective scan and of the causal convolution, for decoding: the state is updated
// in place. Here a vector holds neighbouring states of one channel, as they lie in the (B, E, N) state.
#include <algorithm>

#include "parallel.h"
#include "vector.h"

namespace {

constexpr int64_t CHANNELS = 64;  // channels of one task

template <typename T>
void scan_step(const T* x, int64_t x_row, const T* delta, int64_t delta_row, const float* A, const T* B,
               int64_t B_row, const T* C, int64_t C_row, const float* D, const float* bias, float* state,
               T* y, int64_t batch, int64_t channels, int64_t states, int64_t threads) {
  const int64_t tiles = (channels + CHANNELS - 1) / CHANNELS;
  parallel_for(batch * tiles, threads, [=](int64_t task) {
    const int64_t b = task / tiles, last = std::min((task % tiles + 1) * CHANNELS, channels);
    for (int64_t first = task % tiles * CHANNELS; first < last; first += LANES) {
      const int lanes = static_cast<int>(std::min<int64_t>(LANES, last - first));
      const vfloat inputs = load(x + b * x_row + first, lanes);
      const vfloat dt = softplus(load(delta + b * delta_row + first, lanes) + load(bias + first, lanes));
      const vfloat u = dt * inputs;
      vfloat products[LANES], outputs;
      for (int lane = 0; lane < lanes; ++lane) {
        const int64_t e = first + lane;
        const float rate = dt[lane] * LOG2_E;
        vfloat sum = {};
        for (int64_t n = 0; n < states; n += LANES) {
          const int some = static_cast<int>(std::min<int64_t>(LANES, states - n));
          float* place = state + (b * channels + e) * states + n;
          const vfloat s = exp2v(rate * load(A + e * states + n, some)) * load(place, some) +
                           u[lane] * load(B + b * B_row + n, some);
          store(place, s, some);
          sum += s * load(C + b * C_row + n, some);
        }
        products[lane] = sum;
      }
      for (int lane = lanes; lane < LANES; ++lane) products[lane] = vfloat{};
      sum_lanes(products, reinterpret_cast<float*>(&outputs), LANES);
      store(y + b * channels + first, outputs + load(D + first, lanes) * inputs, lanes);
    }
  });
}

template <typename T, typename S>
void conv_step(const T* x, int64_t x_row, const float* weight, const float* bias, S* state, T* y,
               int64_t batch, int64_t channels, int64_t width, int64_t threads) {
  const int64_t tiles = (channels + CHANNELS - 1) / CHANNELS;
  parallel_for(tiles, threads, [=](int64_t tile) {
    const int64_t last = std::min((tile + 1) * CHANNELS, channels);
    for (int64_t e = tile * CHANNELS; e < last; e += LANES) {
      const int lanes = static_cast<int>(std::min<int64_t>(LANES, last - e));
      Scratch scratch(width * LANES);
      auto* weights = scratch.take<vfloat>(width);
      for (int64_t w = 0; w < width; ++w) {
        weights[w] = vfloat{};
        for (int lane = 0; lane < lanes; ++lane) weights[w][lane] = weight[(e + lane) * width + w];
      }
      for (int64_t b = 0; b < batch; ++b) {
        S* earlier = state + b * (width - 1) * channels + e;
        const vfloat current = load(x + b * x_row + e, lanes);
        vfloat h = load(bias + e, lanes) + weights[width - 1] * current;
        for (int64_t w = 0; w < width - 1; ++w) {
          const vfloat value = load(earlier + w * channels, lanes);
          h += weights[w] * value;
          if (w > 0) store(earlier + (w - 1) * channels, value, lanes);
        }
        if (width > 1) store(earlier + (width - 2) * channels, current, lanes);
        store(y + b * channels + e, h * sigmoid(h), lanes);
      }
    }
  });
}

}  // namespace

EXPORT void sambay_scan_step(const void* x, int64_t x_row, const void* delta, int64_t delta_row,
                             const float* A, const void* B, int64_t B_row, const void* C, int64_t C_row,
                             const float* D, const float* bias, float* state, void* y, int64_t batch,
                             int64_t channels, int64_t states, int64_t is_bfloat16, int64_t threads) {
  auto run = [&](auto kind) {
    using T = decltype(kind);
    scan_step(static_cast<const T*>(x), x_row, static_cast<const T*>(delta), delta_row, A,
              static_cast<const T*>(B), B_row, static_cast<const T*>(C), C_row, D, bias, state,
              static_cast<T*>(y), batch, channels, states, threads);
  };
  is_bfloat16 ? run(bfloat16{}) : run(float{});
}

EXPORT void sambay_conv_step(const void* x, int64_t x_row, const float* weight, const float* bias,
                             void* state, void* y, int64_t batch, int64_t channels, int64_t width,
                             int64_t is_bfloat16, int64_t state_is_bfloat16, int64_t threads) {
  auto run = [&](auto kind, auto state_kind) {
    using T = decltype(kind);
    using S = decltype(state_kind);
    conv_step(static_cast<const T*>(x), x_row, weight, bias, static_cast<S*>(state), static_cast<T*>(y),
              batch, channels, width, threads);
  };
  if (!is_bfloat16)
    run(float{}, float{});
  else if (state_is_bfloat16)
    run(bfloat16{}, bfloat16{});
  else
    run(bfloat16{}, float{});
}

// The address of GOMP_parallel, see parallel.h.
EXPORT void sambay_use_openmp(void* function) {
  gomp_parallel = reinterpret_cast<GompParallel>(function);
}
