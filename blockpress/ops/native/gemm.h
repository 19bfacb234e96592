// Products of rows with a weight matrix, blocked for the caches: what oneDNN does, fused with the steps around it.
//
//     x [rows][depth]      --panels of MR rows-->    left  [panel][depth][MR]     once per product
//     w [columns][depth]   --panels of NR columns--> right [depth][NR]            a panel at a time, KC deep, in float32
//     left panel x right panel --MR x 2 vectors of sums--> a block of sums [rows][columns] --emit--> their destination
//
// A weight stays in memory as stored (weight.h): half floats and codes become float32 in the panel, which is read again
// for every MR rows. Where the processor multiplies pairs of bfloat16 and both operands have that type, panels hold
// pairs. With up to FEW rows no panel pays: the same sums are formed from the weight's lines, transposed in registers.
// Where it has matrix tiles for bfloat16, these take the place of pairs (tiles.h).
//
// Sums run over the depth in order, one fused multiply-add after the other, on tiles a chunk after the other, for any
// number of rows, threads and tasks: the bits of a row depend on the row and the weight alone.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "pool.h"
#include "simd.h"
#include "tiles.h"
#include "weight.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors wider than the processor's only pass between inlined functions

namespace {

#if defined(__AVX512F__)
constexpr int VW = 16, MR = 12;
constexpr long KC = 192;
#elif defined(__AVX__)
constexpr int VW = 8, MR = 6;
constexpr long KC = 256;
#else
constexpr int VW = 4, MR = 6;
constexpr long KC = 256;
#endif
#ifdef __AVX512BF16__
constexpr bool HAS_PAIRS = true;
#else
constexpr bool HAS_PAIRS = false;
#endif
constexpr int NR = 2 * VW;
constexpr long NB = 64 > NR ? 64 : NR;  // most columns of a task
constexpr long MB = 288;                // most rows of a task, whole panels: a canvas of 256 is one
constexpr long ROWS = 4 * MB;           // most rows whose panels are held at a time
constexpr long FEW = 4;

typedef float V __attribute__((vector_size(4 * VW), aligned(4), may_alias));

// How operands are multiplied: as float32, as pairs of bfloat16, or as such pairs on matrix tiles.
enum class Form { FLOATS, PAIRS, TILES };

// The rows of a panel.
constexpr int panel_rows(Form form) { return form == Form::TILES ? LINES : MR; }

// Whether a weight may be multiplied as pairs of bfloat16: it has that type, or is codes, which are rounded to it.
inline bool pairable(const Matrix& w) { return w.kind == BFLOAT16 || w.kind > FLOAT16; }

template <class T>
constexpr int64_t kind_of() { return sizeof(T) == 4 ? FLOAT32 : BFLOAT16; }

inline V loadv(const float* p) { return *reinterpret_cast<const V*>(p); }
inline void storev(float* p, V x) { *reinterpret_cast<V*>(p) = x; }

template <bool PAIRS>
inline V fused(V sum, float x, V y) {
#ifdef __AVX512BF16__
  if (PAIRS) {
    const __m512i all = _mm512_set1_epi32(__builtin_bit_cast(int, x));
    return (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)all, (__m512bh)y);
  }
#endif
  return sum + (x - V{}) * y;
}

// Sums of M rows and two vectors of columns, from 0 if `first`, else added to what is there.
template <int M, bool PAIRS>
__attribute__((noinline)) void tile(long depth, const float* left, const float* right, float* to, long step, bool first) {
  V sums[M][2];
#pragma GCC unroll 16
  for (int i = 0; i < M; i++) {
    sums[i][0] = first ? V{} : loadv(to + i * step);
    sums[i][1] = first ? V{} : loadv(to + i * step + VW);
  }
  for (long k = 0; k < depth; k++) {
    V low = loadv(right), high = loadv(right + VW);
#pragma GCC unroll 16
    for (int i = 0; i < M; i++) {
      sums[i][0] = fused<PAIRS>(sums[i][0], left[i], low);
      sums[i][1] = fused<PAIRS>(sums[i][1], left[i], high);
    }
    left += MR, right += NR;
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; i++) {
    storev(to + i * step, sums[i][0]);
    storev(to + i * step + VW, sums[i][1]);
  }
}

template <bool PAIRS, int M = MR>
inline void tile_of(long rows, long depth, const float* left, const float* right, float* to, long step, bool first) {
  if (rows == M) return tile<M, PAIRS>(depth, left, right, to, step, first);
  if constexpr (M > 1) tile_of<PAIRS, M - 1>(rows, depth, left, right, to, step, first);
}

#ifdef __AVX2__
// The columns of eight lines of eight values. Halves of two lines are loaded into one register: that takes fewer shuffles.
inline void transpose(const float* const* from, long at, __m256 (&column)[8]) {
  __m256 r[8], t[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    const float *low = from[i % 4] + at + i / 4 * 4, *high = from[i % 4 + 4] + at + i / 4 * 4;
    r[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)), _mm_loadu_ps(high), 1);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; j++) {
      column[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
      column[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0xee);
    }
}

// The same written, `step` apart, with the first R values of each column.
template <int R>
inline void transpose(const float* const* from, long at, float* to, long step) {
  __m256 r[8];
  transpose(from, at, r);
  for (int i = 0; i < 8; i++) {
    if (R == 8) _mm256_storeu_ps(to + i * step, r[i]);
    else _mm_storeu_ps(to + i * step, _mm256_castps256_ps128(r[i]));
    if (R == 6) _mm_storel_pi(reinterpret_cast<__m64*>(to + i * step + 4), _mm256_extractf128_ps(r[i], 1));
  }
}

template <bool PAIRS>
inline __m256 fused(__m256 sum, const float* x, __m256 y) {
#ifdef __AVX512BF16__
  if (PAIRS) return _mm256_dpbf16_ps(sum, (__m256bh)_mm256_broadcast_ss(x), (__m256bh)y);
#endif
  return _mm256_fmadd_ps(_mm256_broadcast_ss(x), y, sum);
}

// `tile` straight from NR lines of the weight, transposed in registers: the same sums, and no panel for few rows. A
// cache line of each of eight lines is used up at once, since lines a power of two apart share a cache set.
template <int M, bool PAIRS>
__attribute__((noinline)) void direct(long depth, const float* left, const float* const* lines, float* to, long step,
                                      bool first) {
  constexpr int G = NR / 8;
  __m256 sums[M][G];
  for (int i = 0; i < M; i++)
    for (int g = 0; g < G; g++) sums[i][g] = first ? _mm256_setzero_ps() : _mm256_loadu_ps(to + i * step + 8 * g);
  long k = 0;
  for (; k + 16 <= depth; k += 16)
#pragma GCC unroll 4
    for (int g = 0; g < G; g++)
#pragma GCC unroll 2
      for (long at = k; at < k + 16; at += 8) {
        __m256 r[8];
        for (int i = 0; at == k && i < 8; i++) __builtin_prefetch(lines[8 * g + i] + at + 128, 0, 2);
        transpose(lines + 8 * g, at, r);
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++)
#pragma GCC unroll 4
          for (int i = 0; i < M; i++) sums[i][g] = fused<PAIRS>(sums[i][g], left + (at + j) * MR + i, r[j]);
      }
  for (; k < depth; k++)
    for (int g = 0; g < G; g++) {
      float column[8];
      for (int i = 0; i < 8; i++) std::memcpy(column + i, lines[8 * g + i] + k, 4);
      for (int i = 0; i < M; i++) sums[i][g] = fused<PAIRS>(sums[i][g], left + k * MR + i, _mm256_loadu_ps(column));
    }
  for (int i = 0; i < M; i++)
    for (int g = 0; g < G; g++) _mm256_storeu_ps(to + i * step + 8 * g, sums[i][g]);
}

template <bool PAIRS, int M = FEW>
inline void direct_of(long rows, long depth, const float* left, const float* const* lines, float* to, long step,
                      bool first) {
  if (rows == M) return direct<M, PAIRS>(depth, left, lines, to, step, first);
  if constexpr (M > 1) direct_of<PAIRS, M - 1>(rows, depth, left, lines, to, step, first);
}
#endif

// N of the lines that are interleaved to[k][R].
template <int R, int N>
inline void some_lines(const float* const* from, long depth, float* to) {
  long k = 0;
#ifdef __AVX2__
  const float* lines[8];
  for (int i = 0; i < 8; i++) lines[i] = from[std::min(i, N - 1)];
  for (; k + 8 <= depth; k += 8) transpose<N>(lines, k, to + k * R, R);
#endif
  for (; k < depth; k++)
    for (int i = 0; i < N; i++) std::memcpy(to + k * R + i, from[i] + k, 4);
}

// Lines interleaved: to[k][R] of `count` lines, 1 to R, and of the first again for each that is missing: nobody reads what
// comes of those. 32-bit values, or pairs of bfloat16.
template <int R>
void panel(const float* const* from, int count, long depth, float* to) {
  static_assert(R % 8 == 0 || R % 8 == 4 || R % 8 == 6);
  const float* lines[R];
  for (int i = 0; i < R; i++) lines[i] = from[i < count ? i : 0];
  for (int i = 0; i + 8 <= R; i += 8) some_lines<R, 8>(lines + i, depth, to + i);
  if constexpr (R % 8) some_lines<R, R % 8>(lines + R / 8 * 8, depth, to + R / 8 * 8);
}

// Floats aligned to a cache line: adjacent blocks that two threads write share no line. Many of them lie on large pages, of
// which a fault brings 2 MB.
struct Floats {
  static constexpr size_t LARGE_PAGE = 2 << 20, LINE = 64;
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  float* data = nullptr;
  long size = 0;
  std::unique_ptr<float, Free> memory;

  void resize(long count) {
    memory.reset();  // first, so that both never exist at once
    const size_t bytes = static_cast<size_t>(count) * 4, unit = bytes < 2 * LARGE_PAGE ? LINE : LARGE_PAGE;
    const size_t whole = (bytes + unit - 1) / unit * unit;
    memory.reset(count ? static_cast<float*>(std::aligned_alloc(unit, whole)) : nullptr);
    if (count && !memory) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    if (unit == LARGE_PAGE) madvise(memory.get(), whole, MADV_HUGEPAGE);
#endif
    data = memory.get();
    size = count;
  }
};

// A thread's memory, kept for its next task: new pages would cost as much as the steps that fill them.
struct Scratch {
  static constexpr long LARGE = 8 << 20;  // larger buffers are not kept
  Floats right, lines, sums, left, more, wide, blocks;
  Floats between[8];  // between the steps of one call: forward.cpp
  Values values;

  static float* room(Floats& memory, long count) {
    if (memory.size < count) memory.resize(count);
    return memory.data;
  }

  template <class Op>
  void every(const Op& op) {
    for (auto* memory : {&right, &lines, &sums, &left, &more, &wide, &blocks}) op(*memory);
    for (auto& memory : between) op(memory);
  }

  long bytes() {
    long total = 0;
    every([&](Floats& memory) { total += 4 * memory.size; });
    return total;
  }

  // Free buffers that are larger than that.
  void trim(long most = LARGE) {
    every([&](Floats& memory) {
      if (memory.size > most) memory.resize(0);
    });
  }
};

inline Scratch& scratch() {
  static thread_local Scratch own;
  return own;
}

// A line's units in a panel: whole chunks of them for tiles.
constexpr long units(long depth, Form form) {
  const long pairs = (depth + 1) / 2;
  return form == Form::FLOATS ? depth : form == Form::PAIRS ? pairs : (pairs + CHUNK - 1) / CHUNK * CHUNK;
}

// op(form) for activations of T, with the fastest form that the weights can take.
template <class T, class Op>
inline void by_form(bool pairs, const Op& op) {
  if constexpr (HAS_PAIRS && sizeof(T) == 2) {
#ifdef TILED
    if (pairs && has_tiles()) return op(std::integral_constant<Form, Form::TILES>());
#endif
    if (pairs) return op(std::integral_constant<Form, Form::PAIRS>());
  }
  op(std::integral_constant<Form, Form::FLOATS>());
}

// One panel of rows, the whole depth; ACROSS: for a product with a matrix whose lines are the depth.
template <class T, Form FORM, bool ACROSS = false>
void pack_left(const T* const* rows, int count, long depth, float* to) {
  constexpr bool PAIRS = FORM != Form::FLOATS;
  constexpr int MR = panel_rows(FORM);
  const float* lines[MR];
  const long pairs = (depth + 1) / 2;
  if (PAIRS && depth % 2 == 0) {
    for (int i = 0; i < count; i++) lines[i] = reinterpret_cast<const float*>(rows[i]);
  } else if (PAIRS) {  // the last pair is padded with 0
    float* buffer = Scratch::room(scratch().lines, MR * pairs);
    for (int i = 0; i < count; i++) {
      float* own = buffer + i * pairs;
      own[pairs - 1] = 0;
      std::memcpy(own, rows[i], depth * 2);
      lines[i] = own;
    }
  } else if (sizeof(T) == 4) {
    for (int i = 0; i < count; i++) lines[i] = reinterpret_cast<const float*>(rows[i]);
  } else {
    float* buffer = Scratch::room(scratch().lines, MR * depth);
    for (int i = 0; i < count; i++) {
      each(depth, [&](long k, long n) { put(buffer + i * depth + k, get(rows[i] + k, n), n); });
      lines[i] = buffer + i * depth;
    }
  }
#ifdef TILED
  if constexpr (FORM == Form::TILES) return (ACROSS ? line_up : interleave)(lines, count, pairs, to);
#endif
  if constexpr (FORM != Form::TILES) panel<MR>(lines, count, PAIRS ? pairs : depth, to);
}

// Columns first .. first + count of the product's right side, units from .. from + depth of it: in place, or widened.
template <bool PAIRS>
void right_lines(const Matrix& w, long first, int count, long from, long depth, const float** lines) {
  Scratch& own = scratch();
  if (PAIRS && w.kind > FLOAT16) {  // codes, rounded to bfloat16 as `unpack` rounds them
    float* buffer = Scratch::room(own.lines, NR * depth);
    for (int i = 0; i < count; i++) {
      bf16* to_pairs = reinterpret_cast<bf16*>(buffer + i * depth);
      to_pairs[2 * depth - 1] = {};
      w.codes(first + i, 2 * from, std::min<long>(2 * depth, w.columns - 2 * from), to_pairs, &own.values);
      lines[i] = buffer + i * depth;
    }
  } else if (PAIRS && w.columns % 2 == 0) {
    for (int i = 0; i < count; i++) lines[i] = reinterpret_cast<const float*>(w.at<bf16>(first + i, 2 * from));
  } else if (PAIRS) {
    float* buffer = Scratch::room(own.lines, NR * depth);
    for (int i = 0; i < count; i++) {
      long values = std::min<long>(2 * depth, w.columns - 2 * from);
      buffer[i * depth + depth - 1] = 0;
      std::memcpy(buffer + i * depth, w.at<bf16>(first + i, 2 * from), values * 2);
      lines[i] = buffer + i * depth;
    }
  } else {
    float* buffer = Scratch::room(own.lines, NR * depth);
    for (int i = 0; i < count; i++) lines[i] = w.line(first + i, from, depth, buffer + i * depth);
  }
}

template <bool PAIRS>
void pack_right(const Matrix& w, long first, int count, long from, long depth, float* to) {
  const float* lines[NR];
  right_lines<PAIRS>(w, first, count, from, depth, lines);
  panel<NR>(lines, count, depth, to);
}

inline void pack_pairs(const Matrix& w, long first, int count, long from, long depth, float* to) {
  const bool in_place = w.kind == BFLOAT16 && count == NR;
  float* const wide = Scratch::room(scratch().lines, 2 * NR);
  std::fill_n(wide, 2 * NR, 0.0f);
  for (long k = 0; k < depth; k++, to += NR) {
    const long row = 2 * (from + k);
    const bool odd = row + 1 == w.rows;  // the last pair is padded with 0
    if (in_place && !odd) {
      const bf16 *low = w.at<bf16>(row, first), *high = w.at<bf16>(row + 1, first);
      for (long i = 0; i < NR; i += W) store(to + i, (F)((U)load(low + i) >> 16 | (U)load(high + i)));
      continue;
    }
    w.line(row, first, count, wide);
    if (odd) std::fill_n(wide + NR, NR, 0.0f);
    else w.line(row + 1, first, count, wide + NR);
    for (long i = 0; i < NR; i += W) store(to + i, (F)(rounded(load(wide + i)) | rounded(load(wide + NR + i)) << 16));
  }
}

// The same for a matrix whose lines are the depth: nothing is transposed, but two lines become one of pairs.
template <bool PAIRS>
void pack_across(const Matrix& w, long first, int count, long from, long depth, float* to) {
  if constexpr (PAIRS) return pack_pairs(w, first, count, from, depth, to);
  for (long k = 0; k < depth; k++, to += NR) {
    const float* line = w.line(from + k, first, count, to);
    if (line != to && count == NR) {
      storev(to, loadv(line));
      storev(to + VW, loadv(line + VW));
    } else if (line != to) {
      std::memcpy(to, line, count * 4);
    }
    for (int i = count; i < NR; i++) to[i] = 0;
  }
}

// Prefetches the weights of the next panel while this one is multiplied, so that it need not wait for memory.
struct Ahead {
  const char* data;
  long lines, line_bytes, run, each, at = 0;

  Ahead(const Matrix& w, bool across, bool pairs, long first, long from, long deep, long calls) {
    const long whole = pairs ? 2 : 1, row = across ? from * whole : first, column = across ? first : from * whole;
    const long left = across ? std::min<long>(deep * whole, w.rows - row) : std::min<long>(NR, w.rows - first);
    line_bytes = w.bytes(w.step);
    data = static_cast<const char*>(w.data) + w.bytes(row * w.step + column);
    lines = across && first >= w.columns ? 0 : std::max(0L, left);
    run = w.bytes(across ? NR : deep * whole) / 64 + 1;
    each = (lines * run + calls - 1) / calls;
  }

  void fetch() {
    for (long i = 0; i < each && lines > 0; i++) {
      __builtin_prefetch(data + at * 64, 0, 2);
      if (++at == run) at = 0, lines--, data += line_bytes;
    }
  }
};

#ifdef TILED
constexpr long TILES_DEEP = 16 * CHUNK;  // units of a panel: with 32 lines two thirds of the L1 cache

// `multiply` on tiles, which rounds the sums. The weight's lines are the left side, as they lie where they are bfloat16,
// and sums are turned.
inline void multiply_tiles(const float* left, long rows, long depth, const Matrix& w, long first, long count, bf16* to,
                           long step) {
  const long all = units(depth, Form::TILES), pairs = (depth + 1) / 2, panels = (rows + LINES - 1) / LINES;
  const long across = (count + LINES - 1) / LINES;
  float* const right = Scratch::room(scratch().right, LINES * TILES_DEEP);
  // Blocks of sums are held until they are turned: all of them, or if the depth is one panel, this one and the last.
  const long held_blocks = all > TILES_DEEP ? panels * across + 1 : 2;
  float* const blocks = Scratch::room(scratch().blocks, held_blocks * LINES * LINES);
  Turning turning;
  const Tiles tiles;
  for (long from = 0; from < all; from += TILES_DEEP) {
    const long deep = std::min(TILES_DEEP, all - from), held = std::min(deep, pairs - from);
    for (long j = 0; j < across; j++) {
      const long column = first + j * LINES;
      const int some = static_cast<int>(std::min<long>(LINES, count - j * LINES));
      Lined own{right, CHUNK, LINES * CHUNK};
      if (w.kind == BFLOAT16 && some == LINES && held == deep && w.step % 2 == 0 && w.columns % 2 == 0) {
        own = {reinterpret_cast<const float*>(w.at<bf16>(column, 2 * from)), w.step / 2, CHUNK};
      } else {
        const float* lines[LINES];
        right_lines<true>(w, column, some, from, held, lines);
        if (w.kind > FLOAT16 && some == LINES && held == deep) own = {lines[0], held, CHUNK};  // codes, one after the other
        else line_up(lines, some, held, right);
      }
      for (long i = 0; i < panels; i++) {
        const int here = static_cast<int>(std::min<long>(LINES, rows - i * LINES));
        const float* const panel = left + i * LINES * all + from * LINES;
        float* const block = blocks + (j * panels + i) % held_blocks * LINES * LINES;
        const auto between = [&] { turning.next(), turning.next(); };
        if (here > 16) tile_sums<true, true>(deep / CHUNK, own, panel, block, from == 0, between);
        else tile_sums<false, true>(deep / CHUNK, own, panel, block, from == 0, between);
        if (from + deep < all) continue;
        turning.start(block, to + i * LINES * step + j * LINES, step, here, some);
      }
    }
  }
  turning.finish();
}

// The same ACROSS: rows are the left side. The sums are blocks [row panel][column panel][32][32], added to unless `fresh`.
// pack(panel, first column, columns, from, units) interleaves the weight's lines.
template <class Pack>
void multiply_tiles_across(const float* left, long rows, long depth, long count, float* blocks, bool fresh,
                           const Pack& pack) {
  const long all = units(depth, Form::TILES), pairs = (depth + 1) / 2, across = (count + LINES - 1) / LINES;
  float* const right = Scratch::room(scratch().right, LINES * TILES_DEEP);
  const Tiles tiles;
  for (long from = 0; from < all; from += TILES_DEEP) {
    const long deep = std::min(TILES_DEEP, all - from), held = std::min(deep, pairs - from);
    for (long j = 0; j < across; j++) {
      pack(right, j * LINES, static_cast<int>(std::min<long>(LINES, count - j * LINES)), from, held);
      std::fill_n(right + held * LINES, (deep - held) * LINES, 0.0f);
      for (long i = 0; i < rows; i += LINES) {
        const Lined own{left + i * all + from * LINES, CHUNK, LINES * CHUNK};
        float* const block = blocks + (i / LINES * across + j) * LINES * LINES;
        tile_sums<true, false>(deep / CHUNK, own, right, block, fresh && from == 0, [] {});
      }
    }
  }
}

// Where such blocks have a row's sums from `column` on: 16 of them, from a multiple of 16.
inline const float* in_blocks(const float* blocks, long across, long row, long column) {
  return blocks + (row / LINES * across + column / LINES) * LINES * LINES + row % LINES * LINES + column % LINES;
}
#endif

// `multiply`, or ACROSS `multiply_across`, in float32 or pairs.
template <bool PAIRS, bool ACROSS>
void multiply_panels(const float* left, long rows, long depth, const Matrix& w, long first, long count, float* to, long step,
                     bool fresh) {
  const long all = units(depth, PAIRS ? Form::PAIRS : Form::FLOATS);
#ifdef __AVX2__
  if (!ACROSS && rows <= FEW) {
    for (long j = 0; j < count; j += NR) {
      const float* lines[NR];
      const int some = static_cast<int>(std::min<long>(NR, count - j));
      right_lines<PAIRS>(w, first + j, some, 0, all, lines);
      std::fill(lines + some, lines + NR, lines[0]);
      direct_of<PAIRS>(rows, all, left, lines, to + j, step, fresh);
    }
    return;
  }
#endif
  float* right = Scratch::room(scratch().right, KC * NR);
  for (long from = 0; from < all; from += KC) {
    const long deep = std::min(KC, all - from);
    for (long j = 0; j < count; j += NR) {
      const int some = static_cast<int>(std::min<long>(NR, count - j));
      if (ACROSS) pack_across<PAIRS>(w, first + j, some, from, deep, right);
      else pack_right<PAIRS>(w, first + j, some, from, deep, right);
      Ahead ahead(w, ACROSS, PAIRS, first + j + NR, from, deep, (rows + MR - 1) / MR);
      for (long i = 0; i < rows; i += MR) {
        ahead.fetch();
        tile_of<PAIRS>(std::min<long>(MR, rows - i), deep, left + i * all + from * MR, right, to + i * step + j, step,
                       fresh && from == 0);
      }
    }
  }
}

// What `multiply` gives sums as: tiles round them to what they are multiplied in.
template <Form FORM>
using Sum = std::conditional_t<FORM == Form::TILES, bf16, float>;

// Sums of packed rows with columns first .. first + count; `step` has room for whole panels of columns, but tiles write no
// more than `count`.
template <Form FORM>
void multiply(const float* left, long rows, long depth, const Matrix& w, long first, long count, Sum<FORM>* to, long step) {
#ifdef TILED
  if constexpr (FORM == Form::TILES) return multiply_tiles(left, rows, depth, w, first, count, to, step);
#endif
  if constexpr (FORM != Form::TILES)
    multiply_panels<FORM == Form::PAIRS, false>(left, rows, depth, w, first, count, to, step, true);
}

// The sums of shares @ w: rows of `step`, or on tiles blocks of them (`in_blocks`); added to unless `fresh`.
template <Form FORM>
void multiply_across(const float* left, long rows, long depth, const Matrix& w, long first, long count, float* to, long step,
                     bool fresh) {
#ifdef TILED
  if constexpr (FORM == Form::TILES)
    return multiply_tiles_across(left, rows, depth, count, to, fresh,
                                 [&](float* right, long column, int some, long from, long held) {
                                   pack_pairs(w, first + column, some, from, held, right);
                                 });
#endif
  if constexpr (FORM != Form::TILES)
    multiply_panels<FORM == Form::PAIRS, true>(left, rows, depth, w, first, count, to, step, fresh);
}

// The sums of a row from a multiple of W on, as `multiply_across` leaves those of `count` columns.
template <Form FORM>
inline const float* across_at(const float* sums, long count, long step, long row, long column) {
#ifdef TILED
  if constexpr (FORM == Form::TILES) return in_blocks(sums, (count + LINES - 1) / LINES, row, column);
#endif
  return sums + row * step + column;
}

// One of the weights that the same rows are multiplied with. The products go to rows of T, `step` apart, or where that is
// null they are emitted, together with those of the same columns of `twin`.
struct Side {
  Matrix own;
  void* out = nullptr;
  long step = 0;
  const Matrix* twin = nullptr;
};

// pack(panel, lines, how many) for the panels of rows start .. start + here; row(i) points to row i of x.
template <class T, Form FORM = Form::FLOATS, class Row, class Pack>
void row_panels(const Row& row, long start, long here, int threads, const Pack& pack) {
  constexpr int MR = panel_rows(FORM);
  const long panels = (here + MR - 1) / MR;
  parallel((panels + 7) / 8, threads, [&](long part) {
    for (long p = part * 8; p < std::min(panels, part * 8 + 8); p++) {
      const T* lines[MR];
      const int some = static_cast<int>(std::min<long>(MR, here - p * MR));
      for (int i = 0; i < some; i++) lines[i] = row(start + p * MR + i);
      pack(p, lines, some);
    }
  });
}

// Writes a block of sums as values of T.
template <class T, class S>
inline void copy_out(const S* sums, long step, long rows, long columns, T* to, long to_step) {
  for (long i = 0; i < rows; i++)
    each(columns, [&](long j, long n) { put(to + i * to_step + j, get(sums + i * step + j, n), n); });
}

// multiply(weight, first row, rows, first column, columns, to, step), then emit, for blocks of rows start .. start +
// here with all columns of the sides: smaller blocks where there would be too few for the `used` threads. Sums are of S,
// and where that is T they go to their destination at once.
template <class T, class S, class Multiply, class Emit>
void blocks(const Side* sides, int count, long start, long here, int threads, int used, const Multiply& multiply,
            const Emit& emit) {
  struct Task {
    int side;
    long row, column;
  };
  std::vector<Task> tasks;
  long block = NB;
  for (;; block /= 2) {
    tasks.clear();
    for (long m = 0; m < here; m += MB)
      for (int s = 0; s < count; s++)
        for (long n = 0; n < sides[s].own.rows; n += block) tasks.push_back({s, m, n});
    if (threads <= 1 || static_cast<long>(tasks.size()) >= 4 * threads || block <= NR) break;
  }
  parallel(static_cast<long>(tasks.size()), used, [&](long i) {
    const Task& task = tasks[i];
    const Side& side = sides[task.side];
    const long m = std::min(MB, here - task.row), n = std::min(block, side.own.rows - task.column);
    T* const out = static_cast<T*>(side.out) + (start + task.row) * side.step + task.column;
    if constexpr (std::is_same<S, bf16>::value) {
      if (side.out) return multiply(side.own, task.row, m, task.column, n, out, side.step);
    }
    S* sums = reinterpret_cast<S*>(Scratch::room(scratch().sums, MB * 2 * NB));
    multiply(side.own, task.row, m, task.column, n, sums, 2 * NB);
    if (side.out) return copy_out(sums, 2 * NB, m, n, out, side.step);
    if (side.twin) multiply(*side.twin, task.row, m, task.column, n, sums + NB, 2 * NB);
    emit(start + task.row, m, task.column, n, sums, 2 * NB);
  });
}

// x @ weight^T of each side, to its destination or to emit(first row, rows, first column, columns, sums, step) in blocks; a
// twin's sums follow at NB. row(i) points to row i of x.
template <class T, Form FORM, class Row, class Emit>
void products_as(const Row& row, long rows, long depth, const Side* sides, int count, int threads, const Emit& emit) {
  constexpr int MR = panel_rows(FORM);
  const long all = units(depth, FORM);
  float* const left = Scratch::room(scratch().left, (std::min(rows, ROWS) + MR) * all);
  for (long start = 0; start < rows; start += ROWS) {
    const long here = std::min(ROWS, rows - start);
    row_panels<T, FORM>(row, start, here, threads, [&](long p, const T* const* lines, int some) {
      pack_left<T, FORM>(lines, some, depth, left + p * MR * all);
    });
    const auto by = [&](const Matrix& w, long first, long m, long column, long n, Sum<FORM>* to, long step) {
      multiply<FORM>(left + first * all, m, depth, w, column, n, to, step);
    };
    blocks<T, Sum<FORM>>(sides, count, start, here, threads, rows * depth * NB < 1 << 15 ? 1 : threads, by, emit);
  }
}

template <class T, class Row, class Emit>  // in int8.h: for weights that are all multiplied as codes
void code_products(const Row& row, long rows, long depth, const Side* sides, int count, int threads, const Emit& emit);

template <class T, class Row, class Emit>
void products(const Row& row, long rows, long depth, const Side* sides, int count, int threads, const Emit& emit) {
  if (!rows) return;
  if (sides[0].own.kind == INT8_ROWS) return code_products<T>(row, rows, depth, sides, count, threads, emit);
  bool pairs = true;
  for (int s = 0; s < count; s++) pairs = pairs && pairable(sides[s].own);
  by_form<T>(pairs, [&](auto form) {
    products_as<T, decltype(form)::value>(row, rows, depth, sides, count, threads, emit);
  });
}

// gelu(gate) * up of a block whose twin holds up, rounded where a tensor of T would be.
template <class T, class S>
inline void activate(const S* sums, long step, long rows, long columns, T* to, long to_step) {
  for (long i = 0; i < rows; i++) {
    const S *gate = sums + i * step, *up = gate + NB;
    each(columns, [&](long j, long n) {
      F g = kept(gelu(kept(get(gate + j, n), T{})), T{});
      put(to + i * to_step + j, g * kept(get(up + j, n), T{}), n);
    });
  }
}

}  // namespace
