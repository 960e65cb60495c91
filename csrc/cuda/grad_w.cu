// Partial sums over S splits of the rows of dD = dZ^T x: x [M, K], dZ [M, R], dD [S, R, K].
//
// A block owns one tile of columns of x and one split.
#include "tiles.cuh"

namespace {

template <typename T, int RANKS>
__global__ void __launch_bounds__(THREADS, 1) grad_w_kernel(HydraGradWArguments p, int64_t rows_of_split) {
  const int64_t split = blockIdx.y, first = split * rows_of_split;
  const T* dZ = static_cast<const T*>(p.dZ_ptr);
  columns_of_rows<T, RANKS, true>(
      Matrix<T>(p.x_ptr, p.M, p.K, p.stride_xm), first, smaller(first + rows_of_split, p.M),
      blockIdx.x * static_cast<int64_t>(COLUMNS<T>), p.R, p.dD_ptr + split * p.R * p.K,
      [&](int64_t m, int r) { return r < p.R ? dZ[m * p.R + r] : T(0.0f); }, Same());
}

}  // namespace

int64_t hydra_grad_w_splits(int64_t M, int64_t K) {
  return splits_of(cdiv(M, ROWS), cdiv(K, SPLIT_COLUMNS));
}

int hydra_grad_w(const HydraGradWArguments* p, void* stream) {
  return dispatch(p->type, p->R, [&]<typename T, int RANKS>() {
    const int64_t splits = hydra_grad_w_splits(p->M, p->K);
    if (splits == 0) return 0;
    const int64_t rows_of_split = cdiv(cdiv(p->M, ROWS), splits) * ROWS;
    const dim3 grid(cdiv(p->K, COLUMNS<T>), splits);
    return launch(grad_w_kernel<T, RANKS>, grid, stream, *p, rows_of_split);
  });
}
