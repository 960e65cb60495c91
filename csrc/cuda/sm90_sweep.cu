// The backward's one sweep over x [M, K] and G [M, N] on sm_90, in place of grad_z and grad_w, each element read once:
//
//     dZ = mask * (G [A_up, B_up]) s        dU = G^T Z        dD = dZ^T x        and the sums of grad_z
//     Z is given, or computed as `down` computes it, from the same read of x: Z = mask * (x D^T + x [0; rest]^T + d)
//
// A cluster of blocks owns a range of rows. Each of its blocks owns a slice of x's columns and one of G's, and keeps the
// sums dD and dU of its slices in registers from the first row to the last. For each `height` rows, whose slices lie in
// shared memory while the next ones arrive:
//
//     1. each warp multiplies its columns of G by [A_up, B_up] (and of x by D, where Z is computed)
//     2. each block adds its warps' products up and sends each row's sums to the block that owns the row
//     3. the owner adds the blocks' sums up, applies scale and mask, rounds, and sends dZ and Z to all blocks
//     4. each warp adds G^T Z and x^T dZ of its columns to its sums
//
// Every sum has a fixed order. sum_m G is one more rank, whose Z is 1. Partial sums are laid out as `reduce` reads them.
#include "sm90.cuh"
#include "sm90_plan.cuh"

namespace {

constexpr int SWEEP_THREADS = CARD.warps * 32;

// acc += 16 rows of 16 columns by all ranks: acc[r, i] for row i. `other` holds a rank's columns in a row.
template <int RANKS, typename T>
__device__ void add_rows(float (&acc)[RANKS / 8][4], const T* tile, int stride, const T* other, int other_stride) {
  const int lane = threadIdx.x % 32;
  if constexpr (std::is_same_v<T, float>) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll 1
    for (int k = 0; k < GROUP; k += 4) {
      const float4 upper = *reinterpret_cast<const float4*>(tile + g * stride + k);
      const float4 lower = *reinterpret_cast<const float4*>(tile + (g + 8) * stride + k);
      const float a[4] = {upper.x, upper.y, upper.z, upper.w}, b[4] = {lower.x, lower.y, lower.z, lower.w};
#pragma unroll
      for (int n = 0; n < RANKS / 8; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float4 line = *reinterpret_cast<const float4*>(other + (8 * n + 2 * t + j) * other_stride + k);
          const float c[4] = {line.x, line.y, line.z, line.w};
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            acc[n][j] = __fmaf_rn(a[e], c[e], acc[n][j]);
            acc[n][2 + j] = __fmaf_rn(b[e], c[e], acc[n][2 + j]);
          }
        }
      }
    }
  } else {
    uint32_t a[4];
    load_matrices<false>(a, tile + lane % 16 * stride + lane / 16 * 8);
#pragma unroll
    for (int n = 0; n < RANKS / 8; n += 2) {
      uint32_t b[4];
      load_matrices<false>(b, other + (8 * n + lane % 8 + lane / 16 * 8) * other_stride + lane / 8 % 2 * 8);
      mma<T>(acc[n], a, {b[0], b[1]});
      mma<T>(acc[n + 1], a, {b[2], b[3]});
    }
  }
}

// From row to row of Z and dZ in shared memory, where a row's ranks are neighbours.
template <typename T, int RANKS> constexpr int Z_STRIDE = RANKS + 16 / sizeof(T);

// Z or dZ of 16 rows, in shared memory; in registers too where T has 16 bits.
template <int RANKS, typename T>
struct RanksOfRows {
  const T* at;
  uint32_t held[std::is_same_v<T, float> ? 1 : RANKS / 8][2];

  __device__ explicit RanksOfRows(const T* from) : at(from) {
    if constexpr (!std::is_same_v<T, float>) {
      const int lane = threadIdx.x % 32;
#pragma unroll
      for (int n = 0; n < RANKS / 8; n += 2) {
        uint32_t b[4];
        load_matrices<true>(b, from + lane % 16 * Z_STRIDE<T, RANKS> + 8 * n + lane / 16 * 8);
        held[n][0] = b[0], held[n][1] = b[1], held[n + 1][0] = b[2], held[n + 1][1] = b[3];
      }
    }
  }
};

// acc += 16 columns of 16 rows by all ranks of one of two: acc[r, i] for column i.
template <int RANKS, typename T>
__device__ void add_columns(float (&acc)[RANKS / 8][4], const T* tile, int stride, bool second,
                            const RanksOfRows<RANKS, T>& a_z, const RanksOfRows<RANKS, T>& b_z) {
  const int lane = threadIdx.x % 32;
  if constexpr (std::is_same_v<T, float>) {
    const int g = lane / 4, t = lane % 4;
    const float* const z = second ? b_z.at : a_z.at;
#pragma unroll 2
    for (int row = 0; row < 16; ++row) {
      const float upper = tile[row * stride + g], lower = tile[row * stride + g + 8];
#pragma unroll
      for (int n = 0; n < RANKS / 8; ++n) {
        const float2 b = *reinterpret_cast<const float2*>(z + row * Z_STRIDE<T, RANKS> + 8 * n + 2 * t);
        acc[n][0] = __fmaf_rn(upper, b.x, acc[n][0]), acc[n][1] = __fmaf_rn(upper, b.y, acc[n][1]);
        acc[n][2] = __fmaf_rn(lower, b.x, acc[n][2]), acc[n][3] = __fmaf_rn(lower, b.y, acc[n][3]);
      }
    }
  } else {
    uint32_t a[4];
    load_matrices<true>(a, tile + (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8);
#pragma unroll
    for (int n = 0; n < RANKS / 8; ++n) {
      // Selected by value: a reference to one of two would move both out of registers.
      mma<T>(acc[n], a, {second ? b_z.held[n][0] : a_z.held[n][0], second ? b_z.held[n][1] : a_z.held[n][1]});
    }
  }
}

// 16 bytes from row m, column k on of a matrix, zeros outside of it and of the rows before `last`.
template <typename T>
__device__ void start_line(T* to, const Matrix<T>& from, int64_t m, int64_t last, int64_t k) {
  constexpr int WIDTH = 16 / sizeof(T);
  const int count = m >= last || k >= from.columns ? 0 : static_cast<int>(smaller(WIDTH, from.columns - k));
  const T* const ptr = count == 0 ? from.ptr : from.ptr + m * from.stride + k;
  if (from.lines) {
    start_copy(to, static_cast<const void*>(ptr), count * static_cast<int>(sizeof(T)));
    return;
  }
#pragma unroll
  for (int e = 0; e < WIDTH; ++e) to[e] = e < count ? ptr[e] : T(0.0f);
}

// The sum over the threads whose number is the same modulo `period`, in order; right in the first `period` threads.
__device__ inline float sum_of_threads(float v, int period, float* scratch) {
  __syncthreads();
  scratch[threadIdx.x] = v;
  __syncthreads();
  for (int other = threadIdx.x + period; other < SWEEP_THREADS; other += period) v += scratch[other];
  return v;
}

template <typename T, int RANKS>
__global__ void __launch_bounds__(SWEEP_THREADS, 1) sweep_kernel(
    HydraSm90SweepArguments p, Plan plan, int64_t rows_of_range) {
#if defined(CUDA_ON_HOST) || (__CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1000)
  constexpr int BYTES = sizeof(T), WIDTH = 16 / BYTES, GROUPS = groups_of_warp(RANKS, BYTES);
  constexpr int OWNED = cdiv(8 * RANKS, SWEEP_THREADS);  // elements of dZ that a thread owns in a step, at most
  constexpr int ROW = Z_STRIDE<T, RANKS>;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int C = plan.cluster, H = plan.height, x_groups = plan.x_columns / GROUP, groups = x_groups + plan.g_columns / GROUP;
  const int stride = plan.x_columns + plan.g_columns + WIDTH, up_stride = plan.g_columns + WIDTH;
  const int down_stride = plan.x_columns + WIDTH;
  SharedArrays shared;
  T* const tiles = shared.take<T>(2 * plan.tile(BYTES));
  T* const up_tile = shared.take<T>(plan.up(RANKS, BYTES));
  T* const D_tile = shared.take<T>(plan.down(RANKS, BYTES));
  T* const rest_tile = shared.take<T>(plan.rest(RANKS, BYTES));
  T* const Z_tile = shared.take<T>(plan.ranks_of_rows(RANKS, BYTES));
  T* const dZ_tile = shared.take<T>(plan.ranks_of_rows(RANKS, BYTES));
  float* const of_warps = shared.take<float>(CARD.warps * plan.sums(RANKS));
  float* const of_blocks = shared.take<float>(plan.sums(RANKS));  // for the rows that this block owns

  const int block = blockIdx.x % C, R = p.r_a + p.r_b;
  const int64_t range = blockIdx.x / C, first = range * rows_of_range, last = smaller(first + rows_of_range, p.M);
  const int64_t x_first = block * static_cast<int64_t>(plan.x_columns), g_first = block * static_cast<int64_t>(plan.g_columns);
  const bool wide = p.adapter_type == HYDRA_FLOAT32, wants_g = p.g_ptr != nullptr || p.up_bias_ptr != nullptr;
  const Matrix<T> x(p.x_ptr, p.M, p.K, p.stride_xm), G(p.G_ptr, p.M, p.N, p.stride_gm);

  const auto start_rows = [&](int64_t row, T* tile) {
    const int of_x = plan.x_columns / WIDTH, lines = of_x + plan.g_columns / WIDTH;
    for (int i = warp; i < H; i += CARD.warps) {
      for (int line = lane; line < lines; line += 32) {
        T* const to = tile + i * stride + line * WIDTH;
        if (line < of_x) start_line(to, x, row + i, last, x_first + line * WIDTH);
        else start_line(to, G, row + i, last, g_first + (line - of_x) * WIDTH);
      }
    }
    end_group();
  };
  start_rows(first, tiles);
  for (int i = thread; i < RANKS * plan.g_columns; i += SWEEP_THREADS) {
    const int r = i % RANKS, c = i / RANKS;
    const int64_t n = g_first + c;
    const bool of_a = r < p.r_a;
    const uint32_t bits = bits_of<T>(of_a ? p.A_up_ptr : p.B_up_ptr, of_a ? n * p.r_a + r : n * p.r_b + r - p.r_a, wide,
                                     n < p.N && r < R);
    assign(up_tile[r * up_stride + c], value_of<T>(bits, wide));
  }
  if (plan.computes_Z) {
    for (int r = 0; r < RANKS; ++r) {
      for (int c = thread; c < plan.x_columns; c += SWEEP_THREADS) {
        const int64_t k = x_first + c;
        const bool inside = k < p.K && r < R;
        D_tile[r * down_stride + c] = inside ? static_cast<const T*>(p.D_ptr)[r * p.K + k] : T(0.0f);
        if constexpr (BYTES == 2) {
          const bool rests = inside && r >= p.r_a && p.rest_ptr != nullptr;
          rest_tile[r * down_stride + c] = rests ? static_cast<const T*>(p.rest_ptr)[(r - p.r_a) * p.K + k] : T(0.0f);
        }
      }
    }
  }
  cluster_barrier();  // a block's shared memory may be written from now on: the block runs

  // Of the elements of a step's Z and dZ that this block owns, thread i has i, i + SWEEP_THREADS, and so on: one rank.
  const int own_rows = H / C, owned = own_rows * RANKS, own_rank = thread % RANKS;
  const bool of_a = own_rank < p.r_a;
  const float scale = scale_of<T>(of_a ? p.scale_a_ptr : p.scale_b_ptr, of_a ? p.scale_a : p.scale_b, wide);
  const float d = plan.computes_Z && p.d_ptr != nullptr && own_rank < R ? p.d_ptr[own_rank] : 0.0f;
  float z_sum = 0.0f, of_scale = 0.0f, acc[GROUPS][RANKS / 8][4] = {};
  T* tile = tiles;
  for (int64_t row = first; row < last; row += H) {
    T* const next = tile == tiles ? tiles + plan.tile(BYTES) : tiles;
    __syncthreads();  // nobody reads the tile before this one any more
    if (row + H < last) start_rows(row + H, next);
    else end_group();
    float mask[OWNED], z_given[OWNED];
#pragma unroll
    for (int j = 0; j < OWNED; ++j) {
      const int e = thread + j * SWEEP_THREADS;
      const int64_t m = row + block * own_rows + e / RANKS, i = m * R + own_rank;
      const bool inside = e < owned && m < last && own_rank < R;
      mask[j] = inside ? mask_at<T>(p.mask_ptr, i, p.mask_bytes, p.mask_scale) : 0.0f;
      z_given[j] = inside && !plan.computes_Z ? to_float(static_cast<const T*>(p.Z_ptr)[i]) : 0.0f;
    }
    wait_for_groups<1>();
    __syncthreads();

#pragma unroll 1
    for (int i = 0; i < H; i += 16) {  // 1
      const auto keep = [&](const float (&sums)[RANKS / 8][4], int kind) {
        each_output(sums, [&](int of_i, int r, float v) {
          of_warps[((warp * plan.kinds() + kind) * H + i + of_i) * RANKS + r] = v;
        });
      };
      float dz[RANKS / 8][4] = {};
#pragma unroll 1
      for (int q = x_groups + warp; q < groups; q += CARD.warps)
        add_rows<RANKS>(dz, tile + i * stride + q * GROUP, stride, up_tile + (q - x_groups) * GROUP, up_stride);
      keep(dz, 0);
      if (!plan.computes_Z) continue;
      float z[RANKS / 8][4] = {};
#pragma unroll 1
      for (int q = warp; q < x_groups; q += CARD.warps) {
        add_rows<RANKS>(z, tile + i * stride + q * GROUP, stride, D_tile + q * GROUP, down_stride);
        if constexpr (BYTES == 2)
          add_rows<RANKS>(z, tile + i * stride + q * GROUP, stride, rest_tile + q * GROUP, down_stride);
      }
      keep(z, 1);
    }
    __syncthreads();
    const int sums = plan.sums(RANKS);
    for (int e = thread; e < sums; e += SWEEP_THREADS) {  // 2
      float sum = 0.0f;
      for (int w = 0; w < CARD.warps; ++w) sum += of_warps[w * sums + e];
      const int kind = e / (H * RANKS), of_kind = e % (H * RANKS);
      in_block(of_blocks, of_kind / owned)[(block * plan.kinds() + kind) * owned + of_kind % owned] = sum;
    }
    cluster_barrier();
#pragma unroll
    for (int j = 0; j < OWNED; ++j) {  // 3
      const int e = thread + j * SWEEP_THREADS;
      if (e >= owned) break;
      const auto sum = [&](int kind) {
        float sum = 0.0f;
        for (int b = 0; b < C; ++b) sum += of_blocks[(b * plan.kinds() + kind) * owned + e];
        return sum;
      };
      const int i = block * own_rows + e / RANKS;
      const int64_t m = row + i;
      const float dz = sum(0);
      T z, dZ;
      assign(z, plan.computes_Z ? (sum(1) + d) * mask[j] : z_given[j]);
      assign(dZ, dz * scale * mask[j]);
      if (m >= last || own_rank >= R) {
        assign(z, wants_g && m < last && own_rank == R ? 1.0f : 0.0f);
        assign(dZ, 0.0f);
      } else {
        // The sum of the rounded dZ, which dZ^T x uses as well: where b0 cancels W0 x, the two sums must cancel too.
        z_sum += to_float(dZ);
        of_scale = __fmaf_rn(dz, to_float(z), of_scale);
        if (p.dZ_ptr != nullptr) static_cast<T*>(p.dZ_ptr)[m * R + own_rank] = dZ;
        if (plan.computes_Z && p.Z_ptr != nullptr) static_cast<T*>(p.Z_ptr)[m * R + own_rank] = z;
      }
      for (int b = 0; b < C; ++b) {
        const int to = (block + b) % C;  // not all blocks to one at a time
        in_block(Z_tile, to)[i * ROW + own_rank] = z;
        in_block(dZ_tile, to)[i * ROW + own_rank] = dZ;
      }
    }
    cluster_barrier();
#pragma unroll 1
    for (int i = 0; i < H; i += 16) {  // 4
      const RanksOfRows<RANKS, T> z(Z_tile + i * ROW), dZ(dZ_tile + i * ROW);
#pragma unroll
      for (int j = 0; j < GROUPS; ++j) {
        const int q = warp + j * CARD.warps;
        if (q >= groups) break;
        add_columns<RANKS>(acc[j], tile + i * stride + q * GROUP, stride, q < x_groups, z, dZ);
      }
    }
    tile = next;
  }

  float of_a_u = 0.0f, of_b_u = 0.0f;
#pragma unroll
  for (int j = 0; j < GROUPS; ++j) {
    const int q = warp + j * CARD.warps;
    if (q >= groups) break;
    each_output(acc[j], [&](int i, int r, float v) {
      const int64_t k = x_first + q * GROUP + i, n = g_first + (q - x_groups) * GROUP + i;
      if (q < x_groups) {
        if (k < p.K && r < R) p.dD_ptr[(range * R + r) * p.K + k] = v;
      } else if (n < p.N && r < R) {
        p.dU_ptr[(range * p.N + n) * R + r] = v;
      } else if (n < p.N && r == R && wants_g) {
        if (p.g_ptr != nullptr) p.g_ptr[range * p.N + n] = v;
        if (p.A_up_bias_ptr != nullptr) of_a_u = __fmaf_rn(v, load<T>(p.A_up_bias_ptr, n, wide), of_a_u);
        if (p.B_up_bias_ptr != nullptr) of_b_u = __fmaf_rn(v, load<T>(p.B_up_bias_ptr, n, wide), of_b_u);
      }
    });
  }
  const auto write = [&](float* to, float v) {
    if (to == nullptr) return;
    v = sum_of_threads(v, RANKS, of_warps);
    if (thread < R) to[blockIdx.x * static_cast<int64_t>(R) + thread] = v;
  };
  write(p.z_sums_ptr, z_sum);
  write(p.scales_ptr, of_scale);
  if (p.up_bias_ptr != nullptr) {
    of_a_u = sum_of_threads(of_a_u, 1, of_warps);
    of_b_u = sum_of_threads(of_b_u, 1, of_warps);
    if (thread == 0) p.up_bias_ptr[2 * blockIdx.x] = of_a_u, p.up_bias_ptr[2 * blockIdx.x + 1] = of_b_u;
  }
#else
  __trap();  // code for another card, which must not leave its outputs as they were
#endif
}

}  // namespace

int64_t hydra_sm90_sweep_blocks(int64_t N, int64_t K, int64_t ranks, bool computes_Z, HydraType type) {
  return ranks > 32 ? 0 : plan_of(N, K, ranks, computes_Z, type).cluster;
}

int64_t hydra_sm90_sweep_partials(int64_t M, int64_t N, int64_t K, int64_t ranks, bool computes_Z, HydraType type) {
  const Plan plan = plan_of(N, K, ranks, computes_Z, type);
  return cdiv(M, plan.rows_of_range(M, CARD));
}

int hydra_sm90_sweep(const HydraSm90SweepArguments* p, void* stream) {
  const bool wants_g = p->g_ptr != nullptr || p->up_bias_ptr != nullptr;
  const int64_t M = p->M, R = p->r_a + p->r_b;
  return dispatch(p->type, R + wants_g, [&]<typename T, int RANKS>() {
    if constexpr (RANKS > 32) {
      return 1;
    } else {
      const Plan plan(p->N, p->K, RANKS, sizeof(T), p->D_ptr != nullptr, CARD);
      if (plan.cluster == 0) return 1;
      if (M == 0) return 0;
      const int64_t rows = plan.rows_of_range(M, CARD), bytes = plan.shared_bytes(RANKS, sizeof(T), CARD.warps);
      return launch_clusters(sweep_kernel<T, RANKS>, cdiv(M, rows), plan.cluster, SWEEP_THREADS, bytes, stream, *p, plan, rows);
    }
  });
}
