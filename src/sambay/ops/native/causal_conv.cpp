// Causal depth-wise convolution with SiLU, forward and backward, for float32 and bfloat16.
//
//   h_t = bias + sum over lags of weight[W-1-lag] x_{t-lag}        y_t = h_t sigmoid(h_t)
//
// This is bound by memory, so a task walks whole rows of channels in the order they lie in memory.
// Activations are (B, T, E) with a contiguous last axis; weights come as (W, E). Inputs before the
// first token come from `initial` (B, W-1, E), or are zero; a token that starts a document (`resets`)
// and those after it do not see beyond it.
#include <algorithm>
#include <type_traits>

#include "parallel.h"
#include "vector.h"

namespace {

constexpr int64_t ROWS = 64;    // tokens of one task
constexpr int64_t WIDE = 1024;  // channels of one task: its rows stay in the first-level cache

// WIDTH is the width where it is known to the compiler, which then unrolls; 0 stands for any.
template <typename T, int WIDTH>
struct Conv {
  const T* x;
  int64_t x_row, x_step;
  const float *weight, *bias;  // (W, E), (E)
  const float* initial;        // (B, W-1, E) or null
  const uint8_t* resets;       // (B, T) or null
  int64_t batch, length, channels, any_width;

  int64_t width() const { return WIDTH ? WIDTH : any_width; }
  bool complete(int64_t t, int64_t reach) const { return WIDTH && reach == WIDTH - 1 && t >= reach; }
  int64_t chunks() const { return (length + ROWS - 1) / ROWS; }
  int64_t tiles() const { return (channels + WIDE - 1) / WIDE; }
  const T* at(int64_t b, int64_t t) const { return x + b * x_row + t * x_step; }
  const float* before(int64_t b, int64_t t) const {  // t < 0
    return initial + (b * (width() - 1) + width() - 1 + t) * channels;
  }
  const float* weight_of(int64_t lag) const { return weight + (width() - 1 - lag) * channels; }

  // The largest lag token t may look back.
  int64_t reach(int64_t b, int64_t t) const {
    int64_t lag = 0;
    for (; lag < width() - 1; ++lag) {
      const int64_t position = t - lag;
      if (position >= 0 && resets && resets[b * length + position]) break;
      if (position <= 0 && !initial) break;
    }
    return lag;
  }

  // h_t for LANES channels from e on.
  template <typename Lanes>
  vfloat before_activation(int64_t b, int64_t t, int64_t reach, int64_t e, Lanes lanes) const {
    vfloat sum = load(bias + e, lanes);
    if (complete(t, reach)) {
#pragma GCC unroll 8
      for (int64_t lag = 0; lag < WIDTH; ++lag)
        sum += load(weight_of(lag) + e, lanes) * load(at(b, t - lag) + e, lanes);
      return sum;
    }
    const int64_t near = std::min(reach, t);
    for (int64_t lag = 0; lag <= near; ++lag)
      sum += load(weight_of(lag) + e, lanes) * load(at(b, t - lag) + e, lanes);
    for (int64_t lag = near + 1; lag <= reach; ++lag)
      sum += load(weight_of(lag) + e, lanes) * load(before(b, t - lag) + e, lanes);
    return sum;
  }
};

// The tokens and channels of one task.
struct Region {
  int64_t b, chunk, from, to, first, last;
};

template <typename T, int WIDTH>
Region region_of(const Conv<T, WIDTH>& p, int64_t task) {
  const int64_t first = task % p.tiles() * WIDE;
  const int64_t chunk = task / p.tiles() % p.chunks(), from = chunk * ROWS;
  return {task / p.tiles() / p.chunks(), chunk, from, std::min(from + ROWS, p.length),
          first, std::min(first + WIDE, p.channels)};
}

// Calls run(e, lanes) for the vectors that cover a region's channels; only for the last, incomplete
// one is the number of lanes not known to the compiler.
template <typename Run>
void for_channels(const Region& r, const Run& run) {
  int64_t e = r.first;
  for (; e + LANES <= r.last; e += LANES) run(e, std::integral_constant<int, LANES>{});
  if (e < r.last) run(e, static_cast<int>(r.last - e));
}

template <typename T, int WIDTH>
void forward_task(const Conv<T, WIDTH>& p, int64_t task, T* y) {
  const Region r = region_of(p, task);
  for (int64_t t = r.from; t < r.to; ++t) {
    T* out = y + (r.b * p.length + t) * p.channels;
    const int64_t reach = p.reach(r.b, t);
    for_channels(r, [&](int64_t e, auto lanes) {
      const vfloat h = p.before_activation(r.b, t, reach, e, lanes);
      store(out + e, h * sigmoid(h), lanes);
    });
  }
}

template <typename T>
struct Gradients {
  const T* dy;
  int64_t dy_row, dy_step;
  T* x;            // (B, T, E)
  float* parts;    // (B * chunks, W + 1, E): weights, then bias, still to be summed
  float* initial;  // (B, W-1, E) or null
};

// dL/dx of a token needs dL/dh of the W-1 tokens after it, so a task also recomputes those of its
// neighbour; they go through a ring of W rows.
template <typename T, int WIDTH>
void backward_task(const Conv<T, WIDTH>& p, const Gradients<T>& d, int64_t task) {
  const Region r = region_of(p, task);
  const int64_t W = p.width(), wide = r.last - r.first;
  Scratch scratch(W * wide);
  float* ring = scratch.take<float>(W * wide) - r.first;
  float* part = d.parts + (r.b * p.chunks() + r.chunk) * (W + 1) * p.channels;
  for (int64_t w = 0; w <= W; ++w)
    std::fill(part + w * p.channels + r.first, part + w * p.channels + r.last, 0.0f);

  const int64_t earliest = r.from == 0 && d.initial ? 1 - W : r.from;
  for (int64_t t = r.from; t < r.to + W - 1; ++t) {
    if (t < p.length) {
      const T* dy = d.dy + r.b * d.dy_row + t * d.dy_step;
      const int64_t reach = p.reach(r.b, t), near = std::min(reach, t);
      float* slope = ring + t % W * wide;
      for_channels(r, [&](int64_t e, auto lanes) {
        const vfloat h = p.before_activation(r.b, t, reach, e, lanes);
        const vfloat gate = sigmoid(h);
        const vfloat dh = load(dy + e, lanes) * gate * (1.0f + h * (1.0f - gate));
        store(slope + e, dh, lanes);
        if (t >= r.to) return;
        float* bias = part + W * p.channels + e;
        store(bias, load(bias, lanes) + dh, lanes);
        if (p.complete(t, reach)) {
#pragma GCC unroll 8
          for (int64_t lag = 0; lag < WIDTH; ++lag) {
            float* weight = part + (WIDTH - 1 - lag) * p.channels + e;
            store(weight, load(weight, lanes) + dh * load(p.at(r.b, t - lag) + e, lanes), lanes);
          }
          return;
        }
        for (int64_t lag = 0; lag <= reach; ++lag) {
          const vfloat x = lag <= near ? load(p.at(r.b, t - lag) + e, lanes)
                                       : load(p.before(r.b, t - lag) + e, lanes);
          float* weight = part + (W - 1 - lag) * p.channels + e;
          store(weight, load(weight, lanes) + dh * x, lanes);
        }
      });
    }
    const int64_t source = t - (W - 1);  // every token that sees it is in the ring now
    if (source < earliest || source >= r.to) continue;
    // Looking further back never ends a document's reach twice, so the tokens that see `source`
    // follow one another.
    const int64_t nearest = std::max<int64_t>(0, -source);
    int64_t beyond = nearest;
    while (beyond < W && source + beyond < p.length && beyond <= p.reach(r.b, source + beyond)) ++beyond;
    for_channels(r, [&](int64_t e, auto lanes) {
      vfloat dx = {};
      auto add = [&](int64_t lag) {
        dx += load(p.weight_of(lag) + e, lanes) * load(ring + (source + lag) % W * wide + e, lanes);
      };
      if (WIDTH && nearest == 0 && beyond == WIDTH) {
#pragma GCC unroll 8
        for (int64_t lag = 0; lag < WIDTH; ++lag) add(lag);
      } else {
        for (int64_t lag = nearest; lag < beyond; ++lag) add(lag);
      }
      if (source >= 0)
        store(d.x + (r.b * p.length + source) * p.channels + e, dx, lanes);
      else
        store(d.initial + (r.b * (W - 1) + W - 1 + source) * p.channels + e, dx, lanes);
    });
  }
}

}  // namespace

#define CONV_PARAMETERS                                                                              \
  const void *x, int64_t x_row, int64_t x_step, const float *weight, const float *bias,                \
      const float *initial, const uint8_t *resets, int64_t batch, int64_t length, int64_t channels,    \
      int64_t width, int64_t is_bfloat16
#define CONV_ARGUMENTS \
  x, x_row, x_step, weight, bias, initial, resets, batch, length, channels, width, is_bfloat16

namespace {

// Calls run(conv, T{}) with the convolution of the right type and width.
template <typename Run>
void with_conv(CONV_PARAMETERS, const Run& run) {
  auto make = [&](auto kind, auto fixed) {
    using T = decltype(kind);
    run(Conv<T, decltype(fixed)::value>{static_cast<const T*>(x), x_row, x_step, weight, bias, initial,
                                        resets, batch, length, channels, width}, kind);
  };
  auto typed = [&](auto kind) {
    if (width == 4)
      make(kind, std::integral_constant<int, 4>{});
    else
      make(kind, std::integral_constant<int, 0>{});
  };
  is_bfloat16 ? typed(bfloat16{}) : typed(float{});
}

}  // namespace

EXPORT int64_t sambay_conv_workspace(int64_t batch, int64_t length, int64_t channels, int64_t width) {
  return batch * ((length + ROWS - 1) / ROWS) * (width + 1) * channels;
}

EXPORT void sambay_conv_forward(CONV_PARAMETERS, int64_t threads, void* y) {
  with_conv(CONV_ARGUMENTS, [&](const auto& conv, auto kind) {
    using T = decltype(kind);
    parallel_for(batch * conv.chunks() * conv.tiles(), threads,
                 [&](int64_t task) { forward_task(conv, task, static_cast<T*>(y)); });
  });
}

EXPORT void sambay_conv_backward(CONV_PARAMETERS, int64_t threads, const void* dy, int64_t dy_row,
                                 int64_t dy_step, void* dx, float* weight_and_bias, float* dinitial,
                                 float* workspace) {
  with_conv(CONV_ARGUMENTS, [&](const auto& conv, auto kind) {
    using T = decltype(kind);
    const Gradients<T> d{static_cast<const T*>(dy), dy_row, dy_step, static_cast<T*>(dx), workspace,
                         dinitial};
    parallel_for(batch * conv.chunks() * conv.tiles(), threads,
                 [&](int64_t task) { backward_task(conv, d, task); });
    sum_parts(d.parts, weight_and_bias, batch * conv.chunks(), (width + 1) * channels, threads);
  });
}
