// A step's pass over the vocabulary in float32, a tile of tokens at a time: the products of the head, their statistics,
// and the mean embedding. A tile stays in the caches from its products to the mean; the weight is read from memory once.
//
//     tile   products [rows][TOKENS] --cap, / temperature--> s, m = the largest so far --> w = exp(s - m)
//            sums of w and w (s - m), mean [rows][hidden] += w @ tile; scaled down first where the tile raised m
//     part   some tiles, one after another, from nothing: parts are shared among the threads
//     row    the parts joined in their order; the sample's tile is found by the tiles' sums, then its products once more
//
// Which tokens are a part follows from the vocabulary alone, so the bits of a row depend on the row and the weight alone.
// A row whose largest product is not finite gives NaN. Called through forward.cpp by
// ops/vocabulary/fused.py.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "gemm.h"
#include "moments.h"

namespace {

constexpr long TOKENS = KC; // a tile's, the depth of a panel
constexpr long SOME = 64;   // of a tile, whose weights have a sum of their own: what a sample's products are computed of
constexpr long PARTS = 32, LEAST = 4; // most parts, and fewest tiles of one

struct Head { // mirrors ops/vocabulary/fused.py
    const float *hidden; // [rows][weight.columns]
    int64_t rows;
    Matrix weight;
    const float *temperature;
    const double *uniform;
    const int64_t *banned; // ascending
    const uint8_t *where;  // [rows][bans]: whether banned in that row
    int64_t bans;
    int64_t *argmax, *sample;
    float *entropy, *mean; // mean: [rows][weight.columns], or null
    void *room;            // of `head_room` bytes
    float cap;             // 0: none
};

struct Running : Moments { // of the tiles so far; `rest`, `moment` and the mean are relative to top
    float top = -INF;      // the largest scaled logit, in the reader's units
    float odd = 0;         // infinite or NaN where a product is, and
    int64_t odd_at = 0;    // the first such product; a NaN counts for more
    void see(float most, int64_t at) {
        if (odd == 0 || (odd == odd && most != most)) odd = most, odd_at = at;
    }
};

struct TileSums { // of every SOME weights of a tile, relative to top
    double sums[TOKENS / SOME] = {};
    float top = -INF;
};

template <bool CAPPED> class Pass {
    typedef Computed<float, CAPPED> Read;
    const Head &b;
    const int threads;
    const long vocab = b.weight.rows, depth = b.weight.columns, wide = (depth + NR - 1) / NR * NR;
    const long tiles = (vocab + TOKENS - 1) / TOKENS, each_part = std::max(LEAST, (tiles + PARTS - 1) / PARTS);
    const long parts = (tiles + each_part - 1) / each_part;
    Running *const runs = static_cast<Running *>(b.room);                          // [part][row]
    TileSums *const sums = reinterpret_cast<TileSums *>(runs + parts * b.rows);    // [row][tile]
    float *const means = reinterpret_cast<float *>(sums + tiles * b.rows);         // [part][row][wide]

    Read reader(long row) const { return Read(b.cap, b.temperature[row]); }
    long count(long tile) const { return std::min(TOKENS, vocab - tile * TOKENS); }

    // s - m in nats, of numbers in the reader's units
    static double below(const Read &read, float s, float m) { return (double)(s - m) * (CAPPED ? read.factor : 1.0f); }

    // Products of tokens start .. start + some.
    void ban(long row, long start, long some, float *products) const {
        const int64_t *const end = b.banned + b.bans;
        for (const int64_t *id = std::lower_bound(b.banned, end, (int64_t)start); id < end && *id < start + some; ++id)
            if (b.where[row * b.bans + (id - b.banned)]) products[*id - start] = -INF;
    }

    // Products of a tile become weights, which are added to what the row has of its part; `mean` is scaled down for them.
    TileSums add(Read read, float *products, long tile, Running &run, float *mean, Room &room) const {
        const long some = count(tile);
        const float most = largest(products, some);
        if (!(most < INF)) {
            const auto is = [&](float x) { return x == most || (x != x && most != most); };
            run.see(most, tile * TOKENS + (std::find_if(products, products + some, is) - products));
        }
        if (!std::isfinite(most)) {
            std::fill(products, products + some, 0.0f);
            return {};
        }
        read.found(Same<float>(most).values);
        if (read.top > run.top) {
            const double down = below(read, run.top, read.top), factor = std::exp(down);
            if (run.top > -INF) {
                const double sum = (double)run.ties + run.rest;
                run.moment = factor * (run.moment + down * sum), run.rest = factor * sum;
                if (mean) each(depth, [&](long i, long n) { put(mean + i, get(mean + i, n) * (float)factor, n); });
            }
            run.top = read.top, run.ties = 0;
        }
        read.top = run.top;
        const Moments m = measure<Read, false>(read, products, some, SOME, 1.0, room, products, true);
        if (m.ties && !run.ties) run.argmax = tile * TOKENS + m.argmax;
        run.ties += m.ties, run.rest += m.rest, run.moment += m.moment;
        TileSums sums;
        std::copy_n(room.tiles.data(), (some + SOME - 1) / SOME, sums.sums);
        sums.top = run.top;
        return sums;
    }

    void part(long p, const float *left) { // left: panels of the rows
        const long rows = b.rows;
        Scratch &own = scratch();
        float *const products = Scratch::room(own.wide, (rows + MR) * TOKENS);
        float *const packed = Scratch::room(own.more, (rows + MR) * TOKENS);
        float *const mean = b.mean ? means + p * rows * wide : nullptr;
        Room room;
        room.tiles.resize(TOKENS / SOME);
        Running *const own_runs = runs + p * rows;
        std::fill_n(own_runs, rows, Running());
        for (long tile = p * each_part; tile < std::min(tiles, (p + 1) * each_part); ++tile) {
            const long some = count(tile);
            multiply<false>(left, rows, depth, b.weight, tile * TOKENS, some, products, TOKENS);
            for (long i = 0; i < rows; ++i) {
                float *const own_row = products + i * TOKENS, *const own_mean = mean ? mean + i * wide : nullptr;
                ban(i, tile * TOKENS, some, own_row);
                Running &run = own_runs[i];
                sums[i * tiles + tile] = add(reader(i), own_row, tile, run, own_mean, room);
            }
            if (!mean) continue;
            for (long i = 0; i < rows; i += MR) {
                const float *lines[MR];
                const int here = (int)std::min<long>(MR, rows - i);
                for (int j = 0; j < here; ++j) lines[j] = products + (i + j) * TOKENS;
                pack_left<float, false>(lines, here, some, packed + i * some);
            }
            multiply<false, true>(packed, rows, some, b.weight.from(tile * TOKENS, some), 0, depth, mean, wide,
                                  tile == p * each_part);
        }
    }

    void finish(long row) {
        const Read read = reader(row);
        Running all;
        for (long p = 0; p < parts; ++p) {
            const Running &run = runs[p * b.rows + row];
            if (run.odd != 0) all.see(run.odd, run.odd_at);
            if (run.top > all.top) all.top = run.top, all.argmax = run.argmax;
        }
        if (all.odd != 0 || all.top == -INF) {
            b.argmax[row] = all.odd_at, b.sample[row] = 0, b.entropy[row] = NAN;
            if (b.mean) std::fill_n(b.mean + row * depth, depth, NAN);
            return;
        }
        std::vector<double> factors(parts);
        for (long p = 0; p < parts; ++p) {
            const Running &run = runs[p * b.rows + row];
            if (run.top == -INF) continue;
            const double down = below(read, run.top, all.top), sum = (double)run.ties + run.rest;
            factors[p] = std::exp(down);
            if (down == 0)
                all.ties += run.ties, all.rest += run.rest, all.moment += run.moment;
            else
                all.rest += factors[p] * sum, all.moment += factors[p] * (run.moment + down * sum);
        }
        const double ties = (double)all.ties, total = ties + all.rest;
        b.argmax[row] = all.argmax;
        b.entropy[row] = (float)(std::log(ties) + std::log1p(all.rest / ties) - all.moment / total);
        draw(read, row, all.top);
        if (!b.mean) return;
        float *const to = b.mean + row * depth;
        for (long p = 0; p < parts; ++p) {
            const float *from = means + (p * b.rows + row) * wide, factor = (float)(factors[p] / total);
            each(depth, [&](long i, long n) { put(to + i, get(from + i, n) * factor + (p ? get(to + i, n) : F{}), n); });
        }
    }

    void draw(Read read, long row, float top) {
        constexpr long each_tile = TOKENS / SOME;
        const TileSums *const own = &sums[row * tiles];
        std::vector<double> weights(tiles * each_tile);
        double total = 0, before, ignored;
        for (long i = 0; i < tiles; ++i) {
            const double factor = own[i].top > -INF ? std::exp(below(read, own[i].top, top)) : 0;
            for (long j = 0; j < each_tile; ++j) total += weights[i * each_tile + j] = factor * own[i].sums[j];
        }
        const double target = b.uniform[row] * total;
        const long at = first_above(weights.data(), tiles * each_tile, target, &before);
        const TileSums &found = own[at / each_tile];
        const long start = at * SOME, some = std::min(SOME, vocab - start);
        float *const left = Scratch::room(scratch().more, MR * depth), *const products = Scratch::room(scratch().wide, SOME);
        const float *line = b.hidden + row * depth;
        pack_left<float, false>(&line, 1, depth, left);
        multiply<false>(left, 1, depth, b.weight, start, some, products, SOME);
        ban(row, start, some, products);
        read.top = found.top;
        walk(products, 0, some, [&](const float *from, int64_t place, int64_t n) {
            put(products + place, read.weight(from, read.below(read.scaled(from))), n);
        });
        const double through = (target - before) / weights[at] * found.sums[at % each_tile]; // in units of these weights
        b.sample[row] = start + first_above(products, some, through, &ignored);
    }

public:
    Pass(const Head &head, int threads) : b(head), threads(threads) {}

    long bytes(bool mean) const {
        return b.rows * (parts * (long)(sizeof(Running) + (mean ? wide * sizeof(float) : 0)) + tiles * (long)sizeof(TileSums));
    }

    void run() {
        float *const left = Scratch::room(scratch().left, (b.rows + MR) * depth);
        row_panels<float>([&](long i) { return b.hidden + i * depth; }, 0, b.rows, threads,
                          [&](long p, const float *const *lines, int some) {
                              pack_left<float, false>(lines, some, depth, left + p * MR * depth);
                          });
        parallel(parts, threads, [&](long p) { part(p, left); });
        share(b.rows, b.rows, threads, [&](long start, long stop) {
            for (long row = start; row < stop; ++row) finish(row);
        });
    }
};

// Some of the rows.
inline Head block(Head all, long first, long rows) {
    const long columns = all.weight.columns;
    all.hidden += first * columns, all.temperature += first, all.uniform += first;
    all.argmax += first, all.sample += first, all.entropy += first, all.where += first * all.bans;
    if (all.mean) all.mean += first * columns;
    all.rows = rows;
    return all;
}

// Bytes of `room` for so many rows.
inline long head_room(long rows, long vocab, long columns, bool mean) {
    const Matrix weight{nullptr, vocab, columns};
    return Pass<true>(Head{nullptr, std::min(rows, MB), weight}, 1).bytes(mean);
}

inline void head_step(const Head &head, int threads) {
    for (long first = 0; first < head.rows; first += MB) {
        const Head some = block(head, first, std::min(MB, head.rows - first));
        if (head.cap > 0)
            Pass<true>(some, threads).run();
        else
            Pass<false>(some, threads).run();
    }
}

} // namespace
