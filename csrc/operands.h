// What a forward and a backward are given and what they owe: backend/interface.py in C++.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <vector>

namespace hydra {

// A number, or a 0-dimensional tensor.
struct Scale {
  double value = 1;
  at::Tensor tensor;
};

// The fields of backend.interface.Operands, undefined where they are None.
struct Operands {
  at::Tensor weight, bias, A_down, A_up, B_down, B_up, A_down_bias, A_up_bias, B_down_bias, B_up_bias, mask;
  Scale scale_a, scale_b;
  double mask_scale = 1;

  int64_t r_a() const { return A_down.defined() ? A_down.size(0) : 0; }
  int64_t r_b() const { return B_down.defined() ? B_down.size(0) : 0; }
};

// Gradients in the order ("x", *Operands._fields); a set of them has bit i for gradient i.
enum Gradient : int {
  X, WEIGHT, BIAS, A_DOWN, A_UP, B_DOWN, B_UP, A_DOWN_BIAS, A_UP_BIAS, B_DOWN_BIAS, B_UP_BIAS, MASK, SCALE_A, SCALE_B,
  GRADIENTS
};

struct Needs {
  uint32_t bits;

  template <class... Names>
  bool any(Names... names) const {
    return bits & ((1u << names) | ...);
  }
};

// composed: y0 never exists. effective: neither does Z, the forward being x (W0 + U D)^T. kept: y0 is saved.
enum class Form { composed, effective, kept };

// Undefined tensors stand for None.
using Saved = std::vector<at::Tensor>;
using Gradients = std::array<at::Tensor, GRADIENTS>;

struct Forward {
  at::Tensor h;
  Saved saved;
};

}  // namespace hydra
