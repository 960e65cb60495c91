// The checks of functional.py in one call: they cost Python more than the arithmetic of a small layer.
#pragma once

#include "operands.h"

namespace hydra {

struct Sizes {
  int64_t M, K, N, r_a, r_b;
};

// The sizes of a call that is right in every respect and in no respect special: plain tensors of one dtype (adapters also
// float32 over a low-precision base) on one device. What it does not vouch for, Python judges, and words the error.
bool vouch_for(const at::Tensor& x, const Operands& op, Sizes* sizes);

}  // namespace hydra
