// The arguments and results of a forward and a backward: backend/interface.py in C++.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <string_view>
#include <type_traits>
#include <vector>

namespace hydra {

// A number, or a 0-dimensional tensor.
struct Scale {
  double value = 1;
  at::Tensor tensor;
};

// The one table of operands: type, name, gradient; in the order of backend.interface.Operands. An at::Tensor is undefined
// where Python has None. A double gets no gradient. The struct, the enum and everything that goes through all operands
// are made of these lines, and tests/test_native.py compares them with Python's.
#define HYDRA_OPERANDS(ROW)                    \
  ROW(at::Tensor, weight, WEIGHT)              \
  ROW(at::Tensor, bias, BIAS)                  \
  ROW(at::Tensor, A_down, A_DOWN)              \
  ROW(at::Tensor, A_up, A_UP)                  \
  ROW(at::Tensor, B_down, B_DOWN)              \
  ROW(at::Tensor, B_up, B_UP)                  \
  ROW(at::Tensor, A_down_bias, A_DOWN_BIAS)    \
  ROW(at::Tensor, A_up_bias, A_UP_BIAS)        \
  ROW(at::Tensor, B_down_bias, B_DOWN_BIAS)    \
  ROW(at::Tensor, B_up_bias, B_UP_BIAS)        \
  ROW(at::Tensor, mask, MASK)                  \
  ROW(at::Tensor, input_mask, INPUT_MASK)      \
  ROW(at::Tensor, input_seed, INPUT_SEED)      \
  ROW(Scale, scale_a, SCALE_A)                 \
  ROW(Scale, scale_b, SCALE_B)                 \
  ROW(double, mask_scale, MASK_SCALE)          \
  ROW(double, input_p, INPUT_P)

// All of one call but x.
struct Operands {
#define HYDRA_FIELD(type, name, gradient) type name{};
  HYDRA_OPERANDS(HYDRA_FIELD)
#undef HYDRA_FIELD

  int64_t r_a() const { return A_down.defined() ? A_down.size(0) : 0; }
  int64_t r_b() const { return B_down.defined() ? B_down.size(0) : 0; }
};

#define HYDRA_ONE(type, name, gradient) +1
inline constexpr int OPERANDS = HYDRA_OPERANDS(HYDRA_ONE);
#undef HYDRA_ONE

// Gradients; a set of them has bit i for gradient i.
enum Gradient : int {
  X,
#define HYDRA_GRADIENT(type, name, gradient) gradient,
  HYDRA_OPERANDS(HYDRA_GRADIENT)
#undef HYDRA_GRADIENT
  GRADIENTS
};

inline constexpr std::array<const char*, GRADIENTS> NAMES{
    "x",
#define HYDRA_NAME(type, name, gradient) #name,
    HYDRA_OPERANDS(HYDRA_NAME)
#undef HYDRA_NAME
};

// Calls visit(gradient, op.name, ...) for each operand, of one or more Operands side by side, in the order of the table.
template <class Visit, class... Ops>
void each_operand(const Visit& visit, Ops&... op) {
#define HYDRA_VISIT(type, name, gradient) visit(gradient, op.name...);
  HYDRA_OPERANDS(HYDRA_VISIT)
#undef HYDRA_VISIT
}

template <class Operand>
constexpr bool is_number = std::is_arithmetic_v<std::remove_cvref_t<Operand>>;

// The tensor of an operand that can have one.
inline at::Tensor& tensor_of(at::Tensor& operand) { return operand; }
inline at::Tensor& tensor_of(Scale& operand) { return operand.tensor; }
inline const at::Tensor& tensor_of(const at::Tensor& operand) { return operand; }
inline const at::Tensor& tensor_of(const Scale& operand) { return operand.tensor; }

struct Needs {
  uint32_t bits;

  template <class... Names>
  bool any(Names... names) const {
    return bits & ((1u << names) | ...);
  }
};
static_assert(GRADIENTS <= 32, "sets of gradients are 32 bits wide");

// composed: y0 is never computed. effective: nor is Z, since the forward is x (W0 + U D)^T. kept: y0 is saved.
enum class Form { composed, effective, kept };

// What computes the products with W0 on a CPU: ATen, which calls MKL in fp32; oneDNN by torch's own operator, in the
// forward alone or in both passes; or our kernels for few rows.
enum class Library { aten, onednn_forward, onednn, own };

struct Plan {
  Form form = Form::composed;
  Library library = Library::aten;
  bool sweep = false;  // on a GPU: the backward by one sweep over x and G, where its kernel serves the sizes
};

// Undefined tensors stand for None.
using Saved = std::vector<at::Tensor>;
using Gradients = std::array<at::Tensor, GRADIENTS>;

struct Forward {
  at::Tensor h;
  Saved saved;
};

}  // namespace hydra
