// The forms of DESIGN's composed and kept mathematics on each kind of device; the choice is the caller's.
#pragma once

#include "operands.h"

namespace hydra {

namespace cpu {
// x [M, K] and G [M, N] in float32 or float64, like all operands. `saved` is what the forward gave.
Forward forward(const at::Tensor& x, const Operands& op, Needs needs, Form form);
Gradients backward(const at::Tensor& G, const Operands& op, const Saved& saved, Needs needs, Form form);
}  // namespace cpu

}  // namespace hydra
