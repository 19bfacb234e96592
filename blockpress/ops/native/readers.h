// What reads a row of products of the head: cap and temperature, vectors at a time, from float32 or bfloat16.
//
// A reader gives scaled logits (`logit(scaled)`; some compare and sum in other units), their difference `below` from the
// row's maximum, and weights of both kinds: those of the statistics, and those of the probabilities, whose logits are
// rounded to the products' type. `vocabulary.cpp` uses them.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "simd.h"

namespace {

#if defined(__AVX512F__) && !defined(__znver3__) && !defined(__znver4__) && !defined(__znver5__)
#define GATHERS // AMD's gathers take longer than as many loads; g++ before 13 takes Zen 4 for Zen 3
#endif
constexpr float INF = std::numeric_limits<float>::infinity();

inline F all(float x) { return x - F{}; }
inline F pick(I mask, F yes, F no) { return (F)(((I)yes & mask) | ((I)no & ~mask)); }

// Bit k: whether lane k of a comparison is true.
inline uint32_t lanes(I mask) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
#elif defined(__AVX__)
    return (uint32_t)_mm256_movemask_ps((__m256)mask);
#else
    typedef int64_t Longs __attribute__((vector_size(4 * W)));
    int64_t any = 0;
    for (int k = 0; k < W / 2; ++k) any |= ((Longs)mask)[k];
    if (!any) return 0;
    uint32_t bits = 0;
    for (int k = 0; k < W; ++k) bits |= (uint32_t)(mask[k] & 1) << k;
    return bits;
#endif
}

inline F held(F d) { // -inf and NaN become LOWEST
#if defined(__AVX512F__)
    return (F)_mm512_max_ps((__m512)d, (__m512)all(LOWEST)); // the second where one is NaN; the compiler makes two of it
#elif defined(__AVX__)
    return (F)_mm256_max_ps((__m256)d, (__m256)all(LOWEST));
#else
    return d > LOWEST ? d : all(LOWEST);
#endif
}

// tanh to 2 ulp (Cephes tanhf); -inf stays -inf: a banned token. Few logits are large enough for the second form.
inline F tangent(F z) {
    F size = (F)((I)z & 0x7fffffff);
    F s = z * z, p = all(-5.70498872745e-3f);
    p = p * s + 2.06390887954e-2f;
    p = p * s - 5.37397155531e-2f;
    p = p * s + 1.33314422036e-1f;
    p = p * s - 3.33332819422e-1f;
    F small = p * (s * z) + z;
    I large = size >= 0.625f;
    if (!lanes(large)) return small;
    F enough = size < 9.2f ? size : all(9.2f); // where tanh is 1
    F one = 1.0f - 2.0f / (exponential_above(enough + enough) + 1.0f);
    one = (F)((I)one | ((I)z & (int32_t)0x80000000));
    return pick(large, pick(z < -FLT_MAX, z, one), small);
}

// x / by, rounded as a division rounds, x finite: from the reciprocal (Markstein), which needs a fused multiply-add.
inline F quotient(F x, float by, float reciprocal) {
#if defined(__FMA__) || defined(__aarch64__)
    F q = x * reciprocal;
    F rest = x - q * by; // rounded once: contracted to a fused multiply-add
    return q + rest * reciprocal;
#else
    (void)reciprocal;
    return x / by;
#endif
}

inline I codes(const bf16 *from) {
    H h;
    std::memcpy(&h, from, sizeof h);
#if defined(__AVX512F__)
    return (I)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)h); // in one instruction, not four
#elif defined(__AVX2__)
    return (I)_mm256_cvtepu16_epi32((__m128i)h);
#else
    return __builtin_convertvector(h, I);
#endif
}

struct Sums { // in float64, of float32 vectors
    typedef float Half __attribute__((vector_size(2 * W)));
    typedef double Doubles __attribute__((vector_size(4 * W)));
    Doubles low = {}, high = {};
    void operator+=(F x) {
        Half parts[2];
        std::memcpy(parts, &x, sizeof x);
        low += __builtin_convertvector(parts[0], Doubles);
        high += __builtin_convertvector(parts[1], Doubles);
    }
    double all() const {
        const Doubles both = low + high;
        double parts[W / 2];
        std::memcpy(parts, &both, sizeof parts);
        for (int half = W / 4; half; half /= 2)
            for (int k = 0; k < half; ++k) parts[k] += parts[k + half];
        return parts[0];
    }
};

inline float typed(float x, const float *) { return x; }
inline bf16 typed(float x, const bf16 *) { // of a value that is a bfloat16
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return {(uint16_t)(bits >> 16)};
}

// Readers of products: each gives scaled logits, their difference `below` from the maximum, and weights of both kinds.

template <class T, bool CAPPED> struct Computed; // weights are relative to the row's maximum

// With a cap the logits are tanh alone: their differences, scaled, are more exact than differences of capped logits.
template <bool CAPPED> struct Computed<float, CAPPED> {
    typedef float Type;
    float temperature, by_cap, by_temperature, factor, top = 0;
    Computed(float cap, float temperature)
        : temperature(temperature), by_cap(CAPPED ? 1.0f / cap : 0), by_temperature(1.0f / temperature),
          factor((float)((double)cap / temperature)) {}
    F scaled(const float *from) const {
        return CAPPED ? tangent(load(from) * by_cap) : quotient(load(from), temperature, by_temperature);
    }
    F logit(F s) const { return CAPPED ? s * factor : s; }
    float found(const float *most) {
        top = scaled(most)[0];
        return CAPPED ? top * factor : top;
    }
    F below(F s) const { return CAPPED ? (s - top) * factor : s - top; } // NaN for a banned token
    F weight(const float *, F d) const { return exponential_above(held(d)); }
    F belief(const float *, F) const { return F{}; } // the same as the weights
};

template <bool CAPPED> struct Computed<bf16, CAPPED> {
    typedef bf16 Type;
    float cap, temperature, by_cap, by_temperature, top = 0, about = 0;
    Computed(float cap, float temperature)
        : cap(cap), temperature(temperature), by_cap(CAPPED ? 1.0f / cap : 0), by_temperature(1.0f / temperature) {}
    F scaled(const bf16 *from) const {
        F x = load(from), s = x;
        if (CAPPED) s = tangent(quotient(s, cap, by_cap)) * cap;
        return x < -FLT_MAX ? all(-INF) : quotient(s, temperature, by_temperature);
    }
    F logit(F s) const { return s; }
    float found(const bf16 *most) {
        top = scaled(most)[0];
        about = kept(all(top), bf16{})[0];
        return top;
    }
    F below(F s) const { return s - top; }
    F weight(const bf16 *, F d) const { return exponential_above(held(d)); }
    F belief(const bf16 *, F s) const { return exponential_above(held(kept(s, bf16{}) - about)); }
};

struct Tabled { // weights are exp(s) itself: the caller ensures |s| <= 80
    typedef bf16 Type;
    const float *logits, *weights, *beliefs;
    const float *terms; // of sums: head.h
    float top = 0;
    explicit Tabled(const float *tables, const float *terms = nullptr)
        : logits(tables), weights(tables + 65536), beliefs(tables + 2 * 65536), terms(terms) {}
    static F entries(const float *table, const bf16 *from) {
#ifdef GATHERS
        __mmask16 every = 0xffff;
        __asm__("" : "+Yk"(every)); // else the compiler drops the zeros, and each gather waits for the register's last use
        return (F)_mm512_mask_i32gather_ps(_mm512_setzero_ps(), every, (__m512i)codes(from), table, 4);
#else
        return gathered([&](int i) { return table[from[i].bits]; });
#endif
    }
    F scaled(const bf16 *from) const { return entries(logits, from); }
    F logit(F s) const { return s; }
    float found(const bf16 *most) { return top = logits[most->bits]; }
    F below(F s) const { return s - top; }
    F weight(const bf16 *from, F) const { return entries(weights, from); }
    F belief(const bf16 *from, F) const { return entries(beliefs, from); }
};

// Logits that are scaled already, in float32; T is the products' type. Weights are relative to the row's maximum.
template <class T> struct Ready {
    typedef float Type;
    float top = 0, about = 0;
    F scaled(const float *from) const { return load(from); }
    float found(const float *most) {
        top = most[0];
        about = kept(all(top), T{})[0];
        return top;
    }
    F below(F s) const { return s - top; }
    F weight(const float *, F d) const { return exponential_above(held(d)); }
    F belief(const float *, F s) const { return exponential_above(held(kept(s, T{}) - about)); }
};

// The last values of a row, padded with banned tokens.
template <class T> struct Tail {
    T values[W];
    Tail(const T *from, int64_t count) {
        const uint32_t banned = sizeof(T) == 2 ? 0xff80u : 0xff800000u;
        for (int i = 0; i < W; ++i) std::memcpy(values + i, &banned, sizeof(T));
        std::memcpy(values, from, count * sizeof(T));
    }
};

// Calls `each(from, place, count)` for all of [from, to), W at a time; the last call may have a smaller count.
template <class T, class Each>
inline __attribute__((always_inline)) void walk(const T *row, int64_t from, int64_t to, Each each) {
    int64_t i = from;
    for (; i + W <= to; i += W) each(row + i, i, W);
    if (i < to) each(Tail<T>(row + i, to - i).values, i, to - i);
}

// W times the same product.
template <class T> struct Same {
    T values[W];
    explicit Same(T value) { std::fill(values, values + W, value); }
};

} // namespace
