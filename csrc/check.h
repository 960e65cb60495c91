// The checks of a call's arguments. In Python they take longer than the arithmetic of a small layer.
#pragma once

#include "operands.h"

namespace hydra {

struct Sizes {
  int64_t M, K, N, r_a, r_b;
};

// True, with *sizes set, for a call that is valid and ordinary: plain tensors of one dtype on one device; adapters may also
// be float32 over a low-precision base. Python checks every other call again, and words the error.
bool vouch_for(const at::Tensor& x, const Operands& op, Sizes* sizes);

}  // namespace hydra
