#include "autograd.h"

#include <ATen/autocast_mode.h>
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

void copy_number(const at::Tensor&, at::Tensor&) {}
void copy_number(const Scale& from, Scale& to) { to.value = from.value; }
template <class Number>
void copy_number(Number from, Number& to) { to = from; }

Operands without_tensors(const Operands& op) {
  Operands numbers;
  each_operand([](Gradient, const auto& from, auto& to) { copy_number(from, to); }, op, numbers);
  return numbers;
}

// All of a call that is not a tensor. A set has bit i for gradient i.
struct Call : torch::CustomClassHolder {
  Operands numbers;
  Form form;
  Needs needs{0};
  uint32_t given = 0;  // the tensors that autograd knows as inputs
  uint32_t kept = 0;   // those of them that are saved for the backward; what the form saved follows them
  std::vector<bool> saved;  // which of the form's tensors are defined
};

struct HydraFunction : torch::autograd::Function<HydraFunction> {
  // The list holds only tensors that are defined: autograd's bookkeeping for each one costs host time.
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::TensorList&, const Operands& op,
                            const Gradients& all, c10::intrusive_ptr<Call> call) {
    Forward result = hydra::forward(all[X], op, call->needs, call->form);
    const bool through_W0 = call->form != Form::kept && call->needs.any(B_DOWN);
    torch::autograd::variable_list kept;
    for (int i = WEIGHT; i < GRADIENTS; ++i) {
      const bool read = i == WEIGHT ? through_W0 || call->needs.any(X) : i == BIAS ? through_W0 : true;
      if (read && all[i].defined()) kept.push_back(all[i]), call->kept |= 1u << i;
    }
    for (at::Tensor& t : result.saved) {
      call->saved.push_back(t.defined());
      if (t.defined()) kept.push_back(std::move(t));
    }
    ctx->save_for_backward(std::move(kept));
    ctx->saved_data["call"] = at::IValue::make_capsule(std::move(call));
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
    const auto call = c10::static_intrusive_pointer_cast<Call>(ctx->saved_data["call"].toCapsule());
    const auto tensors = ctx->get_saved_variables();
    Operands op = call->numbers;
    Saved saved;
    auto next = tensors.begin();
    each_operand([&](Gradient i, auto& operand) {
      if constexpr (!is_number<decltype(operand)>)
        if (call->kept & 1u << i) tensor_of(operand) = *next++;
    }, op);
    for (bool defined : call->saved) saved.push_back(defined ? *next++ : at::Tensor());
    Gradients grads = hydra::backward(G[0], op, saved, call->needs, call->form);
    torch::autograd::variable_list result;
    for (int i = 0; i < GRADIENTS; ++i)
      if (call->given & 1u << i) result.push_back(std::move(grads[i]));
    result.resize(result.size() + 3);  // the arguments after the list have no gradients
    return result;
  }
};

}  // namespace

at::Tensor apply(const at::Tensor& x, const Operands& op, Form form) {
  const Gradients all = tensors_of(x, op);
  auto call = c10::make_intrusive<Call>();
  call->numbers = without_tensors(op), call->form = form;
  std::vector<at::Tensor> given;
  for (int i = 0; i < GRADIENTS; ++i)
    if (all[i].defined()) {
      given.push_back(all[i]), call->given |= 1u << i;
      if (at::GradMode::is_enabled() && all[i].requires_grad()) call->needs.bits |= 1u << i;
    }
  return HydraFunction::apply(at::TensorList(given), op, all, std::move(call));
}

Forward forward(const at::Tensor& x, const Operands& op, Needs needs, Form form) {
  const BelowAutograd guard;
#ifdef HYDRA_WITH_CUDA
  if (!x.is_cpu()) return gpu::forward(x, op, needs);
#endif
  return cpu::forward(x, op, needs, form);
}

Gradients backward(const at::Tensor& G, const Operands& op, const Saved& saved, Needs needs, Form form) {
  const BelowAutograd guard;
#ifdef HYDRA_WITH_CUDA
  if (!G.is_cpu()) return gpu::backward(G, op, saved, needs);
#endif
  return cpu::backward(G, op, saved, needs, form);
}

}  // namespace hydra
