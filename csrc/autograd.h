// HydraFunction in C++, for the calls that check.h vouches for: the same boundary to autograd without Python's.
#pragma once

#include "host.h"

namespace hydra {

// h for x [M, K], with a backward where grad mode is on and an operand requires grad.
at::Tensor apply(const at::Tensor& x, const Operands& op, Form form);

// The forms below autograd and autocast, on the device of their tensors.
Forward forward(const at::Tensor& x, const Operands& op, Needs needs, Form form);
Gradients backward(const at::Tensor& G, const Operands& op, const Saved& saved, Needs needs, Form form);

}  // namespace hydra
