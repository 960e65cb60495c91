// Products of a block of rows with a small operand by AMX's tiles, where torch's brgemm spends most of its time outside of
// the products: with a side of 16 ranks it waits for one accumulator, and leaves sums that another loop must round.
//
//   outer   out[r, c] (+)= sum_m left[r, m] right[m, c]                    dU^T, dD, C
//   up      out[m, c] = base[m, c] + row[c] + sum_p left[m, p] right[p, c]   Z U^T, dZ D, W0 + U D; rounded to bf16 once
//
// bf16 is handled as its bits. `right` is in pairs of rows: 32 bits hold rows 2i and 2i + 1 of a column. Everything that a
// tile reads is padded by the caller to TILE_DEPTH along the sum, and `right` to TILE columns; left of `up` also to TILE rows.
#pragma once

#include <cstdint>

namespace hydra::cpu::amx {

constexpr int64_t TILE = 16, TILE_DEPTH = 32;

constexpr int64_t tiles(int64_t n) { return (n + TILE - 1) / TILE * TILE; }
constexpr int64_t depths(int64_t n) { return (n + TILE_DEPTH - 1) / TILE_DEPTH * TILE_DEPTH; }

// Whether this processor has them and this process may use them, for which oneDNN asks when its settings allow them.
bool available();

struct Outer {
  int64_t ranks, columns, depth;  // depth is a multiple of TILE_DEPTH
  const uint16_t* left;           // [ranks, depth]
  int64_t ld_left;
  const uint32_t* right;  // [depth / 2, tiles(columns)]
  int64_t ld_right;
  bool add;  // to out, or write it
  float* out;
  int64_t ld_out;
};

struct Up {
  int64_t rows, columns, depth;  // depth is a multiple of TILE_DEPTH
  const uint16_t* left;          // [tiles(rows), depth]
  const uint32_t* right;         // [depth / 2, tiles(columns)]
  int64_t ld_right;
  const float* row;      // [columns], or null
  const uint16_t* base;  // [rows, columns], may be out; or null
  int64_t ld_base;
  uint16_t* out;
  int64_t ld_out;
};

// Both leave the tile registers released.
void run(const Outer& product);
void run(const Up& product);

}  // namespace hydra::cpu::amx
