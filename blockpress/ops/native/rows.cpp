// Row-wise operations of a forward: RMSNorm, GeGLU, rotary embedding, masked softmax. One pass each, float32 inside.
//
// In torch each is five to eight passes over memory. The values are rounded to bfloat16 where the plain versions round.
// Called by ops/rows.py, which says what the arguments are. Threads are those of torch's own OpenMP, where it is loaded
// and visible (a second pool would fight with it for the cores); else the calling thread alone.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

extern "C" {
__attribute__((weak)) void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned);
__attribute__((weak)) int omp_get_thread_num();
__attribute__((weak)) int omp_get_num_threads();
__attribute__((weak)) int omp_get_max_threads();
}

namespace {

template <class Part>
struct Job {
  const Part* part;
  long rows;
};

template <class Part>
void run(void* data) {
  auto* job = static_cast<Job<Part>*>(data);
  long n = omp_get_num_threads(), i = omp_get_thread_num();
  (*job->part)(job->rows * i / n, job->rows * (i + 1) / n);
}

// part(start, stop) over slices of the rows; `values` of less than a grain are not worth a second thread.
template <class Part>
void share(long rows, long values, const Part& part) {
  constexpr long grain = 1 << 14;
  if (!GOMP_parallel || !omp_get_thread_num || !omp_get_num_threads || !omp_get_max_threads || values < 2 * grain) {
    part(0L, rows);
    return;
  }
  long threads = omp_get_max_threads(), most = values / grain;
  threads = threads < most ? threads : most;
  threads = threads < rows ? threads : rows;
  if (threads <= 1) {
    part(0L, rows);
    return;
  }
  Job<Part> job{&part, rows};
  GOMP_parallel(run<Part>, &job, static_cast<unsigned>(threads), 0);
}

struct bf16 {
  uint16_t bits;
};

constexpr long W = 16;
typedef float F __attribute__((vector_size(4 * W), aligned(4)));
typedef int32_t I __attribute__((vector_size(4 * W), aligned(4)));
typedef uint32_t U __attribute__((vector_size(4 * W), aligned(4)));
typedef uint16_t H __attribute__((vector_size(2 * W), aligned(2)));
typedef uint8_t B __attribute__((vector_size(W), aligned(1)));

inline F load(const float* p) { return *reinterpret_cast<const F*>(p); }
inline F load(const bf16* p) { return (F)(__builtin_convertvector(*reinterpret_cast<const H*>(p), U) << 16); }

inline U rounded(F x) {  // to the nearest bfloat16, ties to even; NaN stays NaN
  U bits = (U)x;
  U up = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return (x != x) ? (U)(I{} + 0x7fc0) : up;
}

inline void store(float* p, F x) { *reinterpret_cast<F*>(p) = x; }
#ifdef __AVX512BF16__  // the same but for numbers below 1e-38, which become 0
inline void store(bf16* p, F x) { *reinterpret_cast<H*>(p) = (H)_mm512_cvtneps_pbh((__m512)x); }
#else
inline void store(bf16* p, F x) { *reinterpret_cast<H*>(p) = __builtin_convertvector(rounded(x), H); }
#endif

// What a value becomes when a tensor of T keeps it.
inline F kept(F x, float) { return x; }
inline F kept(F x, bf16) {
  bf16 buffer[W];
  store(buffer, x);
  return load(buffer);
}

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

// op(place, count) for every run of W features, the last one perhaps shorter.
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

// e^x within 2 ulp for x <= 88; 0 below -87.3 (Cephes' polynomial).
inline F exponential(F x) {
  F tiny = F{} - 87.3f;
  F y = (x < tiny) ? tiny : x;
  F n = y * 1.44269504088896341f + 12582912.0f;  // rounds: the integer sits in the low bits
  I power = (I)n << 23;
  n = n - 12582912.0f;
  F r = y - n * 0.693359375f + n * 2.12194440e-4f;
  F p = F{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  F result = (F)((I)p + power);
  return (x < tiny) ? F{} : result;
}

inline F gelu(F x) {  // 0.5 x (1 + tanh u); near -1 the sum loses what torch's loses
  F u = 0.7978845608028654f * (x + 0.044715f * x * x * x);
  F size = (u < 0.0f) ? -u : u;
  F most = F{} + 40.0f;
  F t = 1.0f - 2.0f / (1.0f + exponential(2.0f * ((size > most) ? most : size)));
  return 0.5f * x * (1.0f + ((u < 0.0f) ? -t : t));
}

template <class T>
void rms_norm(const T* x, const T* weight, T* out, long rows, long size, float eps) {
  share(rows, rows * size, [&](long start, long stop) {
    for (long row = start; row < stop; row++) {
      const T* from = x + row * size;
      T* to = out + row * size;
      F total = {};
      each(size, [&](long i, long count) { F v = get(from + i, count); total += v * v; });
      float scale = 1.0f / std::sqrt(sum(total) / size + eps);
      each(size, [&](long i, long count) {
        F v = get(from + i, count) * scale;
        put(to + i, weight ? v * get(weight + i, count) : v, count);
      });
    }
  });
}

template <class T>
void geglu(const T* gate, const T* up, T* out, long rows, long size, long gate_stride, long up_stride) {
  share(rows, rows * size * 2, [&](long start, long stop) {
    for (long row = start; row < stop; row++) {
      const T *g = gate + row * gate_stride, *u = up + row * up_stride;
      T* to = out + row * size;
      each(size, [&](long i, long count) {
        put(to + i, kept(gelu(get(g + i, count)), T{}) * get(u + i, count), count);
      });
    }
  });
}

// x [batch, heads, length, 2 * half] by strides (s), cos and sin [batch, length, 2 * half] by strides (c); out dense.
template <class T>
void rotate(const T* x, const T* cosine, const T* sine, T* out, long batch, long heads, long length, long half,
            long sb, long sh, long sl, long cb, long cl) {
  long rows = batch * heads * length;
  share(rows, rows * half * 2, [&](long start, long stop) {
    for (long row = start; row < stop; row++) {
      long place = row % length, head = row / length % heads, b = row / length / heads;
      const T* from = x + b * sb + head * sh + place * sl;
      const T *c = cosine + b * cb + place * cl, *s = sine + b * cb + place * cl;
      T* to = out + row * 2 * half;
      each(half, [&](long i, long count) {
        F low = get(from + i, count), high = get(from + half + i, count);
        F a = kept(low * get(c + i, count), T{}) - kept(high * get(s + i, count), T{});
        F z = kept(high * get(c + half + i, count), T{}) + kept(low * get(s + half + i, count), T{});
        put(to + i, a, count);
        put(to + half + i, z, count);
      });
    }
  });
}

// scores [batch, heads, queries, seen], in place; mask [masks, queries, seen] by strides, a byte an entry, or null:
// batch entry b has mask b % masks.
template <class T>
void softmax(T* scores, const uint8_t* mask, long batch, long heads, long queries, long seen, long masks, long mb,
             long mq) {
  constexpr float lowest = sizeof(T) == 2 ? -3.3895313892515355e38f : -3.4028234663852886e38f;
  long rows = batch * heads * queries;
  share(rows, rows * seen * 2, [&](long start, long stop) {
    std::vector<float> buffer(seen + W);
    float* wide = buffer.data();
    for (long row = start; row < stop; row++) {
      T* own = scores + row * seen;
      const uint8_t* may = mask ? mask + row / queries / heads % masks * mb + row % queries * mq : nullptr;
      F best = F{} - INFINITY;
      each(seen, [&](long i, long count) {
        F v = get(own + i, count);
        if (may) {
          B bytes = {};
          if (count == W) bytes = *reinterpret_cast<const B*>(may + i);
          else std::memcpy(&bytes, may + i, count);
          v = (__builtin_convertvector(__builtin_convertvector(bytes, H), U) != 0u) ? v : F{} + lowest;
        }
        if (count < W) {
          float parts[W];
          store(parts, v);
          for (long k = count; k < W; k++) parts[k] = -INFINITY;
          v = load(parts);
        }
        store(wide + i, v);
        best = (v > best || v != v) ? v : best;
      });
      float top = best[0];
      for (long k = 1; k < W; k++) top = (best[k] > top || best[k] != best[k]) ? best[k] : top;
      F total = {};
      for (long i = 0; i < seen; i += W) {
        F e = exponential(load(wide + i) - top);
        store(wide + i, e);
        total += e;
      }
      float share_of = 1.0f / sum(total);
      each(seen, [&](long i, long count) { put(own + i, load(wide + i) * share_of, count); });
    }
  });
}

// out[token] = the sum over j of weights[token][j] * y[places[token][j]], each product rounded.
template <class T>
void weigh(const T* y, const int64_t* places, const float* weights, T* out, long tokens, long k, long size) {
  share(tokens, tokens * k * size, [&](long start, long stop) {
    for (long token = start; token < stop; token++)
      each(size, [&](long i, long count) {
        F total = {};
        for (long j = token * k; j < token * k + k; j++)
          total += kept(get(y + places[j] * size + i, count) * weights[j], T{});
        put(out + token * size + i, total, count);
      });
  });
}

}  // namespace


extern "C" {

#define DEFINE(T, suffix)                                                                                           \
  void rms_norm_##suffix(const T* x, const T* weight, T* out, long rows, long size, float eps) {                    \
    rms_norm(x, weight, out, rows, size, eps);                                                                      \
  }                                                                                                                 \
  void geglu_##suffix(const T* gate, const T* up, T* out, long rows, long size, long gate_stride, long up_stride) { \
    geglu(gate, up, out, rows, size, gate_stride, up_stride);                                                       \
  }                                                                                                                 \
  void rotate_##suffix(const T* x, const T* cosine, const T* sine, T* out, long batch, long heads, long length,     \
                       long half, long sb, long sh, long sl, long cb, long cl) {                                    \
    rotate(x, cosine, sine, out, batch, heads, length, half, sb, sh, sl, cb, cl);                                   \
  }                                                                                                                 \
  void softmax_##suffix(T* scores, const uint8_t* mask, long batch, long heads, long queries, long seen,            \
                        long masks, long mb, long mq) {                                                             \
    softmax(scores, mask, batch, heads, queries, seen, masks, mb, mq);                                              \
  }                                                                                                                 \
  void weigh_##suffix(const T* y, const int64_t* places, const float* weights, T* out, long tokens, long k,         \
                      long size) {                                                                                  \
    weigh(y, places, weights, out, tokens, k, size);                                                                \
  }

DEFINE(float, float32)
DEFINE(bf16, bfloat16)

}  // extern "C"
