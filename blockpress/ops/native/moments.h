// The statistics of a row of products of the head: its largest, its weights and their sums, and where a running sum ends.
//
//     products --a reader's cap, / temperature--> scaled s      m = max s, w = exp(s - m)
//
// The maximum is found first, since cap and temperature keep the order of the products; then one walk computes every
// weight. Sums leave out the maxima's own weights: next to those, small ones would lose their digits. Used by
// `vocabulary.cpp`, on whole rows, and by `head.h`, on a tile of a row at a time.
#pragma once

#include <memory>
#include <vector>

#include "readers.h"

namespace {

constexpr int64_t SPAN = 256; // values summed in float32 before they are added to a float64 sum

inline float highest(F x) { // of numbers
    float parts[W];
    store(parts, x);
    for (int half = W / 2; half; half /= 2)
        for (int k = 0; k < half; ++k) parts[k] = parts[k + half] > parts[k] ? parts[k + half] : parts[k];
    return parts[0];
}

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
    for (int way = 1; way < ways; ++way) {
        best[0] = best[way] > best[0] ? best[way] : best[0];
        odd[0] |= odd[way];
    }
    return lanes(odd[0]) ? NAN : highest(best[0]);
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
    std::unique_ptr<float[]> ready;  // a row's scaled logits
};

// All weights, ties included, are left in `weights`: over the row's products (`over`), else one tile at a time.
template <class Read, bool BELIEF>
Moments measure(const Read &read, const typename Read::Type *row, int64_t vocab, int64_t tile, double unit, Room &room,
                float *weights, bool over) {
    typedef const typename Read::Type *From;
    Moments m;
    Sums moments, beliefs;
    double *sum = room.tiles.data();
    for (int64_t first = 0; first < vocab; first += tile) {
        const int64_t end = std::min(first + tile, vocab), before = m.ties;
        float *into = over ? weights : weights - first;
        Sums rests;
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
        m.rest += rest;
        *sum++ = (double)(m.ties - before) * unit + rest;
    }
    m.moment = moments.all(), m.belief = beliefs.all();
    return m;
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

} // namespace
