// dZ = mask * (G [A_up, B_up]) s, and partial sums over rows of everything else that needs G: G [M, N], Z, dZ, mask
// [M, R], dU = G^T Z [P, N, R], g = sum_m G [P, N], z_sums = sum_m dZ [P_z, R], scales = sum_m (G [A_up, B_up])_r Z_r
// [P_z, R], up_bias = <g, a_u>, <g, b_u> [P, Q, 2].
//
// A block owns up to 256 rows of G and one of Q ranges of columns. It has so many rows because dU's partial sums cost
// 4 R / rows bytes for each element of G. A second launch adds the Q parts of dZ in order, masks and rounds them.
#include "tiles.cuh"

namespace {

// Tiles of rows in a block: as many as there are registers for dZ and shared memory for Z.
__host__ __device__ constexpr int tiles_of_block(int64_t ranks, int64_t bytes) {
  return smaller(4, 256 / (ranks * bytes));
}
// The second launch: rows in a block, and the most blocks, whose sums `reduce` adds up; beyond that a block has more rows.
constexpr int64_t SUM_ROWS = 32, MAX_SUMS = 2 * PROGRAMS;

template <typename T, int RANKS>
__global__ void __launch_bounds__(THREADS, 1) grad_z_kernel(HydraGradZArguments p, int64_t columns_of_split) {
  constexpr int HEIGHT = tiles_of_block(RANKS, sizeof(T)), WIDTH = COLUMNS<T>, PARTS = THREADS / WIDTH;
  constexpr int N_OF_U = RANKS / 8 / SHARERS<T>;
  SHARED_ARRAY(T, G_tile, ROWS * STRIDE<T>);
  SHARED_ARRAY(T, up_tile, RANKS * STRIDE<T>);
  SHARED_ARRAY(T, Z_tiles, HEIGHT * RANKS * ROW_STRIDE<T>);
  SHARED_ARRAY(float, column_sums, THREADS);
  const int64_t row = blockIdx.x * static_cast<int64_t>(ROWS * HEIGHT), split = blockIdx.y, N = p.N;
  const int64_t first = split * columns_of_split, last = smaller(first + columns_of_split, N);
  const int R = p.r_a + p.r_b, warp = threadIdx.x / 32, column = threadIdx.x % WIDTH, part = threadIdx.x / WIDTH;
  const int group = warp / SHARERS<T> * 16, first_rank = warp % SHARERS<T> * N_OF_U * 8;
  const bool wide = p.adapter_type == HYDRA_FLOAT32, wants_g = p.g_ptr != nullptr || p.up_bias_ptr != nullptr;
  const Matrix<T> G(p.G_ptr, p.M, N, p.stride_gm);
  const int tiles = smaller(HEIGHT, cdiv(p.M - row, ROWS));
  Share<T, T> share;
  float dz[HEIGHT][RANKS / 8][4] = {};
  float of_a_u = 0.0f, of_b_u = 0.0f;

  const auto up_from = [&](int64_t n) {
    return [&, n](int r, int i) {
      const bool of_a = r < p.r_a;
      const int64_t at = of_a ? (n + i) * p.r_a + r : (n + i) * p.r_b + r - p.r_a;
      return bits_of<T>(of_a ? p.A_up_ptr : p.B_up_ptr, at, wide, n + i < N && r < R);
    };
  };
  const auto as_T = [=](uint32_t bits) {
    T up;
    assign(up, value_of<T>(bits, wide));
    return up;
  };
  share.load(G, row, first);
  if (p.dU_ptr != nullptr) {
    for (int tile = 0; tile < tiles; ++tile) {
      fill<RANKS, ROWS>(Z_tiles + tile * RANKS * ROW_STRIDE<T>, ROW_STRIDE<T>, [&](int r, int i) {
        const int64_t m = row + tile * ROWS + i;
        return r < R && m < p.M ? static_cast<const T*>(p.Z_ptr)[m * R + r] : T(0.0f);
      }, Same());
    }
  }
  for (int64_t n = first; n < last; n += WIDTH) {
    float dU[N_OF_U][4] = {};
    float g = 0.0f;
#pragma unroll
    for (int tile = 0; tile < HEIGHT; ++tile) {
      if (tile >= tiles) break;
      __syncthreads();
      share.store(G_tile);
      if (tile == 0 && p.dz_ptr != nullptr) fill<RANKS, WIDTH>(up_tile, STRIDE<T>, up_from(n), as_T);
      __syncthreads();
      if (tile + 1 < tiles) share.load(G, row + (tile + 1) * ROWS, n);
      else if (n + WIDTH < last) share.load(G, row, n + WIDTH);
      if (p.dz_ptr != nullptr) product<false, WIDTH>(dz[tile], G_tile + warp * 16 * STRIDE<T>, up_tile, STRIDE<T>);
      if (p.dU_ptr != nullptr) {
        const T* Z_tile = Z_tiles + (tile * RANKS + first_rank) * ROW_STRIDE<T>;
        product<true, ROWS>(dU, G_tile + group, Z_tile, ROW_STRIDE<T>);
      }
      if (wants_g) {
        for (int i = part * (ROWS / PARTS); i < (part + 1) * (ROWS / PARTS); ++i)
          g += to_float(G_tile[i * STRIDE<T> + column]);
      }
    }
    if (p.dU_ptr != nullptr) {
      each_output(dU, [&](int i, int r, float v) {
        const int64_t of_n = n + group + i;
        if (of_n < N && first_rank + r < R) p.dU_ptr[(blockIdx.x * N + of_n) * R + first_rank + r] = v;
      });
    }
    if (wants_g) {
      column_sums[threadIdx.x] = g;
      __syncthreads();
      if (part == 0 && n + column < N) {
        for (int other = 1; other < PARTS; ++other) g += column_sums[other * WIDTH + column];
        if (p.g_ptr != nullptr) p.g_ptr[blockIdx.x * N + n + column] = g;
        if (p.A_up_bias_ptr != nullptr) of_a_u = __fmaf_rn(g, load<T>(p.A_up_bias_ptr, n + column, wide), of_a_u);
        if (p.B_up_bias_ptr != nullptr) of_b_u = __fmaf_rn(g, load<T>(p.B_up_bias_ptr, n + column, wide), of_b_u);
      }
    }
  }

  if (p.dz_ptr != nullptr) {
#pragma unroll
    for (int tile = 0; tile < HEIGHT; ++tile) {
      each_output(dz[tile], [&](int i, int r, float v) {
        const int64_t m = row + tile * ROWS + warp * 16 + i;
        if (m < p.M && r < R) p.dz_ptr[(split * p.M + m) * R + r] = v;
      });
    }
  }
  if (p.up_bias_ptr != nullptr) {
    of_a_u = block_sum(of_a_u);
    of_b_u = block_sum(of_b_u);
    float* up_bias = p.up_bias_ptr + (blockIdx.x * static_cast<int64_t>(gridDim.y) + split) * 2;
    if (threadIdx.x == 0) up_bias[0] = of_a_u, up_bias[1] = of_b_u;
  }
}

// A row has RANKS threads.
template <typename T, int RANKS>
__global__ void __launch_bounds__(THREADS) finish_kernel(HydraGradZArguments p, int64_t splits, int64_t rows) {
  SHARED_ARRAY(float, sums, THREADS);
  const int R = p.r_a + p.r_b, r = threadIdx.x % RANKS, part = threadIdx.x / RANKS;
  const int64_t first = blockIdx.x * rows, last = smaller(first + rows, p.M);
  const bool wide = p.adapter_type == HYDRA_FLOAT32;
  const bool of_a = r < p.r_a;
  const float scale = scale_of<T>(of_a ? p.scale_a_ptr : p.scale_b_ptr, of_a ? p.scale_a : p.scale_b, wide);
  float z_sum = 0.0f, of_scale = 0.0f;
  for (int64_t m = first + part; m < last && r < R; m += THREADS / RANKS) {
    const int64_t i = m * R + r;
    const float dz = sum_of_partials(p.dz_ptr, splits, p.M * R, i);
    if (p.scales_ptr != nullptr) of_scale = __fmaf_rn(dz, to_float(static_cast<const T*>(p.Z_ptr)[i]), of_scale);
    if (p.dZ_ptr == nullptr) continue;
    T& dZ = static_cast<T*>(p.dZ_ptr)[i];
    assign(dZ, dz * scale * mask_at<T>(p.mask_ptr, i, p.mask_bytes, p.mask_scale));
    // The sum of the rounded dZ, which dZ^T x uses as well: where b0 cancels W0 x, the two sums must cancel too.
    z_sum += to_float(dZ);
  }
  const auto write = [&](float* to, float v) {
    if (to == nullptr) return;
    __syncthreads();
    sums[threadIdx.x] = v;
    __syncthreads();
    for (int other = 1; other < THREADS / RANKS; ++other) v += sums[(part + other) % (THREADS / RANKS) * RANKS + r];
    if (part == 0 && r < R) to[blockIdx.x * static_cast<int64_t>(R) + r] = v;
  };
  write(p.z_sums_ptr, z_sum);
  write(p.scales_ptr, of_scale);
}

int64_t rows_of_block(int64_t R, HydraType type) {
  return ROWS * tiles_of_block(R <= 16 ? 16 : R <= 32 ? 32 : 64, type == HYDRA_FLOAT32 ? 4 : 2);
}

int64_t rows_of_sum(int64_t M) { return cdiv(cdiv(M, SUM_ROWS), MAX_SUMS) * SUM_ROWS; }

}  // namespace

int64_t hydra_grad_z_partials(int64_t M, int64_t R, HydraType type) { return cdiv(M, rows_of_block(R, type)); }

int64_t hydra_grad_z_sums(int64_t M) { return M == 0 ? 0 : cdiv(M, rows_of_sum(M)); }

int64_t hydra_grad_z_splits(int64_t M, int64_t N, int64_t R, HydraType type) {
  return splits_of(cdiv(N, SPLIT_COLUMNS), hydra_grad_z_partials(M, R, type));
}

int hydra_grad_z(const HydraGradZArguments* p, void* stream) {
  const int64_t M = p->M, N = p->N, R = p->r_a + p->r_b;
  return dispatch(p->type, R, [&]<typename T, int RANKS>() {
    if (M == 0) return 0;
    const int64_t splits = hydra_grad_z_splits(M, N, R, p->type);
    const dim3 grid(hydra_grad_z_partials(M, R, p->type), splits);
    const int64_t columns_of_split = cdiv(cdiv(N, SPLIT_COLUMNS), splits) * SPLIT_COLUMNS;
    const int status = launch(grad_z_kernel<T, RANKS>, grid, stream, *p, columns_of_split);
    if (status != 0 || p->dz_ptr == nullptr) return status;
    return launch(finish_kernel<T, RANKS>, dim3(hydra_grad_z_sums(M)), stream, *p, splits, rows_of_sum(M));
  });
}
