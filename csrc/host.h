// The forms on each kind of device. The caller chooses which one runs.
#pragma once

#include "operands.h"

namespace hydra {

namespace cpu {
// x [M, K] and G [M, N] in float32 or float64, like all operands, or in bfloat16 or float16, with adapters of that dtype or
// float32. `saved` comes from the forward. bfloat16 and float16 have no effective form.
Forward forward(const at::Tensor& x, const Operands& op, Needs needs, Plan plan);
Gradients backward(const at::Tensor& G, const Operands& op, const Saved& saved, Needs needs, Plan plan);
}  // namespace cpu

#ifdef HYDRA_WITH_CUDA
namespace gpu {
// Only the composed form: x [M, K] and G [M, N] in float32, float16 or bfloat16, adapters of that dtype or float32,
// R = r_a + r_b <= 64. With `sweep` the backward is cuda/sm90_sweep.cu's where that serves it, on sm_90 alone.
Forward forward(const at::Tensor& x, const Operands& op, Needs needs);
Gradients backward(const at::Tensor& G, const Operands& op, const Saved& saved, Needs needs, bool sweep);
}  // namespace gpu
#endif

}  // namespace hydra
