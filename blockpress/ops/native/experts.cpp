// Routed experts in bfloat16 on processors with matrix tiles (AMX): gather, both products, GeGLU and the weighted sum.
//
// A weight is the left operand as stored, in tiles of 16 rows by 32 columns; tokens are the right operand, packed here:
//
//     x [token][hidden]  --16 x 16 transpose of pairs-->  right [hidden / 2][token][2]
//     gate, up rows r..r+15  @  right   -->  h rows r..r+15 of every token, which is packed for the next product
//     down rows              @  h       -->  y [hidden][token]  --transpose-->  slot [token][k][hidden]
//
// A unit of work is an expert with up to 128 of its tokens, so that its weights are read from memory once. Rounded where
// the plain version rounds (the sum over a token's experts: once). Called by ops/cpu/experts.py.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

#include "pool.h"
#include "simd.h"

namespace {

constexpr long BLOCK = 32;   // tokens per product: two tiles
constexpr long UNIT = 128;   // most tokens per unit

inline __m512i bits(F x) {  // the bits of each value's bfloat16, in 32 bits
  return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x));
}

inline void transpose(__m512i r[16]) {  // 16 x 16 values of 32 bits
  __m512i t[16];
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

// c[4][16][16]: rows of `a` and of `b` (16 each, `depth` apart) times one or two tiles of tokens of `right`.
template <bool wide>
void product(const bf16* a, const bf16* b, const uint32_t* right, long depth, float* c) {
  const long step = depth * 2;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (long k = 0; k < depth; k += 32) {
    _tile_loadd(4, a + k, step);
    _tile_loadd(5, b + k, step);
    _tile_loadd(6, right + k / 2 * BLOCK, BLOCK * 4);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    if (wide) {
      _tile_loadd(7, right + k / 2 * BLOCK + 16, BLOCK * 4);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, 64);
  _tile_stored(1, c + 256, 64);
  if (wide) {
    _tile_stored(2, c + 512, 64);
    _tile_stored(3, c + 768, 64);
  }
}

struct Unit {
  long expert, start, count;  // tokens start .. start + count of `slots`
};

struct Mix {
  const bf16 *x, *gate_up, *down;
  const float* weights;
  bf16* y;  // [tokens * k][hidden], weighted
  long k, hidden, size;
  const long* slots;  // token * k + rank, sorted by expert
  std::vector<Unit> units;
  std::atomic<long> next{0};
};

// x's rows of up to 32 slots as [hidden / 2][32] pairs of bfloat16.
void pack(const Mix& mix, const long* slots, long count, uint32_t* right) {
  for (long part = 0; part < BLOCK; part += 16) {
    if (part >= count) break;
    for (long h = 0; h < mix.hidden; h += 32) {
      __m512i r[16];
      for (long t = 0; t < 16; t++)
        r[t] = part + t < count ? _mm512_loadu_si512(mix.x + slots[part + t] / mix.k * mix.hidden + h)
                                : _mm512_setzero_si512();
      transpose(r);
      for (long p = 0; p < 16; p++) _mm512_store_si512(right + (h / 2 + p) * BLOCK + part, r[p]);
    }
  }
}

// gelu(gate) * up for 16 rows and 16 tokens, as eight rows of pairs.
void activate(const float* gate, const float* up, uint32_t* to) {
  for (long row = 0; row < 16; row += 2) {
    F h[2];
    for (long i = 0; i < 2; i++) {
      F g = kept(gelu(kept(load(gate + (row + i) * 16), bf16{})), bf16{});
      h[i] = g * kept(load(up + (row + i) * 16), bf16{});
    }
    __m512i pair = _mm512_or_si512(bits(h[0]), _mm512_slli_epi32(bits(h[1]), 16));
    _mm512_store_si512(to + row / 2 * BLOCK, pair);
  }
}

// 16 rows of y of up to 16 slots, times the slots' weights.
void deliver(const Mix& mix, const float* c, const long* slots, long count, long row) {
  __m512i r[16];
  for (long i = 0; i < 16; i++) r[i] = _mm512_load_si512(c + i * 16);
  transpose(r);
  for (long t = 0; t < count; t++) {
    put(mix.y + slots[t] * mix.hidden + row, kept((F)r[t], bf16{}) * mix.weights[slots[t]], W);
  }
}

void one(const Mix& mix, const Unit& unit, uint32_t* right, uint32_t* middle) {
  alignas(64) float c[1024];
  const long hidden = mix.hidden, size = mix.size, *slots = mix.slots + unit.start;
  const bf16* gate_up = mix.gate_up + unit.expert * 2 * size * hidden;
  const bf16* down = mix.down + unit.expert * hidden * size;
  for (long b = 0; b < unit.count; b += BLOCK) pack(mix, slots + b, unit.count - b, right + b / 2 * hidden);
  for (long row = 0; row < size; row += 16)
    for (long b = 0; b < unit.count; b += BLOCK) {
      bool wide = unit.count - b > 16;
      const bf16* gate = gate_up + row * hidden;
      (wide ? product<true> : product<false>)(gate, gate + size * hidden, right + b / 2 * hidden, hidden, c);
      uint32_t* to = middle + b / 2 * size + row / 2 * BLOCK;
      activate(c, c + 256, to);
      if (wide) activate(c + 512, c + 768, to + 16);
    }
  for (long row = 0; row < hidden; row += 32)
    for (long b = 0; b < unit.count; b += BLOCK) {
      long count = unit.count - b < BLOCK ? unit.count - b : BLOCK;
      const bf16* from = down + row * size;
      (count > 16 ? product<true> : product<false>)(from, from + 16 * size, middle + b / 2 * size, size, c);
      for (long i = 0; i < 2; i++) {
        deliver(mix, c + i * 256, slots + b, count < 16 ? count : 16, row + i * 16);
        if (count > 16) deliver(mix, c + 512 + i * 256, slots + b + 16, count - 16, row + i * 16);
      }
    }
}

void work(void* data) {
  Mix& mix = *static_cast<Mix*>(data);
  alignas(64) uint8_t config[64] = {1};
  for (int tile = 0; tile < 8; tile++) {
    reinterpret_cast<uint16_t*>(config + 16)[tile] = 64;  // bytes per row
    config[48 + tile] = 16;                               // rows
  }
  long words = UNIT / 2 * (mix.hidden + mix.size);
  auto* memory = static_cast<uint32_t*>(_mm_malloc(words * 4, 64));
  _tile_loadconfig(config);
  for (long i; (i = mix.next++) < static_cast<long>(mix.units.size());)
    one(mix, mix.units[i], memory, memory + UNIT / 2 * mix.hidden);
  _tile_release();
  _mm_free(memory);
}

struct Sum {
  const bf16* y;
  bf16* out;
  long tokens, k, hidden;
  std::atomic<long> next{0};
};

void total(void* data) {
  Sum& sum = *static_cast<Sum*>(data);
  for (long start; (start = sum.next.fetch_add(UNIT)) < sum.tokens;)
    for (long token = start; token < start + UNIT && token < sum.tokens; token++)
      for (long h = 0; h < sum.hidden; h += 16) {
        F all = {};
        for (long j = 0; j < sum.k; j++) all += load(sum.y + (token * sum.k + j) * sum.hidden + h);
        store(sum.out + token * sum.hidden + h, all);
      }
}

}  // namespace

extern "C" int has_tiles() {
  constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, request, tile_data) == 0;
}

// hidden and size are multiples of 32; y has room for [tokens * k][hidden].
extern "C" void mix(const bf16* x, const bf16* gate_up, const bf16* down, const float* weights,
                    const int64_t* chosen, bf16* y, bf16* out, long tokens, long k, long hidden, long size,
                    long experts, int threads) {
  std::vector<long> begin(experts + 1), slots(tokens * k);
  for (long s = 0; s < tokens * k; s++) begin[chosen[s] + 1]++;
  for (long e = 0; e < experts; e++) begin[e + 1] += begin[e];
  std::vector<long> at(begin.begin(), begin.end() - 1);
  for (long s = 0; s < tokens * k; s++) slots[at[chosen[s]]++] = s;
  Mix job{x, gate_up, down, weights, y, k, hidden, size, slots.data(), {}};
  for (long e = 0; e < experts; e++)
    for (long start = begin[e]; start < begin[e + 1]; start += UNIT)
      job.units.push_back({e, start, begin[e + 1] - start < UNIT ? begin[e + 1] - start : UNIT});
  Sum sum{y, out, tokens, k, hidden};
  // Each thread takes units until none is left.
  const int useful = std::min(threads, static_cast<int>(job.units.size()));
  parallel(useful, useful, [&](long) { work(&job); });
  parallel(tokens <= UNIT ? 1 : threads, threads, [&](long) { total(&sum); });
}

#else

extern "C" int has_tiles() { return 0; }
extern "C" void mix() {}

#endif
