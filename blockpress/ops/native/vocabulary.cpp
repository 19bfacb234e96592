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
#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "pool.h"
#include "moments.h"

namespace {

constexpr int64_t GRAIN = 1 << 15; // fewest values per slice

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
    double dropped; // most probability that the sparse form leaves out
    float cap;      // 0: none
    int32_t belief; // 0: none, 1: whole, 2: sparse
    int64_t classes;
    const int32_t *class_of; // of each token; `classes`: of none
    const int32_t *members;  // the tokens of all classes, class by class in ascending order
    const int64_t *starts;   // [classes + 1]: where each class begins among them
    const float *bias;       // [rows][classes + 1], added to scaled logits; null: none
    double *mass;            // [rows][classes] of each class, log of the sum of exp(scaled)
    float *best;             // the largest scaled logit
    int64_t *token;          // and the first token that has it
};

// The tokens that hold a row's probability except `dropped`; -1 where they are more than `most`.
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
        const double open = 1.0 - b.dropped - covered;
        if (open <= 0) return count;
        if (count + open / least > (double)b.most) return -1; // every remaining token has less than `least`
    }
}

// The result for a row whose maximum is not finite.
template <class Type, class T> void give_up(const Block &b, const Type *from, T *row, int64_t r, float most) {
    b.argmax[r] = 0;
    for (int64_t i = 0; i < b.vocab; ++i) {
        const float x = widen(from[i]);
        if (most != most ? x == x : x != most) continue;
        b.argmax[r] = i;
        break;
    }
    b.entropy[r] = b.total[r] = NAN;
    if (b.uniform) b.sample[r] = 0;
    if (b.belief) std::fill(row, row + b.vocab, typed(NAN, row));
    if (b.belief == 2) b.counts[r] = -1;
}

// `row`: the products, over which probabilities are written; `from`: what `read` reads, these or a row of their size.
template <class Read, class T>
void see_row(Read read, const typename Read::Type *from, T *row, const Block &b, int64_t r, Room &room) {
    typedef typename Read::Type Type;
    const float most = largest(from, b.vocab);
    const Same<Type> same(typed(most, from));
    const float top = read.found(same.values);
    if (!std::isfinite(most) || !std::isfinite(top)) return give_up(b, from, row, r, most);
    const double unit = read.weight(same.values, F{})[0];
    constexpr bool narrow = sizeof(T) == 2;
    const bool over = b.belief && !narrow; // float32 weights overwrite the products: they are those of the probabilities
    float *weights = over ? (float *)row : room.weight.get();
    const Moments m = narrow && b.belief ? measure<Read, narrow>(read, from, b.vocab, b.tile, unit, room, weights, over)
                                         : measure<Read, false>(read, from, b.vocab, b.tile, unit, room, weights, over);
    const double ties = (double)m.ties, rest = m.rest / unit, sum = ties + rest;
    b.argmax[r] = m.argmax;
    b.entropy[r] = (float)(std::log(ties) + std::log1p(rest / ties) - m.moment / unit / sum);
    b.total[r] = (float)(top + std::log(sum));
    if (b.uniform) b.sample[r] = draw(read, from, b.vocab, b.tile, b.uniform[r], room, weights, over);
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

// The classes of W tokens, or of fewer: the rest count as tokens of none.
inline I classes_of(const Block &b, int64_t place, int64_t count) {
    if (count == W) return *reinterpret_cast<const I *>(b.class_of + place);
    I which = I{} + (int32_t)b.classes;
    std::memcpy(&which, b.class_of + place, count * sizeof(int32_t));
    return which;
}

// A row's scaled logits, each plus the bias of its token's class if there is one; they may overwrite float32 products.
template <class Read>
void prepare(const Read &read, const typename Read::Type *row, const Block &b, const float *bias, float *to) {
    walk(row, 0, b.vocab, [&](const typename Read::Type *from, int64_t place, int64_t count) {
        F s = read.logit(read.scaled(from));
        if (bias) {
            const I which = classes_of(b, place, count);
            s += gathered([&](int k) { return bias[which[k]]; });
        }
        put(to + place, s, count);
    });
}

struct ClassSum { // of a class: its largest logit, that one's first token, and the sum of exp(logit - best)
    float best = -INF;
    int64_t token = 0;
    double sum = 0;
    void raise(float top, int64_t first) {
        if (top > best) sum *= std::exp((double)best - top), best = top, token = first;
    }
    // `values` of at most SPAN logits, padded to whole vectors with -inf
    void add(const float *values, int64_t count) {
        if (best == -INF) return;
        F part = {};
        for (int64_t i = 0; i < count; i += W) part += exponential_above(held(load(values + i) - best));
        Sums sums;
        sums += part;
        sum += sums.all();
    }
};

// Of each class of a row: mass, largest logit and its first token. The sum is relative to the largest so far, so a class
// far below others has all of its digits. NaN counts as -inf.
inline void measure_classes(const Block &b, int64_t r, const float *scaled) {
    float some[SPAN];
    for (int64_t c = 0; c < b.classes; ++c) {
        ClassSum own;
        own.token = b.members[b.starts[c]];
        const bool large = (b.starts[c + 1] - b.starts[c]) * 4 > b.vocab; // its tokens are looked at where they lie
        const int64_t stop = large ? b.vocab : b.starts[c + 1];
        for (int64_t start = large ? 0 : b.starts[c]; start < stop; start += SPAN) {
            const int64_t count = std::min(SPAN, stop - start);
            F best = all(-INF);
            for (int64_t i = 0; i < count; i += W) {
                F x;
                if (large) {
                    x = load(scaled + start + i);
                    x = classes_of(b, start + i, std::min<int64_t>(W, count - i)) == (int32_t)c ? x : all(-INF);
                } else {
                    const int32_t *tokens = b.members + start + i;
                    x = i + W <= count ? gathered([&](int k) { return scaled[tokens[k]]; })
                                       : gathered([&](int k) { return i + k < count ? scaled[tokens[k]] : -INF; });
                }
                best = x > best ? x : best;
                store(some + i, x);
            }
            const float top = highest(best);
            if (top > own.best) {
                const int64_t place = start + (std::find(some, some + count, top) - some);
                own.raise(top, large ? place : b.members[place]);
            }
            own.add(some, count);
        }
        const int64_t at = r * b.classes + c;
        b.mass[at] = own.best + std::log(own.sum), b.best[at] = own.best, b.token[at] = own.token;
    }
}

// What is done with row r: the statistics of its classes, if these are asked for, or else those of a step.
template <class Read, class T> void read_row(const Read &read, const Block &b, int64_t r, Room &room, const T *) {
    T *row = (T *)b.products + r * b.vocab;
    if (b.mass) {
        prepare(read, row, b, nullptr, room.ready.get());
        measure_classes(b, r, room.ready.get());
    } else if (b.bias) {
        float *ready = sizeof(T) == 4 ? (float *)row : room.ready.get();
        prepare(read, row, b, b.bias + r * (b.classes + 1), ready);
        see_row(Ready<T>(), ready, row, b, r, room);
    } else
        see_row(read, row, row, b, r, room);
}

template <class T> void see_computed(const Block &b, int64_t r, Room &room) {
    if (b.cap > 0)
        read_row(Computed<T, true>(b.cap, b.temperature[r]), b, r, room, (T *)nullptr);
    else
        read_row(Computed<T, false>(0, b.temperature[r]), b, r, room, (T *)nullptr);
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
    if (b.mass || (narrow && b.bias)) room.ready.reset(new float[b.vocab + W]);
    for (int64_t r = start; r < stop; ++r) {
        if (!narrow)
            see_computed<float>(b, r, room);
        else if (b.tables && b.table[r] >= 0)
            read_row(Tabled(b.tables + b.table[r] * 3 * 65536), b, r, room, (bf16 *)nullptr);
        else
            see_computed<bf16>(b, r, room);
    }
}

// A step's statistics of each row; where `mass` is given, those of each row's classes, and nothing else.
extern "C" void see(const Block *block, int32_t narrow, int64_t rows, int32_t threads) {
    share(rows, rows * block->vocab / GRAIN, threads, [&](long start, long stop) { see_rows(*block, narrow, start, stop); });
}

// The sums of embedding rows weighted by sparse probabilities, [rows, hidden] in float32; 0 for a row of count -1.
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
