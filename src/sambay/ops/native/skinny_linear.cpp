// x W^T + bias for few rows of x: a decode step reads every weight for a handful of products, so what
// counts is that each is read from memory once and that all cores ask for them.
#include "packed.h"
#include "rows.h"
#include "team.h"

namespace {

constexpr int64_t TASK_BYTES = 1 << 17;  // weights of one task

// `scale` is that of an int8 row of weights; null if the weights are what they say.
struct Call {
  FewRows x;
  int64_t x_row;
  const void* weight;
  int64_t weight_row;
  const float* scale;
  FewRows bias;
  Output y;
  int64_t rows, size, features;
};

template <typename W>
void linear(const Call& call, int64_t threads) {
  const int64_t rows = call.rows, size = call.size, features = call.features;
  const W* weight = static_cast<const W*>(call.weight);
  const bool as_it_is = !call.x.is_bfloat16 && !std::is_same<W, bfloat16>::value;
  Scratch scratch(as_it_is ? 0 : rows * size);
  float* arranged = scratch.take<float>(0);
  for (int64_t b = 0; !as_it_is && b < rows; ++b)
    call.x.arrange_as<W>(b * call.x_row, size, 1.0f, arranged + b * size);
  const float* few = as_it_is ? static_cast<const float*>(call.x.data) : arranged;
  const int64_t few_row = as_it_is ? call.x_row : size;

  int64_t block = TASK_BYTES / (static_cast<int64_t>(sizeof(W)) * std::max<int64_t>(size, 1));
  block = std::max<int64_t>(block / STREAMS * STREAMS, STREAMS);
  auto one_block = [&](int64_t task) {
    const int64_t first = task * block, count = std::min(block, features - first);
    Scratch room(rows * count + count + (std::is_same<W, float>::value ? 0 : MANY * size));
    auto* values = room.take<float>(rows * count);
    auto* bias = room.take<float>(count);
    std::fill(bias, bias + count, 0.0f);
    if (call.bias.data) call.bias.arrange_as<float>(first, count, 1.0f, bias);
    all_products(weight + first * call.weight_row, call.weight_row, count, few, few_row, rows, size,
                 room.take<float>(0), [&](int64_t f, int64_t b, float value) {
                   if (call.scale) value *= call.scale[first + f];
                   values[b * count + f] = value + bias[f];
                 });
    for (int64_t b = 0; b < rows; ++b)
      call.y.write(b * features + first, values + b * count, count);
  };
  run_phases(threads, Phase((features + block - 1) / block, one_block));
}

}  // namespace

// The dtype of x is bfloat16 or float32, that of the weight bfloat16 (1), float32 (0) or int8 with a
// scale per row (2); the bias has that of x.
EXPORT void sambay_skinny_linear(const void* x, int64_t x_row, const void* weight, int64_t weight_row,
                                 const float* scale, const void* bias, void* y, int64_t rows,
                                 int64_t size, int64_t features, int64_t is_bfloat16, int64_t weight_kind,
                                 int64_t threads) {
  const bool narrow = is_bfloat16 != 0;
  const Call call{{x, narrow}, x_row, weight, weight_row, scale, {bias, narrow}, {y, narrow},
                  rows, size, features};
  if (weight_kind == 0) linear<float>(call, threads);
  if (weight_kind == 1) linear<bfloat16>(call, threads);
  if (weight_kind == 2) linear<int8_t>(call, threads);
}
PACKED(sambay_skinny_linear)
