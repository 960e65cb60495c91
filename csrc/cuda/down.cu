// Z = mask * (x D^T + x [0; rest]^T + d): x [M, K], D [R, K], rest [R - r_a, K], d [R], mask [M, R], Z [M, R].
//
// A block owns 64 rows of x and one of Q ranges of columns, so that few rows still fill the card. A second launch adds
// the Q parts in order, adds d and masks. Both products are summed in one accumulator, before anything is rounded.
#include "tiles.cuh"

namespace {

template <typename T, int RANKS>
__global__ void __launch_bounds__(THREADS, 1) down_kernel(HydraDownArguments p, int64_t columns_of_split) {
  constexpr bool WITH_REST = !std::is_same_v<T, float>;
  SHARED_ARRAY(T, x_tile, ROWS * STRIDE<T>);
  SHARED_ARRAY(T, D_tile, RANKS * STRIDE<T>);
  SHARED_ARRAY(T, rest_tile, WITH_REST ? RANKS * STRIDE<T> : 1);
  const int64_t row = blockIdx.x * static_cast<int64_t>(ROWS), first = blockIdx.y * columns_of_split;
  const int64_t last = smaller(first + columns_of_split, p.K);
  const bool with_rest = WITH_REST && p.rest_ptr != nullptr;
  const int warp = threadIdx.x / 32;
  const Matrix<T> x(p.x_ptr, p.M, p.K, p.stride_xm), D(p.D_ptr, p.R, p.K, p.K), rest(p.rest_ptr, p.R - p.r_a, p.K, p.K);
  Share<T, T> share_x;
  Share<T, T, RANKS> share_D, share_rest;
  float z[RANKS / 8][4] = {};
  const auto load = [&](int64_t k) {
    share_x.load(x, row, k);
    share_D.load(D, 0, k);
    if (with_rest) share_rest.load(rest, -p.r_a, k);
  };
  load(first);
  for (int64_t k = first; k < last; k += COLUMNS<T>) {
    __syncthreads();
    share_x.store(x_tile);
    share_D.store(D_tile);
    if (with_rest) share_rest.store(rest_tile);
    __syncthreads();
    if (k + COLUMNS<T> < last) load(k + COLUMNS<T>);
    product<false, COLUMNS<T>>(z, x_tile + warp * 16 * STRIDE<T>, D_tile, STRIDE<T>);
    if (with_rest) product<false, COLUMNS<T>>(z, x_tile + warp * 16 * STRIDE<T>, rest_tile, STRIDE<T>);
  }
  each_output(z, [&](int i, int r, float v) {
    const int64_t m = row + warp * 16 + i;
    if (m < p.M && r < p.R) p.z_ptr[(blockIdx.y * p.M + m) * p.R + r] = v;
  });
}

template <typename T>
__global__ void __launch_bounds__(THREADS, 1) finish_kernel(HydraDownArguments p, int64_t splits) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(THREADS) + threadIdx.x;
  if (i >= p.M * p.R) return;
  float z = sum_of_partials(p.z_ptr, splits, p.M * p.R, i);
  if (p.d_ptr != nullptr) z += p.d_ptr[i % p.R];
  assign(static_cast<T*>(p.Z_ptr)[i], z * mask_at<T>(p.mask_ptr, i, p.mask_bytes, p.mask_scale));
}

}  // namespace

int64_t hydra_down_splits(int64_t M, int64_t K) {
  return splits_of(cdiv(K, SPLIT_COLUMNS), cdiv(M, ROWS));
}

int hydra_down(const HydraDownArguments* p, void* stream) {
  return dispatch(p->type, p->R, [&]<typename T, int RANKS>() {
    if (p->M * p->R == 0) return 0;
    const int64_t splits = hydra_down_splits(p->M, p->K);
    const int64_t columns_of_split = cdiv(cdiv(p->K, SPLIT_COLUMNS), splits) * SPLIT_COLUMNS;
    const int status = launch(down_kernel<T, RANKS>, dim3(cdiv(p->M, ROWS), splits), stream, *p, columns_of_split);
    if (status != 0) return status;
    return launch(finish_kernel<T>, dim3(cdiv(p->M * p->R, THREADS)), stream, *p, splits);
  });
}
