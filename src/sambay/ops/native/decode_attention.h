// What both kinds of decode attention share: the scores of a part of a context, their softmax within
// the part, and the weighted sum of its values.
//
// A context is cut into parts of a fixed size, whatever the number of threads or rows: which thread
// computes a part is left to chance, the order of all sums is not.
#pragma once

#include <cmath>

#include "packed.h"
#include "rows.h"
#include "team.h"

constexpr int64_t PART = 512;        // columns of one part
constexpr int64_t IN_CACHE = 64;     // columns whose values are met by all heads while in the cache
constexpr float FAR_BELOW = -1e30f;  // a score whose exponential is 0

// The keys or values of a batch, (row, head, column, P); a row begins at a column of its own if there
// are `starts`.
template <typename T>
struct Columns {
  const T* data;
  int64_t row, head, column;
  const int64_t* starts;
  const T* at(int64_t b, int64_t k, int64_t s) const {
    return data + b * row + k * head + (s + (starts ? starts[b] : 0)) * column;
  }
};

struct Lengths {
  const void* data;
  bool is_int64;
  int64_t most;
  int64_t at(int64_t b) const {
    const int64_t length =
        is_int64 ? static_cast<const int64_t*>(data)[b] : static_cast<const int32_t*>(data)[b];
    return std::clamp<int64_t>(length, 0, most);
  }
  int64_t longest(int64_t rows) const {
    int64_t longest = 0;
    for (int64_t b = 0; b < rows; ++b) longest = std::max(longest, at(b));
    return longest;
  }
};

static inline int64_t in_vectors(int64_t size) { return (size + LANES - 1) / LANES * LANES; }

static inline float exp2_of(float z) { return exp2v(vfloat{} + z)[0]; }

// scores[g * PART + c] = query g . key c, times the factor; columns up to the next vector lie far below.
template <typename T>
static inline void score(const FewRows& queries, int64_t query, int64_t query_step, int64_t group, const T* keys,
                         int64_t column, int64_t count, int64_t size, float factor, float* scores,
                         int64_t scores_row) {
  Scratch scratch((group + MANY) * size);
  float* few = scratch.take<float>(group * size);
  for (int64_t g = 0; g < group; ++g)
    queries.arrange_as<T>(query + g * query_step, size, factor, few + g * size);
  all_products(keys, column, count, few, size, group, size, scratch.take<float>(MANY * size),
               [&](int64_t c, int64_t g, float value) { scores[g * scores_row + c] = value; });
  for (int64_t g = 0; g < group; ++g)
    std::fill(scores + g * scores_row + count, scores + g * scores_row + in_vectors(count), FAR_BELOW);
}

// What a softmax over several parts needs of each: its largest score and the sum of exponentials.
struct Statistics {
  float most, sum;
};

// Replaces scores by 2^(score - most).
static inline Statistics exponentials(float* scores, int64_t count) {
  vfloat most = vfloat{} + FAR_BELOW, total = {};
  for (int64_t c = 0; c < count; c += LANES) {
    const vfloat some = load(scores + c);
    most = some > most ? some : most;
  }
  Statistics result{most[0], 0};
  for (int lane = 1; lane < LANES; ++lane) result.most = std::max<float>(result.most, most[lane]);
  for (int64_t c = 0; c < count; c += LANES) {
    const vfloat some = exp2v(load(scores + c) - result.most);
    store(scores + c, some);
    total += some;
  }
  sum_lanes(&total, &result.sum, 1);
  return result;
}

// out[g] += the values of `count` columns, weighted by weights[g * weights_row + c].
template <int V, int G, typename T>
static inline void weigh(const T* values, int64_t column, int64_t count, const float* weights,
                         int64_t weights_row, float* out, int64_t out_row, int lanes) {
  vfloat sum[G][V];  // in registers, as long as no loop over it remains one
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[g][v] = load(out + g * out_row + v * LANES);
  for (int64_t c = 0; c < count; ++c) {
    vfloat value[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) value[v] = load(values + c * column + v * LANES, V > 1 ? LANES : lanes);
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      const float weight = weights[g * weights_row + c];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[g][v] += weight * value[v];
    }
  }
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(out + g * out_row + v * LANES, sum[g][v]);
}

// The same for all heads of a group and the whole width. `out` rows are whole vectors.
template <typename T>
static inline void weigh_all(const T* values, int64_t column, int64_t count, const float* weights,
                             int64_t weights_row, int64_t group, int64_t size, float* out,
                             int64_t out_row) {
  const int rest = static_cast<int>(size % LANES);
  for (int64_t first = 0; first < count; first += IN_CACHE) {
    const int64_t some = std::min(IN_CACHE, count - first);
    const T* from = values + first * column;
    in_steps<4>(group, [&](auto G, int64_t g) {
      constexpr int heads = decltype(G)::value;
      const float* weight = weights + g * weights_row + first;
      in_steps<3>(size / LANES, [&](auto V, int64_t v) {
        weigh<decltype(V)::value, heads>(from + v * LANES, column, some, weight, weights_row,
                                         out + g * out_row + v * LANES, out_row, LANES);
      });
      if (rest)
        weigh<1, heads>(from + size - rest, column, some, weight, weights_row,
                        out + g * out_row + size - rest, out_row, rest);
    });
  }
}

#define QUERY_PARAMETERS                                                                            \
  const void *q, int64_t q_row, int64_t q_head, const void *k, int64_t k_row, int64_t k_head,       \
      int64_t k_column, const void *v, int64_t v_row, int64_t v_head, int64_t v_column,             \
      const void *lengths, int64_t lengths_are_int64, const int64_t *starts, void *out, int64_t rows, int64_t heads,       \
      int64_t key_heads, int64_t columns, int64_t size, int64_t query_is_bfloat16,             \
      int64_t cache_is_bfloat16
