#include "amx.h"

#include <algorithm>

#if defined(__x86_64__) && defined(__linux__) && __has_include(<amxbf16intrin.h>)
#define HYDRA_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,amx-tile,amx-bf16"))), apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 sees it in its own header
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512bf16,amx-tile,amx-bf16")
#endif
#include <immintrin.h>
#endif

namespace hydra::cpu::amx {

#ifndef HYDRA_AMX
bool available() { return false; }
void run(const Outer&) {}
void run(const Up&) {}
#else

namespace {

struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_of_row[16] = {};
  uint8_t rows[16] = {};

  // Tiles 0 to 3 are sums of `of_left` rows, 4 and 5 are of left, 6 and 7 of right.
  explicit Config(int64_t of_left) {
    for (int tile = 0; tile < 8; ++tile) bytes_of_row[tile] = 64, rows[tile] = tile < 6 ? uint8_t(of_left) : 16;
  }
};

// The compiler does not know that tiles read and write memory.
inline void fence() { asm volatile("" ::: "memory"); }

constexpr long BYTES = sizeof(uint32_t);

// N <= 4 tiles of 16 ranks and 16 columns, side by side.
template <int N>
void outer_tiles(const Outer& o, int64_t r, int64_t c, float* out, int64_t ld_out, bool add) {
  const long of_out = ld_out * BYTES, of_left = o.ld_left * 2, of_right = o.ld_right * BYTES;
  fence();
  if (add) {
    _tile_loadd(0, out, of_out);
    if constexpr (N > 1) _tile_loadd(1, out + TILE, of_out);
    if constexpr (N > 2) _tile_loadd(2, out + 2 * TILE, of_out);
    if constexpr (N > 3) _tile_loadd(3, out + 3 * TILE, of_out);
  } else {
    _tile_zero(0);
    if constexpr (N > 1) _tile_zero(1);
    if constexpr (N > 2) _tile_zero(2);
    if constexpr (N > 3) _tile_zero(3);
  }
  for (int64_t m = 0; m < o.depth; m += TILE_DEPTH) {
    const uint32_t* right = o.right + m / 2 * o.ld_right + c;
    _tile_loadd(4, o.left + r * o.ld_left + m, of_left);
    _tile_loadd(6, right, of_right);
    if constexpr (N > 1) _tile_loadd(7, right + TILE, of_right);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (N > 2) _tile_loadd(6, right + 2 * TILE, of_right);
    if constexpr (N > 1) _tile_dpbf16ps(1, 4, 7);
    if constexpr (N > 3) _tile_loadd(7, right + 3 * TILE, of_right);
    if constexpr (N > 2) _tile_dpbf16ps(2, 4, 6);
    if constexpr (N > 3) _tile_dpbf16ps(3, 4, 7);
  }
  _tile_stored(0, out, of_out);
  if constexpr (N > 1) _tile_stored(1, out + TILE, of_out);
  if constexpr (N > 2) _tile_stored(2, out + 2 * TILE, of_out);
  if constexpr (N > 3) _tile_stored(3, out + 3 * TILE, of_out);
  fence();
}

inline __m512 widened(__m256i bits) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)); }

constexpr int64_t BLOCK = 2 * TILE;

// Sums of the block of rows from m and columns from c on.
inline void up_tiles(const Up& u, int64_t m, int64_t c, float* sums) {
  const bool two_rows = m + TILE < u.rows, two_columns = c + TILE < u.columns;
  const long of_left = u.depth * 2, of_right = u.ld_right * BYTES, of_sums = BLOCK * BYTES;
  const uint16_t* left = u.left + m * u.depth;
  fence();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t p = 0; p < u.depth; p += TILE_DEPTH) {
    const uint32_t* right = u.right + p / 2 * u.ld_right + c;
    _tile_loadd(4, left + p, of_left);
    _tile_loadd(6, right, of_right);
    _tile_dpbf16ps(0, 4, 6);
    if (two_columns) {
      _tile_loadd(7, right + TILE, of_right);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (!two_rows) continue;
    _tile_loadd(5, left + TILE * u.depth + p, of_left);
    _tile_dpbf16ps(2, 5, 6);
    if (two_columns) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, of_sums);
  _tile_stored(1, sums + TILE, of_sums);
  _tile_stored(2, sums + TILE * BLOCK, of_sums);
  _tile_stored(3, sums + TILE * BLOCK + TILE, of_sums);
  fence();
}

// 32 columns of a row: to the nearest, ties to even.
inline void store_row(const Up& u, const float* sums, int64_t m, int64_t c, __mmask32 mask) {
  const auto low = static_cast<__mmask16>(mask), high = static_cast<__mmask16>(mask >> 16);
  __m512 a = _mm512_load_ps(sums), b = _mm512_load_ps(sums + TILE);
  if (u.row) {
    a = _mm512_add_ps(a, _mm512_maskz_loadu_ps(low, u.row + c));
    b = _mm512_add_ps(b, _mm512_maskz_loadu_ps(high, u.row + c + TILE));
  }
  if (u.base) {
    const __m512i base = _mm512_maskz_loadu_epi16(mask, u.base + m * u.ld_base + c);
    a = _mm512_add_ps(a, widened(_mm512_castsi512_si256(base)));
    b = _mm512_add_ps(b, widened(_mm512_extracti64x4_epi64(base, 1)));
  }
  _mm512_mask_storeu_epi16(u.out + m * u.ld_out + c, mask, (__m512i)_mm512_cvtne2ps_pbh(b, a));
}

inline void store_block(const Up& u, const float* sums, int64_t m, int64_t c) {
  const int64_t columns = std::min(BLOCK, u.columns - c), rows = std::min(BLOCK, u.rows - m);
  const __mmask32 mask = columns == BLOCK ? ~__mmask32(0) : (__mmask32(1) << columns) - 1;
  for (int64_t i = 0; i < rows; ++i) {
    __builtin_prefetch(u.out + (m + i) * u.ld_out + c + 2 * BLOCK, 1);  // each row is on a page of its own
    store_row(u, sums + i * BLOCK, m + i, c, mask);
  }
}

}  // namespace

bool available() {
  static const bool found = [] {
    constexpr unsigned BF16 = 1u << 22, TILES = 1u << 24, AVX512_BF16 = 1u << 5;
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (BF16 | TILES)) != (BF16 | TILES)) return false;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & AVX512_BF16)) return false;
    constexpr long GET_PERMISSION = 0x1022, OF_TILES = 1l << 18;  // arch_prctl's
    unsigned long permission = 0;
    return syscall(SYS_arch_prctl, GET_PERMISSION, &permission) == 0 && (permission & OF_TILES);
  }();
  return found;
}

void run(const Outer& o) {
  for (int64_t r = 0; r < o.ranks; r += TILE) {
    const int64_t ranks = std::min(TILE, o.ranks - r);
    const Config config(ranks);
    _tile_loadconfig(&config);
    float* out = o.out + r * o.ld_out;
    int64_t c = 0;
    for (; c + 4 * TILE <= o.columns; c += 4 * TILE) outer_tiles<4>(o, r, c, out + c, o.ld_out, o.add);
    for (; c + TILE <= o.columns; c += TILE) outer_tiles<1>(o, r, c, out + c, o.ld_out, o.add);
    if (c < o.columns) {
      alignas(64) float sums[TILE * TILE];
      outer_tiles<1>(o, r, c, sums, TILE, false);
      for (int64_t i = 0; i < ranks; ++i)
        for (int64_t j = c; j < o.columns; ++j) {
          float& to = out[i * o.ld_out + j];
          to = o.add ? to + sums[i * TILE + j - c] : sums[i * TILE + j - c];
        }
    }
  }
  _tile_release();
}

void run(const Up& u) {
  const Config config(TILE);
  _tile_loadconfig(&config);
  // Two blocks of sums in turn: while one is rounded, tiles write the other.
  alignas(64) float sums[2][BLOCK * BLOCK];
  int64_t rounded_m = 0, rounded_c = 0, turn = 0;
  for (int64_t m = 0; m < u.rows; m += BLOCK)
    for (int64_t c = 0; c < u.columns; c += BLOCK) {
      up_tiles(u, m, c, sums[turn % 2]);
      if (turn++ > 0) store_block(u, sums[turn % 2], rounded_m, rounded_c);
      rounded_m = m, rounded_c = c;
    }
  if (turn > 0) store_block(u, sums[(turn - 1) % 2], rounded_m, rounded_c);
  _tile_release();
}

#endif

}  // namespace hydra::cpu::amx

#if defined(HYDRA_AMX) && defined(__clang__)
#pragma clang attribute pop
#endif
