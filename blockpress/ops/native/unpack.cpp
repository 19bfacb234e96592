// Weights of 4 and 8 bits become bfloat16 or float32, a register of values at a time.
//
//     unpack    value = table[code] * scale     integers: table = -8 .. 7, minus a zero point; floats: the e2m1 values
//     e4m3      value = code                    eight bits: sign, four of exponent with bias 7, three of fraction
//
// A register holds W bytes of codes, so 2 W values of 4 bits: the low halves and the high halves, which are interleaved
// when written. Called by ops/unpacking.py, which documents the arguments.

#include <cstdint>
#include <cstring>

#include "pool.h"
#include "simd.h"

namespace {

enum Kind { BFLOAT16 = 0, FLOAT32 = 1, ROUNDED = 2 };  // ROUNDED: float32 that was rounded to bfloat16

inline U widened(const uint8_t* from) {
  return __builtin_convertvector(__builtin_convertvector(*reinterpret_cast<const B*>(from), H), U);
}

struct Table {  // sixteen floats; an index has four bits
#ifdef __AVX512F__
  F all;
  explicit Table(const float* from) : all(*reinterpret_cast<const F*>(from)) {}
  inline F operator[](U index) const { return __builtin_shuffle(all, (I)index); }
#elif defined(__AVX__)
  F low, high;
  explicit Table(const float* from)
      : low(*reinterpret_cast<const F*>(from)), high(*reinterpret_cast<const F*>(from + W)) {}
  inline F operator[](U index) const {
    return index > 7u ? __builtin_shuffle(high, (I)(index & 7u)) : __builtin_shuffle(low, (I)(index & 7u));
  }
#else
  const float* all;
  explicit Table(const float* from) : all(from) {}
  inline F operator[](U index) const {
    F x;
    for (long i = 0; i < W; i++) x[i] = all[index[i]];
    return x;
  }
#endif
};

struct Job {
  const uint8_t* packed;   // [rows][columns / 2]
  const float* table;      // [16]
  const float* scale;      // [rows][columns / group], or null for 1; with picks, the table of all 256 scales
  const uint8_t* picks;    // [rows][columns / group], or null
  const float* shift;      // as scale: subtracted from the table's value first; or null for 0
  void* out;               // [rows][columns], bfloat16 or float32
  long rows, columns, group;
  int kind;
};

// One number for each of W bytes from column `at` on: with groups of 16 columns one per eight bytes, else one for all.
template <class Number>
inline F spread(const Number& number, long at, long group) {
  F first = number(at / group) - F{};  // not a sum, which would lose the sign of a zero
#ifdef __AVX512F__
  if (group != 16) return first;
  constexpr I upper = {0, 0, 0, 0, 0, 0, 0, 0, -1, -1, -1, -1, -1, -1, -1, -1};
  return upper ? number(at / group + 1) - F{} : first;
#else
  return first;
#endif
}

inline void side_by_side(float* to, F low, F high) {
#ifdef __AVX512F__
  constexpr I first = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
#elif defined(__AVX__)
  constexpr I first = {0, 8, 1, 9, 2, 10, 3, 11};
#else
  constexpr I first = {0, 4, 1, 5};
#endif
  *reinterpret_cast<F*>(to) = __builtin_shuffle(low, high, first);
  *reinterpret_cast<F*>(to + W) = __builtin_shuffle(low, high, first + (int32_t)(W / 2));
}

template <int KIND>
void part(const Job& job, long start, long stop) {
  const Table table(job.table);
  const long groups = job.columns / job.group;
  for (long row = start; row < stop; row++) {
    const uint8_t* from = job.packed + row * (job.columns / 2);
    for (long at = 0; at < job.columns; at += 2 * W) {
      U bytes = widened(from + at / 2);
      F low = table[bytes & 15u], high = table[bytes >> 4];
      if (job.shift) {
        F zero = spread([&](long i) { return job.shift[row * groups + i]; }, at, job.group);
        low -= zero;
        high -= zero;
      }
      if (job.scale) {
        F scale = job.picks ? spread([&](long i) { return job.scale[job.picks[row * groups + i]]; }, at, job.group)
                            : spread([&](long i) { return job.scale[row * groups + i]; }, at, job.group);
        low *= scale;
        high *= scale;
      }
      if (KIND == BFLOAT16) {
        uint16_t* to = static_cast<uint16_t*>(job.out) + row * job.columns + at;
        *reinterpret_cast<U*>(to) = nearest(low) | nearest(high) << 16;
      } else {
        if (KIND == ROUNDED) {
          low = (F)(nearest(low) << 16);
          high = (F)(nearest(high) << 16);
        }
        side_by_side(static_cast<float*>(job.out) + row * job.columns + at, low, high);
      }
    }
  }
}

void some(const Job& job, long start, long stop) {
  if (job.kind == BFLOAT16) part<BFLOAT16>(job, start, stop);
  if (job.kind == FLOAT32) part<FLOAT32>(job, start, stop);
  if (job.kind == ROUNDED) part<ROUNDED>(job, start, stop);
}

struct Codes {
  const uint8_t* from;
  void* out;
  long count;
  int kind;
};

inline U float_bits(U code) {  // of e4m3; a subnormal's fraction is in steps of 2^-9, so no float32 is subnormal
  U size = code & 0x7fu;
  U bits = size < 8u ? (U)(__builtin_convertvector((I)size, F) * 0x1p-9f) : (size << 20) + (120u << 23);
  bits = size == 0x7fu ? U{} + 0x7fc00000u : bits;
  return bits | (code & 0x80u) << 24;
}

template <int KIND>
inline void write(void* out, long at, U bits) {
  if (KIND == BFLOAT16)
    *reinterpret_cast<H*>(static_cast<uint16_t*>(out) + at) = __builtin_convertvector(bits >> 16, H);
  else
    *reinterpret_cast<U*>(static_cast<float*>(out) + at) = bits;
}

template <int KIND>
void part(const Codes& job, long start, long stop) {
  long at = start;
  for (; at + W <= stop; at += W) write<KIND>(job.out, at, float_bits(widened(job.from + at)));
  if (at == stop) return;
  uint8_t codes[W] = {};
  float values[W];
  memcpy(codes, job.from + at, stop - at);
  write<KIND>(values, 0, float_bits(widened(codes)));
  const long size = KIND == BFLOAT16 ? 2 : 4;
  memcpy(static_cast<char*>(job.out) + at * size, values, (stop - at) * size);
}

void some(const Codes& job, long start, long stop) {
  if (job.kind == BFLOAT16) part<BFLOAT16>(job, start, stop);
  if (job.kind == FLOAT32) part<FLOAT32>(job, start, stop);
}

constexpr long GRAIN = 1 << 15;  // fewest values per slice

}  // namespace

// group is 16, or a multiple of 32 that divides the columns; kind is one of Kind.
extern "C" void unpack(const uint8_t* packed, const float* table, const float* scale, const uint8_t* picks,
                       const float* shift, void* out, long rows, long columns, long group, int kind,
                       int threads) {
  const Job job{packed, table, scale, picks, shift, out, rows, columns, group, kind};
  share(rows, rows * columns / GRAIN, threads, [&](long start, long stop) { some(job, start, stop); });
}

extern "C" void e4m3(const uint8_t* from, void* out, long count, int kind, int threads) {
  const Codes job{from, out, count, kind};
  share(count, count / GRAIN, threads, [&](long start, long stop) { some(job, start, stop); });
}
