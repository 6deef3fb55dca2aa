// Vectors of floats as wide as the machine's registers, through the vector extensions that gcc and
// clang share, with the few functions the kernels need: exp2, softplus, partial loads and stores.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float vfloat __attribute__((vector_size(4 * LANES)));
typedef int32_t vint __attribute__((vector_size(4 * LANES)));
typedef uint32_t vbits __attribute__((vector_size(4 * LANES)));
typedef uint16_t vhalf __attribute__((vector_size(2 * LANES)));

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

struct bfloat16 {
  uint16_t bits;
};

// sum + a * b, rounded once where there is such an instruction. Left to themselves, compilers split it
// in some loops and not in others, where a result must not depend on the loop that computed it.
static inline vfloat fused(vfloat a, vfloat b, vfloat sum) {
#if defined(__FMA__)
  __asm__("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "vm"(b));
  return sum;
#else
  return sum + a * b;
#endif
}

// Reads and writes of fewer than LANES elements; the rest of a vector read is zero. They are kept out
// of line, because a copy of unknown size would force the vector into memory on the common path too.
template <typename Vector, typename Element>
__attribute__((noinline)) static Vector load_some(const Element* from, int lanes) {
  Vector value = {};
  memcpy(&value, from, sizeof(Element) * lanes);
  return value;
}

template <typename Vector, typename Element>
__attribute__((noinline)) static void store_some(Element* to, Vector value, int lanes) {
  memcpy(to, &value, sizeof(Element) * lanes);
}

template <typename Vector, typename Element>
static inline Vector load_vector(const Element* from, int lanes) {
  if (lanes != LANES) return load_some<Vector>(from, lanes);
  Vector value;
  memcpy(&value, from, sizeof value);
  return value;
}

template <typename Vector, typename Element>
static inline void store_vector(Element* to, Vector value, int lanes) {
  if (lanes != LANES) return store_some(to, value, lanes);
  memcpy(to, &value, sizeof value);
}

static inline vfloat load(const float* from, int lanes = LANES) {
  return load_vector<vfloat>(from, lanes);
}

static inline void store(float* to, vfloat value, int lanes = LANES) { store_vector(to, value, lanes); }

static inline vfloat load(const bfloat16* from, int lanes = LANES) {
#if defined(__AVX2__)
  if (lanes == LANES) {  // one instruction, which compilers do not find: they widen half by half
    struct Block {
      uint16_t values[LANES];
    };
    vbits bits;
    __asm__("vpmovzxwd %1, %0" : "=v"(bits) : "m"(*reinterpret_cast<const Block*>(from)));
    return (vfloat)(bits << 16);
  }
#endif
  return (vfloat)(__builtin_convertvector(load_vector<vhalf>(from, lanes), vbits) << 16);
}

// Rounds to nearest even; a NaN stays a NaN.
static inline void store(bfloat16* to, vfloat value, int lanes = LANES) {
  vbits bits = (vbits)value;
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  bits = value != value ? vbits{} + 0x7fc0u : bits;
  store_vector(to, __builtin_convertvector(bits, vhalf), lanes);
}

// to[i] = sum of the lanes of from[i]. Two passes, because the second, over groups of four, is a loop
// that compilers turn into shuffles of whole vectors; one vector after another would be four times
// slower. `from` is overwritten.
static inline void sum_lanes(vfloat* from, float* to, int64_t count) {
  typedef float quad __attribute__((vector_size(16)));
  float* flat = reinterpret_cast<float*>(from);
  for (int64_t i = 0; i < count; ++i) {
    quad sum, next;
    memcpy(&sum, flat + LANES * i, sizeof sum);
    for (int part = 1; part < LANES / 4; ++part) {
      memcpy(&next, flat + LANES * i + 4 * part, sizeof next);
      sum += next;
    }
    memcpy(flat + 4 * i, &sum, sizeof sum);
  }
  for (int64_t i = 0; i < count; ++i)
    to[i] = (flat[4 * i] + flat[4 * i + 1]) + (flat[4 * i + 2] + flat[4 * i + 3]);
}

// 2^z to about 1e-7 relative; exactly 1 at 0, exactly 0 far below the smallest float, infinity above
// the largest; a NaN stays a NaN.
static inline vfloat exp2v(vfloat z) {
#if defined(__AVX512F__)
  // As instructions, since the header of their intrinsics costs half a second to compile.
  vfloat whole, scaled;
  __asm__("vrndscaleps $8, %1, %0" : "=v"(whole) : "v"(z));
#else
  // Clamped so that the exponent field below becomes 0 (the float 0) or 255 (infinity).
  z = z < -127.0f ? vfloat{} - 127.0f : z;
  z = z > 128.0f ? vfloat{} + 128.0f : z;
  const vfloat whole = (z + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23 rounds to an integer
#endif
  const vfloat part = z - whole;
  vfloat power = part * 0.001326472731307149f + 0.009671512991189957f;
  power = part * power + 0.05550733581185341f;
  power = part * power + 0.24022242426872253f;
  power = part * power + 0.6931470036506653f;
  power = part * power + 1.0f;
#if defined(__AVX512F__)
  __asm__("vscalefps %2, %1, %0" : "=v"(scaled) : "v"(power), "v"(whole));
  return scaled;
#else
  return power * (vfloat)((__builtin_convertvector(whole, vint) + 127) << 23);
#endif
}

static inline vfloat expv(vfloat z) { return exp2v(z * LOG2_E); }

static inline vfloat absolute(vfloat z) { return (vfloat)((vbits)z & 0x7fffffffu); }

static inline vfloat sigmoid(vfloat z) {
  const vfloat small = expv(-absolute(z));
  return (z < 0.0f ? small : vfloat{} + 1.0f) / (1.0f + small);
}

// log(1 + exp(z)), accurate relative to its size also where it is tiny, and exactly 0 for z below
// -104, which is what makes a delta of -1e4 leave a state untouched.
// log1p(s) = 2 artanh(s / (2 + s)) with s = exp(-|z|) in (0, 1].
static inline vfloat softplus(vfloat z) {
  const vfloat small = expv(-absolute(z));
  const vfloat ratio = small / (2.0f + small);
  const vfloat square = ratio * ratio;
  vfloat series = square * 0.2801198661327362f + 0.28001806139945984f;
  series = square * series + 0.4002152681350708f;
  series = square * series + 0.666664183139801f;
  series = square * series + 2.0f;
  return (z > 0.0f ? z : vfloat{}) + ratio * series;
}
