// What the forward and the backward of the Mamba-1 selective scan share.
//
//   s_t = exp(dt_t A) s_{t-1} + dt_t B_t x_t     y_t = C_t . s_t + D x_t     dt = softplus(delta + bias)
//
// One vector holds one state index n of LANES neighbouring channels, so a step needs no sum across
// lanes. A task walks a row's time in chunks: first everything that exists once per channel (dt,
// dt*x), then the recurrence for a few n at a time with their states in registers.
//
// B batch, T positions, E channels, N states per channel. Activations are (B, T, E) and (B, T, N)
// with any strides but a contiguous last axis; everything else is contiguous.
#pragma once

#include <algorithm>
#include <type_traits>

#include "parallel.h"
#include "vector.h"

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
