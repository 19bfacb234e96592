// A step's pass over the vocabulary, a tile of tokens at a time: the products of the head, their statistics, and the mean
// embedding. A tile stays in the caches while it is used; products are never in memory.
//
//     tile   products [rows][tokens] --cap, / temperature--> s, m = the largest so far --> w = exp(s - m)
//            sums of w and w (s - m), and in float32: mean [rows][hidden] += w @ tile, scaled down where the tile raised m
//     part   some tiles, one after another, from nothing: parts are shared among the threads
//     row    the parts joined in their order; the sample's tile is found by the tiles' sums, then its products once more
//     mean   in bfloat16: all products again, since a probability is rounded when the sum of the row is known
//
// float32 reads the weight from memory once. bfloat16 is for matrix tiles (tiles.h), on which products cost less than
// writing and reading them. Which tokens are a part follows from the vocabulary alone, so the bits of a row depend on the
// row and the weight alone. A row whose largest product is not finite gives NaN. Called through forward.cpp by
// ops/vocabulary/fused.py.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "gemm.h"
#include "moments.h"

namespace {

constexpr long SOME = 64;             // of a tile, whose weights have a sum of their own: what a sample's products are computed of
constexpr long PARTS = 32, LEAST = 4; // most parts, and fewest tiles of one

struct Head { // mirrors ops/vocabulary/fused.py
    const void *hidden; // [rows][weight.columns], float32 or bfloat16
    int64_t rows;
    Matrix weight;
    const float *temperature;
    const double *uniform;
    const int64_t *banned; // ascending
    const uint8_t *where;  // [rows][bans]: whether banned in that row
    int64_t bans;
    const float *tables;   // of bfloat16, as in vocabulary.cpp: [which][logits, weights, beliefs][65536]; null: computed
    const int64_t *table;  // per row, which one; -1: none
    const float *terms;    // with tables: [which][65536][weight, weight * logit, belief, 0]
    int64_t *argmax, *sample;
    float *entropy, *mean; // mean: [rows][weight.columns], or null
    void *room;            // of `head_room` bytes
    float cap;             // 0: none
};

// What a reader's weights are relative to: the largest so far, whose own weight is 1, or nothing.
template <class Read> struct Scale {
    static double unit(const Read &, float) { return 1; }
    static double down(const Read &read, float from, float to) { return std::exp(below(read, from, to)); }
    // s - m in nats, of numbers in the reader's units
    static double below(const Read &, float s, float m) { return (double)s - m; }
    // The same factor for the weights of rounded logits.
    static double down_belief(const Read &, float from, float to) {
        return std::exp((double)kept(all(from), bf16{})[0] - kept(all(to), bf16{})[0]);
    }
};
template <> inline double Scale<Computed<float, true>>::below(const Computed<float, true> &read, float s, float m) {
    return (double)(s - m) * read.factor;
}
template <> inline double Scale<Computed<float, false>>::below(const Computed<float, false> &, float s, float m) {
    return s - m;
}
template <> inline double Scale<Tabled>::unit(const Tabled &, float top) { return std::exp((double)top); }
template <> inline double Scale<Tabled>::down(const Tabled &, float, float) { return 1; }
template <> inline double Scale<Tabled>::down_belief(const Tabled &, float, float) { return 1; }

struct Running : Moments { // of the tiles so far, in units of the weights at `top`; `rest` and `moment` leave out its ties
    float top = -INF;      // the largest scaled logit, in the reader's units
    float odd = 0;         // infinite or NaN where a product is, and
    int64_t odd_at = 0;    // the first such product; a NaN counts for more
    void see(float most, int64_t at) {
        if (odd == 0 || (odd == odd && most != most)) odd = most, odd_at = at;
    }
    bool useless() const { return odd != 0 || top == -INF; }
    // Makes `to` the top; what was summed is scaled by the result.
    template <class Read> double raise(const Read &read, float to) {
        typedef Scale<Read> As;
        const double factor = top > -INF ? As::down(read, top, to) : 0;
        if (top > -INF && top != to) {
            const double sum = (double)ties * As::unit(read, top) + rest;
            moment = factor * (moment + As::below(read, top, to) * sum), rest = factor * sum, ties = 0;
            belief *= As::down_belief(read, top, to);
        }
        top = to;
        return factor;
    }
    // Adds other tiles'; their ties count where their top is the same. Returns what their weights are scaled by.
    template <class Read> double add(const Read &read, Running other) {
        const double factor = other.raise(read, top);
        ties += other.ties, rest += other.rest, moment += other.moment, belief += other.belief;
        return factor;
    }
};

// `measure` of products below the top, with one load for each; `sums` of every SOME weights.
inline Moments moments_of_terms(const Tabled &read, const bf16 *products, long count, double *sums) {
    typedef float Term __attribute__((vector_size(16), may_alias));
    constexpr int ways = 4; // independent chains
    const Term *const of = reinterpret_cast<const Term *>(read.terms);
    Moments m;
    for (long first = 0; first < count; first += SOME) {
        const long stop = std::min(first + SOME, count);
        Term parts[ways] = {};
        long i = first;
        for (; i + ways <= stop; i += ways)
            for (int way = 0; way < ways; ++way) parts[way] += of[products[i + way].bits];
        for (; i < stop; ++i) parts[0] += of[products[i].bits];
        double total[3];
        for (int k = 0; k < 3; ++k) total[k] = ((double)parts[0][k] + parts[1][k]) + ((double)parts[2][k] + parts[3][k]);
        m.rest += *sums++ = total[0], m.moment += total[1] - (double)read.top * total[0], m.belief += total[2];
    }
    return m;
}

struct TileSums { // of every SOME weights of a tile, relative to top
    double sums[4] = {};
    float top = -INF;
};

template <class T, bool CAPPED> class Pass {
    static constexpr bool NARROW = sizeof(T) == 2;
#ifdef TILED
    static constexpr Form FORM = NARROW ? Form::TILES : Form::FLOATS;
#else
    static constexpr Form FORM = Form::FLOATS;
#endif
    static constexpr int MR = panel_rows(FORM);
    static constexpr long TOKENS = NARROW ? 4 * SOME : KC; // a tile's
    const Head &b;
    const int threads;
    const long vocab = b.weight.rows, depth = b.weight.columns, wide = (depth + NR - 1) / NR * NR;
    const long tiles = (vocab + TOKENS - 1) / TOKENS, each_part = std::max(LEAST, (tiles + PARTS - 1) / PARTS);
    const long parts = (tiles + each_part - 1) / each_part, all = units(depth, FORM);
    const long part_mean = (b.rows + MR - 1) / MR * MR * wide; // the sums of a part's mean
    Running *const runs = static_cast<Running *>(b.room);                       // [part][row]
    TileSums *const sums = reinterpret_cast<TileSums *>(runs + parts * b.rows); // [row][tile]
    double *const totals = reinterpret_cast<double *>(sums + tiles * b.rows);   // [row]
    float *const tops = reinterpret_cast<float *>(totals + b.rows);             // [row]: NaN where there is no mean
    float *const means = tops + (b.rows + 1) / 2 * 2;                           // [part], as `multiply_across` leaves them

    const T *line(long row) const { return static_cast<const T *>(b.hidden) + row * depth; }
    long count(long tile) const { return std::min(TOKENS, vocab - tile * TOKENS); }

    // op(a reader of the row)
    template <class Op> auto with(long row, const Op &op) const {
        if constexpr (NARROW) {
            const long which = b.tables ? b.table[row] : -1;
            if (which >= 0) return op(Tabled(b.tables + which * 3 * 65536, b.terms + which * 4 * 65536));
        }
        return op(Computed<T, CAPPED>(b.cap, b.temperature[row]));
    }

    // Products of rows with tokens start .. start + some, as T, TOKENS apart; those that are banned are -inf.
    void multiply_tile(const float *left, long first, long rows, long start, long some, T *products) const {
        if constexpr (NARROW) {
            narrow_products(left, rows, start, some, products);
        } else {
            multiply<FORM>(left, rows, depth, b.weight, start, some, products, TOKENS);
        }
        const int64_t *const end = b.banned + b.bans;
        const int64_t *const begin = std::lower_bound(b.banned, end, (int64_t)start);
        for (const int64_t *id = begin; id < end && *id < start + some; ++id)
            for (long row = 0; row < rows; ++row)
                if (b.where[(first + row) * b.bans + (id - b.banned)])
                    products[row * TOKENS + *id - start] = typed(-INF, (const T *)nullptr);
    }

    void narrow_products(const float *left, long rows, long start, long some, bf16 *products) const {
        for (long n = 0; n < some; n += NB) {
            const long here = std::min(NB, some - n);
#ifdef TILED
            multiply_tiles(left, rows, depth, b.weight, start + n, here, products + n, TOKENS);
#else
            float *const wider = Scratch::room(scratch().sums, MB * NB);
            multiply<FORM>(left, rows, depth, b.weight, start + n, here, wider, NB);
            copy_out(wider, NB, rows, here, products + n, TOKENS);
#endif
        }
    }

    // Products of a tile are added to what the row has of its part. float32 products become weights, and `mean` is scaled
    // down for them.
    template <class Read>
    TileSums add(Read read, T *products, long tile, Running &run, float *mean, Room &room) const {
        const long some = count(tile);
        const float most = largest(products, some);
        if (!(most < INF)) {
            const auto is = [&](T x) { return widen(x) == most || (widen(x) != widen(x) && most != most); };
            run.see(most, tile * TOKENS + (std::find_if(products, products + some, is) - products));
        }
        const Same<T> same(typed(most, products));
        if (!std::isfinite(most) || !std::isfinite(read.found(same.values))) {
            if (!NARROW) std::fill(products, products + some, T{});
            return {};
        }
        if (read.top > run.top) {
            const bool held = run.top > -INF;
            const float factor = (float)run.raise(read, read.top);
            if (mean && held) each(depth, [&](long i, long n) { put(mean + i, get(mean + i, n) * factor, n); });
        }
        const float top = run.top;
        const Moments m = read.top < top ? moments_below(read, top, products, some, room) : moments(read, products, some, room);
        if (m.ties && !run.ties) run.argmax = tile * TOKENS + m.argmax;
        run.ties += m.ties, run.rest += m.rest, run.moment += m.moment, run.belief += m.belief;
        TileSums sums;
        std::copy_n(room.tiles.data(), (some + SOME - 1) / SOME, sums.sums);
        sums.top = top;
        return sums;
    }

    template <class Read> Moments moments(const Read &read, T *products, long some, Room &room) const {
        float *const weights = NARROW ? room.weight.get() : reinterpret_cast<float *>(products);
        const double unit = Scale<Read>::unit(read, read.top);
        return measure<Read, NARROW>(read, products, some, SOME, unit, room, weights, !NARROW);
    }

    // Of a tile without the top.
    template <class Read> Moments moments_below(Read read, float top, T *products, long some, Room &room) const {
        relative(read, top);
        if constexpr (std::is_same<Read, Tabled>::value) return moments_of_terms(read, products, some, room.tiles.data());
        return moments(read, products, some, room);
    }

    // Makes a reader's weights relative to this maximum.
    template <class Read> static void relative(Read &read, float top) { read.top = top; }
    static void relative(Computed<bf16, CAPPED> &read, float top) { read.top = top, read.about = kept(::all(top), bf16{})[0]; }

    // A mean of a part, += weights @ a tile.
    void add_mean(const T *weights, long some, long tile, float *mean, bool fresh) const {
        const long deep = units(some, FORM);
        float *const packed = Scratch::room(scratch().more, (b.rows + MR) * deep);
        for (long i = 0; i < b.rows; i += MR) {
            const T *lines[MR];
            const int here = (int)std::min<long>(MR, b.rows - i);
            for (int j = 0; j < here; ++j) lines[j] = weights + (i + j) * TOKENS;
            pack_left<T, FORM, true>(lines, here, some, packed + i * deep);
        }
        multiply_across<FORM>(packed, b.rows, some, b.weight.from(tile * TOKENS, some), 0, depth, mean, wide, fresh);
    }

    // op(tile, row, its products) for the tiles of a part, and after each done(tile, products).
    template <class Op, class Done> void each_tile(long part, const float *left, const Op &op, const Done &done) const {
        T *const products = reinterpret_cast<T *>(Scratch::room(scratch().wide, (b.rows + MR) * TOKENS));
        const long stop = std::min(tiles, (part + 1) * each_part);
        for (long tile = part * each_part; tile < stop; ++tile) {
            multiply_tile(left, 0, b.rows, tile * TOKENS, count(tile), products);
            for (long row = 0; row < b.rows; ++row) op(tile, row, products + row * TOKENS);
            done(tile, products);
        }
    }

    void measure_part(long part, const float *left) { // left: panels of the rows
        const long rows = b.rows;
        float *const mean = b.mean && !NARROW ? means + part * part_mean : nullptr;
        Room room;
        room.tiles.resize(TOKENS / SOME);
        if (NARROW) room.weight.reset(new float[SOME + W]), room.belief.reset(new float[TOKENS + W]);
        Running *const own = runs + part * rows;
        std::fill_n(own, rows, Running());
        each_tile(
            part, left,
            [&](long tile, long i, T *products) {
                sums[i * tiles + tile] = with(i, [&](auto read) {
                    return add(read, products, tile, own[i], mean ? mean + i * wide : nullptr, room);
                });
            },
            [&](long tile, const T *products) {
                if (mean) add_mean(products, count(tile), tile, mean, tile == part * each_part);
            });
    }

    // The mean of a part from probabilities, which are rounded.
    void mean_of_part(long part, const float *left) {
        float *const mean = means + part * part_mean;
        const std::vector<Share> shares(totals, totals + b.rows);
        each_tile(
            part, left,
            [&](long tile, long i, T *products) {
                if (tops[i] != tops[i]) std::fill_n(products, count(tile), T{});
                else with(i, [&](auto read) { believe_tile(read, products, count(tile), tops[i], shares[i]); });
            },
            [&](long tile, const T *products) { add_mean(products, count(tile), tile, mean, tile == part * each_part); });
    }

    template <class Read> void believe_tile(Read read, T *products, long some, float top, const Share &share) const {
        relative(read, top);
        walk(products, 0, some, [&](const T *from, int64_t place, int64_t n) __attribute__((always_inline)) {
            put(products + place, share(read.belief(from, read.scaled(from))), n);
        });
    }

    template <class Read> void finish(Read read, long row) {
        Running joined;
        for (long p = 0; p < parts; ++p) {
            const Running &run = runs[p * b.rows + row];
            if (run.odd != 0) joined.see(run.odd, run.odd_at);
            if (run.top > joined.top) joined.top = run.top, joined.argmax = run.argmax;
        }
        tops[row] = NAN;
        if (joined.useless()) {
            b.argmax[row] = joined.odd_at, b.sample[row] = 0, b.entropy[row] = NAN;
            if (b.mean) std::fill_n(b.mean + row * depth, depth, NAN);
            return;
        }
        std::vector<double> factors(parts);
        for (long p = 0; p < parts; ++p)
            if (runs[p * b.rows + row].top > -INF) factors[p] = joined.add(read, runs[p * b.rows + row]);
        const double unit = Scale<Read>::unit(read, joined.top), ties = (double)joined.ties, rest = joined.rest / unit;
        b.argmax[row] = joined.argmax;
        b.entropy[row] = (float)(std::log(ties) + std::log1p(rest / ties) - joined.moment / unit / (ties + rest));
        draw(read, row, joined.top);
        tops[row] = joined.top, totals[row] = NARROW ? joined.belief : ties + rest;
        if (b.mean && !NARROW) join_means(row, factors.data(), totals[row]);
    }

    void join_means(long row, const double *factors, double total) const {
        float *const to = b.mean + row * depth;
        for (long p = 0; p < parts; ++p) {
            const float factor = (float)((factors ? factors[p] : 1) / total);
            each(depth, [&](long i, long n) {
                const float *from = across_at<FORM>(means + p * part_mean, depth, wide, row, i);
                put(to + i, get(from, n) * factor + (p ? get(to + i, n) : F{}), n);
            });
        }
    }

    template <class Read> void draw(Read read, long row, float top) {
        constexpr long each_tile = TOKENS / SOME;
        const TileSums *const own = &sums[row * tiles];
        std::vector<double> weights(tiles * each_tile);
        double total = 0, before, ignored;
        for (long i = 0; i < tiles; ++i) {
            const double factor = own[i].top > -INF ? Scale<Read>::down(read, own[i].top, top) : 0;
            for (long j = 0; j < each_tile; ++j) total += weights[i * each_tile + j] = factor * own[i].sums[j];
        }
        const double target = b.uniform[row] * total;
        const long at = first_above(weights.data(), tiles * each_tile, target, &before);
        const TileSums &found = own[at / each_tile];
        const long start = at * SOME, some = std::min(SOME, vocab - start);
        float *const left = Scratch::room(scratch().more, MR * all);
        T *const products = reinterpret_cast<T *>(Scratch::room(scratch().wide, TOKENS));
        const T *own_line = line(row);
        pack_left<T, FORM>(&own_line, 1, depth, left);
        multiply_tile(left, row, 1, start, some, products);
        relative(read, found.top);
        float drawn[SOME];
        walk(products, 0, some, [&](const T *from, int64_t place, int64_t n) {
            put(drawn + place, read.weight(from, read.below(read.scaled(from))), n);
        });
        const double through = (target - before) / weights[at] * found.sums[at % each_tile]; // in units of these weights
        b.sample[row] = start + first_above(drawn, some, through, &ignored);
    }

public:
    Pass(const Head &head, int threads) : b(head), threads(threads) {}

    long bytes(bool mean) const {
        const long row = parts * (long)sizeof(Running) + tiles * (long)sizeof(TileSums) + 12;
        return b.rows * row + 8 + (mean ? parts * part_mean * (long)sizeof(float) : 0);
    }

    void run() {
        float *const left = Scratch::room(scratch().left, (b.rows + MR) * all);
        row_panels<T, FORM>([&](long i) { return line(i); }, 0, b.rows, threads, [&](long p, const T *const *lines, int some) {
            pack_left<T, FORM>(lines, some, depth, left + p * MR * all);
        });
        parallel(parts, threads, [&](long p) { measure_part(p, left); });
        const auto each_row = [&](const auto &op) {
            share(b.rows, b.rows, threads, [&](long start, long stop) {
                for (long row = start; row < stop; ++row) op(row);
            });
        };
        each_row([&](long row) { with(row, [&](auto read) { finish(read, row); }); });
        if (!NARROW || !b.mean) return;
        if constexpr (NARROW) parallel(parts, threads, [&](long p) { mean_of_part(p, left); });
        each_row([&](long row) {
            if (tops[row] == tops[row]) join_means(row, nullptr, 1);
        });
    }
};

// Some of the rows.
template <class T> Head block(Head all, long first, long rows) {
    const long columns = all.weight.columns;
    all.hidden = static_cast<const T *>(all.hidden) + first * columns;
    all.temperature += first, all.uniform += first;
    all.argmax += first, all.sample += first, all.entropy += first, all.where += first * all.bans;
    if (all.table) all.table += first;
    if (all.mean) all.mean += first * columns;
    all.rows = rows;
    return all;
}

// Bytes of `room` for so many rows.
template <class T> long head_room(long rows, long vocab, long columns, bool mean) {
    const Matrix weight{nullptr, vocab, columns};
    return Pass<T, true>(Head{nullptr, std::min(rows, MB), weight}, 1).bytes(mean);
}

template <class T> void head_step(const Head &head, int threads) {
    for (long first = 0; first < head.rows; first += MB) {
        const Head some = block<T>(head, first, std::min(MB, head.rows - first));
        if (head.cap > 0)
            Pass<T, true>(some, threads).run();
        else
            Pass<T, false>(some, threads).run();
    }
}

} // namespace
