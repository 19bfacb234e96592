// The statistics of the head's products for a step, row by row: cap, temperature, maximum, sums, entropy, argmax, sample,
// probabilities ("belief").
//
//     products --cap, / temperature--> scaled s      m = max s, w = exp(s - m)
//     entropy  log(sum w) - sum(w (s - m)) / sum w   from moments about the maximum, which both sums leave out
//     sample   sums of w over tiles, in float64: the tile is found first, then the token in it
//     belief   exp(s' - m') / sum, s' rounded to the products' type, written where the products were
//
// `largest` finds the maximum of the products (cap and temperature keep their order). `measure` computes every logit
// once, sums up, and keeps the weights of the probabilities: of float32 products in their place, if probabilities are
// requested, of bfloat16 products in a separate buffer. `gather` and `believe` normalise the weights. A product of -inf,
// even under a cap, is a banned token. A row whose maximum is not finite gives NaN.
//
// bfloat16 has 65,536 values: of a large vocabulary, scaled logits and weights come from tables that the caller computed (three
// per temperature), with no tanh, quotient or exp left. The caller's torch version is ops/vocabulary/passes.py.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "pool.h"
#include "simd.h"

namespace {

constexpr int64_t GRAIN = 1 << 15; // fewest values per slice

#if defined(__AVX512F__) && !defined(__znver3__) && !defined(__znver4__) && !defined(__znver5__)
#define GATHERS // AMD's gathers take longer than as many loads; g++ before 13 takes Zen 4 for Zen 3
#endif
constexpr int64_t SPAN = 256; // values summed in float32 before they are added to a float64 sum
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

inline F held(F d) { return d > LOWEST ? d : all(LOWEST); } // -inf and NaN become LOWEST

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
        double sum = 0;
        for (int k = 0; k < W / 2; ++k) sum += low[k] + high[k];
        return sum;
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
    float found(const bf16 *most) {
        top = scaled(most)[0];
        about = kept(all(top), bf16{})[0];
        return top;
    }
    F below(F s) const { return s - top; }
    F weight(const bf16 *, F d) const { return exponential_above(held(d)); }
    F belief(const bf16 *, F s) const { return exponential_above(held(kept(s, bf16{}) - about)); }
};

struct Tabled { // weights are exp(s) itself: the caller ensures |s| <= 84
    typedef bf16 Type;
    const float *logits, *weights, *beliefs;
    float top = 0;
    explicit Tabled(const float *tables) : logits(tables), weights(tables + 65536), beliefs(tables + 2 * 65536) {}
    static F entries(const float *table, const bf16 *from) {
#ifdef GATHERS
        __mmask16 every = 0xffff;
        __asm__("" : "+Yk"(every)); // else the compiler drops the zeros, and each gather waits for the register's last use
        return (F)_mm512_mask_i32gather_ps(_mm512_setzero_ps(), every, (__m512i)codes(from), table, 4);
#else
        constexpr int some = W < 8 ? W : 8; // g++ turns 16 at once into 16 insertions into a whole register
        typedef float Part __attribute__((vector_size(4 * some)));
        Part parts[W / some];
        for (int i = 0; i < W; ++i) parts[i / some][i % some] = table[from[i].bits];
        F x;
        std::memcpy(&x, parts, sizeof x);
        return x;
#endif
    }
    F scaled(const bf16 *from) const { return entries(logits, from); }
    float found(const bf16 *most) { return top = logits[most->bits]; }
    F below(F s) const { return s - top; }
    F weight(const bf16 *from, F) const { return entries(weights, from); }
    F belief(const bf16 *from, F) const { return entries(beliefs, from); }
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

// The largest product; NaN if any product is NaN.
template <class T> float largest(const T *row, int64_t vocab) {
    constexpr int ways = 4; // independent chains
    F best[ways];
    I odd[ways] = {};
    std::fill(best, best + ways, all(-INF));
    auto look = [&](F x, int way) {
        best[way] = x > best[way] ? x : best[way];
        odd[way] |= x != x;
    };
    int64_t i = 0;
    for (; i + ways * W <= vocab; i += ways * W)
        for (int way = 0; way < ways; ++way) look(load(row + i + way * W), way);
    walk(row, i, vocab, [&](const T *from, int64_t, int64_t) { look(load(from), 0); });
    float top = -INF;
    for (int way = 0; way < ways; ++way)
        for (int k = 0; k < W; ++k) {
            if (odd[way][k]) return NAN;
            top = std::max(top, best[way][k]);
        }
    return top;
}

struct Moments { // of a row; sums are in units of the reader's weights
    int64_t argmax = -1; // the first index of the maximum m
    int64_t ties = 0;    // how many indices have it
    double rest = 0;     // the weights of all others
    double moment = 0;   // sum of w (s - m)
    double belief = 0;   // sum of the weights of the rounded logits
};

struct Room { // a thread's buffers
    std::vector<double> tiles;       // sums of weights
    std::unique_ptr<float[]> weight; // of the last tile read
    std::unique_ptr<float[]> belief; // weights of a row's rounded logits
};

// All weights, ties included, are left in `weights`: over the row's products (`over`), else one tile at a time.
template <class Read, bool BELIEF>
Moments measure(const Read &read, const typename Read::Type *row, int64_t vocab, int64_t tile, double unit, Room &room,
                float *weights, bool over) {
    typedef const typename Read::Type *From;
    Moments m;
    for (int64_t first = 0; first < vocab; first += tile) {
        const int64_t end = std::min(first + tile, vocab), before = m.ties;
        float *into = over ? weights : weights - first;
        Sums rests, moments, beliefs;
        for (int64_t start = first; start < end; start += SPAN) {
            F rest = {}, moment = {}, belief = {};
            auto each = [&](From from, int64_t place, int64_t count) __attribute__((always_inline)) {
                const F s = read.scaled(from);
                const F d = read.below(s);
                F w = read.weight(from, d);
                if (BELIEF) {
                    const F rough = read.belief(from, s);
                    belief += rough;
                    store(room.belief.get() + place, rough);
                }
                const I tie = d >= 0.0f;
                put(into + place, w, count);
                if (const uint32_t tied = lanes(tie)) {
                    if (!m.ties) m.argmax = place + __builtin_ctz(tied);
                    m.ties += __builtin_popcount(tied);
                    w = (F)((I)w & ~tie);
                }
                rest += w;
                moment += w * held(d);
            };
            walk(row, start, std::min(start + SPAN, end), each);
            rests += rest, moments += moment;
            if (BELIEF) beliefs += belief;
        }
        const double rest = rests.all();
        m.rest += rest, m.moment += moments.all(), m.belief += beliefs.all();
        room.tiles[first / tile] = (double)(m.ties - before) * unit + rest;
    }
    return m;
}

// The first index whose running sum of `weights` exceeds the target; if none does, the last index with weight.
template <class Number> int64_t first_above(const Number *weights, int64_t count, double target, double *before) {
    double through = 0;
    int64_t last = 0;
    *before = 0;
    for (int64_t i = 0; i < count; ++i) {
        const double next = through + weights[i];
        if (next > through) last = i, *before = through;
        if (next > target) return i;
        through = next;
    }
    return last;
}

// The same within a tile: in steps of many values first.
inline int64_t first_above(const float *weights, int64_t count, double target) {
    constexpr int64_t step = 8 * W;
    std::vector<double> sums;
    for (int64_t i = 0; i < count; i += step) {
        Sums sum;
        walk(weights, i, std::min(i + step, count), [&](const float *from, int64_t, int64_t some) {
            const F w = load(from);
            sum += some < W ? (w > 0.0f ? w : F{}) : w; // a tail's padding is -inf
        });
        sums.push_back(sum.all());
    }
    double before, ignored;
    const int64_t start = first_above(sums.data(), (int64_t)sums.size(), target, &before) * step;
    return start + first_above(weights + start, std::min(step, count - start), target - before, &ignored);
}

template <class Read>
int64_t draw(const Read &read, const typename Read::Type *row, int64_t vocab, int64_t tile, double uniform,
             const Room &room, float *weights, bool over) {
    double total = 0, before;
    for (double x : room.tiles) total += x;
    const int64_t at = first_above(room.tiles.data(), (int64_t)room.tiles.size(), uniform * total, &before);
    const int64_t start = at * tile, stop = std::min(start + tile, vocab);
    if (over)
        weights += start;
    else if (stop < vocab) // else they are still there
        walk(row, start, stop, [&](const typename Read::Type *from, int64_t place, int64_t) {
            store(weights + place - start, read.weight(from, read.below(read.scaled(from))));
        });
    return start + first_above(weights, stop - start, uniform * total - before);
}

struct Share { // x -> x / total, in two factors: both stay normal floats where the total is nearly subnormal or infinite
    double total;
    float first, second;
    explicit Share(double total) : total(total) {
        const int about = std::max(-100, std::min(100, std::ilogb(total)));
        first = std::ldexp(1.0f, -about);
        second = (float)(std::ldexp(1.0, about) / total);
    }
    template <class Some> Some operator()(Some x) const { return x * first * second; }
};

// `row` becomes the normalised `weights`; they may share memory.
template <class T> void believe(const float *weights, T *row, int64_t vocab, Share share) {
    walk(weights, 0, vocab, [&](const float *from, int64_t place, int64_t count) __attribute__((always_inline)) {
        put(row + place, share(load(from)), count);
    });
}

struct Block { // mirrors ops/vocabulary/native.py: Block
    void *products;
    int64_t vocab, tile, most; // most: most tokens with sparse probabilities
    const float *temperature;
    const double *uniform; // null: no sample
    const float *tables;   // [which][logits, weights, beliefs][65536]; null: computed
    const int64_t *table;  // per row, which one; -1: none
    int64_t *argmax, *sample;
    float *entropy, *total; // total: log of the sum of exp(scaled)
    int64_t *counts, *ids;  // of the sparse probabilities; count -1: all of the row's probabilities are written
    float *shares;
    float cap;      // 0: none
    int32_t belief; // 0: none, 1: whole, 2: sparse
};

constexpr double DROPPED = 1.0 / 512 - 1e-6; // most probability that the sparse form leaves out

// The tokens that hold a row's probability except DROPPED; -1 where they are more than `most`.
template <class T>
int64_t gather(const float *weights, const T *, const Block &b, Share share, int64_t *ids, float *shares) {
    for (double least = 1.0 / 4096;; least /= 16) {
        const float floor = (float)(least * share.total * (1 - 1e-6));
        int64_t count = 0;
        double covered = 0;
        for (int64_t start = 0; start < b.vocab; start += W) {
            const int64_t left = b.vocab - start;
            const F w = left < W ? load(Tail<float>(weights + start, left).values) : load(weights + start);
            for (uint32_t some = lanes(w >= floor); some; some &= some - 1) {
                const int64_t i = start + __builtin_ctz(some);
                const float p = share(weights[i]);
                if (p < least) continue;
                if (count == b.most) return -1;
                ids[count] = i;
                shares[count++] = sizeof(T) == 2 ? kept(all(p), bf16{})[0] : p;
                covered += p;
            }
        }
        const double open = 1.0 - DROPPED - covered;
        if (open <= 0) return count;
        if (count + open / least > (double)b.most) return -1; // every remaining token has less than `least`
    }
}

// The result for a row whose maximum is not finite.
template <class T> void give_up(const Block &b, T *row, int64_t r, float most) {
    b.argmax[r] = 0;
    for (int64_t i = 0; i < b.vocab; ++i) {
        const float x = widen(row[i]);
        if (most != most ? x == x : x != most) continue;
        b.argmax[r] = i;
        break;
    }
    b.entropy[r] = b.total[r] = NAN;
    if (b.uniform) b.sample[r] = 0;
    if (b.belief) std::fill(row, row + b.vocab, typed(NAN, row));
    if (b.belief == 2) b.counts[r] = -1;
}

template <class Read> void see_row(Read read, const Block &b, int64_t r, Room &room) {
    typedef typename Read::Type T;
    T *row = (T *)b.products + r * b.vocab;
    const float most = largest(row, b.vocab);
    const Same<T> same(typed(most, row));
    const float top = read.found(same.values);
    if (!std::isfinite(most) || !std::isfinite(top)) return give_up(b, row, r, most);
    const double unit = read.weight(same.values, F{})[0];
    constexpr bool narrow = sizeof(T) == 2;
    const bool over = b.belief && !narrow; // float32 weights overwrite the products: they are those of the probabilities
    float *weights = over ? (float *)row : room.weight.get();
    const Moments m = narrow && b.belief ? measure<Read, narrow>(read, row, b.vocab, b.tile, unit, room, weights, over)
                                         : measure<Read, false>(read, row, b.vocab, b.tile, unit, room, weights, over);
    const double ties = (double)m.ties, rest = m.rest / unit, sum = ties + rest;
    b.argmax[r] = m.argmax;
    b.entropy[r] = (float)(std::log(ties) + std::log1p(rest / ties) - m.moment / unit / sum);
    b.total[r] = (float)(top + std::log(sum));
    if (b.uniform) b.sample[r] = draw(read, row, b.vocab, b.tile, b.uniform[r], room, weights, over);
    if (!b.belief) return;
    const Share share(narrow ? m.belief : sum * unit);
    const float *shared = narrow ? room.belief.get() : weights;
    if (b.belief == 2) {
        const int64_t at = r * b.most;
        b.counts[r] = gather(shared, row, b, share, b.ids + at, b.shares + at);
        if (b.counts[r] >= 0) return;
    }
    believe(shared, row, b.vocab, share);
}

template <class T> void see_computed(const Block &b, int64_t r, Room &room) {
    if (b.cap > 0)
        see_row(Computed<T, true>(b.cap, b.temperature[r]), b, r, room);
    else
        see_row(Computed<T, false>(0, b.temperature[r]), b, r, room);
}

template <class T> void add_rows(const T *weight, int64_t hidden, const Block &b, float *out, int64_t r) {
    float *sum = out + r * hidden;
    std::fill(sum, sum + hidden, 0.0f);
    for (int64_t k = 0; k < b.counts[r]; ++k) {
        const T *row = weight + b.ids[r * b.most + k] * hidden;
        const float share = b.shares[r * b.most + k];
        for (int64_t i = 0; i < hidden; ++i) sum[i] += share * widen(row[i]);
    }
}

} // namespace

// Rows [start, stop) of a block; `narrow`: the products are bfloat16, else float32.
static void see_rows(const Block &b, bool narrow, int64_t start, int64_t stop) {
    Room room;
    room.tiles.resize((b.vocab + b.tile - 1) / b.tile);
    room.weight.reset(new float[b.tile + W]);
    if (narrow && b.belief) room.belief.reset(new float[b.vocab + W]);
    for (int64_t r = start; r < stop; ++r) {
        if (!narrow)
            see_computed<float>(b, r, room);
        else if (b.tables && b.table[r] >= 0)
            see_row(Tabled(b.tables + b.table[r] * 3 * 65536), b, r, room);
        else
            see_computed<bf16>(b, r, room);
    }
}

// The sums of embedding rows weighted by sparse probabilities, [rows, hidden] in float32; 0 for a row of count -1.
extern "C" void see(const Block *block, int32_t narrow, int64_t rows, int32_t threads) {
    share(rows, rows * block->vocab / GRAIN, threads, [&](long start, long stop) { see_rows(*block, narrow, start, stop); });
}

// values: the number of embeddings over all rows.
extern "C" void combine(const Block *block, const void *weight, int32_t narrow, int64_t hidden, float *out,
                        int64_t rows, int64_t values, int32_t threads) {
    share(rows, values * hidden / GRAIN, threads, [&](long start, long stop) {
        for (int64_t r = start; r < stop; ++r) {
            if (narrow)
                add_rows((const bf16 *)weight, hidden, *block, out, r);
            else
                add_rows((const float *)weight, hidden, *block, out, r);
        }
    });
}
