// The products with W0 of few rows, by our own kernels. A library packs all of W0 before it multiplies, which for few rows
// takes longer than the products; here W0 is read once.
//
//   linear_of_few_rows          x W0^T + bias + onto    [M, N]
//   few_rows_times_weight       G W0 + onto             [M, K]
//
// In fp32, and in bf16 and fp16 by widened blocks with one rounding of each result; not in double. Any M is served.
#pragma once

#include <ATen/core/Tensor.h>

namespace hydra::cpu {

at::Tensor linear_of_few_rows(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& onto);
at::Tensor few_rows_times_weight(const at::Tensor& G, const at::Tensor& weight, const at::Tensor& onto);

}  // namespace hydra::cpu
