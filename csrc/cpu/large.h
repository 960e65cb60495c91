// The products with W0 [N, K], by the library that the caller chose.
//
//   linear          x W0^T + bias + onto    [M, N]
//   times_weight    G W0 + onto             [M, K]
//
// bias and onto may be undefined. The result may be onto itself, overwritten. What is added is added in the accumulator, so
// that nothing is rounded before the sum.
//
// Where torch has no oneDNN kernels for bf16 or fp16, it multiplies them in plain loops: G W0 then takes a hundred times as
// long as in fp32. There these products are fp32's: up to 128 rows by our own kernels (few_rows.h), beyond by a library, of
// blocks that are widened. Each result is rounded once.
#pragma once

#include "../operands.h"

namespace hydra::cpu {

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& onto, Library library);
at::Tensor times_weight(const at::Tensor& G, const at::Tensor& weight, const at::Tensor& onto, Library library);

// Whether this torch has oneDNN's operators in the form that is called here, and its settings allow them.
bool has_onednn();

// Whether products in this dtype are computed in fp32, block by block.
bool is_widened(at::ScalarType dtype);

}  // namespace hydra::cpu
