// What a decode step does with its few rows between matrix products and mixers: embedding, norms, gates,
// sums, rotations, and the places of the new tokens. Each is over in a microsecond or two.
#include <cmath>

#include "packed.h"
#include "rows.h"
#include "team.h"

namespace {

constexpr int64_t ELEMENTS = 2048;  // of a row, in one task

template <typename Run>
inline void as_type(int64_t is_bfloat16, const Run& run) {
  is_bfloat16 ? run(bfloat16{}) : run(float{});
}

inline int lanes_from(int64_t i, int64_t end) { return static_cast<int>(std::min<int64_t>(LANES, end - i)); }

inline float sum_of(vfloat value) {
  float sum;
  sum_lanes(&value, &sum, 1);
  return sum;
}

inline vfloat rounded_to(vfloat value, float) { return value; }

inline vfloat rounded_to(vfloat value, bfloat16) {
  bfloat16 narrow[LANES];
  store(narrow, value);
  return load(narrow);
}

template <typename X, typename W>
void norm_row(const X* x, const W* weight, const W* bias, W* out, int64_t size, bool centred, float eps,
              float factor, float* wide) {
  vfloat sums = {}, squares = {};
  for (int64_t i = 0; i < size; i += LANES) {
    const vfloat value = rounded_to(load(x + i, lanes_from(i, size)), W{});
    store(wide + i, value);
    sums += value;
  }
  const float mean = centred ? sum_of(sums) / static_cast<float>(size) : 0;
  for (int64_t i = 0; i < size; i += LANES) {
    vfloat value = load(wide + i) - mean;
    for (int lane = lanes_from(i, size); lane < LANES; ++lane) value[lane] = 0;
    squares += value * value;
  }
  const float scale = 1 / std::sqrt(sum_of(squares) / static_cast<float>(size) + eps);
  for (int64_t i = 0; i < size; i += LANES) {
    const int lanes = lanes_from(i, size);
    vfloat value = (load(wide + i) - mean) * scale * load(weight + i, lanes);
    if (bias) value += load(bias + i, lanes);
    store(out + i, value * factor, lanes);
  }
}

}  // namespace

// out (rows, size), float32; a token that is no entry of the table gives NaN.
EXPORT void sambay_embed_rows(const int64_t* tokens, const void* table, int64_t table_row, float* out,
                              int64_t rows, int64_t size, int64_t entries, int64_t is_bfloat16,
                              double factor) {
  as_type(is_bfloat16, [&](auto kind) {
    const auto* from = static_cast<const decltype(kind)*>(table);
    for (int64_t b = 0; b < rows; ++b) {
      float* row = out + b * size;
      if (tokens[b] < 0 || tokens[b] >= entries) {
        std::fill(row, row + size, NAN);
        continue;
      }
      for (int64_t i = 0; i < size; i += LANES) {
        const int lanes = lanes_from(i, size);
        store(row + i, load(from + tokens[b] * table_row + i, lanes) * static_cast<float>(factor), lanes);
      }
    }
  });
}
PACKED(sambay_embed_rows)

// x is rounded to the type of the weight first, as it is by a cast before the norm.
EXPORT void sambay_norm_rows(const void* x, int64_t x_row, const void* weight, const void* bias, void* out,
                             int64_t rows, int64_t size, int64_t x_is_bfloat16, int64_t weight_is_bfloat16,
                             int64_t centred, double eps, double factor) {
  Scratch scratch(size + LANES);
  auto* wide = scratch.take<float>(size + LANES);
  as_type(x_is_bfloat16, [&](auto x_kind) {
    as_type(weight_is_bfloat16, [&](auto kind) {
      using X = decltype(x_kind);
      using W = decltype(kind);
      for (int64_t b = 0; b < rows; ++b)
        norm_row(static_cast<const X*>(x) + b * x_row, static_cast<const W*>(weight),
                 static_cast<const W*>(bias), static_cast<W*>(out) + b * size, size, centred != 0,
                 static_cast<float>(eps), static_cast<float>(factor), wide);
    });
  });
}
PACKED(sambay_norm_rows)

// silu(gate) * value, rounded once.
EXPORT void sambay_gate_rows(const void* gate, int64_t gate_row, const void* value, int64_t value_row,
                             void* out, int64_t rows, int64_t size, int64_t is_bfloat16, int64_t threads) {
  as_type(is_bfloat16, [&](auto kind) {
    using T = decltype(kind);
    const int64_t pieces = (size + ELEMENTS - 1) / ELEMENTS;
    auto one_piece = [&](int64_t task) {
      const int64_t b = task / pieces, first = task % pieces * ELEMENTS;
      const int64_t end = std::min(first + ELEMENTS, size);
      const T* a = static_cast<const T*>(gate) + b * gate_row;
      const T* m = static_cast<const T*>(value) + b * value_row;
      T* to = static_cast<T*>(out) + b * size;
      for (int64_t i = first; i < end; i += LANES) {
        const int lanes = lanes_from(i, end);
        const vfloat some = load(a + i, lanes);
        store(to + i, some * sigmoid(some) * load(m + i, lanes), lanes);
      }
    };
    run_phases(threads, Phase(rows * pieces, one_piece));
  });
}
PACKED(sambay_gate_rows)

// x + factor * y in float32.
EXPORT void sambay_add_rows(const float* x, const void* y, float* out, int64_t count, int64_t y_is_bfloat16,
                            double factor) {
  as_type(y_is_bfloat16, [&](auto kind) {
    const auto* added = static_cast<const decltype(kind)*>(y);
    for (int64_t i = 0; i < count; i += LANES) {
      const int lanes = lanes_from(i, count);
      store(out + i, load(x + i, lanes) + static_cast<float>(factor) * load(added + i, lanes), lanes);
    }
  });
}
PACKED(sambay_add_rows)

// One more column in every slot but the idle ones.
EXPORT void sambay_count_columns(int64_t* lengths, int64_t rows) {
  for (int64_t b = 0; b < rows; ++b) lengths[b] += lengths[b] > 0;
}
PACKED(sambay_count_columns)

// Where the newest column lies, -1 in idle slots, and how many there are; in a ring of that size, if any.
EXPORT void sambay_slot_places(const int64_t* lengths, int64_t ring, int64_t* columns, int64_t* seen,
                               int64_t rows) {
  for (int64_t b = 0; b < rows; ++b) {
    const int64_t column = lengths[b] - 1;
    columns[b] = ring && column > 0 ? column % ring : column;
    seen[b] = ring ? std::min(lengths[b], ring) : lengths[b];
  }
}
PACKED(sambay_slot_places)

// Cosines and sines (rows, half) of column * frequency.
EXPORT void sambay_rotary_turns(const int64_t* columns, const float* frequencies, float* cosines,
                                float* sines, int64_t rows, int64_t half) {
  for (int64_t b = 0; b < rows; ++b)
    for (int64_t i = 0; i < half; ++i) {
      const float angle = static_cast<float>(columns[b]) * frequencies[i];
      cosines[b * half + i] = std::cos(angle);
      sines[b * half + i] = std::sin(angle);
    }
}
PACKED(sambay_rotary_turns)

EXPORT void sambay_rotate_heads(const void* x, int64_t x_row, int64_t x_head, const float* cosines,
                                const float* sines, void* out, int64_t rows, int64_t heads, int64_t half,
                                int64_t is_bfloat16) {
  as_type(is_bfloat16, [&](auto kind) {
    using T = decltype(kind);
    for (int64_t b = 0; b < rows; ++b)
      for (int64_t h = 0; h < heads; ++h) {
        const T* from = static_cast<const T*>(x) + b * x_row + h * x_head;
        T* to = static_cast<T*>(out) + (b * heads + h) * 2 * half;
        for (int64_t i = 0; i < half; i += LANES) {
          const int lanes = lanes_from(i, half);
          const vfloat first = load(from + i, lanes), second = load(from + half + i, lanes);
          const vfloat c = load(cosines + b * half + i, lanes), s = load(sines + b * half + i, lanes);
          store(to + i, first * c - second * s, lanes);
          store(to + half + i, second * c + first * s, lanes);
        }
      }
  });
}
PACKED(sambay_rotate_heads)
