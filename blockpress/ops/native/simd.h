// Vectors of floats of the processor's width, and the functions of a network on them.
//
// GCC's and clang's vector extensions: the same code becomes AVX-512, AVX2, NEON or scalar instructions. bfloat16 exists
// only in memory: it is widened to float32 when loaded, and rounded, ties to even, when stored.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors wider than the processor's only pass between inlined functions
#pragma GCC diagnostic ignored "-Wuninitialized"  // of g++ 12's own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#ifdef __AVX__
#include <immintrin.h>
#endif

namespace {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

#ifdef __AVX512F__
constexpr long W = 16;
#elif defined(__AVX__)
constexpr long W = 8;  // the compiler splits vectors wider than the processor's, and badly in selections
#else
constexpr long W = 4;
#endif
typedef float F __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t I __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint32_t U __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint16_t H __attribute__((vector_size(2 * W), aligned(2), may_alias));
typedef uint8_t B __attribute__((vector_size(W), aligned(1), may_alias));

inline F load(const float* p) { return *reinterpret_cast<const F*>(p); }
#if defined(__AVX512F__)
inline F load(const bf16* p) {
  __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
}
#elif defined(__AVX2__)
inline F load(const bf16* p) {
  return (F)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16);
}
#else
inline F load(const bf16* p) { return (F)(__builtin_convertvector(*reinterpret_cast<const H*>(p), U) << 16); }
#endif

// The vector of W values.
template <class Value>
inline __attribute__((always_inline)) F gathered(const Value& value) {
  constexpr int some = W < 8 ? W : 8;  // g++ turns 16 at once into 16 insertions into a whole register
  typedef float Part __attribute__((vector_size(4 * some)));
  Part parts[W / some];
  for (int i = 0; i < W; i++) parts[i / some][i % some] = value(i);
  F x;
  std::memcpy(&x, parts, sizeof x);
  return x;
}

inline float widen(float x) { return x; }
inline float widen(bf16 x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float widen(f16 x) {  // subnormal numbers too: a product moves the exponent
  uint32_t bits = static_cast<uint32_t>(x.bits & 0x7fff) << 13, sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  value *= 0x1p112f;
  if ((x.bits & 0x7c00) == 0x7c00) {
    bits |= 0x7f800000;
    std::memcpy(&value, &bits, 4);
  }
  std::memcpy(&bits, &value, 4);
  bits |= sign;
  std::memcpy(&value, &bits, 4);
  return value;
}

// A line of half floats as float32, as wide as the processor is.
template <class T>
inline void widen_all(const T* from, long count, float* to) {
  long i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= count; i += 16) {
    __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
    _mm512_storeu_ps(to + i, std::is_same<T, bf16>::value
                                 ? (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)
                                 : _mm512_cvtph_ps(half));
  }
#elif defined(__AVX2__) && defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(to + i, std::is_same<T, bf16>::value
                                 ? (__m256)_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16)
                                 : _mm256_cvtph_ps(half));
  }
#endif
  for (; i < count; i++) to[i] = widen(from[i]);
}

inline U nearest(F number) {  // the bits of the bfloat16, ties to even; not of NaN
  U bits = (U)number;
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}
inline U rounded(F x) { return (x != x) ? (U)(I{} + 0x7fc0) : nearest(x); }  // NaN stays NaN

inline void store(float* p, F x) { *reinterpret_cast<F*>(p) = x; }
#ifdef __AVX512BF16__  // the same but for numbers below 1e-38, which become 0
inline void store(bf16* p, F x) { *reinterpret_cast<H*>(p) = (H)_mm512_cvtneps_pbh((__m512)x); }
#else
inline void store(bf16* p, F x) { *reinterpret_cast<H*>(p) = __builtin_convertvector(rounded(x), H); }
#endif

// A value rounded as a tensor of T would store it.
inline F kept(F x, float) { return x; }
#ifdef __AVX512BF16__
inline F kept(F x, bf16) {
  return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x)), 16);
}
#else
inline F kept(F x, bf16) { return (F)(rounded(x) << 16); }
#endif

template <class T>
inline F load_some(const T* p, long count) {
  T buffer[W] = {};
  std::memcpy(buffer, p, count * sizeof(T));
  return load(buffer);
}

template <class T>
inline void store_some(T* p, F x, long count) {
  T buffer[W];
  store(buffer, x);
  std::memcpy(p, buffer, count * sizeof(T));
}

// Calls op(place, count) for every W features; the last call may have fewer.
template <class Op>
inline void each(long size, const Op& op) {
  long i = 0;
  for (; i + W <= size; i += W) op(i, W);
  if (i < size) op(i, size - i);
}

template <class T>
inline F get(const T* p, long count) { return count == W ? load(p) : load_some(p, count); }
template <class T>
inline void put(T* p, F x, long count) { count == W ? store(p, x) : store_some(p, x, count); }

inline float sum(F x) {
  float parts[W];
  store(parts, x);
  for (long half = W / 2; half; half /= 2)
    for (long i = 0; i < half; i++) parts[i] += parts[i + half];
  return parts[0];
}

// e^x to 1 ulp for -87.3 < x < 88, and 0 at LOWEST, the smallest argument (Cephes' expf): 2^n (1 + r + ...), |r| <=
// log(2) / 2. The lowest bits of `t` are n + 127, the exponent of 2^n; at LOWEST they are 0, and so is the factor.
constexpr float LOWEST = -88.0f;

inline F exponential_above(F x) {
  const float magic = 12582912.0f + 127;  // 1.5 * 2^23: adding it rounds to an integer
  F t = x * 1.44269504088896341f + magic, n = t - magic;
  F r = x - n * 0.693359375f + n * 2.12194440e-4f;
  F p = F{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return p * (F)((I)t << 23);
}

inline F exponential(F x) { return exponential_above((x < LOWEST) ? F{} + LOWEST : x); }  // NaN stays NaN

inline F gelu(F x) {  // 0.5 x (1 + tanh u); near -1 the sum loses the digits that torch's loses
  F u = 0.7978845608028654f * (x + 0.044715f * x * x * x);
  F size = (u < 0.0f) ? -u : u;
  F most = F{} + 40.0f;
  F t = 1.0f - 2.0f / (1.0f + exponential_above(2.0f * ((size > most) ? most : size)));
  return 0.5f * x * (1.0f + ((u < 0.0f) ? -t : t));
}

// to = x divided by its root mean square (times weight), rounded once.
template <class T>
inline void normalise(const T* x, const T* weight, T* to, long size, float eps) {
  F total = {};
  each(size, [&](long i, long count) {
    F v = get(x + i, count);
    total += v * v;
  });
  float scale = 1.0f / std::sqrt(sum(total) / size + eps);
  each(size, [&](long i, long count) {
    F v = get(x + i, count) * scale;
    put(to + i, weight ? v * get(weight + i, count) : v, count);
  });
}

// Rotates each pair (i, i + half) by its angle; `to` may be x.
template <class T>
inline void turn(const T* x, const T* cosine, const T* sine, T* to, long half) {
  each(half, [&](long i, long count) {
    F low = get(x + i, count), high = get(x + half + i, count);
    F a = kept(low * get(cosine + i, count), T{}) - kept(high * get(sine + i, count), T{});
    F z = kept(high * get(cosine + half + i, count), T{}) + kept(low * get(sine + half + i, count), T{});
    put(to + i, a, count);
    put(to + half + i, z, count);
  });
}

// Which of W keys a row of the mask shows, one byte each.
inline I visible(const uint8_t* may, long count) {
  B bytes = {};
  if (count == W) bytes = *reinterpret_cast<const B*>(may);
  else std::memcpy(&bytes, may, count);
  return __builtin_convertvector(__builtin_convertvector(bytes, H), U) != 0u;
}

// Softmax of one row in place, in float32, with scores and results as a tensor of T stores them; where `may` is 0 the
// score is the smallest of T. wide: size + 2 * W floats. The sum runs over W lanes, of which the first score takes number
// `lane`: so scores that are shifted have the same sum.
template <class T, class Stored>
inline void soften(Stored* own, const uint8_t* may, long size, float* wide, long lane = 0) {
  constexpr float lowest = sizeof(T) == 2 ? -3.3895313892515355e38f : -3.4028234663852886e38f;
  F best = F{} - INFINITY;
  for (long k = 0; k < lane; k++) wide[k] = -INFINITY;
  each(size, [&](long i, long count) {
    F v = kept(get(own + i, count), T{});
    if (may) v = visible(may + i, count) ? v : F{} + lowest;
    if (count < W) {
      float parts[W];
      store(parts, v);
      for (long k = count; k < W; k++) parts[k] = -INFINITY;
      v = load(parts);
    }
    store(wide + lane + i, v);
    best = (v > best || v != v) ? v : best;
  });
  store(wide + lane + size, F{} - INFINITY);
  float top = best[0];
  for (long k = 1; k < W; k++) top = (best[k] > top || best[k] != best[k]) ? best[k] : top;
  F total = {};
  for (long i = 0; i < lane + size; i += W) {
    F e = exponential(load(wide + i) - top);
    store(wide + i, e);
    total += e;
  }
  float share_of = 1.0f / sum(total);
  each(size, [&](long i, long count) { put(own + i, kept(get(wide + lane + i, count) * share_of, T{}), count); });
}

}  // namespace
