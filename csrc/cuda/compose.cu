// D = [A_down; C], C = B_down W0; rest = C - C rounded; d = [a_d, B_down b0 + b_d]; U = [s_a A_up, s_b B_up];
// u = s_a a_u + s_b b_u. Shapes: W0 [N, K], D [R, K], rest [r_b, K], d [R], U [N, R], u [N].
//
// C is computed in fp32: partial sums over S splits of the rows of W0. A second launch adds them in order and computes
// everything else; each range of its blocks has one job.
#include "tiles.cuh"

namespace {

template <typename T, int RANKS>
__global__ void __launch_bounds__(THREADS, 1) compose_kernel(HydraComposeArguments p, int64_t rows_of_split) {
  const int64_t split = blockIdx.y, first = split * rows_of_split;
  const bool wide = p.adapter_type == HYDRA_FLOAT32;
  columns_of_rows<float, RANKS, false>(
      Matrix<T>(p.w_ptr, p.N, p.K, p.stride_wn), first, smaller(first + rows_of_split, p.N),
      blockIdx.x * static_cast<int64_t>(COLUMNS<float>), p.r_b, p.C_ptr + split * p.r_b * p.K,
      [&](int64_t n, int r) { return bits_of<T>(p.B_down_ptr, r * p.N + n, wide, r < p.r_b); },
      [=](uint32_t bits) { return rounded<T>(value_of<T>(bits, wide)); });
}

template <typename T>
__device__ void element_of_D(const HydraComposeArguments& p, int64_t i, int64_t splits) {
  T* D = static_cast<T*>(p.D_ptr);
  const int64_t of_C = i - p.r_a * p.K;
  if (of_C < 0) {
    assign(D[i], load<T>(p.A_down_ptr, i, p.adapter_type == HYDRA_FLOAT32));
    return;
  }
  const float C = sum_of_partials(p.C_ptr, splits, p.r_b * p.K, of_C);
  assign(D[i], C);
  if (p.rest_ptr != nullptr) assign(static_cast<T*>(p.rest_ptr)[of_C], C - to_float(D[i]));
}

template <typename T>
__device__ void element_of_U(const HydraComposeArguments& p, int64_t i, float scale_a, float scale_b) {
  const bool wide = p.adapter_type == HYDRA_FLOAT32;
  const int R = p.r_a + p.r_b;
  const int64_t n = i / R;
  const int r = i % R;
  const float U = r < p.r_a ? scale_a * load<T>(p.A_up_ptr, n * p.r_a + r, wide)
                            : scale_b * load<T>(p.B_up_ptr, n * p.r_b + r - p.r_a, wide);
  assign(static_cast<T*>(p.U_ptr)[i], U);
}

template <typename T>
__device__ void element_of_u(const HydraComposeArguments& p, int64_t n, float scale_a, float scale_b) {
  const bool wide = p.adapter_type == HYDRA_FLOAT32;
  float u = 0.0f;
  if (p.A_up_bias_ptr != nullptr) u += scale_a * load<T>(p.A_up_bias_ptr, n, wide);
  if (p.B_up_bias_ptr != nullptr) u += scale_b * load<T>(p.B_up_bias_ptr, n, wide);
  assign(static_cast<T*>(p.u_ptr)[n], u);
}

// One element of d, by the whole block.
template <typename T>
__device__ void element_of_d(const HydraComposeArguments& p, int r) {
  const bool wide = p.adapter_type == HYDRA_FLOAT32;
  const void* down_bias = r < p.r_a ? p.A_down_bias_ptr : p.B_down_bias_ptr;
  const int of_branch = r < p.r_a ? r : r - p.r_a;
  float d = 0.0f;
  if (r >= p.r_a && p.bias_ptr != nullptr) {
    const T* b0 = static_cast<const T*>(p.bias_ptr);
    for (int64_t n = threadIdx.x; n < p.N; n += THREADS)
      d = __fmaf_rn(rounded<T>(load<T>(p.B_down_ptr, of_branch * p.N + n, wide)), to_float(b0[n]), d);
  }
  d = block_sum(d);
  if (down_bias != nullptr) d += load<T>(down_bias, of_branch, wide);
  if (threadIdx.x == 0) p.d_ptr[r] = d;
}

template <typename T>
__global__ void __launch_bounds__(THREADS, 1) finish_kernel(
    HydraComposeArguments p, int64_t splits, int64_t end_D, int64_t end_U, int64_t end_u) {
  const bool wide = p.adapter_type == HYDRA_FLOAT32;
  const float scale_a = scale_of<T>(p.scale_a_ptr, p.scale_a, wide);
  const float scale_b = scale_of<T>(p.scale_b_ptr, p.scale_b, wide);
  const int64_t R = p.r_a + p.r_b, block = blockIdx.x;
  const auto element = [](int64_t job) { return job * THREADS + threadIdx.x; };
  if (block < end_D) {
    if (const int64_t i = element(block); i < R * p.K) element_of_D<T>(p, i, splits);
  } else if (block < end_U) {
    if (const int64_t i = element(block - end_D); i < p.N * R) element_of_U<T>(p, i, scale_a, scale_b);
  } else if (block < end_u) {
    if (const int64_t n = element(block - end_U); n < p.N) element_of_u<T>(p, n, scale_a, scale_b);
  } else {
    element_of_d<T>(p, block - end_u);
  }
}

}  // namespace

int64_t hydra_compose_splits(int64_t N, int64_t K) {
  return splits_of(cdiv(N, ROWS), cdiv(K, SPLIT_COLUMNS));
}

int hydra_compose(const HydraComposeArguments* p, void* stream) {
  const int64_t N = p->N, K = p->K, R = p->r_a + p->r_b, splits = hydra_compose_splits(N, K);
  if (R > 64) return 1;
  return dispatch(p->type, p->r_b, [&]<typename T, int RANKS>() {
    if (p->r_b > 0) {
      const dim3 grid(cdiv(K, COLUMNS<float>), splits);
      const int status = launch(compose_kernel<T, RANKS>, grid, stream, *p, cdiv(cdiv(N, ROWS), splits) * ROWS);
      if (status != 0) return status;
    }
    const int64_t end_D = cdiv(R * K, THREADS), end_U = end_D + (p->U_ptr != nullptr ? cdiv(N * R, THREADS) : 0);
    const int64_t end_u = end_U + (p->u_ptr != nullptr ? cdiv(N, THREADS) : 0);
    const int64_t blocks = end_u + (p->d_ptr != nullptr ? R : 0);
    return launch(finish_kernel<T>, dim3(blocks), stream, *p, splits, end_D, end_U, end_u);
  });
}
