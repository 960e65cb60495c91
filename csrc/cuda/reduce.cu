// Partial sums into gradients, in a fixed order. From grad_z: dU [P, N, R], g = sum_m G [P, N], z = sum_m dZ [P_z, R],
// scales [P_z, R], up_bias [P, Q, 2]; from grad_w: dD [S, R, K], whose last r_b rows are T.
//
//     dA_up = s_a dU_a    dA_down = dD_a    da_u = s_a g    da_d = z_a    ds_a from scales and up_bias    (b likewise)
//     db0 = g + z_b B_down                  dB_down = T W0^T + z_b b0^T, T in fp32
//
// Three launches: all sums, where a block's number says which job it has; then T W0^T, where a block has 64 rows of W0 and
// a part of the columns; then the sums of those parts.
#include "tiles.cuh"

namespace {

struct Ends {  // the first block after each job of the first launch
  int64_t up, down, columns;
};

template <typename T>
__device__ void element_of_dU(const HydraReduceArguments& p, int64_t i, float scale_a, float scale_b) {
  const bool wide = p.adapter_type == HYDRA_FLOAT32;
  const int R = p.r_a + p.r_b, r = i % R;
  const int64_t n = i / R;
  const float dU = sum_of_partials(p.dU_ptr, p.P, p.N * R, i);
  if (r < p.r_a && p.dA_up_ptr != nullptr) store<T>(p.dA_up_ptr, n * p.r_a + r, scale_a * dU, wide);
  if (r >= p.r_a && p.dB_up_ptr != nullptr) store<T>(p.dB_up_ptr, n * p.r_b + r - p.r_a, scale_b * dU, wide);
}

// dA_down and T are rows of dD.
template <typename T>
__device__ void element_of_dD(const HydraReduceArguments& p, int64_t i) {
  const int64_t of_a = p.r_a * p.K;
  const float dD = sum_of_partials(p.dD_ptr, p.S, (p.r_a + p.r_b) * p.K, i);
  if (i >= of_a) p.T_ptr[i - of_a] = dD;
  else if (p.dA_down_ptr != nullptr) store<T>(p.dA_down_ptr, i, dD, p.adapter_type == HYDRA_FLOAT32);
}

// Column r of P_z rows of R sums, by the whole block.
__device__ float sum_of_rank(const float* sums, const HydraReduceArguments& p, int r) {
  float sum = 0.0f;
  for (int64_t i = threadIdx.x; i < p.P_z; i += THREADS) sum += sums[i * (p.r_a + p.r_b) + r];
  return block_sum(sum);
}

template <typename T>
__device__ void gradients_of_columns(const HydraReduceArguments& p, int64_t n, float scale_a, float scale_b) {
  const bool wide = p.adapter_type == HYDRA_FLOAT32;
  float g = n < p.N ? sum_of_partials(p.g_ptr, p.P, p.N, n) : 0.0f;
  if (n < p.N && p.dA_up_bias_ptr != nullptr) store<T>(p.dA_up_bias_ptr, n, scale_a * g, wide);
  if (n < p.N && p.dB_up_bias_ptr != nullptr) store<T>(p.dB_up_bias_ptr, n, scale_b * g, wide);
  if (p.dbias_ptr == nullptr) return;
  for (int r = 0; p.B_down_ptr != nullptr && r < p.r_b; ++r) {
    const float z = sum_of_rank(p.z_sums_ptr, p, p.r_a + r);
    if (n < p.N) g = __fmaf_rn(z, load<T>(p.B_down_ptr, r * p.N + n, wide), g);
  }
  if (n < p.N) assign(static_cast<T*>(p.dbias_ptr)[n], g);
}

// Jobs of one block each: every rank r < R here, then the two scales.
template <typename T>
__device__ void gradient_of_rank(const HydraReduceArguments& p, int r) {
  const bool wide = p.adapter_type == HYDRA_FLOAT32, of_a = r < p.r_a;
  void* to = of_a ? p.dA_down_bias_ptr : p.dB_down_bias_ptr;
  if (to == nullptr) return;
  const float z = sum_of_rank(p.z_sums_ptr, p, r);
  if (threadIdx.x == 0) store<T>(to, of_a ? r : r - p.r_a, z, wide);
}

template <typename T>
__device__ void gradient_of_scale(const HydraReduceArguments& p, bool of_a) {
  void* to = of_a ? p.dscale_a_ptr : p.dscale_b_ptr;
  if (to == nullptr) return;
  const int R = p.r_a + p.r_b, first = of_a ? 0 : p.r_a, end = of_a ? p.r_a : R;
  float sum = 0.0f;
  for (int64_t i = threadIdx.x; i < p.P_z; i += THREADS) {
#pragma unroll 4
    for (int r = first; r < end; ++r) sum += p.scales_ptr[i * R + r];
  }
  for (int64_t i = threadIdx.x; i < p.P * p.Q; i += THREADS) sum += p.up_bias_ptr[2 * i + (of_a ? 0 : 1)];
  sum = block_sum(sum);
  if (threadIdx.x == 0) store<T>(to, 0, sum, p.adapter_type == HYDRA_FLOAT32);
}

template <typename T>
__global__ void __launch_bounds__(THREADS, 1) reduce_kernel(HydraReduceArguments p, Ends ends) {
  const bool wide = p.adapter_type == HYDRA_FLOAT32;
  const float scale_a = scale_of<T>(p.scale_a_ptr, p.scale_a, wide);
  const float scale_b = scale_of<T>(p.scale_b_ptr, p.scale_b, wide);
  const int64_t block = blockIdx.x, R = p.r_a + p.r_b;
  const auto element = [](int64_t job) { return job * THREADS + threadIdx.x; };
  if (block < ends.up) {
    if (const int64_t i = element(block); i < p.N * R) element_of_dU<T>(p, i, scale_a, scale_b);
  } else if (block < ends.down) {
    const int64_t i = element(block - ends.up), end = (p.T_ptr != nullptr ? R : p.r_a) * p.K;
    if (i < end) element_of_dD<T>(p, i);
  } else if (block < ends.columns) {
    gradients_of_columns<T>(p, element(block - ends.down), scale_a, scale_b);
  } else if (block < ends.columns + R) {
    gradient_of_rank<T>(p, block - ends.columns);
  } else {
    gradient_of_scale<T>(p, block == ends.columns + R);
  }
}

// dB [splits, N, r_b]: the parts of (T W0^T)^T.
template <typename T, int RANKS>
__global__ void __launch_bounds__(THREADS, 1) through_weight_kernel(HydraReduceArguments p, int64_t columns_of_split) {
  constexpr int WIDTH = COLUMNS<float>;
  SHARED_ARRAY(float, w_tile, ROWS * STRIDE<float>);
  SHARED_ARRAY(float, T_tile, RANKS * STRIDE<float>);
  const int64_t row = blockIdx.x * static_cast<int64_t>(ROWS), split = blockIdx.y;
  const int64_t first = split * columns_of_split, last = smaller(first + columns_of_split, p.K);
  const int warp = threadIdx.x / 32;
  const Matrix<T> w(p.w_ptr, p.N, p.K, p.stride_wn);
  Share<T, float> share_w;
  Other<float, RANKS, WIDTH, false> share_T;
  float dB[RANKS / 8][4] = {};
  const auto load = [&](int64_t k) {
    share_w.load(w, row, k);
    share_T.load([&](int r, int i) { return r < p.r_b && k + i < p.K ? p.T_ptr[r * p.K + k + i] : 0.0f; });
  };
  load(first);
  for (int64_t k = first; k < last; k += WIDTH) {
    __syncthreads();
    share_w.store(w_tile);
    share_T.store(T_tile, STRIDE<float>, Same());
    __syncthreads();
    if (k + WIDTH < last) load(k + WIDTH);
    product<false, WIDTH>(dB, w_tile + warp * 16 * STRIDE<float>, T_tile, STRIDE<float>);
  }
  each_output(dB, [&](int i, int r, float v) {
    const int64_t n = row + warp * 16 + i;
    if (n < p.N && r < p.r_b) p.dB_ptr[(split * p.N + n) * p.r_b + r] = v;
  });
}

// A block has one rank and 128 columns of dB_down.
template <typename T>
__global__ void __launch_bounds__(THREADS) finish_kernel(HydraReduceArguments p, int64_t splits) {
  const int64_t n = blockIdx.x * static_cast<int64_t>(THREADS) + threadIdx.x, r = blockIdx.y;
  const float z = p.bias_ptr != nullptr ? sum_of_rank(p.z_sums_ptr, p, p.r_a + r) : 0.0f;
  if (n >= p.N) return;
  float dB = sum_of_partials(p.dB_ptr, splits, p.N * p.r_b, n * p.r_b + r);
  if (p.bias_ptr != nullptr) dB = __fmaf_rn(z, to_float(static_cast<const T*>(p.bias_ptr)[n]), dB);
  store<T>(p.dB_down_ptr, r * p.N + n, dB, p.adapter_type == HYDRA_FLOAT32);
}

}  // namespace

int64_t hydra_reduce_splits(int64_t N, int64_t K) { return splits_of(cdiv(K, SPLIT_COLUMNS), cdiv(N, ROWS)); }

int hydra_reduce(const HydraReduceArguments* p, void* stream) {
  const int64_t N = p->N, R = p->r_a + p->r_b, splits = p->dB_down_ptr == nullptr ? 0 : hydra_reduce_splits(N, p->K);
  if (R > 64) return 1;
  return dispatch(p->type, p->r_b, [&]<typename T, int RANKS>() {
    const bool ups = p->dA_up_ptr != nullptr || p->dB_up_ptr != nullptr;
    const bool columns = p->dbias_ptr != nullptr || p->dA_up_bias_ptr != nullptr || p->dB_up_bias_ptr != nullptr;
    Ends ends;
    ends.up = ups ? cdiv(N * R, THREADS) : 0;
    const int64_t downs = p->T_ptr != nullptr ? R : p->dA_down_ptr != nullptr ? p->r_a : 0;
    ends.down = ends.up + cdiv(downs * p->K, THREADS);
    ends.columns = ends.down + (columns ? cdiv(N, THREADS) : 0);
    const int status = launch(reduce_kernel<T>, dim3(ends.columns + R + 2), stream, *p, ends);
    if (status != 0 || splits == 0) return status;
    const int64_t columns_of_split = cdiv(cdiv(p->K, SPLIT_COLUMNS), splits) * SPLIT_COLUMNS;
    const dim3 grid(cdiv(N, ROWS), splits);
    const int second = launch(through_weight_kernel<T, RANKS>, grid, stream, *p, columns_of_split);
    if (second != 0) return second;
    return launch(finish_kernel<T>, dim3(cdiv(N, THREADS), p->r_b), stream, *p, splits);
  });
}
