#include "autograd.h"

#include <ATen/autocast_mode.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>

namespace hydra {
namespace {

struct BelowAutograd {
  at::AutoDispatchBelowADInplaceOrView autograd;
  c10::impl::ExcludeDispatchKeyGuard autocast{c10::autocast_dispatch_keyset};
};

// x and the tensors among the operands, each at the number of its gradient; undefined where an operand is a number.
Gradients tensors_of(const at::Tensor& x, const Operands& op) {
  Gradients all;
  all[X] = x;
  each_operand([&](Gradient i, const auto& operand) {
    if constexpr (!is_number<decltype(operand)>) all[i] = tensor_of(operand);
  }, op);
  return all;
}

// All of a call that is not a tensor. A set has bit i for gradient i, or for the form's i-th tensor.
struct Call {
  Operands numbers;  // its tensors stay undefined
  Plan plan;
  Needs needs{0};
  uint32_t given = 0;  // the tensors that autograd knows as inputs
  uint32_t kept = 0;   // those of them that are saved for the backward; what the form saved follows them
  uint32_t saved = 0;  // which of the form's tensors are defined
  uint32_t forms_tensors = 0;  // how many it has
};

// Visits each number of a call. A double holds every one of them exactly.
template <class SomeCall, class Visit>
void each_number(SomeCall& call, const Visit& visit) {
  visit(call.plan.form), visit(call.plan.library), visit(call.plan.sweep), visit(call.needs.bits), visit(call.given);
  visit(call.kept), visit(call.saved), visit(call.forms_tensors);
  each_operand([&](Gradient, auto& operand) {
    if constexpr (is_number<decltype(operand)>) visit(operand);
    else if constexpr (std::is_same_v<std::remove_cvref_t<decltype(operand)>, Scale>) visit(operand.value);
  }, call.numbers);
}

// A call as autograd saves it. Compiled autograd takes plain values alone, and those of a list for constants.
c10::List<double> packed(const Call& call) {
  c10::List<double> numbers;
  each_number(call, [&](auto value) { numbers.push_back(static_cast<double>(value)); });
  return numbers;
}

Call unpacked(const c10::List<double>& numbers) {
  Call call;
  size_t next = 0;
  each_number(call, [&](auto& value) { value = static_cast<std::remove_cvref_t<decltype(value)>>(numbers.get(next++)); });
  return call;
}

struct HydraFunction : torch::autograd::Function<HydraFunction> {
  // The list holds only tensors that are defined: autograd's bookkeeping for each one costs host time.
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::TensorList&, const Operands& op,
                            const Gradients& all, Call call) {
    Forward result = hydra::forward(all[X], op, call.needs, call.plan);
    const bool through_W0 = call.plan.form != Form::kept && call.needs.any(B_DOWN);
    const bool from_dZ = call.needs.any(X, A_DOWN, B_DOWN, A_DOWN_BIAS, B_DOWN_BIAS) || (call.needs.any(BIAS) && op.r_b());
    torch::autograd::variable_list kept;
    for (int i = WEIGHT; i < GRADIENTS; ++i) {
      const bool read = i == WEIGHT ? through_W0 || call.needs.any(X) : i == BIAS ? through_W0 : i == MASK ? from_dZ :
                        i == INPUT_MASK || i == INPUT_SEED ? call.needs.any(X, A_DOWN) : true;
      if (read && all[i].defined()) kept.push_back(all[i]), call.kept |= 1u << i;
    }
    for (at::Tensor& t : result.saved) {
      if (t.defined()) kept.push_back(std::move(t)), call.saved |= 1u << call.forms_tensors;
      ++call.forms_tensors;
    }
    ctx->save_for_backward(std::move(kept));
    ctx->saved_data["call"] = packed(call);
    return std::move(result.h);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& G) {
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "hydra_linear: create_graph=True asks for a derivative of its backward, which has none; use "
                "backend='reference' for gradient penalties and other double backwards");
    constexpr c10::DispatchKeySet batched({c10::DispatchKey::Batched, c10::DispatchKey::FuncTorchBatched});
    TORCH_CHECK(!G[0].key_set().has_any(batched), "hydra_linear: backend 'native' takes no batched gradients "
                "(is_grads_batched, vectorize=True); use backend='aten'");
    const Call call = unpacked(ctx->saved_data["call"].toDoubleList());
    Needs asked{0};  // torch.autograd.grad(h, [A_up]) asks for fewer than the forward saw
    for (int i = 0, edge = 0; i < GRADIENTS; ++i)
      if (call.given & 1u << i) asked.bits |= call.needs.bits & uint32_t(ctx->needs_input_grad(edge++)) << i;
    const auto tensors = ctx->get_saved_variables();
    Operands op = call.numbers;
    Saved saved;
    auto next = tensors.begin();
    each_operand([&](Gradient i, auto& operand) {
      if constexpr (!is_number<decltype(operand)>)
        if (call.kept & 1u << i) tensor_of(operand) = *next++;
    }, op);
    for (uint32_t i = 0; i < call.forms_tensors; ++i) saved.push_back(call.saved & 1u << i ? *next++ : at::Tensor());
    Gradients grads = hydra::backward(G[0], op, saved, asked, call.plan);
    torch::autograd::variable_list result;
    for (int i = 0; i < GRADIENTS; ++i)
      if (call.given & 1u << i) result.push_back(std::move(grads[i]));
    result.resize(result.size() + 3);  // the arguments after the list have no gradients
    return result;
  }
};

}  // namespace

at::Tensor apply(const at::Tensor& x, const Operands& op, Plan plan) {
  const Gradients all = tensors_of(x, op);
  Call call{.numbers = op, .plan = plan};
  each_operand([](Gradient, auto& operand) {
    if constexpr (!is_number<decltype(operand)>) tensor_of(operand).reset();
  }, call.numbers);
  std::vector<at::Tensor> given;
  for (int i = 0; i < GRADIENTS; ++i)
    if (all[i].defined()) {
      given.push_back(all[i]), call.given |= 1u << i;
      if (at::GradMode::is_enabled() && all[i].requires_grad()) call.needs.bits |= 1u << i;
    }
  return HydraFunction::apply(at::TensorList(given), op, all, call);
}

Forward forward(const at::Tensor& x, const Operands& op, Needs needs, Plan plan) {
  const BelowAutograd guard;
#ifdef HYDRA_WITH_CUDA
  if (!x.is_cpu()) return gpu::forward(x, op, needs);
#endif
  return cpu::forward(x, op, needs, plan);
}

Gradients backward(const at::Tensor& gradient, const Operands& op, const Saved& saved, Needs needs, Plan plan) {
  const BelowAutograd guard;
  // A ZeroTensor has no elements in memory.
  const at::Tensor G = gradient._is_zerotensor() ? at::zeros(gradient.sizes(), gradient.options()) : gradient;
#ifdef HYDRA_WITH_CUDA
  if (!G.is_cpu()) return gpu::backward(G, op, saved, needs, plan.sweep);
#endif
  return cpu::backward(G, op, saved, needs, plan);
}

}  // namespace hydra
