// The CUDA kernels of backend `native`, as the host calls them: for each pass a struct of arguments and a launcher.
//
// Composed form, R = r_a + r_b from 1 to 64 (csrc/cuda/*.cu hold the formulas); N, K at least 1:
//   forward     hydra_compose   D = [A_down; C], C = B_down W0, its rest, d, U, u          reads W0 once
//               hydra_down      Z = mask * (x D^T + x [0; rest]^T + d)                      reads x once
//   backward    hydra_grad_z    dZ, partial sums of dU = G^T Z, sum_m G, sum_m dZ, scales   reads G once
//               hydra_grad_w    partial sums of dD = dZ^T x                                 reads x once
//               hydra_reduce    every gradient of adapters, scales and b0 from the partial sums    reads W0 once
//   on sm_90    hydra_sm90_sweep  in place of grad_z and grad_w, for R up to 32                   reads x and G once
//
// Every launcher enqueues on `stream` (a cudaStream_t) of the current device, allocates nothing, reads no device memory
// on the host, and returns a cudaError_t (0: enqueued; 1, cudaErrorInvalidValue: R > 64, or no such type).
// The caller allocates outputs, partial sums and workspaces. Their sizes depend only on shapes and type (functions at the
// end), so that every run on one architecture gives the same bits. Where M = 0, hydra_down and hydra_grad_z write nothing.
//
// "type" is that of W0, b0, x, G, D, rest, Z, dZ, U, u; "adapter_type" that of the adapters, their biases, scales by
// pointer, and their gradients: equal to type, or fp32. Everything is contiguous except W0, x and G: their rows may
// be any stride apart, with contiguous elements (rows that are aligned to 16 bytes are fast). null means absent or, for an
// output, not wanted. No input may overlap an output; nothing needs to be initialised.
#pragma once

#include <cstdint>

extern "C" {

enum HydraType : int32_t { HYDRA_FLOAT32 = 0, HYDRA_FLOAT16 = 1, HYDRA_BFLOAT16 = 2 };

struct HydraComposeArguments {
  const void* w_ptr;     // W0 [N, K]; read where r_b > 0
  const void* bias_ptr;  // b0 [N] of type, or null
  const void* A_down_ptr;  // [r_a, K], null where r_a = 0
  const void* A_up_ptr;    // [N, r_a], null where r_a = 0
  const void* B_down_ptr;  // [r_b, N], null where r_b = 0
  const void* B_up_ptr;    // [N, r_b], null where r_b = 0
  const void* A_down_bias_ptr;  // [r_a], or null
  const void* A_up_bias_ptr;    // [N], or null
  const void* B_down_bias_ptr;  // [r_b], or null
  const void* B_up_bias_ptr;    // [N], or null
  const void* scale_a_ptr;      // one value, or null: scale_a below counts
  const void* scale_b_ptr;
  void* D_ptr;     // [R, K], written: A_down and C, each rounded to type
  void* rest_ptr;  // [r_b, K], written: C less its rounded value, rounded; null where type is fp32 or r_b = 0
  float* d_ptr;    // [R], written: [a_d, B_down b0 + b_d]; or null
  void* U_ptr;     // [N, R], written: [s_a A_up, s_b B_up]; or null
  void* u_ptr;     // [N], written: s_a a_u + s_b b_u, without b0; or null
  float* C_ptr;    // workspace [hydra_compose_splits(N, K), r_b, K]; null where r_b = 0
  int64_t N;
  int64_t K;
  int64_t stride_wn;  // elements from row to row of W0
  int32_t r_a;
  int32_t r_b;
  float scale_a;  // used where scale_a_ptr is null
  float scale_b;
  HydraType type;
  HydraType adapter_type;
};

struct HydraDownArguments {
  const void* x_ptr;     // [M, K]
  const void* D_ptr;     // [R, K], of compose
  const void* rest_ptr;  // [R - r_a, K], of compose; or null
  const float* d_ptr;    // [R], of compose; or null
  const void* mask_ptr;  // [M, R], or null
  void* Z_ptr;           // [M, R], written
  float* z_ptr;          // workspace [hydra_down_splits(M, K), M, R]
  int64_t M;
  int64_t K;
  int64_t stride_xm;  // elements from row to row of x
  int32_t R;
  int32_t r_a;         // rest belongs to the rows of D after these
  int32_t mask_bytes;  // 1: mask is uint8, 0 or 1; 0: of type
  float mask_scale;    // the mask is multiplied by it
  HydraType type;
};

struct HydraGradZArguments {
  const void* G_ptr;          // [M, N]
  const void* A_up_ptr;       // [N, r_a], null where r_a = 0
  const void* B_up_ptr;       // [N, r_b], null where r_b = 0
  const void* A_up_bias_ptr;  // [N]; null where absent, or where the gradient of its scale is not wanted
  const void* B_up_bias_ptr;
  const void* scale_a_ptr;  // as for compose
  const void* scale_b_ptr;
  const void* Z_ptr;     // [M, R], of down; null where neither dU nor scales is wanted
  const void* mask_ptr;  // [M, R], or null
  void* dZ_ptr;          // [M, R], written, or null: mask * (G [A_up, B_up]) s, rounded to type
  float* dU_ptr;         // [P, N, R], written, or null: partial sums of G^T Z; P = hydra_grad_z_partials(M, R, type)
  float* g_ptr;          // [P, N], written, or null: of sum_m G
  float* z_sums_ptr;     // [P_z, R], written, or null: of sum_m of the rounded dZ; P_z = hydra_grad_z_sums(M)
  float* scales_ptr;     // [P_z, R], written, or null: of <G [A_up, B_up], Z> by rank
  float* up_bias_ptr;    // [P, Q, 2], written, or null as scales is: of <G, a_u> and <G, b_u>
  float* dz_ptr;         // workspace [Q, M, R]; Q = hydra_grad_z_splits(M, N, R, type); null where dZ and scales both are
  int64_t M;
  int64_t N;
  int64_t stride_gm;  // elements from row to row of G
  int32_t r_a;
  int32_t r_b;
  int32_t mask_bytes;  // as for down
  float mask_scale;
  float scale_a;
  float scale_b;
  HydraType type;
  HydraType adapter_type;
};

struct HydraGradWArguments {
  const void* x_ptr;   // [M, K]
  const void* dZ_ptr;  // [M, R], of grad_z
  float* dD_ptr;       // [S, R, K], written: partial sums of dZ^T x; S = hydra_grad_w_splits(M, K)
  int64_t M;
  int64_t K;
  int64_t stride_xm;
  int32_t R;
  HydraType type;
};

// Where D is given, Z is computed as hydra_down computes it, else read. For `blocks` of hydra_sm90_sweep_blocks and
// P = hydra_sm90_sweep_partials, both of R, or of R + 1 where g or up_bias is wanted, there are P partial sums of dU, g
// and dD, P * blocks of z_sums and scales, and P * blocks of up_bias: for hydra_reduce P_z = P * blocks, Q = blocks, S = P.
struct HydraSm90SweepArguments {
  const void* x_ptr;          // [M, K]
  const void* G_ptr;          // [M, N]
  void* Z_ptr;                // [M, R], of down; where D is given it is written, or null
  const void* D_ptr;          // [R, K], of compose; or null
  const void* rest_ptr;       // [r_b, K], of compose; or null
  const float* d_ptr;         // [R], of compose; or null
  const void* A_up_ptr;       // as for grad_z, with all that follows
  const void* B_up_ptr;
  const void* A_up_bias_ptr;
  const void* B_up_bias_ptr;
  const void* scale_a_ptr;
  const void* scale_b_ptr;
  const void* mask_ptr;
  void* dZ_ptr;          // [M, R], written, or null
  float* dU_ptr;         // [P, N, R], written
  float* dD_ptr;         // [P, R, K], written
  float* g_ptr;          // [P, N], written, or null
  float* z_sums_ptr;     // [P * blocks, R], written, or null
  float* scales_ptr;     // [P * blocks, R], written, or null
  float* up_bias_ptr;    // [P, blocks, 2], written, or null
  int64_t M;
  int64_t N;
  int64_t K;
  int64_t stride_xm;
  int64_t stride_gm;
  int32_t r_a;
  int32_t r_b;
  int32_t mask_bytes;
  float mask_scale;
  float scale_a;
  float scale_b;
  HydraType type;
  HydraType adapter_type;
};

struct HydraReduceArguments {
  const float* dU_ptr;      // of grad_z; null where dA_up and dB_up both are
  const float* g_ptr;       // null where dbias, dA_up_bias and dB_up_bias all are
  const float* z_sums_ptr;  // read for biases of down projections, dbias over B_down, dB_down over b0; else null
  const float* scales_ptr;  // null where dscale_a and dscale_b both are
  const float* up_bias_ptr;
  const float* dD_ptr;      // of grad_w; null where dA_down and dB_down both are
  const void* w_ptr;        // W0 [N, K]; read only for dB_down
  const void* bias_ptr;     // b0 [N], or null; read only for dB_down
  const void* B_down_ptr;   // [r_b, N], or null; read only for dbias
  const void* scale_a_ptr;  // as for compose
  const void* scale_b_ptr;
  void* dA_down_ptr;  // gradients, written, of adapter_type and their operands' shapes; null where not wanted
  void* dA_up_ptr;
  void* dB_down_ptr;
  void* dB_up_ptr;
  void* dA_down_bias_ptr;
  void* dA_up_bias_ptr;
  void* dB_down_bias_ptr;
  void* dB_up_bias_ptr;
  void* dscale_a_ptr;
  void* dscale_b_ptr;
  void* dbias_ptr;  // db0 [N], of type
  float* T_ptr;     // workspace [r_b, K]; null where dB_down is
  float* dB_ptr;    // workspace [hydra_reduce_splits(N, K), N, r_b]; null where dB_down is
  int64_t P;        // of grad_z: hydra_grad_z_partials(M, R, type); 0 where M = 0, which gives gradients of 0
  int64_t P_z;      // hydra_grad_z_sums(M); 0 where M = 0
  int64_t Q;        // hydra_grad_z_splits(M, N, R, type)
  int64_t S;        // of grad_w: hydra_grad_w_splits(M, K); 0 where M = 0
  int64_t N;
  int64_t K;        // read only for dA_down and dB_down
  int64_t stride_wn;
  int32_t r_a;
  int32_t r_b;
  float scale_a;
  float scale_b;
  HydraType type;
  HydraType adapter_type;
};

int hydra_compose(const HydraComposeArguments*, void* stream);
int hydra_down(const HydraDownArguments*, void* stream);
int hydra_grad_z(const HydraGradZArguments*, void* stream);
int hydra_grad_w(const HydraGradWArguments*, void* stream);
int hydra_sm90_sweep(const HydraSm90SweepArguments*, void* stream);
int hydra_reduce(const HydraReduceArguments*, void* stream);

// The number of parts into which a pass divides its sums; no CUDA call. Where M = 0, sums over M have 0 parts.
int64_t hydra_compose_splits(int64_t N, int64_t K);
int64_t hydra_down_splits(int64_t M, int64_t K);
int64_t hydra_grad_z_partials(int64_t M, int64_t R, HydraType type);
int64_t hydra_grad_z_sums(int64_t M);
int64_t hydra_grad_z_splits(int64_t M, int64_t N, int64_t R, HydraType type);
int64_t hydra_grad_w_splits(int64_t M, int64_t K);
int64_t hydra_reduce_splits(int64_t N, int64_t K);
// Blocks of a cluster; 0 where hydra_sm90_sweep does not serve these sizes.
int64_t hydra_sm90_sweep_blocks(int64_t N, int64_t K, int64_t ranks, bool computes_Z, HydraType type);
int64_t hydra_sm90_sweep_partials(int64_t M, int64_t N, int64_t K, int64_t ranks, bool computes_Z, HydraType type);
}
