// How sm90_sweep divides the columns of x and G, and the shared memory of a block.
#pragma once

#include "tiles.cuh"

namespace {

struct Card {
  int warps;             // of a block
  int64_t shared_bytes;  // that a block may have
  int64_t blocks;        // that run at once
};
constexpr Card SM90{8, 227 << 10, 128};
#ifdef CUDA_ON_HOST
constexpr Card CARD{4, 40 << 10, 32};  // so small that a test's shapes take every plan, and several steps each
#else
constexpr Card CARD = SM90;
#endif
constexpr int GROUP = 16;  // columns that a warp multiplies at once

// Groups of columns whose sums fit a warp's registers. In fp32 shared memory is full first.
__host__ __device__ constexpr int groups_of_warp(int64_t ranks, int64_t bytes) { return bytes == 4 ? 8 : 288 / ranks; }

// How the columns are divided. Rows in shared memory are 16 bytes longer than a multiple of 32 bytes, so that the eight
// rows that a warp reads at once lie in different banks.
struct Plan {
  int cluster, height;        // 0: nothing fits
  int x_columns, g_columns;   // of a block, multiples of GROUP
  bool computes_Z;

  // Blocks 8 or 16 by columns, then as many rows at once as fit. `ranks` is 16 or 32, `bytes` those of an element.
  constexpr Plan(int64_t N, int64_t K, int64_t ranks, int64_t bytes, bool computes_Z, const Card& card)
      : cluster(0), height(0), x_columns(0), g_columns(0), computes_Z(computes_Z) {
    for (const int blocks : {8, 16}) {
      x_columns = cdiv(K, blocks * GROUP) * GROUP, g_columns = cdiv(N, blocks * GROUP) * GROUP;
      if (cdiv((x_columns + g_columns) / GROUP, card.warps) > groups_of_warp(ranks, bytes)) continue;
      for (const int rows : {64, 32, 16}) {
        cluster = blocks, height = rows;
        if (shared_bytes(ranks, bytes, card.warps) <= card.shared_bytes) return;
      }
    }
    cluster = height = 0;
  }

  __host__ __device__ constexpr int kinds() const { return computes_Z ? 2 : 1; }  // of sums over columns
  __host__ __device__ constexpr int64_t tile(int64_t bytes) const { return height * (x_columns + g_columns + 16 / bytes); }
  // Of [A_up, B_up]; of D and of rest.
  __host__ __device__ constexpr int64_t up(int64_t ranks, int64_t bytes) const { return ranks * (g_columns + 16 / bytes); }
  __host__ __device__ constexpr int64_t down(int64_t ranks, int64_t bytes) const {
    return computes_Z ? ranks * (x_columns + 16 / bytes) : 0;
  }
  __host__ __device__ constexpr int64_t rest(int64_t ranks, int64_t bytes) const {
    return bytes == 2 ? down(ranks, bytes) : 0;
  }
  __host__ __device__ constexpr int64_t sums(int64_t ranks) const { return kinds() * height * ranks; }
  __host__ __device__ constexpr int64_t ranks_of_rows(int64_t ranks, int64_t bytes) const {
    return height * (ranks + 16 / bytes);
  }
  constexpr int64_t shared_bytes(int64_t ranks, int64_t bytes, int64_t warps) const {
    const int64_t elements = 2 * tile(bytes) + up(ranks, bytes) + down(ranks, bytes) + rest(ranks, bytes) +
                             2 * ranks_of_rows(ranks, bytes);
    return elements * bytes + (warps + 1) * sums(ranks) * sizeof(float);
  }
  constexpr int64_t rows_of_range(int64_t M, const Card& card) const {
    return M == 0 ? height : cdiv(cdiv(M, height), card.blocks / cluster) * height;
  }
};

// The goals' shapes in bf16: at R = 16 all by clusters of 8, at R = 32 the widest by 16.
static_assert(Plan(768, 3072, 16, 2, false, SM90).cluster == 8 && Plan(768, 3072, 16, 2, false, SM90).height == 64);
static_assert(Plan(1024, 4096, 16, 2, false, SM90).cluster == 8 && Plan(1024, 4096, 16, 2, false, SM90).height == 64);
static_assert(Plan(4096, 4096, 16, 2, false, SM90).cluster == 8 && Plan(4096, 4096, 16, 2, false, SM90).height == 32);
static_assert(Plan(4096, 14336, 16, 2, false, SM90).cluster == 8 && Plan(4096, 14336, 16, 2, false, SM90).height == 16);
static_assert(Plan(768, 3072, 32, 2, false, SM90).cluster == 8 && Plan(4096, 4096, 32, 2, false, SM90).cluster == 8);
static_assert(Plan(4096, 14336, 32, 2, false, SM90).cluster == 16 && Plan(4096, 14336, 32, 2, false, SM90).height == 32);
static_assert(Plan(14336, 14336, 32, 2, false, SM90).cluster == 0);

Plan plan_of(int64_t N, int64_t K, int64_t ranks, bool computes_Z, HydraType type) {
  return Plan(N, K, ranks <= 16 ? 16 : 32, type == HYDRA_FLOAT32 ? 4 : 2, computes_Z, CARD);
}

}  // namespace
