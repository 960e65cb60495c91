#include "large.h"

#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/add.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#include "small.h"

namespace hydra::cpu {
namespace {

using Text = std::string_view;
using Bias = std::optional<at::Tensor>;
using Product = at::Tensor(const at::Tensor&, const at::Tensor&, const Bias&, Text, c10::List<std::optional<at::Scalar>>,
                           std::optional<Text>);
using ProductAndAdd = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const Bias&, Text);

// torch's operator if it is there with just this signature.
template <class Signature>
std::optional<c10::TypedOperatorHandle<Signature>> found(const char* overload) {
  const auto handle = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", overload});
  if (!handle) return std::nullopt;
  try {
    return handle->typed<Signature>();
  } catch (const c10::Error&) {
    return std::nullopt;
  }
}

struct OneDnn {
  std::optional<c10::TypedOperatorHandle<Product>> product = found<Product>("");
  std::optional<c10::TypedOperatorHandle<ProductAndAdd>> product_and_add = found<ProductAndAdd>("binary");
};

const OneDnn& onednn() {
  static const OneDnn operators;
  return operators;
}

// v matrix^T + bias + onto, where matrix may be a transposed view.
at::Tensor by_onednn(const at::Tensor& v, const at::Tensor& matrix, const Bias& bias, const at::Tensor& onto) {
  if (onto.defined()) return onednn().product_and_add->call(v, onto, matrix, bias, "add");
  return onednn().product->call(v, matrix, bias, "none", c10::List<std::optional<at::Scalar>>(), "");
}

bool suits_onednn(const at::Tensor& v, const at::Tensor& matrix) {
  const bool dense = v.is_contiguous() && matrix.is_contiguous() && v.numel() > 0 && matrix.numel() > 0;
  // Without them torch's operator refuses bf16.
  const bool served = v.scalar_type() == at::kFloat || (v.scalar_type() == at::kBFloat16 && has_matrix_units());
  return dense && served && has_onednn();
}

}  // namespace

bool has_onednn() {
  return onednn().product && onednn().product_and_add && at::globalContext().userEnabledMkldnn();
}

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& onto, Library library) {
  // In bf16 ATen itself calls oneDNN, but has no product that adds a matrix and a bias before it rounds.
  const bool three_summands = bias.defined() && onto.defined();
  if ((library != Library::aten || (three_summands && x.scalar_type() == at::kBFloat16)) && suits_onednn(x, weight))
    return by_onednn(x, weight, bias.defined() ? Bias(bias) : std::nullopt, onto);
  if (three_summands) {
    at::Tensor y0 = at::addmm(bias, x, weight.t());
    return y0.add_(onto);
  }
  if (onto.defined()) {
    at::Tensor out = onto;
    return at::addmm_out(out, out, x, weight.t());
  }
  return bias.defined() ? at::addmm(bias, x, weight.t()) : at::mm(x, weight.t());
}

at::Tensor times_weight(const at::Tensor& G, const at::Tensor& weight, const at::Tensor& onto, Library library) {
  if (library == Library::onednn && suits_onednn(G, weight)) return by_onednn(G, weight.t(), std::nullopt, onto);
  if (!onto.defined()) return at::mm(G, weight);
  at::Tensor out = onto;
  return at::addmm_out(out, out, G, weight);
}

}  // namespace hydra::cpu
