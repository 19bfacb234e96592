// The products of a forward and the steps between them: a matrix, the experts, attention, whole layers, and the head.
//
// Whatever the plain version would store in a tensor of T between two operations is rounded to T, so that bfloat16 gives
// the same within float32 rounding of the sums. Called by ops/cpu/, which documents the arguments.

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "gemm.h"
#include "head.h"
#include "int8.h"

namespace {

template <class T>
T* keep(int which, long count) {
  const long size = static_cast<long>(sizeof(T));
  return reinterpret_cast<T*>(Scratch::room(scratch().between[which], (count * size + 3) / 4));
}
enum { NORMED, STATES, FED, ACTIVE, ROUTED, SLOTS, SCORES_OF };

struct Unused {  // for sides that have destinations
  template <class S>
  void operator()(long, long, long, long, const S*, long) const {}
};

template <class T>
void linear(const T* x, long rows, long step, const Matrix& weight, T* out, long out_step, int threads) {
  const Side side{weight, out, out_step};
  products<T>([&](long i) { return x + i * step; }, rows, weight.columns, &side, 1, threads, Unused());
}

// out [rows][weight.columns] = shares [rows][weight.rows] @ weight, in partial sums of DEEP products: one running sum over
// a whole vocabulary would lose a digit.
template <class T, Form FORM>
void combine_as(const T* shares, long rows, long step, const Matrix& weight, float* out, int threads) {
  constexpr long DEEP = 2048;
  constexpr int MR = panel_rows(FORM);
  const long panels = (rows + MR - 1) / MR, columns = weight.columns;
  float* const left = keep<float>(SLOTS, panels * MR * units(std::min<long>(DEEP, weight.rows), FORM));
  const long block = columns >= 4 * threads * NB ? NB : NR;
  const long across = (columns + block - 1) / block, down = (rows + MB - 1) / MB;
  for (long from = 0; from < weight.rows; from += DEEP) {
    const long deep = std::min<long>(DEEP, weight.rows - from), all = units(deep, FORM);
    parallel(panels, threads, [&](long p) {
      const T* lines[MR];
      const int some = static_cast<int>(std::min<long>(MR, rows - p * MR));
      for (int i = 0; i < some; i++) lines[i] = shares + (p * MR + i) * step + from;
      pack_left<T, FORM, true>(lines, some, deep, left + p * MR * all);
    });
    const Matrix slice = weight.from(from, deep);
    parallel(across * down, threads, [&](long task) {
      const long n = task % across * block, m = task / across * MB;
      const long here = std::min(MB, rows - m), some = std::min(block, columns - n);
      float* sums = Scratch::room(scratch().sums, MB * 2 * NB);
      multiply_across<FORM>(left + m * all, here, deep, slice, n, some, sums, NB, true);
      for (long i = 0; i < here; i++)
        each(some, [&](long j, long c) {
          float* to = out + (m + i) * columns + n + j;
          const F part = get(across_at<FORM>(sums, some, NB, i, j), c);
          put(to, from ? get(to, c) + part : part, c);
        });
    });
  }
}

template <class T>
void combine(const T* shares, long rows, long step, const Matrix& weight, float* out, int threads) {
  by_form<T>(pairable(weight), [&](auto form) {
    combine_as<T, decltype(form)::value>(shares, rows, step, weight, out, threads);
  });
}

// ---- experts

struct Experts {  // mirrors ops/cpu/experts.py
  Matrix gate_up;  // [experts * 2 * size][hidden], each expert's gate rows first
  Matrix down;     // [experts * hidden][size]
  int64_t count, size;
};

struct Unit {
  long expert, start, count;  // slots start .. start + count, sorted by expert
};

constexpr long UNIT = 10 * 12;  // most tokens per unit: whole panels of 6 and of 12

template <class T, Form FORM>
void expert_unit(const T* x, long hidden, long k, const Experts& experts, const float* weights, const long* slots,
                 const Unit& unit, T* y) {
  constexpr int MR = panel_rows(FORM);
  const long size = experts.size, all = units(hidden, FORM), middle = units(size, FORM);
  Scratch& own = scratch();
  float* left = Scratch::room(own.more, (UNIT + MR) * all);
  auto* const sums = reinterpret_cast<Sum<FORM>*>(Scratch::room(own.sums, MB * 2 * NB));
  // The activations [count][size] of T, followed by their panels.
  float* memory = Scratch::room(own.wide, UNIT * size + (UNIT + MR) * middle);
  T* active = reinterpret_cast<T*>(memory);
  float* again = memory + UNIT * size;
  slots += unit.start;
  const T* lines[MR];
  auto pack = [&](long depth, float* to, long step, const auto& row) {
    for (long i = 0; i < unit.count; i += MR) {
      const int some = static_cast<int>(std::min<long>(MR, unit.count - i));
      for (int j = 0; j < some; j++) lines[j] = row(i + j);
      pack_left<T, FORM>(lines, some, depth, to + i * step);
    }
  };
  pack(hidden, left, all, [&](long i) { return x + slots[i] / k * hidden; });
  const Matrix gate = experts.gate_up.from(unit.expert * 2 * size, size);
  const Matrix up = experts.gate_up.from(unit.expert * 2 * size + size, size);
  const Matrix down = experts.down.from(unit.expert * hidden, hidden);
  for (long n = 0; n < size; n += NB) {
    const long some = std::min(NB, size - n);
    multiply<FORM>(left, unit.count, hidden, gate, n, some, sums, 2 * NB);
    multiply<FORM>(left, unit.count, hidden, up, n, some, sums + NB, 2 * NB);
    activate(sums, 2 * NB, unit.count, some, active + n, size);
  }
  pack(size, again, middle, [&](long i) { return active + i * size; });
  for (long n = 0; n < hidden; n += NB) {
    const long some = std::min(NB, hidden - n);
    multiply<FORM>(again, unit.count, size, down, n, some, sums, 2 * NB);
    for (long i = 0; i < unit.count; i++)
      each(some, [&](long j, long c) {
        put(y + slots[i] * hidden + n + j, kept(get(sums + i * 2 * NB + j, c), T{}) * weights[slots[i]], c);
      });
  }
}

// The same for weights that are multiplied as codes: the activations between the products are rounded to codes too.
template <class T>
void expert_codes(const T* x, long hidden, long k, const Experts& experts, const float* weights, const long* slots,
                  const Unit& unit, T* y) {
  const long size = experts.size;
  Scratch& own = scratch();
  float* sums = Scratch::room(own.sums, MB * 2 * NB);
  float* left = Scratch::room(own.more, CodeRows::size(unit.count, std::max(hidden, size)));
  T* active = reinterpret_cast<T*>(Scratch::room(own.wide, UNIT * size));
  slots += unit.start;
  const Matrix gate = experts.gate_up.from(unit.expert * 2 * size, size);
  const Matrix up = experts.gate_up.from(unit.expert * 2 * size + size, size);
  const Matrix down = experts.down.from(unit.expert * hidden, hidden);
  const auto given = CodeRows::of<T>([&](long i) { return x + slots[i] / k * hidden; }, unit.count, hidden, left);
  for (long n = 0; n < size; n += NB) {
    const long some = std::min(NB, size - n);
    given.multiply(gate, n, some, sums, 2 * NB);
    given.multiply(up, n, some, sums + NB, 2 * NB);
    activate(sums, 2 * NB, unit.count, some, active + n, size);
  }
  const auto fed = CodeRows::of<T>([&](long i) { return active + i * size; }, unit.count, size, left);
  for (long n = 0; n < hidden; n += NB) {
    const long some = std::min(NB, hidden - n);
    fed.multiply(down, n, some, sums, 2 * NB);
    for (long i = 0; i < unit.count; i++)
      each(some, [&](long j, long c) {
        put(y + slots[i] * hidden + n + j, kept(get(sums + i * 2 * NB + j, c), T{}) * weights[slots[i]], c);
      });
  }
}

// Sort tokens by expert, run each expert over its tokens, and sum every token's rows in the order of its chosen experts.
template <class T>
void mix(const T* x, long tokens, long hidden, long k, const Experts& experts, const float* weights,
         const int64_t* chosen, T* y, T* out, int threads) {
  std::vector<long> begin(experts.count + 1), slots(tokens * k);
  for (long s = 0; s < tokens * k; s++) begin[chosen[s] + 1]++;
  std::partial_sum(begin.begin(), begin.end(), begin.begin());
  std::vector<long> at(begin.begin(), begin.end() - 1);
  for (long s = 0; s < tokens * k; s++) slots[at[chosen[s]]++] = s;
  std::vector<Unit> all;
  for (long e = 0; e < experts.count; e++) {
    const long own = begin[e + 1] - begin[e], parts = (own + UNIT - 1) / UNIT;
    for (long i = 0; i < parts; i++) {
      const long start = own * i / parts, stop = own * (i + 1) / parts;
      all.push_back({e, begin[e] + start, stop - start});
    }
  }
  std::stable_sort(all.begin(), all.end(), [](const Unit& a, const Unit& b) { return a.count > b.count; });
  const bool pairs = pairable(experts.gate_up) && pairable(experts.down);
  parallel(static_cast<long>(all.size()), threads, [&](long i) {
    const Unit& unit = all[i];
    if (experts.down.kind == INT8_ROWS) return expert_codes(x, hidden, k, experts, weights, slots.data(), unit, y);
    by_form<T>(pairs, [&](auto form) {
      expert_unit<T, decltype(form)::value>(x, hidden, k, experts, weights, slots.data(), unit, y);
    });
  });
  const long slices = std::max(1L, std::min(tokens, tokens * hidden * k >> 14));
  parallel(slices, threads, [&](long part) {
    for (long token = tokens * part / slices; token < tokens * (part + 1) / slices; token++)
      each(hidden, [&](long i, long n) {
        F total = {};
        for (long j = 0; j < k; j++) total += get(y + (token * k + j) * hidden + i, n);
        put(out + token * hidden + i, total, n);
      });
  });
}

// ---- attention

struct Piece {  // keys and values of a span; mirrors ops/cpu/attention.py
  const void *key, *value;
  int64_t count, key_head, key_row, value_head, value_row;
};

struct Span {  // queries start .. stop and their pieces of keys; mask [queries or 1][keys], one byte per entry, or null
  int64_t start, stop, first, last;
  const uint8_t* mask;
  int64_t mask_row, lane;  // lane: of the first key in the softmax's sums
};

template <class T>
struct Attention {
  const T* query;
  long head_step, row_step, heads, kv, dim;
  const Piece* pieces;
  T* out;  // [rows][heads][dim]

  // Queries `from` to `to` of a span, for all heads that share a key head.
  template <Form FORM>
  void block(const Span& span, long head, long from, long to) const {
    constexpr int MR = panel_rows(FORM);
    const long group = heads / kv, rows = (to - from) * group;
    long keys = 0;
    for (long p = span.first; p < span.last; p++) keys += pieces[p].count;
    // On tiles the first key has the place that its number has among those of a chunk.
    const long shift = FORM == Form::TILES ? span.lane % (2 * CHUNK) : 0, step = shift + keys + NR;
    const long width = (dim + NR - 1) / NR * NR, room = (rows + MR - 1) / MR * MR * width;
    Scratch& own = scratch();
    const long deep = units(dim, FORM), shares = FORM == Form::TILES ? units(shift + keys, FORM) : keys;
    float* left = Scratch::room(own.more, (rows + MR) * std::max(deep, shares));
    float* buffer = Scratch::room(own.wide, keys + 3 * W + rows * step * sizeof(Sum<FORM>) / 4 + 1);
    auto* const scores = reinterpret_cast<Sum<FORM>*>(buffer + keys + 3 * W) + shift;
    float* sums = Scratch::room(own.sums, room);
    if (!keys) std::fill_n(sums, room, 0.0f);  // an empty sum
    for (long i = 0; i < rows; i += MR) {
      const T* lines[MR];
      const int some = static_cast<int>(std::min<long>(MR, rows - i));
      for (int j = 0; j < some; j++) lines[j] = line(span, head, from, i + j, group);
      pack_left<T, FORM>(lines, some, dim, left + i * deep);
    }
    long at = 0;
    for (long p = span.first; p < span.last; p++) {
      const Piece& piece = pieces[p];
      const Matrix key{static_cast<const T*>(piece.key) + head * piece.key_head, piece.count, dim, piece.key_row,
                       kind_of<T>(), nullptr, nullptr, nullptr, nullptr, 0, 0, 0};
      for (long n = 0; n < piece.count; n += NB)
        multiply<FORM>(left, rows, dim, key, n, std::min<long>(NB, piece.count - n), scores + at + n, step);
      at += piece.count;
    }
    for (long i = 0; i < rows; i++) {
      const uint8_t* may = span.mask ? span.mask + (from + i / group) * span.mask_row : nullptr;
      soften<T>(scores + i * step, may, keys, buffer, span.lane % W);
    }
#ifdef TILED
    if constexpr (FORM == Form::TILES) mean_on_tiles(span, head, rows, keys, shift, scores - shift, step, left, sums);
#endif
    if constexpr (FORM != Form::TILES) mean(span, head, rows, scores, step, left, sums, width);
    for (long i = 0; i < rows; i++) {
      const long row = span.start + from + i / group, h = head * group + i % group;
      T* const to = out + (row * heads + h) * dim;
      each(dim, [&](long j, long n) { put(to + j, get(across_at<FORM>(sums, dim, width, i, j), n), n); });
    }
  }

  // sums = shares @ the pieces' values.
  void mean(const Span& span, long head, long rows, const float* shares, long step, float* left, float* sums,
            long width) const {
    long at = 0;
    for (long p = span.first; p < span.last; p++) {
      const Piece& piece = pieces[p];
      if (!piece.count) continue;
      const Matrix value{static_cast<const T*>(piece.value) + head * piece.value_head, piece.count, dim,
                         piece.value_row, kind_of<T>(), nullptr, nullptr, nullptr, nullptr, 0, 0, 0};
      for (long i = 0; i < rows; i += MR) {
        const float* lines[MR];
        const int some = static_cast<int>(std::min<long>(MR, rows - i));
        for (int j = 0; j < some; j++) lines[j] = shares + (i + j) * step + at;
        pack_left<float, Form::FLOATS>(lines, some, piece.count, left + i * piece.count);
      }
      multiply_across<Form::FLOATS>(left, rows, piece.count, value, 0, dim, sums, width, at == 0);
      at += piece.count;
    }
  }

#ifdef TILED
  // The same on tiles; each row of shares is preceded by `shift` places. So a chunk is of the same keys, whatever pieces
  // they come in and however many are left out before the first.
  void mean_on_tiles(const Span& span, long head, long rows, long keys, long shift, bf16* shares, long step, float* left,
                     float* sums) const {
    const long places = shift + keys;
    std::vector<const bf16*> lines(places + 1);  // an odd number ends with none
    long at = shift;
    for (long p = span.first; p < span.last; p++)
      for (long k = 0; k < pieces[p].count; k++)
        lines[at++] = static_cast<const bf16*>(pieces[p].value) + head * pieces[p].value_head + k * pieces[p].value_row;
    for (long i = 0; i < rows; i += LINES) {
      const bf16* own[LINES];
      const int some = static_cast<int>(std::min<long>(LINES, rows - i));
      for (int j = 0; j < some; j++) own[j] = std::fill_n(shares + (i + j) * step, shift, bf16{}) - shift;
      pack_left<bf16, Form::TILES, true>(own, some, places, left + i * units(places, Form::TILES));
    }
    multiply_tiles_across(left, rows, places, dim, sums, true,
                          [&](float* right, long column, int some, long from, long held) {
                            pack_lines(lines.data() + 2 * from, column, some, held, right);
                          });
  }
#endif

  const T* line(const Span& span, long head, long from, long i, long group) const {
    return query + (head * group + i % group) * head_step + (span.start + from + i / group) * row_step;
  }

  void run(const Span* spans, long count, int threads) const {
    by_form<T>(true, [&](auto form) { run_as<decltype(form)::value>(spans, count, threads); });
  }

  template <Form FORM>
  void run_as(const Span* spans, long count, int threads) const {
    constexpr long SCORES = 1 << 16, panel = panel_rows(FORM);  // per task, so that they stay in its core's cache
    struct Task {
      long span, head, from, to;
    };
    std::vector<Task> tasks;
    double work = 0;
    for (long s = 0; s < count; s++) {
      const long queries = spans[s].stop - spans[s].start, group = heads / kv;
      long keys = 0;
      for (long p = spans[s].first; p < spans[s].last; p++) keys += pieces[p].count;
      work += 1.0 * queries * keys * heads * dim;
      long most = std::max(std::max<long>(1, 2 * panel / group), SCORES / std::max(1L, keys) / group);
      const long parts = (queries + most - 1) / most;
      for (long h = 0; h < kv; h++)
        for (long i = 0; i < parts; i++) tasks.push_back({s, h, queries * i / parts, queries * (i + 1) / parts});
    }
    parallel(static_cast<long>(tasks.size()), work < 1 << 17 ? 1 : threads, [&](long i) {
      block<FORM>(spans[tasks[i].span], tasks[i].head, tasks[i].from, tasks[i].to);
    });
  }
};

// ---- whole layers


// op(first, last) over slices of the rows.
template <class Op>
void over(long rows, long values, int threads, const Op& op) {
  long slices = std::max(1L, std::min(std::min(rows, 4L * threads), rows * values >> 14));
  parallel(slices, threads, [&](long i) { op(rows * i / slices, rows * (i + 1) / slices); });
}

struct Before {  // mirrors ops/cpu/layer.py: from a layer's input to queries, keys and values
  const void* norm;              // [hidden]
  Matrix query, key, value;      // value.data null: values are the keys before their norm
  const void *query_norm, *key_norm;
  int64_t hidden, heads, kv, dim;
  float eps;
};

template <class T>
void before(const Before& layer, const T* x, const T* cosine, const T* sine, long rows, long skip, T* query, T* key,
            T* value, int threads) {
  const long hidden = layer.hidden, dim = layer.dim, wide = layer.heads * dim, narrow = layer.kv * dim;
  T* const normed = keep<T>(NORMED, rows * hidden);
  over(rows, hidden, threads, [&](long first, long last) {
    for (long i = first; i < last; i++)
      normalise(x + i * hidden, static_cast<const T*>(layer.norm), normed + i * hidden, hidden, layer.eps);
  });
  const bool shared = !layer.value.data;
  std::vector<Side> sides = {{layer.key, key, narrow}};
  if (!shared) sides.push_back({layer.value, value, narrow});
  const auto row = [&](long i) { return normed + i * hidden; };
  const Side queries{layer.query, query, wide};
  if (!skip) sides.push_back(queries);
  products<T>(row, rows, hidden, sides.data(), static_cast<int>(sides.size()), threads, Unused());
  if (skip)  // the first rows have no queries
    products<T>([&](long i) { return row(i + skip); }, rows - skip, hidden, &queries, 1, threads, Unused());
  over(rows, wide + 2 * narrow, threads, [&](long first, long last) {
    for (long i = first; i < last; i++) {
      const T *c = cosine + i * dim, *s = sine + i * dim;
      for (long h = 0; h < layer.kv; h++) {
        T *k = key + i * narrow + h * dim, *v = value + i * narrow + h * dim;
        normalise(shared ? k : v, static_cast<const T*>(nullptr), v, dim, layer.eps);
        normalise(k, static_cast<const T*>(layer.key_norm), k, dim, layer.eps);
        turn(k, c, s, k, dim / 2);
      }
      for (long h = 0; i >= skip && h < layer.heads; h++) {
        T* q = query + (i - skip) * wide + h * dim;
        normalise(q, static_cast<const T*>(layer.query_norm), q, dim, layer.eps);
        turn(q, c, s, q, dim / 2);
      }
    }
  });
}

struct After {  // mirrors ops/cpu/layer.py: from attention's output to the layer's output
  Matrix out, gate, up, down, router;  // router.data null: a dense layer
  Experts experts;
  const void *attention_norm, *mlp_norm, *mlp_after, *experts_norm, *experts_after, *feed_after;
  const void *router_scale, *expert_scale;
  const void *canvas_scalar, *causal_scalar;
  int64_t hidden, inner, width, top_k;  // width: of attention's output
  float eps, root;
};

// The best `k` scores as torch.topk returns them (the same algorithm breaks ties), and their weights.
template <class T>
void route(const T* scores, long count, long k, const T* scale, float* weights, int64_t* chosen,
           std::vector<std::pair<float, int64_t>>& queue, float* wide) {
  for (long e = 0; e < count; e++) wide[count + 2 * W + e] = widen(scores[e]);
  float* own = wide + count + 2 * W;
  soften<float>(own, nullptr, count, wide);
  for (long e = 0; e < count; e++) queue[e] = {own[e], e};
  auto better = [](const auto& a, const auto& b) {
    return (std::isnan(a.first) && !std::isnan(b.first)) || a.first > b.first;
  };
  if (k * 64 <= count) {
    std::partial_sort(queue.begin(), queue.begin() + k, queue.end(), better);
  } else {
    std::nth_element(queue.begin(), queue.begin() + k - 1, queue.end(), better);
    std::sort(queue.begin(), queue.begin() + k - 1, better);
  }
  float total = 0;
  for (long j = 0; j < k; j++) total += queue[j].first;
  for (long j = 0; j < k; j++) {
    chosen[j] = queue[j].second;
    weights[j] = queue[j].first / total * widen(scale[chosen[j]]);
  }
}

template <class T>
void route_rows(const After& layer, const T* h, long rows, float* weights, int64_t* chosen, int threads) {
  const long hidden = layer.hidden, experts = layer.router.rows;
  T *const scaled = keep<T>(NORMED, rows * hidden), *const scores = keep<T>(SCORES_OF, rows * experts);
  const T* scale = static_cast<const T*>(layer.router_scale);
  over(rows, hidden, threads, [&](long first, long last) {
    for (long i = first; i < last; i++) {
      T* own = scaled + i * hidden;
      normalise(h + i * hidden, static_cast<const T*>(nullptr), own, hidden, layer.eps);
      each(hidden, [&](long j, long n) {
        put(own + j, kept(get(own + j, n) * get(scale + j, n), T{}) * layer.root, n);
      });
    }
  });
  linear(scaled, rows, hidden, layer.router, scores, experts, threads);
  over(rows, experts * 8, threads, [&](long first, long last) {
    std::vector<std::pair<float, int64_t>> queue(experts);
    std::vector<float> wide(2 * (experts + W) + W);
    for (long i = first; i < last; i++)
      route(scores + i * experts, experts, layer.top_k, static_cast<const T*>(layer.expert_scale),
            weights + i * layer.top_k, chosen + i * layer.top_k, queue, wide.data());
  });
}

// x, mixed and out have the same rows; causal: per row whether it is in the causal pass, or null: `all` of them.
template <class T>
void after(const After& layer, const T* x, const T* mixed, T* out, long rows, const uint8_t* causal, int all,
           int threads) {
  const long hidden = layer.hidden, inner = layer.inner;
  auto norm = [&](const void* weight) { return static_cast<const T*>(weight); };
  T *const h = keep<T>(STATES, rows * hidden), *const fed = keep<T>(FED, rows * hidden);
  T* const active = keep<T>(ACTIVE, rows * inner);
  linear(mixed, rows, layer.width, layer.out, fed, hidden, threads);
  T* const normed = keep<T>(NORMED, rows * hidden);
  over(rows, hidden * 2, threads, [&](long first, long last) {
    std::vector<T> line(hidden);
    for (long i = first * hidden; i < last * hidden; i += hidden) {
      normalise(fed + i, norm(layer.attention_norm), line.data(), hidden, layer.eps);
      each(hidden, [&](long j, long n) { put(h + i + j, get(x + i + j, n) + get(line.data() + j, n), n); });
      normalise(h + i, norm(layer.mlp_norm), normed + i, hidden, layer.eps);
    }
  });
  const Side gated{layer.gate, nullptr, 0, &layer.up};
  products<T>([&](long i) { return normed + i * hidden; }, rows, hidden, &gated, 1, threads,
              [&](long m, long count, long n, long columns, const auto* sums, long step) {
                activate(sums, step, count, columns, active + m * inner + n, inner);
              });
  linear(active, rows, inner, layer.down, fed, hidden, threads);
  T* const routed = layer.router.data ? keep<T>(ROUTED, rows * hidden) : nullptr;
  if (routed) {
    std::vector<float> weights(rows * layer.top_k);
    std::vector<int64_t> chosen(rows * layer.top_k);
    route_rows(layer, h, rows, weights.data(), chosen.data(), threads);
    over(rows, hidden, threads, [&](long first, long last) {
      for (long i = first * hidden; i < last * hidden; i += hidden)
        normalise(h + i, norm(layer.experts_norm), normed + i, hidden, layer.eps);
    });
    mix(normed, rows, hidden, layer.top_k, layer.experts, weights.data(), chosen.data(),
        keep<T>(SLOTS, rows * layer.top_k * hidden), routed, threads);
  }
  const float scalars[] = {layer.canvas_scalar ? widen(*norm(layer.canvas_scalar)) : 1.0f,
                           widen(*norm(layer.causal_scalar))};
  over(rows, hidden * 3, threads, [&](long first, long last) {
    std::vector<T> line(hidden), more(hidden);
    for (long row = first; row < last; row++) {
      const long i = row * hidden;
      const float scalar = scalars[causal ? causal[row] != 0 : all != 0];
      T* own = fed + i;
      if (routed) {
        normalise(own, norm(layer.mlp_after), line.data(), hidden, layer.eps);
        normalise(routed + i, norm(layer.experts_after), more.data(), hidden, layer.eps);
        each(hidden, [&](long j, long n) { put(own + j, get(line.data() + j, n) + get(more.data() + j, n), n); });
      }
      normalise(own, norm(layer.feed_after), line.data(), hidden, layer.eps);
      each(hidden, [&](long j, long n) {
        put(out + i + j, kept(get(h + i + j, n) + get(line.data() + j, n), T{}) * scalar, n);
      });
    }
  });
}

}  // namespace

extern "C" {

#define DEFINE(T, suffix)                                                                                           \
  void linear_##suffix(const T* x, long rows, long step, const Matrix* weight, T* out, long out_step, int threads) { \
    linear(x, rows, step, *weight, out, out_step, threads);                                                         \
  }                                                                                                                 \
  void combine_##suffix(const T* shares, long rows, long step, const Matrix* weight, float* out, int threads) {     \
    combine(shares, rows, step, *weight, out, threads);                                                             \
  }                                                                                                                 \
  void mix_##suffix(const T* x, long tokens, long hidden, long k, const Experts* experts, const float* weights,     \
                    const int64_t* chosen, T* y, T* out, int threads) {                                             \
    mix(x, tokens, hidden, k, *experts, weights, chosen, y, out, threads);                                          \
  }                                                                                                                 \
  void attend_##suffix(const T* query, long head_step, long row_step, long heads, long kv, long dim,                \
                       const Span* spans, long count, const Piece* pieces, T* out, int threads) {                   \
    Attention<T>{query, head_step, row_step, heads, kv, dim, pieces, out}.run(spans, count, threads);               \
  }                                                                                                                 \
  void before_##suffix(const Before* layer, const T* x, const T* cosine, const T* sine, long rows, long skip,       \
                       T* query, T* key, T* value, int threads) {                                                   \
    before(*layer, x, cosine, sine, rows, skip, query, key, value, threads);                                        \
  }                                                                                                                 \
  void after_##suffix(const After* layer, const T* x, const T* mixed, T* out, long rows, const uint8_t* causal,     \
                      int all, int threads) {                                                                       \
    after(*layer, x, mixed, out, rows, causal, all, threads);                                                       \
    scratch().trim();                                                                                               \
  }                                                                                                                 \
  long room_for_head_##suffix(long rows, long vocab, long columns, int mean) {                                      \
    return head_room<T>(rows, vocab, columns, mean);                                                                \
  }                                                                                                                 \
  void sample_from_hidden_##suffix(const Head* head, int threads) {                                                 \
    head_step<T>(*head, threads);                                                                                   \
    scratch().trim();                                                                                               \
  }

DEFINE(float, float32)
DEFINE(bf16, bfloat16)

int uses_tiles() { return has_tiles(); }

long held_bytes() { return scratch().bytes(); }  // kept by the calling thread between calls

void give_back() { scratch().trim(0); }  // frees what the calling thread keeps

}  // extern "C"
