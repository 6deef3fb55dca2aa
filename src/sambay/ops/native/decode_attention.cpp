// Attention of one new query per row over a cache, with grouped heads and a length of its own per row:
// every key and every value is read from memory once.
#include "decode_attention.h"

namespace {

template <typename T>
struct Call {
  FewRows q;
  int64_t q_row, q_head;
  Columns<T> k, v;
  Lengths lengths;
  Output out;
  int64_t rows, heads, key_heads, size;
  float scale;
};

template <typename T>
void attend(const Call<T>& call, int64_t threads) {
  const int64_t group = call.heads / call.key_heads, size = call.size, width = in_vectors(size);
  const int64_t parts = (call.lengths.longest(call.rows) + PART - 1) / PART;
  const int64_t pairs = call.rows * call.key_heads;
  Scratch scratch(pairs * parts * group * (width + 2));
  auto* sums = scratch.take<float>(pairs * parts * group * width);
  auto* statistics = scratch.take<Statistics>(pairs * parts * group);

  auto one_part = [&](int64_t task) {
    const int64_t b = task / parts / call.key_heads, k = task / parts % call.key_heads;
    const int64_t first = task % parts * PART;
    const int64_t count = std::min(call.lengths.at(b) - first, PART);
    if (count <= 0) return;
    Scratch room(group * PART);
    auto* scores = room.take<float>(group * PART);
    score(call.q, b * call.q_row + k * group * call.q_head, call.q_head, group,
          call.k.at(b, k, first), call.k.column, count, size, call.scale * LOG2_E, scores, PART);
    for (int64_t g = 0; g < group; ++g)
      statistics[task * group + g] = exponentials(scores + g * PART, count);
    float* sum = sums + task * group * width;
    std::fill(sum, sum + group * width, 0.0f);
    weigh_all(call.v.at(b, k, first), call.v.column, count, scores, PART, group, size, sum, width);
  };
  auto one_head = [&](int64_t task) {
    const int64_t b = task / call.heads, h = task % call.heads, k = h / group;
    const int64_t used = (call.lengths.at(b) + PART - 1) / PART;
    auto place = [&](int64_t part) {
      return ((b * call.key_heads + k) * parts + part) * group + h % group;
    };
    float most = FAR_BELOW, total = 0;
    for (int64_t part = 0; part < used; ++part)
      most = std::max(most, statistics[place(part)].most);
    Scratch room(width);
    auto* result = room.take<float>(width);
    std::fill(result, result + width, 0.0f);
    for (int64_t part = 0; part < used; ++part) {
      const Statistics& one = statistics[place(part)];
      const float factor = exp2_of(one.most - most);
      total += factor * one.sum;
      const float* sum = sums + place(part) * width;
      for (int64_t i = 0; i < width; i += LANES) store(result + i, load(result + i) + factor * load(sum + i));
    }
    const float scale = used ? 1 / total : 0;
    for (int64_t i = 0; i < width; i += LANES) store(result + i, load(result + i) * scale);
    call.out.write(task * size, result, size);
  };
  run_phases(threads, Phase(pairs * parts, one_part), Phase(call.rows * call.heads, one_head));
}

template <typename T>
void store_columns(const T* keys, int64_t keys_row, int64_t keys_head, const T* values, int64_t values_row,
                   int64_t values_head, T* k, int64_t k_row, int64_t k_head, int64_t k_column, T* v,
                   int64_t v_row, int64_t v_head, int64_t v_column, const Lengths& columns, int64_t rows,
                   int64_t heads, int64_t size) {
  for (int64_t b = 0; b < rows; ++b) {
    const int64_t column = columns.is_int64 ? static_cast<const int64_t*>(columns.data)[b]
                                            : static_cast<const int32_t*>(columns.data)[b];
    if (column < 0) continue;
    for (int64_t h = 0; h < heads; ++h) {
      memcpy(k + b * k_row + h * k_head + column * k_column, keys + b * keys_row + h * keys_head,
             sizeof(T) * size);
      memcpy(v + b * v_row + h * v_head + column * v_column, values + b * values_row + h * values_head,
             sizeof(T) * size);
    }
  }
}

}  // namespace

EXPORT void sambay_decode_attention(QUERY_PARAMETERS, double scale, int64_t threads) {
  auto run = [&](auto kind) {
    using T = decltype(kind);
    attend<T>({{q, query_is_bfloat16 != 0}, q_row, q_head,
               {static_cast<const T*>(k), k_row, k_head, k_column, starts},
               {static_cast<const T*>(v), v_row, v_head, v_column, starts},
               {lengths, lengths_are_int64 != 0, columns}, {out, query_is_bfloat16 != 0}, rows, heads,
               key_heads, size, static_cast<float>(scale)},
              threads);
  };
  cache_is_bfloat16 ? run(bfloat16{}) : run(float{});
}

EXPORT void sambay_store_columns(const void* keys, int64_t keys_row, int64_t keys_head, const void* values,
                                 int64_t values_row, int64_t values_head, void* k, int64_t k_row,
                                 int64_t k_head, int64_t k_column, void* v, int64_t v_row, int64_t v_head,
                                 int64_t v_column, const void* columns, int64_t columns_are_int64,
                                 int64_t rows, int64_t heads, int64_t size, int64_t is_bfloat16) {
  auto run = [&](auto kind) {
    using T = decltype(kind);
    store_columns(static_cast<const T*>(keys), keys_row, keys_head, static_cast<const T*>(values),
                  values_row, values_head, static_cast<T*>(k), k_row, k_head, k_column,
                  static_cast<T*>(v), v_row, v_head, v_column, {columns, columns_are_int64 != 0, 0}, rows,
                  heads, size);
  };
  is_bfloat16 ? run(bfloat16{}) : run(float{});
}
PACKED(sambay_decode_attention)
PACKED(sambay_store_columns)
