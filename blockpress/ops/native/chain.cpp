// Sums and the best way of a chain: what ops/chain.py computes in numpy, whose terms these are.
//
//     F[i + 1][t] = sum of F[i][s] exp(weight[i][l])    over moves s -l-> t          forward
//     B[i][s]     = sum of exp(weight[i][l]) B[i + 1][t]                             backward
//     bias[i][l]  = log of the sum of F[i][s] B[i + 1][t]    over moves of label l
//
// Sums have a fraction and an exponent of their own (`Sum`), so no difference between states is too large for them, and
// neither exp nor log is needed for a move. States that no way from the start reaches are not looked at backward.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

constexpr double NONE = -std::numeric_limits<double>::infinity();
constexpr double LOG2 = 0.693147180559945309417;
constexpr double MOST = 1e15; // a larger logarithm has no digits after its point
constexpr int64_t FAR = int64_t(1) << 60;

struct Sum { // fraction 2^exponent; 0: {0, -FAR}
    double fraction = 0;
    int64_t exponent = -FAR;
    static Sum of(double logarithm) {
        if (!(logarithm > NONE)) return {};
        const double x = std::max(-MOST, std::min(MOST, logarithm)), whole = std::floor(x / LOG2);
        return {std::exp(x - whole * LOG2), (int64_t)whole};
    }
    double logarithm() const { return fraction > 0 ? std::log(fraction) + (double)exponent * LOG2 : NONE; }
};

inline Sum operator*(const Sum &a, const Sum &b) { return {a.fraction * b.fraction, a.exponent + b.exponent}; }

inline double power(int64_t exponent) { // 2^exponent, <= 1; 0 where that is nothing next to 1
    const int64_t bits = exponent < -200 ? 0 : (1023 + exponent) << 52;
    double result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

struct Groups { // the moves in `order`, group k from starts[k] to starts[k + 1]
    const int32_t *order, *starts;
};

struct Chain { // mirrors ops/chain.py
    int64_t positions, states, labels, start;
    const int32_t *source, *target, *label; // of each move
    Groups into, out_of, of_label;          // grouped by target, source and label
    const double *weight, *best;            // [positions][labels]
    const double *end;                      // [states]
    double *bias;                           // [positions][labels]
    int64_t *path, *through;                // labels [positions] and states [positions + 1] of the best way
};

// Grouped moves, with the two numbers of each that a sum over its group looks at.
struct Pairs {
    std::vector<int32_t> first, second, starts;
    int64_t most = 0; // moves in a group
    Pairs(const Groups &groups, int64_t count, const int32_t *a, const int32_t *b)
        : starts(groups.starts, groups.starts + count + 1) {
        for (int32_t at = 0; at < starts[count]; ++at)
            first.push_back(a[groups.order[at]]), second.push_back(b[groups.order[at]]);
        for (int64_t k = 0; k < count; ++k) most = std::max<int64_t>(most, starts[k + 1] - starts[k]);
    }
    // The sum of a[first] b[second] over group k; `room`: for `most` of them.
    Sum sum(int64_t k, const Sum *a, const Sum *b, Sum *room) const {
        const int64_t start = starts[k], count = starts[k + 1] - start;
        int64_t top = -FAR;
        for (int64_t i = 0; i < count; ++i) {
            room[i] = a[first[start + i]] * b[second[start + i]];
            top = std::max(top, room[i].exponent);
        }
        double total = 0;
        for (int64_t i = 0; i < count; ++i) total += room[i].fraction * power(room[i].exponent - top);
        if (!(total > 0)) return {};
        int64_t bits; // total >= 1
        std::memcpy(&bits, &total, sizeof bits);
        const int64_t shift = (bits >> 52) - 1023;
        bits -= shift << 52;
        std::memcpy(&total, &bits, sizeof total);
        return {total, top + shift};
    }
};

// Takes the largest exponent from all of them, so that long chains do not leave their range.
void level(Sum *sums, int64_t count) {
    int64_t top = -FAR;
    for (int64_t i = 0; i < count; ++i)
        if (sums[i].fraction > 0) top = std::max(top, sums[i].exponent);
    for (int64_t i = 0; i < count; ++i)
        sums[i] = sums[i].fraction > 0 ? Sum{sums[i].fraction, sums[i].exponent - top} : Sum{};
}

// The best way, by the moves through which the best way to each state came; -1: no way came there.
void follow(const Chain &c, const std::vector<int32_t> &came, const double *highest) {
    int64_t at = 0;
    for (int64_t s = 1; s < c.states; ++s)
        if (highest[s] + c.end[s] > highest[at] + c.end[at]) at = s;
    c.through[c.positions] = at;
    for (int64_t i = c.positions; i-- > 0;) {
        const int32_t move = came[i * c.states + at];
        c.path[i] = move < 0 ? -1 : c.label[move];
        c.through[i] = at = move < 0 ? 0 : c.source[move];
    }
}

} // namespace

extern "C" void chain(const Chain *given) {
    const Chain &c = *given;
    const int64_t n = c.positions, states = c.states, labels = c.labels;
    const Pairs into(c.into, states, c.source, c.label), out_of(c.out_of, states, c.label, c.target),
        of_label(c.of_label, labels, c.source, c.target);
    std::vector<Sum> weight(n * labels), forward((n + 1) * states), room(std::max({into.most, out_of.most, of_label.most}));
    for (int64_t k = 0; k < n * labels; ++k) weight[k] = Sum::of(c.weight[k]);
    std::vector<double> highest(states, NONE), next(states);
    std::vector<int32_t> came(n * states, -1);
    forward[c.start] = Sum::of(0);
    highest[c.start] = 0;
    for (int64_t i = 0; i < n; ++i) {
        Sum *to = &forward[(i + 1) * states];
        for (int64_t t = 0; t < states; ++t) {
            to[t] = into.sum(t, &forward[i * states], &weight[i * labels], room.data());
            next[t] = NONE;
            for (int32_t at = into.starts[t]; at < into.starts[t + 1]; ++at) {
                const double x = highest[into.first[at]] + c.best[i * labels + into.second[at]];
                if (x > next[t]) next[t] = x, came[i * states + t] = c.into.order[at];
            }
        }
        level(to, states);
        std::swap(highest, next);
    }
    follow(c, came, highest.data());
    std::vector<Sum> backward(states), before(states);
    for (int64_t s = 0; s < states; ++s) backward[s] = Sum::of(c.end[s]);
    for (int64_t i = n; i-- > 0;) {
        const Sum *f = &forward[i * states];
        for (int64_t l = 0; l < labels; ++l)
            c.bias[i * labels + l] = of_label.sum(l, f, backward.data(), room.data()).logarithm();
        for (int64_t s = 0; s < states; ++s)
            before[s] = f[s].fraction > 0 ? out_of.sum(s, &weight[i * labels], backward.data(), room.data()) : Sum{};
        level(before.data(), states);
        std::swap(backward, before);
    }
}
