// Products of 8-bit integers: x's rows become codes of -127 .. 127 with a scale each, a weight has codes and scales.
//
//     x [rows][depth]      --largest / 127-->  codes, scale of a row
//     codes x codes        --> int32, exact    (at most 132,104 deep: ops/integers.py)
//     sum * weight's scale * x's scale         in this order, each rounded to float32
//
// The blocking is gemm.h's. A unit of 32 bits holds what one lane multiplies and sums at once: with VNNI four bytes, x's
// plus 128, since that operand is unsigned (128 times the weight's sum is subtracted again); elsewhere two 16-bit
// values. (AVX2 could multiply bytes too, but sums two such products in 16 bits, where they do not fit.)
//
// Sums are exact, so a row's results depend only on the row.
#pragma once

#include "gemm.h"
#if defined(__SSE2__) && !defined(__AVX__)
#include <emmintrin.h>
#endif

namespace {

#ifdef __AVX512VNNI__
constexpr long UNIT_CODES = 4;
constexpr int32_t OFFSET = 128;
typedef uint8_t Code;
#else
constexpr long UNIT_CODES = 2;
constexpr int32_t OFFSET = 0;
typedef int16_t Code;
#endif
typedef int32_t VI __attribute__((vector_size(4 * VW), aligned(4), may_alias));
typedef Code CodesOfF __attribute__((vector_size(sizeof(Code) * W), aligned(1), may_alias));

inline VI loadi(const float* p) { return *reinterpret_cast<const VI*>(p); }
inline void storei(float* p, VI x) { *reinterpret_cast<VI*>(p) = x; }

// sum + the products of x's codes with the weight's, lane by lane.
inline VI added(VI sum, VI x, VI weight) {
#if defined(__AVX512VNNI__)
  return (VI)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)weight);
#elif defined(__AVX512BW__)
  return sum + (VI)_mm512_madd_epi16((__m512i)x, (__m512i)weight);
#elif defined(__AVX2__)
  return sum + (VI)_mm256_madd_epi16((__m256i)x, (__m256i)weight);
#elif defined(__SSE2__)
  return sum + (VI)_mm_madd_epi16((__m128i)x, (__m128i)weight);
#else
  return sum + (x >> 16) * (weight >> 16) + (x << 16 >> 16) * (weight << 16 >> 16);
#endif
}

inline VI all_of(float unit) {
  int32_t bits;
  std::memcpy(&bits, &unit, 4);
  return VI{} + bits;
}

inline long code_units(long depth) { return (depth + UNIT_CODES - 1) / UNIT_CODES; }

inline I nearest_integers(F x) {  // ties to even; never contracted with the product that gives x
#if defined(__AVX512F__)
  return (I)_mm512_cvtps_epi32((__m512)x);
#elif defined(__AVX2__)
  return (I)_mm256_cvtps_epi32((__m256)x);
#else
  I whole;
  for (long i = 0; i < W; i++) whole[i] = static_cast<int32_t>(std::rint(x[i]));
  return whole;
#endif
}

inline F larger(F x, F y) { return (y > x || y != y) ? y : x; }  // NaN wins

// The codes of a row, and its scale: 0 for a row that is nearly 0, NaN for one that is not finite. The padding of the
// last unit is multiplied by zeros.
template <class T>
float encode(const T* x, long depth, float* to) {
  constexpr float SMALLEST = 0x1p-100f;
  F most = {};
  each(depth, [&](long i, long n) { most = larger(most, (F)((U)get(x + i, n) & 0x7fffffffu)); });
  float top = most[0];
  for (long k = 1; k < W; k++) top = (most[k] > top || most[k] != most[k]) ? most[k] : top;
  Code* codes = reinterpret_cast<Code*>(to);
  if (!(top >= SMALLEST && top <= 3.4028234663852886e38f)) {
    std::fill_n(codes, code_units(depth) * UNIT_CODES, static_cast<Code>(OFFSET));
    return top < SMALLEST ? 0.0f : NAN;
  }
  const float steps = 127.0f / top;
  each(depth, [&](long i, long n) {
    const CodesOfF some = __builtin_convertvector(nearest_integers(get(x + i, n) * steps) + OFFSET, CodesOfF);
    std::memcpy(codes + i, &some, n * sizeof(Code));
  });
  return top / 127.0f;
}

// One panel of up to MR rows, as units, and their scales.
template <class T>
void pack_codes(const T* const* rows, int count, long depth, float* to, float* scales) {
  const long all = code_units(depth);
  const float* lines[MR];
  float* buffer = Scratch::room(scratch().lines, MR * all);
  for (int i = 0; i < count; i++) {
    scales[i] = encode(rows[i], depth, buffer + i * all);
    lines[i] = buffer + i * all;
  }
  panel<MR>(lines, count, all, to);
}

// A vector of units of a weight's codes.
inline VI units_at(const int8_t* codes) {
#if defined(__AVX512VNNI__)
  return (VI)_mm512_loadu_si512(codes);
#elif defined(__AVX512BW__)
  return (VI)_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
#elif defined(__AVX2__)
  return (VI)_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
#elif defined(__SSE2__)
  const __m128i some = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
  return (VI)_mm_srai_epi16(_mm_unpacklo_epi8(some, some), 8);
#else
  int16_t wide[VW * UNIT_CODES];
  for (long i = 0; i < VW * UNIT_CODES; i++) wide[i] = codes[i];
  VI units;
  std::memcpy(&units, wide, sizeof units);
  return units;
#endif
}
constexpr long VECTOR_CODES = VW * UNIT_CODES;

// Units from .. from + deep of a weight's line: in place, or in the buffer, padded with 0.
inline const float* weight_units(const Matrix& w, long row, long from, long deep, float* buffer) {
  const int8_t* codes = w.at<int8_t>(row, from * UNIT_CODES);
  const long values = std::min(deep * UNIT_CODES, w.columns - from * UNIT_CODES);
  if (sizeof(Code) == 1 && values == deep * UNIT_CODES) return reinterpret_cast<const float*>(codes);
  Code* to = reinterpret_cast<Code*>(buffer);
  long i = 0;
  for (; i + VECTOR_CODES <= values; i += VECTOR_CODES) storei(buffer + i / UNIT_CODES, units_at(codes + i));
  for (; i < values; i++) to[i] = static_cast<Code>(codes[i]);
  for (; i < deep * UNIT_CODES; i++) to[i] = 0;
  return buffer;
}

inline void pack_weight(const Matrix& w, long first, int count, long from, long deep, float* to) {
  const float* lines[NR];
  float* buffer = Scratch::room(scratch().lines, NR * deep);
  for (int i = 0; i < count; i++) lines[i] = weight_units(w, first + i, from, deep, buffer + i * deep);
  panel<NR>(lines, count, deep, to);
}

// The sums contain 128 for each code of x: what that adds to a panel's columns.
inline void add_offsets(const float* right, long deep, float* to) {
  VI low = loadi(to), high = loadi(to + VW);
  const VI ones = VI{} + 0x01010101;
  for (long k = 0; k < deep; k++, right += NR) {
    low = added(low, ones, loadi(right));
    high = added(high, ones, loadi(right + VW));
  }
  storei(to, low);
  storei(to + VW, high);
}

template <int M>
__attribute__((noinline)) void int_tile(long depth, const float* left, const float* right, float* to, long step, bool first) {
  VI sums[M][2];
#pragma GCC unroll 16
  for (int i = 0; i < M; i++) {
    sums[i][0] = first ? VI{} : loadi(to + i * step);
    sums[i][1] = first ? VI{} : loadi(to + i * step + VW);
  }
  for (long k = 0; k < depth; k++) {
    const VI low = loadi(right), high = loadi(right + VW);
#pragma GCC unroll 16
    for (int i = 0; i < M; i++) {
      sums[i][0] = added(sums[i][0], all_of(left[i]), low);
      sums[i][1] = added(sums[i][1], all_of(left[i]), high);
    }
    left += MR, right += NR;
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; i++) {
    storei(to + i * step, sums[i][0]);
    storei(to + i * step + VW, sums[i][1]);
  }
}

template <int M = MR>
inline void int_tile_of(long rows, long depth, const float* left, const float* right, float* to, long step, bool first) {
  if (rows == M) return int_tile<M>(depth, left, right, to, step, first);
  if constexpr (M > 1) int_tile_of<M - 1>(rows, depth, left, right, to, step, first);
}

// int32 sums become floats in place; the sums of a row share one scale of x.
inline void scale_sums(float* sums, long count, const float* offsets, const float* scales, float own) {
  long j = 0;
  for (; j + VW <= count; j += VW) {
    VI sum = loadi(sums + j);
    if (OFFSET) sum -= OFFSET * loadi(offsets + j);
    storev(sums + j, __builtin_convertvector(sum, V) * loadv(scales + j) * own);
  }
  for (; j < count; j++) {
    int32_t sum, offset = 0;
    std::memcpy(&sum, sums + j, 4);
    if (OFFSET) std::memcpy(&offset, offsets + j, 4);
    sums[j] = static_cast<float>(sum - OFFSET * offset) * scales[j] * own;
  }
}

// Products of packed rows with columns first .. first + count; `step` has room for whole panels of columns.
inline void multiply_codes(const float* left, const float* own, long rows, long depth, const Matrix& w, long first,
                           long count, float* to, long step) {
  const long all = code_units(depth);
  float* right = Scratch::room(scratch().right, KC * NR);
  float offsets[NB + NR] = {};
  for (long from = 0; from < all; from += KC) {
    const long deep = std::min(KC, all - from);
    for (long j = 0; j < count; j += NR) {
      pack_weight(w, first + j, static_cast<int>(std::min<long>(NR, count - j)), from, deep, right);
      if (OFFSET) add_offsets(right, deep, offsets + j);
      Ahead ahead(w, false, false, first + j + NR, from * UNIT_CODES, deep * UNIT_CODES, (rows + MR - 1) / MR);
      for (long i = 0; i < rows; i += MR) {
        ahead.fetch();
        int_tile_of(std::min<long>(MR, rows - i), deep, left + i * all + from * MR, right, to + i * step + j, step,
                    from == 0);
      }
    }
  }
  const float* scales = static_cast<const float*>(w.scale) + first;
  for (long i = 0; i < rows; i++) scale_sums(to + i * step, count, offsets, scales, own[i]);
}

inline int32_t sum_of(VI x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_epi32((__m512i)x);
#else
  int32_t parts[VW];
  std::memcpy(parts, &x, sizeof x);
  for (int half = VW / 2; half; half /= 2)
    for (int i = 0; i < half; i++) parts[i] += parts[i + half];
  return parts[0];
#endif
}

// The same for 1 to FEW rows: dot products along the weight's lines. x: each row's units, in whole vectors.
template <int M>
void int_dots(const float* const* x, const float* own, const Matrix& w, long line, float* to, long step) {
  VI sums[M] = {}, ones = {};
  float rest[VW];
  const float scale = static_cast<const float*>(w.scale)[line];
  for (long k = 0; k < w.columns; k += VECTOR_CODES) {
    const bool whole = k + VECTOR_CODES <= w.columns;
    const VI y = whole ? units_at(w.at<int8_t>(line, k)) : loadi(weight_units(w, line, k / UNIT_CODES, VW, rest));
    for (int i = 0; i < M; i++) sums[i] = added(sums[i], loadi(x[i] + k / UNIT_CODES), y);
    if (OFFSET) ones = added(ones, VI{} + 0x01010101, y);
  }
  for (int i = 0; i < M; i++) to[i * step] = static_cast<float>(sum_of(sums[i] - OFFSET * ones)) * scale * own[i];
}

inline void few_codes(const float* const* x, const float* own, long rows, const Matrix& w, long first, long count,
                      float* to, long step) {
  for (long j = 0; j < count; j++, to++) {
    switch (rows) {
      case 1: int_dots<1>(x, own, w, first + j, to, step); break;
      case 2: int_dots<2>(x, own, w, first + j, to, step); break;
      case 3: int_dots<3>(x, own, w, first + j, to, step); break;
      default: int_dots<4>(x, own, w, first + j, to, step);
    }
  }
}

// The rows of one task as codes: in panels, or up to FEW of them as lines.
struct CodeRows {
  long count, depth;
  float *units, *scales;
  const float* lines[FEW];  // null: in panels

  // Floats of memory needed for this many rows.
  static long size(long rows, long depth) { return (rows + MR) * ((code_units(depth) + VW - 1) / VW * VW + 1); }

  template <class T, class Row>
  static CodeRows of(const Row& row, long count, long depth, float* memory) {
    const long all = code_units(depth), whole = (all + VW - 1) / VW * VW;
    CodeRows own{count, depth, memory, memory + (count + MR) * whole, {}};
    for (long i = 0; i < count && count <= FEW; i++) {
      float* line = memory + i * whole;
      std::fill(line + all - 1, line + whole, 0.0f);  // multiplied by zeros, so it must not be NaN
      own.scales[i] = encode<T>(row(i), depth, line);
      own.lines[i] = line;
    }
    for (long i = 0; i < count && count > FEW; i += MR) {
      const T* lines[MR];
      const int some = static_cast<int>(std::min<long>(MR, count - i));
      for (int j = 0; j < some; j++) lines[j] = row(i + j);
      pack_codes(lines, some, depth, memory + i * all, own.scales + i);
    }
    return own;
  }

  void multiply(const Matrix& w, long first, long columns, float* to, long step) const {
    if (lines[0]) few_codes(lines, scales, count, w, first, columns, to, step);
    else multiply_codes(units, scales, count, depth, w, first, columns, to, step);
  }
};

// `products` of gemm.h for weights that are all codes.
template <class T, class Row, class Emit>
void code_products(const Row& row, long rows, long depth, const Side* sides, int count, int threads, const Emit& emit) {
  const long all = code_units(depth);
  float* const left = Scratch::room(scratch().left, CodeRows::size(std::min(rows, ROWS), depth));
  for (long start = 0; start < rows; start += ROWS) {
    const long here = std::min(ROWS, rows - start), panels = (here + MR - 1) / MR;
    float* const scales = left + panels * MR * all;
    if (rows > FEW)
      row_panels<T>(row, start, here, threads, [&](long p, const T* const* lines, int some) {
        pack_codes(lines, some, depth, left + p * MR * all, scales + p * MR);
      });
    const CodeRows few = rows > FEW ? CodeRows{} : CodeRows::of<T>(row, rows, depth, left);
    const auto by = [&](const Matrix& w, long first, long m, long column, long n, float* to, long step) {
      const CodeRows own = rows > FEW ? CodeRows{m, depth, left + first * all, scales + first, {}} : few;
      own.multiply(w, column, n, to, step);
    };
    blocks<T, float>(sides, count, start, here, threads, rows * depth * NB < 1 << 17 ? 1 : threads, by, emit);
  }
}

}  // namespace
