// Products of a few rows held in the cache with many rows that are read once from memory: few rows of
// activations with a weight, or the queries of a group with the keys of a context.
//
// Every product is summed in one order, whatever it is computed together with, so a row's result does
// not depend on how many rows there are.
#pragma once

#include <algorithm>
#include <type_traits>

#include "vector.h"

// Rows of a block of products, of what is read once and of what stays: so many sums fill the registers.
// A single row that stays leaves registers free, and more streams from memory.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int MANY = 4, FEW = 6;
#else
constexpr int MANY = 4, FEW = 2;
#endif
constexpr int STREAMS = 8;
constexpr int AHEAD = 1024;  // bytes
constexpr int WIDEN = 4 * FEW;  // from so many rows on, widening a weight once beats doing it again

typedef int8_t vbyte __attribute__((vector_size(LANES)));

static inline vfloat load(const int8_t* from, int lanes = LANES) {
#if defined(__AVX2__)
  if (lanes == LANES) {  // see the load of bfloat16
    struct Block {
      int8_t values[LANES];
    };
    vint whole;
    __asm__("vpmovsxbd %1, %0" : "=v"(whole) : "m"(*reinterpret_cast<const Block*>(from)));
    return __builtin_convertvector(whole, vfloat);
  }
#endif
  return __builtin_convertvector(__builtin_convertvector(load_vector<vbyte>(from, lanes), vint), vfloat);
}

// Elements come in pairs of vectors. Two bfloat16 in one word are widened by a shift and a mask, so
// their pairs are the even and the odd ones of 2 * LANES elements; what they meet is arranged alike.
constexpr int PAIR = 2 * LANES;

static inline void load_pair(const float* from, vfloat& first, vfloat& second) {
  first = load(from);
  second = load(from + LANES);
}

static inline void load_pair(const int8_t* from, vfloat& first, vfloat& second) {
  first = load(from);
  second = load(from + LANES);
}

static inline void load_pair(const bfloat16* from, vfloat& first, vfloat& second) {
  vbits words;
  memcpy(&words, from, sizeof words);
  first = (vfloat)(words << 16);
  second = (vfloat)(words & 0xffff0000u);
}

// Copies a row of `size` elements as floats, in the order in which rows of T are loaded.
template <typename T, typename From>
static inline void arrange(const From* from, int64_t size, float factor, float* to) {
  int64_t i = 0;
  if (std::is_same<T, bfloat16>::value)
    for (; i + PAIR <= size; i += PAIR) {
      float pair[PAIR];
      store(pair, factor * load(from + i));
      store(pair + LANES, factor * load(from + i + LANES));
      for (int j = 0; j < LANES; ++j) {
        to[i + j] = pair[2 * j];
        to[i + LANES + j] = pair[2 * j + 1];
      }
    }
  for (; i < size; i += LANES) {
    const int lanes = static_cast<int>(std::min<int64_t>(LANES, size - i));
    store(to + i, factor * load(from + i, lanes), lanes);
  }
}

// Rows of float32 or bfloat16 that are few, so that their type is asked for at run time.
struct FewRows {
  const void* data;
  bool is_bfloat16;
  template <typename T>
  void arrange_as(int64_t offset, int64_t size, float factor, float* to) const {
    if (is_bfloat16)
      arrange<T>(static_cast<const bfloat16*>(data) + offset, size, factor, to);
    else
      arrange<T>(static_cast<const float*>(data) + offset, size, factor, to);
  }
};

// What a result is written to; its type, too, is asked for at run time.
struct Output {
  void* data;
  bool is_bfloat16;
  void write(int64_t offset, const float* from, int64_t size) const {
    for (int64_t i = 0; i < size; i += LANES) {
      const int lanes = static_cast<int>(std::min<int64_t>(LANES, size - i));
      if (is_bfloat16)
        store(static_cast<bfloat16*>(data) + offset + i, load(from + i, lanes), lanes);
      else
        store(static_cast<float*>(data) + offset + i, load(from + i, lanes), lanes);
    }
  }
};

// sums[m * F + f] = the lanes of many[m] . few[f], for M rows and F rows of `size` elements. `ahead` is
// where the next rows lie: each fetches its successor, since rows are too short for the processor to
// foresee.
template <int M, int F, typename T>
static inline void products(const T* many, int64_t many_row, const float* few, int64_t few_row,
                            int64_t size, int64_t ahead, vfloat* sums) {
  constexpr int LINE = 64 / static_cast<int>(sizeof(T));  // elements of a cache line
  constexpr int BLOCK = LINE > PAIR ? LINE : PAIR;
  vfloat sum[M][F];  // in registers, as long as no loop over it remains one
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int f = 0; f < F; ++f) sum[m][f] = vfloat{};
  int64_t i = 0;
  auto step = [&](int64_t at) {
    vfloat a[M], b[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) load_pair(many + m * many_row + at, a[m], b[m]);
#pragma GCC unroll 8
    for (int f = 0; f < F; ++f) {
      const vfloat c = load(few + f * few_row + at), d = load(few + f * few_row + at + LANES);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) sum[m][f] = fused(a[m], c, sum[m][f]);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) sum[m][f] = fused(b[m], d, sum[m][f]);
    }
  };
  for (; i + BLOCK <= size; i += BLOCK) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
      for (int at = 0; at < BLOCK; at += LINE)
        __builtin_prefetch(many + m * many_row + ahead + i + at);
#pragma GCC unroll 8
    for (int at = 0; at < BLOCK; at += PAIR) step(i + at);
  }
  for (; i + PAIR <= size; i += PAIR) step(i);
  for (; i < size; i += LANES) {
    const int lanes = static_cast<int>(std::min<int64_t>(LANES, size - i));
#pragma GCC unroll 8
    for (int f = 0; f < F; ++f) {
      const vfloat b = load(few + f * few_row + i, lanes);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) sum[m][f] = fused(load(many + m * many_row + i, lanes), b, sum[m][f]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int f = 0; f < F; ++f) sums[m * F + f] = sum[m][f];
}

// many . few for single rows, one after another: the processor foresees what comes next in a row of
// narrow weights, but not in several rows at once, which share a page. In float32 rows are long enough
// for that. The sums have another order than in `products`, so they round otherwise.
template <typename T>
static inline float product(const T* many, const float* few, int64_t size) {
  constexpr int LINE = 64 / static_cast<int>(sizeof(T));
  constexpr int BLOCK = LINE > 2 * PAIR ? LINE : 2 * PAIR;
  vfloat sum[4] = {};
  auto step = [&](int64_t at, vfloat& first_sum, vfloat& second_sum) {
    vfloat first, second;
    load_pair(many + at, first, second);
    first_sum = fused(first, load(few + at), first_sum);
    second_sum = fused(second, load(few + at + LANES), second_sum);
  };
  int64_t i = 0;
  for (; i + BLOCK <= size; i += BLOCK) {
    for (int at = 0; at < BLOCK; at += LINE)
      __builtin_prefetch(reinterpret_cast<const char*>(many + i + at) + AHEAD);
#pragma GCC unroll 8
    for (int at = 0; at < BLOCK; at += 2 * PAIR) {
      step(i + at, sum[0], sum[1]);
      step(i + at + PAIR, sum[2], sum[3]);
    }
  }
  for (; i + PAIR <= size; i += PAIR) step(i, sum[0], sum[1]);
  for (; i < size; i += LANES) {
    const int lanes = static_cast<int>(std::min<int64_t>(LANES, size - i));
    sum[0] = fused(load(many + i, lanes), load(few + i, lanes), sum[0]);
  }
  vfloat all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  float value;
  sum_lanes(&all, &value, 1);
  return value;
}

// Calls use(integral_constant<count>, first) over [0, size) in steps of COUNT and a smaller last one.
template <int COUNT, typename Use>
static inline void in_steps(int64_t size, const Use& use) {
  int64_t first = 0;
  for (; first + COUNT <= size; first += COUNT) use(std::integral_constant<int, COUNT>{}, first);
  if constexpr (COUNT > 1) {
    const int64_t rest = size - first;
    in_steps<COUNT - 1>(rest, [&](auto count, int64_t from) { use(count, first + from); });
  }
}

template <int M, int F, typename T, typename Out>
static inline void block_of_products(const T* many, int64_t many_row, int64_t m, const float* few,
                                     int64_t few_row, int64_t f, int64_t size, int64_t ahead,
                                     const Out& out) {
  vfloat sums[M * F];
  float values[M * F];
  products<M, F>(many, many_row, few + f * few_row, few_row, size, ahead, sums);
  sum_lanes(sums, values, M * F);
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < F; ++j) out(m + i, f + j, values[i * F + j]);
}

// out(m, f, value) for all `num_many` x `num_few` products. `many` comes from memory once; a block of
// its rows meets all of `few` while it is in the cache, widened once to `wide` (MANY x size floats,
// needed for other types than float).
template <typename T, typename Out>
static inline void all_products(const T* many, int64_t many_row, int64_t num_many, const float* few,
                                int64_t few_row, int64_t num_few, int64_t size, float* wide,
                                const Out& out) {
  if (num_few == 1 && !std::is_same<T, float>::value) {
    for (int64_t m = 0; m < num_many; ++m) out(m, 0, product(many + m * many_row, few, size));
    return;
  }
  if (num_few == 1) {
    in_steps<STREAMS>(num_many, [&](auto M, int64_t m) {
      block_of_products<decltype(M)::value, 1>(many + m * many_row, many_row, m, few, few_row, 0, size,
                                               M * many_row, out);
    });
    return;
  }
  in_steps<MANY>(num_many, [&](auto M, int64_t m) {
    constexpr int R = decltype(M)::value;
    const T* rows = many + m * many_row;
    auto meet = [&](const auto* from, int64_t row, int64_t ahead) {
      in_steps<FEW>(num_few, [&](auto F, int64_t f) {
        block_of_products<R, decltype(F)::value>(from, row, m, few, few_row, f, size,
                                                 f == 0 ? ahead : 0, out);
      });
    };
    if (std::is_same<T, float>::value || num_few <= WIDEN) return meet(rows, many_row, R * many_row);
    for (int r = 0; r < R; ++r) {
      const T* from = rows + r * many_row;
      float* to = wide + r * size;
      int64_t i = 0;
      for (; i + PAIR <= size; i += PAIR) {
        vfloat first, second;
        load_pair(from + i, first, second);
        __builtin_prefetch(from + R * many_row + i);
        store(to + i, first);
        store(to + i + LANES, second);
      }
      for (; i < size; i += LANES) {
        const int lanes = static_cast<int>(std::min<int64_t>(LANES, size - i));
        store(to + i, load(from + i, lanes), lanes);
      }
    }
    meet(wide, size, 0);
  });
}
