// Row-wise operations of a forward: RMSNorm, GeGLU, rotary embedding, masked softmax. One pass each, float32 inside.
//
// In torch each is five to eight passes over memory. Values are rounded to bfloat16 where the plain versions round.
// Called by ops/rows.py, which documents the arguments.

#include <vector>

#include "pool.h"
#include "simd.h"

namespace {

constexpr long GRAIN = 1 << 14;  // fewest values per slice

template <class T>
void rms_norm(const T* x, const T* weight, T* out, long rows, long size, float eps, int threads) {
  share(rows, rows * size / GRAIN, threads, [&](long start, long stop) {
    for (long row = start; row < stop; row++) normalise(x + row * size, weight, out + row * size, size, eps);
  });
}

template <class T>
void geglu(const T* gate, const T* up, T* out, long rows, long size, long gate_stride, long up_stride, int threads) {
  share(rows, rows * size * 2 / GRAIN, threads, [&](long start, long stop) {
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
            long sb, long sh, long sl, long cb, long cl, int threads) {
  long rows = batch * heads * length;
  share(rows, rows * half * 2 / GRAIN, threads, [&](long start, long stop) {
    for (long row = start; row < stop; row++) {
      long place = row % length, head = row / length % heads, b = row / length / heads;
      long angle = b * cb + place * cl;
      turn(x + b * sb + head * sh + place * sl, cosine + angle, sine + angle, out + row * 2 * half, half);
    }
  });
}

// scores [batch, heads, queries, keys], in place; mask [masks, queries, keys] by strides, one byte per entry, or null:
// batch entry b uses mask b % masks.
template <class T>
void softmax(T* scores, const uint8_t* mask, long batch, long heads, long queries, long seen, long masks, long mb,
             long mq, int threads) {
  long rows = batch * heads * queries;
  share(rows, rows * seen * 2 / GRAIN, threads, [&](long start, long stop) {
    std::vector<float> wide(seen + 2 * W);
    for (long row = start; row < stop; row++)
      soften<T>(scores + row * seen, mask ? mask + row / queries / heads % masks * mb + row % queries * mq : nullptr,
             seen, wide.data());
  });
}

// The gradient of `softmax`'s scores from its result and the result's gradient, all dense; 0 where the mask is 0.
template <class T>
void softmax_gradient(const T* shares, const T* gradient, const uint8_t* mask, T* out, long batch, long heads,
                      long queries, long seen, long masks, long mb, long mq, int threads) {
  long rows = batch * heads * queries;
  share(rows, rows * seen * 2 / GRAIN, threads, [&](long start, long stop) {
    for (long row = start; row < stop; row++) {
      const T *p = shares + row * seen, *g = gradient + row * seen;
      const uint8_t* may = mask ? mask + row / queries / heads % masks * mb + row % queries * mq : nullptr;
      F total = {};
      each(seen, [&](long i, long count) { total += get(p + i, count) * get(g + i, count); });
      float mean = sum(total);
      each(seen, [&](long i, long count) {
        F v = get(p + i, count) * (get(g + i, count) - mean);
        put(out + row * seen + i, may ? (visible(may + i, count) ? v : F{}) : v, count);
      });
    }
  });
}

// out[token] = the sum over j of weights[token][j] * y[places[token][j]], each product rounded.
template <class T>
void weigh(const T* y, const int64_t* places, const float* weights, T* out, long tokens, long k, long size,
           int threads) {
  share(tokens, tokens * k * size / GRAIN, threads, [&](long start, long stop) {
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
  void rms_norm_##suffix(const T* x, const T* weight, T* out, long rows, long size, float eps, int threads) {       \
    rms_norm(x, weight, out, rows, size, eps, threads);                                                             \
  }                                                                                                                 \
  void geglu_##suffix(const T* gate, const T* up, T* out, long rows, long size, long gate_stride, long up_stride,   \
                      int threads) {                                                                                \
    geglu(gate, up, out, rows, size, gate_stride, up_stride, threads);                                              \
  }                                                                                                                 \
  void rotate_##suffix(const T* x, const T* cosine, const T* sine, T* out, long batch, long heads, long length,     \
                       long half, long sb, long sh, long sl, long cb, long cl, int threads) {                       \
    rotate(x, cosine, sine, out, batch, heads, length, half, sb, sh, sl, cb, cl, threads);                          \
  }                                                                                                                 \
  void softmax_##suffix(T* scores, const uint8_t* mask, long batch, long heads, long queries, long seen,            \
                        long masks, long mb, long mq, int threads) {                                                \
    softmax(scores, mask, batch, heads, queries, seen, masks, mb, mq, threads);                                     \
  }                                                                                                                 \
  void softmax_gradient_##suffix(const T* shares, const T* gradient, const uint8_t* mask, T* out, long batch,       \
                                 long heads, long queries, long seen, long masks, long mb, long mq, int threads) {  \
    softmax_gradient(shares, gradient, mask, out, batch, heads, queries, seen, masks, mb, mq, threads);             \
  }                                                                                                                 \
  void weigh_##suffix(const T* y, const int64_t* places, const float* weights, T* out, long tokens, long k,         \
                      long size, int threads) {                                                                     \
    weigh(y, places, weights, out, tokens, k, size, threads);                                                       \
  }

DEFINE(float, float32)
DEFINE(bf16, bfloat16)

}  // extern "C"
