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

constexpr float INTEGERS[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
constexpr float FLOATS_4[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};
constexpr float HALVES[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};  // in units of 0.5

template <int64_t KIND>
inline float widen_one(const uint8_t* codes, long i) {
  if (KIND == E4M3) return from_e4m3(codes[i]);
  if (KIND == INT8) return static_cast<int8_t>(codes[i]);
  return (KIND == E2M1 ? FLOATS_4 : INTEGERS)[i % 2 ? codes[i / 2] >> 4 : codes[i / 2] & 15];
}

// LOT codes as float32, in units of `unit`: 4-bit codes by a table of bytes, 8-bit floats as half floats of their bits.
constexpr long LOT = 16;
template <int64_t KIND>
constexpr float unit() {
#ifdef __AVX2__
  return KIND == E4M3 ? 256.0f : KIND == E2M1 ? 0.5f : 1.0f;
#else
  return 1.0f;
#endif
}

#ifdef __AVX2__
inline void widen_bytes(__m128i bytes, F (&to)[LOT / W]) {
#ifdef __AVX512F__
  to[0] = (F)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
#else
  to[0] = (F)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
  to[1] = (F)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)));
#endif
}

inline void widen_e4m3(__m128i bytes, F (&to)[LOT / W]) {  // in units of 256: a half float's exponent is 8 more
  const __m256i wide = _mm256_cvtepu8_epi16(bytes);
  const __m256i size = _mm256_and_si256(wide, _mm256_set1_epi16(0x7f));
  const __m256i odd = _mm256_cmpeq_epi16(size, _mm256_set1_epi16(0x7f));  // NaN
  const __m256i sign = _mm256_slli_epi16(_mm256_xor_si256(wide, size), 8);
  __m256i halves = _mm256_or_si256(_mm256_slli_epi16(size, 7), sign);
  halves = _mm256_or_si256(halves, _mm256_and_si256(odd, _mm256_set1_epi16(0x7e00)));
#ifdef __AVX512F__
  to[0] = (F)_mm512_cvtph_ps(halves);
#else
  to[0] = (F)_mm256_cvtph_ps(_mm256_castsi256_si128(halves));
  to[1] = (F)_mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
#endif
}

template <int64_t KIND>
inline void widen_lot(const uint8_t* codes, F (&to)[LOT / W]) {
  if (KIND == E4M3 || KIND == INT8) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    return KIND == E4M3 ? widen_e4m3(bytes, to) : widen_bytes(bytes, to);
  }
  const __m128i pairs = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)), low = _mm_set1_epi8(15);
  const __m128i nibbles = _mm_unpacklo_epi8(_mm_and_si128(pairs, low), _mm_and_si128(_mm_srli_epi16(pairs, 4), low));
  const __m128i halves = _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12);  // of FLOATS_4
  widen_bytes(KIND == E2M1 ? _mm_shuffle_epi8(halves, nibbles) : _mm_sub_epi8(nibbles, _mm_set1_epi8(8)), to);
}
#else
template <int64_t KIND>
inline void widen_lot(const uint8_t* codes, F (&to)[LOT / W]) {
  for (long v = 0; v < LOT / W; v++)
    for (long i = 0; i < W; i++) to[v][i] = widen_one<KIND>(codes, v * W + i);
}
#endif

#if defined(__AVX512BW__) && defined(__AVX512BF16__)
#define LOOKS_UP
constexpr long TWO = 2 * LOT;

inline __m512i rounded_both(F low, F high) { return (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low); }

// TWO codes of 4 bits in bfloat16, looked up among the values of all 16: LOT for the first half of them, LOT for the other.
inline void look_up(const uint8_t* codes, __m512i values, bf16* to) {
  const __m512i second = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(LOT), 1);
  const __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  const __m512i apart = _mm512_or_si512(pairs, _mm512_slli_epi32(pairs, 12));  // a nibble in each 16 bits, and rubbish
  const __m512i places = _mm512_or_si512(_mm512_and_si512(apart, _mm512_set1_epi16(LOT - 1)), second);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(places, values));
}

#endif

// What each 4-bit float is in bfloat16 under each scale of a byte, for lines with the same `outer`: kept by a thread.
struct Values {
#ifdef LOOKS_UP
  const float* table = nullptr;
  float outer = 0;
  int64_t divides = 0;
  alignas(64) bf16 of[256][LOT];

  void fill(const float* scales, float global, int64_t by) {
    table = scales, outer = global, divides = by;
    for (int i = 0; i < 256; i += 2) {
      const auto scale = [&](float own) { return (by ? own / global : own * global) * unit<E2M1>(); };
      _mm512_store_si512(of[i], rounded_both(load(HALVES) * scale(scales[i]), load(HALVES) * scale(scales[i + 1])));
    }
  }

  __m512i two(uint8_t low, uint8_t high) const {
    const __m256i first = _mm256_load_si256(reinterpret_cast<const __m256i*>(of[low]));
    return _mm512_inserti64x4(_mm512_castsi256_si512(first), *reinterpret_cast<const __m256i*>(of[high]), 1);
  }
#endif
};

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

  long groups() const { return group ? static_cast<uint32_t>(columns + group - 1) / static_cast<uint32_t>(group) : 0; }

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
    else codes(row, first, count, buffer);
    return buffer;
  }

  // Values of a line of codes, as T; `values`: what the thread has kept.
  template <class T>
  void codes(long row, long first, long count, T* buffer, Values* values = nullptr) const {
    if (kind == E4M3) unpack<E4M3>(row, first, count, buffer, values);
    else if (kind == INT8 || kind == INT8_ROWS) unpack<INT8>(row, first, count, buffer, values);
    else if (kind == NIBBLES) unpack<NIBBLES>(row, first, count, buffer, values);
    else unpack<E2M1>(row, first, count, buffer, values);
  }

  template <int64_t KIND, class T>
  void unpack(long row, long first, long count, T* buffer, Values* values) const {
    constexpr bool NARROW = sizeof(T) == 2;  // which rounds anyway
    !NARROW && halves == 1 ? unpack_runs<KIND, !NARROW>(row, first, count, buffer, values)
                           : unpack_runs<KIND, false>(row, first, count, buffer, values);
  }

  // Groups of columns that share a scale. What is read from is copied: values that are written could be any of it.
  template <int64_t KIND, bool ROUNDED, class T>
  void unpack_runs(long row, long first, long count, T* to, [[maybe_unused]] Values* known) const {
    const Matrix own = *this;
    constexpr long each = KIND == NIBBLES || KIND == E2M1 ? 2 : 1;  // codes in a byte
    const uint8_t* codes = static_cast<const uint8_t*>(own.data) + (row * own.step + first) / each;
    if (KIND == E2M1 && own.group == LOT && first % LOT == 0 && count % LOT == 0)
      return own.unpack_lots<ROUNDED>(codes, row, first / LOT, count / LOT, to, known);
    const uint32_t size = static_cast<uint32_t>(own.group), number = static_cast<uint32_t>(first) / size;
    long place = row * own.groups() + number, end = static_cast<long>(number) * size;
    for (long column = first, stop = first + count; column < stop; place++) {
      end = std::min(stop, end + static_cast<long>(size));
      const float factor = own.scale_at<KIND>(row, place), shift = own.zero ? own.zero[place] : 0.0f;
      const F lot_factor = factor * unit<KIND>() - F{}, lot_shift = shift / unit<KIND>() - F{};
#ifdef LOOKS_UP
      if constexpr (each == 2 && sizeof(T) == 2) {
        const F values = (load(KIND == E2M1 ? HALVES : INTEGERS) - lot_shift) * lot_factor;
        const __m512i both = rounded_both(values, values);
        for (; column + TWO <= end; column += TWO, to += TWO, codes += TWO / each) look_up(codes, both, to);
      }
#endif
      for (; column + LOT <= end; column += LOT, to += LOT, codes += LOT / each) {
        F values[LOT / W];
        widen_lot<KIND>(codes, values);
        for (long v = 0; v < LOT / W; v++) {
          const F value = (values[v] - lot_shift) * lot_factor;
          store(to + v * W, ROUNDED ? (F)(nearest(value) << 16) : value);  // NaN stays NaN: its low bits are 0 here
        }
      }
      if (column == end) continue;
      const long left = end - column;
      for (long i = 0; i < left; i++) {
        const F value = ((widen_one<KIND>(codes, i) - F{}) - shift) * factor;
        store_some(to + i, ROUNDED ? kept(value, bf16{}) : value, 1);
      }
      column = end, to += left, codes += left / each;
    }
  }

  // The same where each group is a lot: scales are decoded W at a time.
  template <bool ROUNDED, class T>
  void unpack_lots(const uint8_t* codes, long row, long group_number, long groups, T* to,
                   [[maybe_unused]] Values* values) const {
    const uint8_t* scales = static_cast<const uint8_t*>(scale) + row * this->groups() + group_number;
    long from = 0;
#ifdef LOOKS_UP
    if constexpr (sizeof(T) == 2)
      if (values && has(values, row))
        for (; from + 2 <= groups; from += 2, to += TWO, codes += TWO / 2)
          look_up(codes, values->two(scales[from], scales[from + 1]), to);
#endif
    const F every = outer ? outer[row] - F{} : F{} + 1.0f;
    for (; from < groups; from += W) {
      const long some = std::min(W, groups - from);
      const uint8_t* own = scales + from;
      const F found = some == W ? gathered([&](int i) { return table[own[i]]; })
                                : gathered([&](int i) { return i < some ? table[own[i]] : 0.0f; });
      float factors[W];
      store(factors, (divides ? found / every : found * every) * unit<E2M1>());
      for (long i = 0; i < some; i++, to += LOT, codes += LOT / 2) {
        F values[LOT / W];
        widen_lot<E2M1>(codes, values);
        for (long v = 0; v < LOT / W; v++) {
          const F value = values[v] * factors[i];
          store(to + v * W, ROUNDED ? (F)(nearest(value) << 16) : value);
        }
      }
    }
  }

#ifdef LOOKS_UP
  // Whether these are a line's values; made so where the line beside it shares its `outer`.
  bool has(Values* values, long row) const {
    const float own = outer ? outer[row] : 1.0f;
    if (values->table == table && values->outer == own && values->divides == divides) return true;
    if (outer && (rows < 2 || outer[row ? row - 1 : 1] != own)) return false;
    values->fill(table, own, divides);
    return true;
  }
#endif

  template <int64_t KIND>
  float scale_at(long row, long place) const {
    if (KIND != E2M1) return halves ? widen(static_cast<const bf16*>(scale)[place]) : static_cast<const float*>(scale)[place];
    const float own = table[static_cast<const uint8_t*>(scale)[place]];
    return !outer ? own : divides ? own / outer[row] : own * outer[row];
  }
};

}  // namespace
