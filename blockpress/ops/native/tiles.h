// Products of bfloat16 on matrix tiles (Intel's AMX): what gemm.h multiplies with where the processor has them.
//
//     a    [depth / 32][32 lines][32 values]     lines as they lie, a chunk of 32 values at a time
//     b    [depth / 2][32 columns][2 values]     columns interleaved in pairs
//     a @ b --four tiles of 16 x 16 sums--> c [32 lines][32 columns]
//
// A tile is 16 rows of 64 bytes. Sums of a chunk run over its even and its odd places apart, and are added to what the
// chunks before it came to: other bits than pairs give, but the same for any line and column of a tile.
#pragma once

#include <algorithm>
#include <cstring>
#include <utility>

#include "simd.h"

#if defined(__AMX_BF16__) && defined(__linux__)
#define TILED
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int LINES = 32;   // of `a`, and columns of `b`
constexpr long CHUNK = 16;  // units of two values

#ifdef TILED

// Whether the system lets this process use tiles: it is asked once.
inline bool has_tiles() {
  constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM
  static const bool granted = syscall(SYS_arch_prctl, request, tile_data) == 0;
  return granted;
}

// A thread's tiles, configured for as long as this exists.
struct Tiles {
  Tiles() {
    alignas(64) uint8_t config[64] = {1};
    for (int tile = 0; tile < 8; tile++) {
      reinterpret_cast<uint16_t*>(config + 16)[tile] = 64;  // bytes per row
      config[48 + tile] = 16;                               // rows
    }
    _tile_loadconfig(config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
};

// Where a chunk of 32 lines lies: values from one line to the next, and from one chunk to the next.
struct Lined {
  const float* data;
  long step, chunk;  // in units
};

// Sums of 32 lines with 32 columns, or with 16 unless WIDE: from 0 if `first`, else added to what is in block c. `between`
// is called once for each chunk: the multiplication goes on meanwhile. ONCE: b shall not take the place of a, which is used
// again first, in the L1 cache.
template <bool WIDE, bool ONCE, class Between>
inline void tile_sums(long chunks, Lined a, const float* b, float* c, bool first, const Between& between) {
  constexpr long step = LINES;
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    if (WIDE) _tile_zero(2);
    if (WIDE) _tile_zero(3);
  } else {
    _tile_loadd(0, c, step * 4);
    _tile_loadd(1, c + 16 * step, step * 4);
    if (WIDE) _tile_loadd(2, c + 16, step * 4);
    if (WIDE) _tile_loadd(3, c + 16 * step + 16, step * 4);
  }
  for (long k = 0; k < chunks; k++, a.data += a.chunk, b += LINES * CHUNK) {
    if (ONCE) _tile_stream_loadd(6, b, LINES * 4);
    else _tile_loadd(6, b, LINES * 4);
    _tile_loadd(4, a.data, a.step * 4);
    _tile_loadd(5, a.data + 16 * a.step, a.step * 4);
    if (WIDE && ONCE) _tile_stream_loadd(7, b + 16, LINES * 4);
    if (WIDE && !ONCE) _tile_loadd(7, b + 16, LINES * 4);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    if (WIDE) _tile_dpbf16ps(2, 4, 7);
    if (WIDE) _tile_dpbf16ps(3, 5, 7);
    between();
  }
  _tile_stored(0, c, step * 4);
  _tile_stored(1, c + 16 * step, step * 4);
  if (WIDE) _tile_stored(2, c + 16, step * 4);
  if (WIDE) _tile_stored(3, c + 16 * step + 16, step * 4);
}

// Four columns of 16 lines of units: op(column, its units). Parts of four lines are loaded into one register, which
// leaves two rounds of shuffles.
template <class Line, class Op>
inline void four_columns(const Line& line, const Op& op) {
  __m512 r[4], t[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    r[i] = _mm512_castps128_ps512(_mm_loadu_ps(line(i)));
    r[i] = _mm512_insertf32x4(r[i], _mm_loadu_ps(line(4 + i)), 1);
    r[i] = _mm512_insertf32x4(r[i], _mm_loadu_ps(line(8 + i)), 2);
    r[i] = _mm512_insertf32x4(r[i], _mm_loadu_ps(line(12 + i)), 3);
  }
  t[0] = _mm512_unpacklo_ps(r[0], r[1]), t[1] = _mm512_unpackhi_ps(r[0], r[1]);
  t[2] = _mm512_unpacklo_ps(r[2], r[3]), t[3] = _mm512_unpackhi_ps(r[2], r[3]);
  op(0, _mm512_shuffle_ps(t[0], t[2], 0x44));
  op(1, _mm512_shuffle_ps(t[0], t[2], 0xee));
  op(2, _mm512_shuffle_ps(t[1], t[3], 0x44));
  op(3, _mm512_shuffle_ps(t[1], t[3], 0xee));
}

// A block of sums [32 lines][32 columns] on its way to[column][line] in bfloat16, `columns` and `lines` of it: first pairs
// of lines are rounded and interleaved, then they are transposed. Done in parts, some for each chunk of the next block's
// products, which would wait for all of them together.
struct Turning {
  static constexpr int PARTS = 12;  // for each half of the columns two of the first kind and four of the second
  const float* block = nullptr;
  bf16* to = nullptr;
  long step = 0;
  int columns = 0, lines = 0, part = PARTS;
  alignas(64) float pairs[16 * 16];

  void start(const float* from, bf16* out, long out_step, int count, int height) {
    finish();
    block = from, to = out, step = out_step, columns = count, lines = height, part = 0;
  }

  void next() {
    if (part == PARTS) return;
    const int half = part < 6 ? 0 : 16, own = part % 6;
    part++;
    if (half >= columns) return;
    if (own < 2) return interleave_lines(8 * own, half);
    const int first = 4 * (own - 2), count = columns - half - first;
    const __mmask32 some = static_cast<__mmask32>(lines < 32 ? (1u << lines) - 1 : ~0u);
    bf16* const out = to + (half + first) * step;
    four_columns([&](int i) { return pairs + i * 16 + first; },
                 [&](int j, __m512 x) { if (j < count) _mm512_mask_storeu_epi16(out + j * step, some, (__m512i)x); });
  }

  void interleave_lines(int first, int half) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                           5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (int pair = first; pair < first + 8; pair++) {
      const float* line = block + 2 * pair * LINES + half;
      const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(line + LINES), _mm512_loadu_ps(line));
      _mm512_store_si512(pairs + pair * 16, _mm512_permutexvar_epi16(order, (__m512i)both));
    }
  }

  void finish() {
    while (part < PARTS) next();
  }
};

// b's units of up to 32 columns, each a line of values; missing columns are the first again, the last chunk ends with 0.
inline void interleave(const float* const* from, int count, long depth, float* to) {
  const float* lines[LINES];
  for (int i = 0; i < LINES; i++) lines[i] = from[i < count ? i : 0];
  for (int half = 0; half < (count > 16 ? 32 : 16); half += 16) {
    long k = 0;
    for (; k + 4 <= depth; k += 4)
      four_columns([&](int i) { return lines[half + i] + k; },
                   [&](int j, __m512 x) { _mm512_storeu_ps(to + (k + j) * LINES + half, x); });
    for (; k % CHUNK || k < depth; k++)
      for (int i = 0; i < 16; i++) {
        if (k < depth) std::memcpy(to + k * LINES + half + i, lines[half + i] + k, 4);
        else to[k * LINES + half + i] = 0;
      }
  }
}

// a's chunks of up to 32 lines; missing lines and the last chunk's end are 0.
inline void line_up(const float* const* from, int count, long depth, float* to) {
  const long tail = depth % CHUNK;
  const __mmask16 some = static_cast<__mmask16>((1 << tail) - 1);
  for (int i = 0; i < LINES; i++) {
    float* own = to + i * CHUNK;
    long k = 0;
    for (; k + CHUNK <= depth; k += CHUNK, own += LINES * CHUNK)
      _mm512_storeu_ps(own, i < count ? _mm512_loadu_ps(from[i] + k) : _mm512_setzero_ps());
    if (tail) _mm512_storeu_ps(own, i < count ? _mm512_maskz_loadu_ps(some, from[i] + k) : _mm512_setzero_ps());
  }
}

// b's units of `count` columns from `first` of rows, two of them a unit; a row that is null counts as 0.
inline void pack_lines(const bf16* const* rows, long first, int count, long depth, float* to) {
  const __mmask32 some = static_cast<__mmask32>(count == LINES ? ~0u : (1u << count) - 1);
  const auto line = [&](const bf16* row) {
    const __m512i x = row ? _mm512_maskz_loadu_epi16(some, row + first) : _mm512_setzero_si512();
    return std::make_pair(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(x)),
                          _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(x, 1)));
  };
  for (long k = 0; k < depth; k++, to += LINES) {
    const auto low = line(rows[2 * k]), high = line(rows[2 * k + 1]);
    _mm512_storeu_si512(to, _mm512_or_si512(low.first, _mm512_slli_epi32(high.first, 16)));
    _mm512_storeu_si512(to + 16, _mm512_or_si512(low.second, _mm512_slli_epi32(high.second, 16)));
  }
}

#else

inline bool has_tiles() { return false; }

#endif

}  // namespace
