// HydraFunction in C++, for calls that check.h vouches for: it costs less host time than Python's.
#pragma once

#include "host.h"

namespace hydra {

// h for x [M, K], with a backward where grad mode is on and an operand requires grad.
at::Tensor apply(const at::Tensor& x, const Operands& op, Plan plan);

// One pass of a form, on the device of its tensors, with autograd and autocast switched off.
Forward forward(const at::Tensor& x, const Operands& op, Needs needs, Plan plan);
Gradients backward(const at::Tensor& G, const Operands& op, const Saved& saved, Needs needs, Plan plan);

}  // namespace hydra
