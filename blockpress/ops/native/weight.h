// A weight as stored in memory, and any part of one of its lines as float32.
//
//     floats      float32, bfloat16, float16
//     bytes       e4m3 or int8          value = (code - zero) * scale
//     nibbles     4-bit integers        value = (nibble - 8 - zero) * scale
//     e2m1        4-bit floats          value = code * (one-byte scale * outer)
//     int8 rows   int8                  multiplied as integers (int8.h), with a float32 scale per line
//
// Scales and zero points are per `group` columns of a line, `outer` (the global scale) is per line. Mirrors
// ops/cpu/bridge.py. Layouts and rounding are those of ops/packed.py: with bfloat16 scales the value is rounded to
// bfloat16 too, but not where a line has only one scale (`factors`).
#pragma once

#include <algorithm>

#include "simd.h"

namespace {

enum Kind : int64_t { FLOAT32, BFLOAT16, FLOAT16, E4M3, INT8, NIBBLES, E2M1, INT8_ROWS };

inline float from_e4m3(uint8_t code) {
  uint32_t bits = (code & 0x7fu) << 20;
  float value;
  std::memcpy(&value, &bits, 4);
  value = (code & 0x7f) == 0x7f ? NAN : value * 0x1p120f;
  return code & 0x80 ? -value : value;
}

inline F widen_codes(const int8_t* p) {
  B bytes;
  std::memcpy(&bytes, p, W);
#if defined(__AVX512F__)
  return (F)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)bytes));
#elif defined(__AVX2__)
  return (F)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  F x;
  for (long i = 0; i < W; i++) x[i] = p[i];
  return x;
#endif
}

inline F widen_codes(const uint8_t* p) {  // e4m3
#if defined(__AVX512F__)
  U code = (U)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
  U code = (U)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  U code;
  for (long i = 0; i < W; i++) code[i] = p[i];
#endif
  U size = code & 0x7fu;
  F value = (F)(size << 20) * 0x1p120f;
  U bits = (U)value | (code & 0x80u) << 24;
  return (F)((size == 0x7fu) ? U{} + 0x7fc00000u : bits);
}

// W values of a table of 16 by half bytes, the low half of a byte first.
inline F widen_nibbles(const uint8_t* p, const float* table) {
#if defined(__AVX512F__)
  __m512i all = _mm512_castsi128_si512(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  const __m512i words = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
  const __m512i shifts = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
  __m512i index = _mm512_srlv_epi32(_mm512_permutexvar_epi32(words, all), shifts);
  return (F)_mm512_permutexvar_ps(index, _mm512_loadu_ps(table));  // only the low four bits select
#elif defined(__AVX2__)
  int32_t word;
  std::memcpy(&word, p, 4);
  const __m256i shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
  __m256i index = _mm256_srlv_epi32(_mm256_set1_epi32(word), shifts);
  __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index);
  __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), index);
  return (F)_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
#else
  F x;
  for (long i = 0; i < W; i += 2) x[i] = table[p[i / 2] & 15], x[i + 1] = table[p[i / 2] >> 4];
  return x;
#endif
}

constexpr float INTEGERS[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
constexpr float FLOATS_4[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

// `rows` lines of `columns` values, `step` values from one line to the next.
struct Matrix {
  const void* data;
  int64_t rows, columns, step, kind;
  const void* scale;    // [rows][columns / group], float32 or bfloat16; for E2M1 a byte each, an index of `table`
  const int8_t* zero;   // as scale, or null
  const float* outer;   // [rows], or null
  const float* table;   // [256]: the scale that each byte encodes
  int64_t group, halves, divides;  // halves: scales are bfloat16, and if 1 so is the value; divides: the scale is divided by `outer`

  template <class T>
  const T* at(long row, long column) const { return static_cast<const T*>(data) + row * step + column; }

  long groups() const { return group ? (columns + group - 1) / group : 0; }

  // The bytes of this many values of a line.
  long bytes(long values) const {
    if (kind == NIBBLES || kind == E2M1) return values / 2;
    return kind == FLOAT32 ? values * 4 : kind <= FLOAT16 ? values * 2 : values;
  }

  Matrix from(long row, long count) const {
    Matrix part = *this;
    part.data = static_cast<const char*>(data) + bytes(row * step);
    part.rows = count;
    const long moved = row * groups();
    if (scale) part.scale = static_cast<const char*>(scale) + moved * (kind == E2M1 ? 1 : halves ? 2 : 4);
    if (zero) part.zero = zero + moved;
    if (outer) part.outer = outer + row;
    return part;
  }

  // Values of a line as float32: in place, or in the buffer. `first` is even.
  const float* line(long row, long first, long count, float* buffer) const {
    if (kind == FLOAT32) return at<float>(row, first);
    if (kind == BFLOAT16) widen_all(at<bf16>(row, first), count, buffer);
    else if (kind == FLOAT16) widen_all(at<f16>(row, first), count, buffer);
    else if (kind == E4M3) unpack<E4M3>(row, first, count, buffer);
    else if (kind == INT8 || kind == INT8_ROWS) unpack<INT8>(row, first, count, buffer);
    else if (kind == NIBBLES) unpack<NIBBLES>(row, first, count, buffer);
    else unpack<E2M1>(row, first, count, buffer);
    return buffer;
  }

  template <int64_t KIND>
  void unpack(long row, long first, long count, float* buffer) const {
    halves == 1 ? unpack_runs<KIND, true>(row, first, count, buffer) : unpack_runs<KIND, false>(row, first, count, buffer);
  }

  // Groups of columns that share a scale.
  template <int64_t KIND, bool ROUNDED>
  void unpack_runs(long row, long first, long count, float* to) const {
    const uint8_t* codes = static_cast<const uint8_t*>(data) + bytes(row * step + first);
    const long places = row * groups();
    for (long column = first; column < first + count;) {
      const long number = column / group, stop = std::min(first + count, (number + 1) * group), run = stop - column;
      const float factor = scale_at<KIND>(row, places + number), shift = zero ? zero[places + number] : 0.0f;
      long i = 0;
      for (; i + W <= run; i += W) {
        F value = (widened<KIND>(codes, i) - shift) * factor;
        store(to + i, ROUNDED ? kept(value, bf16{}) : value);
      }
      for (; i < run; i++) {
        F value = ((one<KIND>(codes, i) - F{}) - shift) * factor;
        to[i] = (ROUNDED ? kept(value, bf16{}) : value)[0];
      }
      column = stop, to += run, codes += bytes(run);
    }
  }

  template <int64_t KIND>
  static F widened(const uint8_t* codes, long i) {
    if (KIND == E4M3) return widen_codes(codes + i);
    if (KIND == INT8) return widen_codes(reinterpret_cast<const int8_t*>(codes) + i);
    return widen_nibbles(codes + i / 2, KIND == E2M1 ? FLOATS_4 : INTEGERS);
  }

  template <int64_t KIND>
  static float one(const uint8_t* codes, long i) {
    if (KIND == E4M3) return from_e4m3(codes[i]);
    if (KIND == INT8) return static_cast<int8_t>(codes[i]);
    return (KIND == E2M1 ? FLOATS_4 : INTEGERS)[i % 2 ? codes[i / 2] >> 4 : codes[i / 2] & 15];
  }

  template <int64_t KIND>
  float scale_at(long row, long place) const {
    if (KIND != E2M1) return halves ? widen(static_cast<const bf16*>(scale)[place]) : static_cast<const float*>(scale)[place];
    const float own = table[static_cast<const uint8_t*>(scale)[place]];
    return !outer ? own : divides ? own / outer[row] : own * outer[row];
  }
};

}  // namespace
