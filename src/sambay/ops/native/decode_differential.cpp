// Differential attention of one new query per row over a cache: the keys are read for both maps, then
// the values for their difference, each once. The exponentials wait in between, which costs less than
// keeping two sums of values apart. The norm within a pair and its factor are applied at the end.
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
  float scale, weight, eps, factor;
  const float* norm_weight;  // null: neither norm nor factor
};

// Heads 2j and 2j + 1 are the two maps of pair j; a group of pairs reads the key heads 2p and 2p + 1.
template <typename T>
void attend(const Call<T>& call, int64_t threads) {
  const int64_t group = call.heads / call.key_heads, size = call.size, width = 2 * in_vectors(size);
  const int64_t longest = call.lengths.longest(call.rows), parts = (longest + PART - 1) / PART;
  const int64_t key_pairs = call.key_heads / 2, groups = call.rows * key_pairs;
  Scratch scratch(groups * parts * group * (2 * PART + 4 + width));
  // Of every part: exponentials (map, member, column), statistics (map, member), sums (member, width).
  auto* scores = scratch.take<float>(groups * parts * 2 * group * PART);
  auto* sums = scratch.take<float>(groups * parts * group * width);
  auto* statistics = scratch.take<Statistics>(groups * parts * 2 * group);

  struct Place {
    int64_t b, pair, first, count;
  };
  auto place_of = [&](int64_t task) {
    const int64_t b = task / parts / key_pairs, first = task % parts * PART;
    return Place{b, task / parts % key_pairs, first, std::min(call.lengths.at(b) - first, PART)};
  };
  auto score_part = [&](int64_t task) {
    const Place at = place_of(task);
    if (at.count <= 0) return;
    for (int64_t map = 0; map < 2; ++map) {
      float* own = scores + (2 * task + map) * group * PART;
      score(call.q, at.b * call.q_row + (2 * at.pair * group + map) * call.q_head, 2 * call.q_head, group,
            call.k.at(at.b, 2 * at.pair + map, at.first), call.k.column, at.count, size,
            call.scale * LOG2_E, own, PART);
      for (int64_t g = 0; g < group; ++g)
        statistics[(2 * task + map) * group + g] = exponentials(own + g * PART, at.count);
    }
  };
  // 2^(most of this part - most of all) / (sum of all exponentials), of one map and member.
  auto share = [&](int64_t task, int64_t used, int64_t index) {
    const Statistics* first = statistics + (task - task % parts) * 2 * group + index;
    float most = FAR_BELOW, total = 0;
    for (int64_t part = 0; part < used; ++part) most = std::max(most, first[part * 2 * group].most);
    for (int64_t part = 0; part < used; ++part) {
      const Statistics& one = first[part * 2 * group];
      total += exp2_of(one.most - most) * one.sum;
    }
    return exp2_of(statistics[task * 2 * group + index].most - most) / total;
  };
  auto weigh_part = [&](int64_t task) {
    const Place at = place_of(task);
    if (at.count <= 0) return;
    const int64_t used = (call.lengths.at(at.b) + PART - 1) / PART;
    float* first = scores + 2 * task * group * PART;
    const float* second = first + group * PART;
    for (int64_t g = 0; g < group; ++g) {
      const float plus = share(task, used, g), minus = call.weight * share(task, used, group + g);
      for (int64_t c = g * PART; c < g * PART + at.count; c += LANES)
        store(first + c, plus * load(first + c) - minus * load(second + c));
    }
    float* sum = sums + task * group * width;
    std::fill(sum, sum + group * width, 0.0f);
    for (int64_t half = 0; half < 2; ++half)
      weigh_all(call.v.at(at.b, 2 * at.pair + half, at.first), call.v.column, at.count, first, PART, group,
                size, sum + half * (width / 2), width);
  };
  auto finish = [&](int64_t task) {
    const int64_t j = task % (call.heads / 2), b = task / (call.heads / 2), pair = j / group;
    const int64_t used = (call.lengths.at(b) + PART - 1) / PART;
    Scratch room(width);
    auto* result = room.take<float>(width);
    std::fill(result, result + width, 0.0f);
    vfloat squares = {};
    for (int64_t part = 0; part < used; ++part) {
      const float* sum = sums + (((b * key_pairs + pair) * parts + part) * group + j % group) * width;
      for (int64_t i = 0; i < width; i += LANES) store(result + i, load(result + i) + load(sum + i));
    }
    float scale = 1, mean;
    if (call.norm_weight) {
      for (int64_t i = 0; i < width; i += LANES) squares += load(result + i) * load(result + i);
      sum_lanes(&squares, &mean, 1);
      scale = call.factor / std::sqrt(mean / static_cast<float>(2 * size) + call.eps);
    }
    for (int64_t half = 0; half < 2; ++half) {
      float* own = result + half * (width / 2);
      const float* weight = call.norm_weight + half * size;
      for (int64_t i = 0; call.norm_weight && i < size; ++i) own[i] *= scale * weight[i];
      call.out.write((task * 2 + half) * size, own, size);
    }
  };
  run_phases(threads, Phase(groups * parts, score_part), Phase(groups * parts, weigh_part),
                  Phase(call.rows * call.heads / 2, finish));
}

}  // namespace

EXPORT void sambay_decode_differential(QUERY_PARAMETERS, const float* weight, const float* norm_weight,
                                       double scale, double eps, double factor, int64_t threads) {
  auto run = [&](auto kind) {
    using T = decltype(kind);
    attend<T>({{q, query_is_bfloat16 != 0}, q_row, q_head,
               {static_cast<const T*>(k), k_row, k_head, k_column, starts},
               {static_cast<const T*>(v), v_row, v_head, v_column, starts},
               {lengths, lengths_are_int64 != 0, columns}, {out, query_is_bfloat16 != 0}, rows, heads,
               key_heads, size, static_cast<float>(scale), *weight, static_cast<float>(eps),
               static_cast<float>(factor), norm_weight},
              threads);
  };
  cache_is_bfloat16 ? run(bfloat16{}) : run(float{});
}
PACKED(sambay_decode_differential)
