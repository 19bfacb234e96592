// 4-bit weights become bfloat16: sixteen bytes are 32 values, and low and high halves lie side by side as one register.
//
//     value = table[code] * scale         integers: table = -8 .. 7, less a zero point; floats: the sixteen e2m1 values
//
// Called by ops/unpacking.py, which says what the arguments are. Threads: see rows.cpp.

#include <cstdint>
#include <cstring>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

extern "C" {
__attribute__((weak)) void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned);
__attribute__((weak)) int omp_get_thread_num();
__attribute__((weak)) int omp_get_num_threads();
__attribute__((weak)) int omp_get_max_threads();
}

namespace {

constexpr long W = 16;
typedef float F __attribute__((vector_size(4 * W), aligned(4)));
typedef int32_t I __attribute__((vector_size(4 * W), aligned(4)));
typedef uint32_t U __attribute__((vector_size(4 * W), aligned(4)));
typedef uint16_t H __attribute__((vector_size(2 * W), aligned(2)));
typedef uint8_t B __attribute__((vector_size(W), aligned(1)));

inline U rounded(F x) {  // the bits of the nearest bfloat16, ties to even, in the low half; scales are finite
  U bits = (U)x;
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

struct Job {
  const uint8_t* packed;   // [rows][columns / 2]
  const float* table;      // [16]
  const float* scale;      // [rows][columns / group], or null for 1; where there are picks, the 256 scales to pick from
  const uint8_t* picks;    // [rows][columns / group], or null
  const float* shift;      // as scale: taken from the table's value first; or null for 0
  uint16_t* out;           // [rows][columns]
  long rows, columns, group;
};

// A number for each of 16 bytes from column `at` on: of groups of 16 columns one for each eight bytes, else one for all.
template <class Number>
inline F spread(const Number& number, long at, long group) {
  F first = F{} + number(at / group);
  if (group != 16) return first;
  constexpr I upper = {0, 0, 0, 0, 0, 0, 0, 0, -1, -1, -1, -1, -1, -1, -1, -1};
  return upper ? F{} + number(at / group + 1) : first;
}

void part(const Job& job, long start, long stop) {
  const F table = *reinterpret_cast<const F*>(job.table);
  const long groups = job.columns / job.group;
  for (long row = start; row < stop; row++) {
    const uint8_t* from = job.packed + row * (job.columns / 2);
    uint16_t* to = job.out + row * job.columns;
    for (long at = 0; at < job.columns; at += 32) {
      U bytes = __builtin_convertvector(__builtin_convertvector(*reinterpret_cast<const B*>(from + at / 2), H), U);
      F low = __builtin_shuffle(table, (I)(bytes & 15u)), high = __builtin_shuffle(table, (I)(bytes >> 4));
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
      *reinterpret_cast<U*>(to + at) = rounded(low) | rounded(high) << 16;
    }
  }
}

void run(void* data) {
  const Job& job = *static_cast<Job*>(data);
  long n = omp_get_num_threads(), i = omp_get_thread_num();
  part(job, job.rows * i / n, job.rows * (i + 1) / n);
}

}  // namespace

// group is 16, or a multiple of 32 that divides the columns.
extern "C" void unpack(const uint8_t* packed, const float* table, const float* scale, const uint8_t* picks,
                       const float* shift, uint16_t* out, long rows, long columns, long group) {
  Job job{packed, table, scale, picks, shift, out, rows, columns, group};
  bool many = rows * columns >= 1 << 16 && rows > 1;
  if (many && GOMP_parallel && omp_get_thread_num && omp_get_num_threads && omp_get_max_threads)
    GOMP_parallel(run, &job, 0, 0);
  else
    part(job, 0, rows);
}
