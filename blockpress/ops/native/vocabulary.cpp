// One pass per row over the products of the head: cap, temperature, maximum, sums, entropy, argmax, sample, belief.
//
//     products --cap, / temperature--> scaled s      m = max s, w = exp(s - m)
//     entropy  log(sum w) - sum(w (s - m)) / sum w   from moments about the maximum, which is left out of both sums
//     sample   sums of w over tiles, in float64: the tile is found first, then the token in it
//     belief   exp(s' - m') / sum, s' rounded to the products' type, written where the products were
//
// The maximum is sought among the products (cap and temperature keep their order), so a row is read from a cache three
// times and from memory once. A product of -inf, even under a cap, is a denied token. A row whose maximum is no finite
// number is answered with NaN.
//
// bfloat16 has 65,536 values: with many rows to read, scaled logits and weights come from tables that the caller has
// made (three a temperature), and no tanh, quotient or exp is left. Whoever calls has a version in torch:
// ops/vocabulary.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__) // values in a vector
constexpr int WIDE = 16;
#elif defined(__AVX__)
constexpr int WIDE = 8;
#else
constexpr int WIDE = 4;
#endif
constexpr int64_t SPAN = 256; // values that are summed in float32 before a sum goes on in float64
typedef float Floats __attribute__((vector_size(4 * WIDE)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDE)));
typedef double Doubles __attribute__((vector_size(8 * WIDE)));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDE)));
constexpr float INF = std::numeric_limits<float>::infinity();
constexpr float LEAST = -86.5f; // below it exp leaves the normal floats: weight 0

inline Floats all(float x) { return x - Floats{}; }
inline Floats pick(Ints mask, Floats yes, Floats no) { return (Floats)(((Ints)yes & mask) | ((Ints)no & ~mask)); }

// exp(x) for -87 < x < 88, to 1 ulp: 2^n exp(r), |r| <= log(2) / 2 (Cephes expf).
inline Floats exponential(Floats x) {
    const float magic = 12582912.0f; // 1.5 * 2^23: adding it rounds to a whole number
    Floats n = (x * 1.44269504088896341f + magic) - magic;
    Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Floats p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return (Floats)((Ints)p + (__builtin_convertvector(n, Ints) << 23));
}

// exp(d) for d <= 0, -inf included: 0 below LEAST.
inline Floats exponential_or_0(Floats d) {
    Ints some = d > LEAST;
    return (Floats)((Ints)exponential(pick(some, d, all(LEAST))) & some);
}

// tanh to 2 ulp (Cephes tanhf).
inline Floats tangent(Floats z) {
    Floats size = (Floats)((Ints)z & 0x7fffffff);
    Floats held = pick(size < 9.2f, size, all(9.2f)); // where it is 1
    Floats large = 1.0f - 2.0f / (exponential(held + held) + 1.0f);
    Floats s = z * z, p = all(-5.70498872745e-3f);
    p = p * s + 2.06390887954e-2f;
    p = p * s - 5.37397155531e-2f;
    p = p * s + 1.33314422036e-1f;
    p = p * s - 3.33332819422e-1f;
    Floats small = p * s * z + z;
    Floats signed_large = (Floats)((Ints)large | ((Ints)z & (int32_t)0x80000000));
    return pick(size < 0.625f, small, signed_large);
}

// x / by, rounded as a division is, from the reciprocal (Markstein); x finite.
inline Floats quotient(Floats x, float by, float reciprocal) {
    Floats q = x * reciprocal;
    Floats rest = x - q * by; // one rounding: contracted to a fused multiply-add
    return q + rest * reciprocal;
}

inline Floats load(const float *from) {
    Floats x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

inline Ints codes(const uint16_t *from) {
    Halves h;
    std::memcpy(&h, from, sizeof h);
#ifdef __AVX512F__
    return (Ints)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)h); // in one instruction, not four
#else
    return __builtin_convertvector(h, Ints);
#endif
}

inline Floats load(const uint16_t *from) { return (Floats)(codes(from) << 16); }

inline Ints nearest(Floats x) { // bfloat16, ties to even, in the high half
    Ints bits = (Ints)x;
    return (bits + 0x7fff + ((bits >> 16) & 1)) & (int32_t)0xffff0000;
}

inline Floats rounded(Floats x, const float *) { return x; }
inline Floats rounded(Floats x, const uint16_t *) { return pick(x < -FLT_MAX, x, (Floats)nearest(x)); }

inline void store(float *to, Floats x) { std::memcpy(to, &x, sizeof x); }
inline void store(uint16_t *to, Floats x) {
    Halves h = __builtin_convertvector((nearest(x) >> 16) & 0xffff, Halves);
    std::memcpy(to, &h, sizeof h);
}

inline float raw(float x) { return x; }
inline float raw(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline float typed(float x, const float *) { return x; }
inline uint16_t typed(float x, const uint16_t *) { // of a value that bfloat16 holds
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return (uint16_t)(bits >> 16);
}

inline bool any(Ints mask) {
#ifdef __AVX512F__
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
#else
    int32_t found = 0;
    for (int i = 0; i < WIDE; ++i) found |= mask[i];
    return found;
#endif
}

// Two ways to read products: each gives scaled logits, weights exp(s - something) and weights of rounded logits.

template <class T> struct Computed { // weights are relative to the row's maximum
    typedef T Type;
    float cap, temperature, by_cap, by_temperature, top = 0, about = 0;
    Computed(float cap, float temperature)
        : cap(cap), temperature(temperature), by_cap(cap > 0 ? 1.0f / cap : 0), by_temperature(1.0f / temperature) {}
    Floats scaled(const T *from) const {
        Floats x = load(from), s = x;
        if (cap > 0) {
            s = pick(x > FLT_MAX, all(FLT_MAX), x);
            s = tangent(quotient(s, cap, by_cap)) * cap;
        }
        return pick(x < -FLT_MAX, all(-INF), quotient(s, temperature, by_temperature));
    }
    void found(float maximum) {
        top = maximum;
        about = rounded(all(top), (const T *)nullptr)[0];
    }
    Floats weight(const T *, Floats s) const { return exponential_or_0(s - top); }
    Floats belief(const T *from, Floats s) const { return exponential_or_0(rounded(s, from) - about); }
};

struct Tabled { // weights are exp(s) itself: the caller sees to it that |s| <= 84
    typedef uint16_t Type;
    const float *logits, *weights, *beliefs;
    explicit Tabled(const float *tables) : logits(tables), weights(tables + 65536), beliefs(tables + 2 * 65536) {}
    static Floats entries(const float *table, const uint16_t *from) {
#ifdef __AVX512F__
        __mmask16 every = 0xffff;
        __asm__("" : "+Yk"(every)); // else the zeros are dropped, and each gather waits for the register's last use
        return (Floats)_mm512_mask_i32gather_ps(_mm512_setzero_ps(), every, (__m512i)codes(from), table, 4);
#else
        Floats x;
        for (int i = 0; i < WIDE; ++i) x[i] = table[from[i]];
        return x;
#endif
    }
    Floats scaled(const uint16_t *from) const { return entries(logits, from); }
    void found(float) {}
    Floats weight(const uint16_t *from, Floats) const { return entries(weights, from); }
    Floats belief(const uint16_t *from, Floats) const { return entries(beliefs, from); }
};

// The last values of a row, filled up with denied tokens.
template <class T> struct Tail {
    T values[WIDE];
    Tail(const T *from, int64_t count) {
        const uint32_t denied = sizeof(T) == 2 ? 0xff80u : 0xff800000u;
        for (int i = 0; i < WIDE; ++i) std::memcpy(values + i, &denied, sizeof(T));
        std::memcpy(values, from, count * sizeof(T));
    }
};

// `each(from, place)` for all of [from, to), WIDE at a time.
template <class T, class Each> inline void walk(const T *row, int64_t from, int64_t to, Each each) {
    int64_t i = from;
    for (; i + WIDE <= to; i += WIDE) each(row + i, i);
    if (i < to) each(Tail<T>(row + i, to - i).values, i);
}

// WIDE times the same product.
template <class T> struct Same {
    T values[WIDE];
    explicit Same(T value) { std::fill(values, values + WIDE, value); }
};

struct Moments { // of a row; sums in the unit of the reader's weights
    int64_t argmax = -1;  // the first place of the maximum m
    double ties = 0;      // how many places have it
    double rest = 0;      // the weights of all others
    double moment = 0;    // sum of w (s - m)
    double belief = 0;    // sum of the weights of the rounded logits
};

// The largest product; NaN if there is any.
template <class T> float largest(const T *row, int64_t vocab) {
    Floats best = all(-INF);
    Ints odd = {};
    auto look = [&](Floats x) {
        best = pick(x > best, x, best);
        odd |= x != x;
    };
    walk(row, 0, vocab, [&](const T *from, int64_t) { look(load(from)); });
    float top = -INF;
    for (int k = 0; k < WIDE; ++k) {
        if (odd[k]) return NAN;
        if (best[k] > top) top = best[k];
    }
    return top;
}

// The first place in [from, to) whose scaled logit is `top`.
template <class Read>
int64_t first_at(const Read &read, const typename Read::Type *row, int64_t from, int64_t to, float top) {
    int64_t found = -1;
    walk(row, from, to, [&](const typename Read::Type *at, int64_t place) {
        Floats s = read.scaled(at);
        if (found >= 0 || !any(s >= top)) return;
        for (int k = WIDE - 1; k >= 0; --k)
            if (s[k] >= top) found = place + k;
    });
    return found;
}

template <class Read, bool BELIEF>
Moments measure(const Read &read, const typename Read::Type *row, int64_t vocab, int64_t tile, float top, double unit,
                double *tiles) {
    typedef const typename Read::Type *From;
    Moments m;
    for (int64_t first = 0; first < vocab; first += tile) {
        const int64_t end = std::min(first + tile, vocab);
        Doubles rests = {}, moments = {}, beliefs = {};
        Ints ties = {};
        for (int64_t start = first; start < end; start += SPAN) {
            Floats rest = {}, moment = {}, belief = {};
            walk(row, start, std::min(start + SPAN, end), [&](From from, int64_t) {
                Floats s = read.scaled(from), d = s - top;
                Ints tie = d >= 0.0f;
                Floats w = (Floats)((Ints)read.weight(from, s) & ~tie);
                ties -= tie;
                rest += w;
                moment += w * pick(d > -1e30f, d, all(-1e30f)); // 0 times -inf is no 0
                if (BELIEF) belief += read.belief(from, s);
            });
            rests += __builtin_convertvector(rest, Doubles);
            moments += __builtin_convertvector(moment, Doubles);
            if (BELIEF) beliefs += __builtin_convertvector(belief, Doubles);
        }
        double count = 0, rest = 0;
        for (int k = 0; k < WIDE; ++k) {
            count += ties[k], rest += rests[k];
            m.moment += moments[k], m.belief += beliefs[k];
        }
        if (count > 0 && m.argmax < 0) m.argmax = first_at(read, row, first, end, top);
        m.ties += count, m.rest += rest;
        tiles[first / tile] = count * unit + rest;
    }
    return m;
}

// The first place whose running sum of `weights` exceeds the target; where none does, the last that adds to it.
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

template <class Read>
int64_t draw(const Read &read, const typename Read::Type *row, int64_t vocab, int64_t tile, double uniform,
             const std::vector<double> &tiles) {
    double total = 0, before, ignored;
    for (double x : tiles) total += x;
    const int64_t start = first_above(tiles.data(), (int64_t)tiles.size(), uniform * total, &before) * tile;
    const int64_t stop = std::min(start + tile, vocab);
    std::vector<float> weights(tile + WIDE, 0.0f);
    walk(row, start, stop, [&](const typename Read::Type *from, int64_t place) {
        store(&weights[place - start], read.weight(from, read.scaled(from)));
    });
    return start + first_above(weights.data(), stop - start, uniform * total - before, &ignored);
}

struct Share { // x -> x / total, in two factors: neither leaves the normal floats where the total nearly does
    float first, second;
    explicit Share(double total) {
        const int about = std::max(-100, std::min(100, std::ilogb(total)));
        first = std::ldexp(1.0f, -about);
        second = (float)(std::ldexp(1.0, about) / total);
    }
    Floats operator()(Floats x) const { return x * first * second; }
};

template <class Read> void believe(const Read &read, typename Read::Type *row, int64_t vocab, Share share) {
    walk(row, 0, vocab, [&](const typename Read::Type *from, int64_t place) {
        Floats p = share(read.belief(from, read.scaled(from)));
        if (place + WIDE <= vocab) return store(row + place, p);
        typename Read::Type last[WIDE];
        store(last, p);
        std::memcpy(row + place, last, (vocab - place) * sizeof last[0]);
    });
}

struct Block { // mirrored by ops/vocabulary/native.py: Block
    void *products;
    int64_t vocab, tile, most; // most: tokens of a sparse belief
    const float *temperature;
    const double *uniform; // null: no sample
    const float *tables;   // [which][logits, weights, beliefs][65536]; null: computed
    const int64_t *table;  // for each row, which
    int64_t *argmax, *sample;
    float *entropy, *total; // total: log of the sum of exp(scaled)
    int64_t *counts, *ids;  // of the sparse beliefs; count -1: the row's belief is written whole
    float *shares;
    float cap;      // 0: none
    int32_t belief; // 0: none, 1: whole, 2: sparse
};

constexpr double DROPPED = 1.0 / 512 - 1e-6; // most probability that a sparse belief leaves out

// The tokens that hold a row's belief but for DROPPED; -1 where they are more than `most`.
template <class Read>
int64_t gather(const Read &read, const typename Read::Type *row, const Block &b, float temperature, float top,
               double sum, Share share, int64_t *ids, float *shares) {
    for (double least = 1.0 / 4096;; least /= 16) {
        // Products that cannot reach the share `least` are passed over unscaled: its logit, a little lower, uncapped.
        double bound = top + std::log(least * sum);
        bound -= std::abs(bound) / 100 + std::abs(top) / 100 + 1e-3; // rounded logits are off by 1 / 256 at most
        bound *= temperature;
        if (b.cap > 0) bound = bound <= -b.cap ? -INF : bound >= b.cap ? FLT_MAX : b.cap * std::atanh(bound / b.cap);
        const float floor = (float)(bound - std::abs(bound) * 1e-3);
        int64_t count = 0;
        double kept = 0;
        for (int64_t start = 0; start < b.vocab; start += WIDE) {
            const int64_t stop = std::min(start + WIDE, b.vocab);
            if (stop - start == WIDE && !any(load(row + start) >= floor)) continue;
            for (int64_t i = start; i < stop; ++i) {
                if (!(raw(row[i]) >= floor)) continue;
                const Same<typename Read::Type> same(row[i]);
                const Floats p = share(read.belief(same.values, read.scaled(same.values)));
                if (p[0] < least) continue;
                if (count == b.most) return -1;
                ids[count] = i;
                shares[count++] = rounded(p, row)[0];
                kept += p[0];
            }
        }
        const double open = 1.0 - DROPPED - kept;
        if (open <= 0) return count;
        if (count + open / least > (double)b.most) return -1; // what is left is in tokens of less than `least`
    }
}

// What is said of a row whose maximum is not finite.
template <class T> void give_up(const Block &b, T *row, int64_t r, float most) {
    b.argmax[r] = 0;
    for (int64_t i = 0; i < b.vocab; ++i) {
        const float x = raw(row[i]);
        if (most != most ? x == x : x != most) continue;
        b.argmax[r] = i;
        break;
    }
    b.entropy[r] = b.total[r] = NAN;
    if (b.uniform) b.sample[r] = 0;
    if (b.belief) std::fill(row, row + b.vocab, typed(NAN, row));
    if (b.belief == 2) b.counts[r] = -1;
}

template <class Read> void see_row(Read read, const Block &b, int64_t r, std::vector<double> &tiles) {
    auto *row = (typename Read::Type *)b.products + r * b.vocab;
    const float most = largest(row, b.vocab);
    const Same<typename Read::Type> same(typed(most, row));
    const Floats tops = read.scaled(same.values);
    const float top = tops[0];
    if (!std::isfinite(most) || !std::isfinite(top)) return give_up(b, row, r, most);
    read.found(top);
    const double unit = read.weight(same.values, tops)[0];
    const bool narrow = b.belief && sizeof *row == 2;
    const Moments m = narrow ? measure<Read, true>(read, row, b.vocab, b.tile, top, unit, tiles.data())
                             : measure<Read, false>(read, row, b.vocab, b.tile, top, unit, tiles.data());
    const double rest = m.rest / unit, sum = m.ties + rest;
    b.argmax[r] = m.argmax;
    b.entropy[r] = (float)(std::log(m.ties) + std::log1p(rest / m.ties) - m.moment / unit / sum);
    b.total[r] = (float)(top + std::log(sum));
    if (b.uniform) b.sample[r] = draw(read, row, b.vocab, b.tile, b.uniform[r], tiles);
    if (!b.belief) return;
    const Share share(narrow ? m.belief : sum * unit);
    if (b.belief == 2) {
        const int64_t at = r * b.most;
        b.counts[r] = gather(read, row, b, b.temperature[r], top, sum, share, b.ids + at, b.shares + at);
        if (b.counts[r] >= 0) return;
    }
    believe(read, row, b.vocab, share);
}

template <class T> void add_rows(const T *weight, int64_t hidden, const Block &b, float *out, int64_t r) {
    float *sum = out + r * hidden;
    std::fill(sum, sum + hidden, 0.0f);
    for (int64_t k = 0; k < b.counts[r]; ++k) {
        const T *row = weight + b.ids[r * b.most + k] * hidden;
        const float share = b.shares[r * b.most + k];
        for (int64_t i = 0; i < hidden; ++i) sum[i] += share * raw(row[i]);
    }
}

} // namespace

// Rows [start, stop) of a block; `narrow`: the products are bfloat16, else float32.
extern "C" void see(const Block *block, int32_t narrow, int64_t start, int64_t stop) {
    const Block &b = *block;
    std::vector<double> tiles((b.vocab + b.tile - 1) / b.tile);
    for (int64_t r = start; r < stop; ++r) {
        if (!narrow)
            see_row(Computed<float>(b.cap, b.temperature[r]), b, r, tiles);
        else if (b.tables)
            see_row(Tabled(b.tables + b.table[r] * 3 * 65536), b, r, tiles);
        else
            see_row(Computed<uint16_t>(b.cap, b.temperature[r]), b, r, tiles);
    }
}

// The sums of embedding rows that sparse beliefs share out, [rows, hidden] in float32; 0 for a row of count -1.
extern "C" void combine(const Block *block, const void *weight, int32_t narrow, int64_t hidden, float *out,
                        int64_t start, int64_t stop) {
    for (int64_t r = start; r < stop; ++r) {
        if (narrow)
            add_rows((const uint16_t *)weight, hidden, *block, out, r);
        else
            add_rows((const float *)weight, hidden, *block, out, r);
    }
}
