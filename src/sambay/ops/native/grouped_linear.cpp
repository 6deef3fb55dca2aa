// x W^T + bias for few rows of x and weights of 4 or 8 bits, of which a group in a row shares a scale.
//
// What is read from memory are the weights as they are stored; a vector of them costs an instruction
// or two before it meets x, which is prepared once so that no more are needed.
#include "packed.h"
#include "rows.h"
#include "team.h"

namespace {

constexpr int64_t TASK_BYTES = 1 << 16;  // weights of one task
constexpr int BLOCK = 32;                // weights that are unpacked together; groups are whole blocks
constexpr int VECTORS = BLOCK / LANES;
constexpr int WORDS = 8;  // of 16 bits that hold a block of 4-bit weights

// Rows of a block of products, where sums of a group and of all groups share the registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int PAIRED = 4, SINGLE = 8;
#else
constexpr int PAIRED = 2, SINGLE = 4;
#endif
constexpr int TOGETHER = 2;  // rows of x
constexpr int UNPACK_ONCE = 4;  // from more rows of x on, unpacking a weight once beats doing it again

// Weights of 4 bits, stored with 8 added: a block is eight words, and the four numbers in word l are the
// weights l, 8 + l, 16 + l and 24 + l. A number is taken where it stands in its word, by a mask alone,
// and so a power of 16 too large, for which x makes up; the eights are taken off by a sum of x.
struct Nibbles {
  using Element = uint8_t;
  static constexpr int BYTES = BLOCK / 2;
  static constexpr float ADDED = 8.0f;
  static float factor(int i) { return 1.0f / (1 << (4 * (i / WORDS))); }  // of weight i of a block

  // Once in a vector of eight, twice in one of sixteen, half of them in one of four.
  static constexpr int PARTS = LANES < WORDS ? WORDS / LANES : 1;
  vbits words[PARTS];

  void read(const uint8_t* from) {
    struct Block {
      uint16_t words[WORDS];
    };
    const auto& block = *reinterpret_cast<const Block*>(from);
#if defined(__AVX512F__)
    typedef uint16_t vwords __attribute__((vector_size(32)));
    vwords twice;
    __asm__("vbroadcasti128 %1, %0" : "=x"(twice) : "m"(block));
    __asm__("vpmovzxwd %1, %0" : "=v"(words[0]) : "x"(twice));
#elif defined(__AVX2__)
    __asm__("vpmovzxwd %1, %0" : "=v"(words[0]) : "m"(block));
#else
    for (int part = 0; part < PARTS; ++part)
      words[part] = __builtin_convertvector(load_vector<vhalf>(block.words + part * LANES, LANES), vbits);
#endif
  }

  template <int V>
  vfloat vector() const {
    vbits mask;
    for (int l = 0; l < LANES; ++l) mask[l] = 15u << (4 * ((V * LANES + l) / WORDS));
    return __builtin_convertvector((vint)(words[V % PARTS] & mask), vfloat);
  }
};

// Weights of 8 bits.
struct Bytes {
  using Element = int8_t;
  static constexpr int BYTES = BLOCK;
  static constexpr float ADDED = 0.0f;
  static float factor(int) { return 1.0f; }
  const int8_t* block;
  void read(const int8_t* from) { block = from; }
  template <int V>
  vfloat vector() const {
    return load(block + V * LANES);
  }
};

// Weights of either kind that have become floats before.
struct Floats {
  using Element = float;
  static constexpr int BYTES = 4 * BLOCK;
  const float* block;
  void read(const float* from) { block = from; }
  template <int V>
  vfloat vector() const {
    return load(block + V * LANES);
  }
};

inline float scale_of(const float* from) { return *from; }
inline float scale_of(const bfloat16* from) {
  const uint32_t bits = static_cast<uint32_t>(from->bits) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline vfloat everywhere(float value) {
  vfloat vector;
  for (int l = 0; l < LANES; ++l) vector[l] = value;
  return vector;
}

// Calls use(integral_constant<V>) for all V below COUNT.
template <int COUNT, typename Use>
inline void unrolled(const Use& use) {
  if constexpr (COUNT > 0) {
    unrolled<COUNT - 1>(use);
    use(std::integral_constant<int, COUNT - 1>{});
  }
}

// x as weights want it: times their factors; and the sum with which each group begins.
struct Arranged {
  const float *x, *starts;
  int64_t size, groups, blocks;  // weights and groups of a row, blocks of a group
};

// out(i, f + j, value) for M rows of weights and the rows [f, f + F) of x. Sums are taken in one order
// whatever M, F and W are, so that no row depends on its neighbours. `ahead` is where the next rows lie.
template <int M, int F, typename W, typename S, typename Out>
inline void products(const void* weight, int64_t weight_row, const S* scale, int64_t scale_row,
                     const Arranged& few, int64_t f, int64_t ahead, const Out& out) {
  vfloat sums[M * F] = {};
  const float* x = few.x + f * few.size;
  const float* start = few.starts + f * few.groups * LANES;
  const char* from = static_cast<const char*>(weight);
  for (int64_t g = 0; g < few.groups; ++g, start += LANES) {
    vfloat part[M][F];
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < F; ++j) part[i][j] = load(start + j * few.groups * LANES);
    for (int64_t block = 0; block < few.blocks; ++block, from += W::BYTES, x += BLOCK) {
      W rows[M];
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) {
        __builtin_prefetch(from + i * weight_row + ahead);
        rows[i].read(reinterpret_cast<const typename W::Element*>(from + i * weight_row));
      }
      unrolled<VECTORS>([&](auto v) {
        constexpr int V = decltype(v)::value;
        vfloat met[F];
#pragma GCC unroll 8
        for (int j = 0; j < F; ++j) met[j] = load(x + j * few.size + V * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) {
          const vfloat value = rows[i].template vector<V>();
#pragma GCC unroll 8
          for (int j = 0; j < F; ++j) part[i][j] = fused(value, met[j], part[i][j]);
        }
      });
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const vfloat shared = everywhere(scale_of(scale + i * scale_row + g));
#pragma GCC unroll 8
      for (int j = 0; j < F; ++j) sums[i * F + j] = fused(part[i][j], shared, sums[i * F + j]);
    }
  }
  float values[M * F];
  sum_lanes(sums, values, M * F);
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < F; ++j) out(i, f + j, values[i * F + j]);
}

// Calls use(integral_constant<count>, first) over [0, size) in steps of COUNT, then one by one.
template <int COUNT, typename Use>
inline void in_blocks(int64_t size, const Use& use) {
  int64_t first = 0;
  for (; first + COUNT <= size; first += COUNT) use(std::integral_constant<int, COUNT>{}, first);
  for (; first < size; ++first) use(std::integral_constant<int, 1>{}, first);
}

// out(m, f, value) for `count` rows of weights and all rows of x. `room` has space for PAIRED rows.
template <typename W, typename S, typename Out>
void all_of_a_task(const char* weight, int64_t weight_row, const S* scale, int64_t scale_row,
                   int64_t count, const Arranged& few, int64_t rows, float* room, const Out& out) {
  if (rows == 1) {
    in_blocks<SINGLE>(count, [&](auto M, int64_t m) {
      constexpr int R = decltype(M)::value;
      auto put = [&](int64_t i, int64_t f, float value) { out(m + i, f, value); };
      products<R, 1, W>(weight + m * weight_row, weight_row, scale + m * scale_row, scale_row, few, 0,
                        R * weight_row, put);
    });
    return;
  }
  in_blocks<PAIRED>(count, [&](auto M, int64_t m) {
    constexpr int R = decltype(M)::value;
    const char* from = weight + m * weight_row;
    auto put = [&](int64_t i, int64_t f, float value) { out(m + i, f, value); };
    if (rows <= UNPACK_ONCE) {
      in_blocks<TOGETHER>(rows, [&](auto F, int64_t f) {
        products<R, decltype(F)::value, W>(from, weight_row, scale + m * scale_row, scale_row, few, f,
                                           f == 0 ? R * weight_row : 0, put);
      });
      return;
    }
    for (int i = 0; i < R; ++i)
      for (int64_t block = 0; block * BLOCK < few.size; ++block) {
        const char* at = from + i * weight_row + block * W::BYTES;
        W one;
        __builtin_prefetch(at + R * weight_row);
        one.read(reinterpret_cast<const typename W::Element*>(at));
        unrolled<VECTORS>([&](auto v) {
          constexpr int V = decltype(v)::value;
          store(room + i * few.size + block * BLOCK + V * LANES, one.template vector<V>());
        });
      }
    in_blocks<TOGETHER>(rows, [&](auto F, int64_t f) {
      products<R, decltype(F)::value, Floats>(room, few.size * 4, scale + m * scale_row, scale_row, few,
                                              f, 0, put);
    });
  });
}

struct Call {
  FewRows x;
  int64_t x_row;
  const char* weight;
  int64_t weight_row;
  const void* scale;
  int64_t scale_row;
  FewRows bias;
  Output y;
  int64_t rows, size, features, group;
};

// The row of x, and in `starts` its sums over the groups, for weights of kind W.
template <typename W>
void arrange_row(const Call& call, int64_t b, float* x, float* starts) {
  float factors[BLOCK];
  for (int i = 0; i < BLOCK; ++i) factors[i] = W::factor(i);
  call.x.arrange_as<float>(b * call.x_row, call.size, 1.0f, x);
  for (int64_t first = 0; first < call.size; first += call.group, starts += LANES) {
    vfloat sum = {};
    for (int64_t i = first; i < first + call.group; i += LANES) {
      const vfloat value = load(x + i);
      sum += value;
      store(x + i, value * load(factors + i % BLOCK));
    }
    store(starts, -W::ADDED * sum);
  }
}

template <typename W, typename S>
void linear(const Call& call, int64_t threads) {
  const int64_t rows = call.rows, size = call.size, features = call.features;
  const int64_t groups = size / call.group;
  Scratch scratch(rows * (size + groups * LANES));
  auto* x = scratch.take<float>(rows * size);
  auto* starts = scratch.take<float>(rows * groups * LANES);
  for (int64_t b = 0; b < rows; ++b) arrange_row<W>(call, b, x + b * size, starts + b * groups * LANES);
  const Arranged few{x, starts, size, groups, call.group / BLOCK};
  const S* scale = static_cast<const S*>(call.scale);

  int64_t block = TASK_BYTES / std::max<int64_t>(size / BLOCK * W::BYTES, 1);
  block = std::max<int64_t>(block / SINGLE * SINGLE, SINGLE);
  auto one_block = [&](int64_t task) {
    const int64_t first = task * block, count = std::min(block, features - first);
    Scratch room(PAIRED * size + rows * count + count);
    auto* unpacked = room.take<float>(PAIRED * size);
    auto* values = room.take<float>(rows * count);
    auto* bias = room.take<float>(count);
    std::fill(bias, bias + count, 0.0f);
    if (call.bias.data) call.bias.arrange_as<float>(first, count, 1.0f, bias);
    all_of_a_task<W>(call.weight + first * call.weight_row, call.weight_row,
                     scale + first * call.scale_row, call.scale_row, count, few, rows, unpacked,
                     [&](int64_t m, int64_t b, float value) { values[b * count + m] = value + bias[m]; });
    for (int64_t b = 0; b < rows; ++b) call.y.write(b * features + first, values + b * count, count);
  };
  run_phases(threads, Phase((features + block - 1) / block, one_block));
}

}  // namespace

// The dtype of x and bias is bfloat16 or float32, so is that of the scales; weights have 4 or 8 bits. A
// group is a multiple of 32, and a row a whole number of groups.
EXPORT void sambay_grouped_linear(const void* x, int64_t x_row, const void* weight, int64_t weight_row,
                                  const void* scale, int64_t scale_row, const void* bias, void* y,
                                  int64_t rows, int64_t size, int64_t features, int64_t group,
                                  int64_t bits, int64_t is_bfloat16, int64_t scale_is_bfloat16,
                                  int64_t threads) {
  const bool narrow = is_bfloat16 != 0, narrow_scale = scale_is_bfloat16 != 0;
  const Call call{{x, narrow},    x_row,       static_cast<const char*>(weight), weight_row, scale, scale_row,
                  {bias, narrow}, {y, narrow}, rows,                             size,       features, group};
  if (bits == 4) narrow_scale ? linear<Nibbles, bfloat16>(call, threads) : linear<Nibbles, float>(call, threads);
  if (bits == 8) narrow_scale ? linear<Bytes, bfloat16>(call, threads) : linear<Bytes, float>(call, threads);
}
PACKED(sambay_grouped_linear)
