#include "large.h"

#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/add.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <bit>

#include "adapters.h"
#include "few_rows.h"

namespace hydra::cpu {
namespace {

using Text = std::string_view;
using Bias = std::optional<at::Tensor>;
using Product = at::Tensor(const at::Tensor&, const at::Tensor&, const Bias&, Text, c10::List<std::optional<at::Scalar>>,
                           std::optional<Text>);
using ProductAndAdd = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const Bias&, Text);

// torch's operator if it is there with just this signature.
template <class Signature>
std::optional<c10::TypedOperatorHandle<Signature>> found(const char* name, const char* overload) {
  const auto handle = c10::Dispatcher::singleton().findSchema({name, overload});
  if (!handle) return std::nullopt;
  try {
    return handle->typed<Signature>();
  } catch (const c10::Error&) {
    return std::nullopt;
  }
}

struct OneDnn {
  std::optional<c10::TypedOperatorHandle<Product>> product = found<Product>("mkldnn::_linear_pointwise", "");
  std::optional<c10::TypedOperatorHandle<ProductAndAdd>> product_and_add =
      found<ProductAndAdd>("mkldnn::_linear_pointwise", "binary");
  bool bf16 = says("mkldnn::_is_mkldnn_bf16_supported"), fp16 = says("mkldnn::_is_mkldnn_fp16_supported");

  // True too where there is no such question, since nothing then is known against torch's own products.
  static bool says(const char* question) {
    const auto asked = found<bool()>(question, "");
    return !asked || asked->call();
  }
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

// A copy in fp32, with contiguous rows. Lazy negation is carried out first: torch 2.13 forgets it from fp16 to fp32.
at::Tensor widened(const at::Tensor& t) {
  const auto options = t.options().dtype(at::kFloat).memory_format(at::MemoryFormat::Contiguous);
  return at::empty(t.sizes(), options).copy_(t.is_neg() ? t.resolve_neg() : t);
}

// Rows up to which our own kernels are faster than blocks of W0 in fp32 (measured on a Zen 3, in bf16).
constexpr int64_t FEW_ROWS = 128;

// Whether our own kernels multiply v [rows, *] with W0; `blocks`: the choice is between them and blocks of W0 in fp32. They
// read rows of W0, so that another layout would be copied first.
bool by_own_kernels(const at::Tensor& v, const at::Tensor& weight, Library library, bool blocks) {
  const bool in_place = (weight.size(1) <= 1 || weight.stride(1) == 1) && !weight.is_neg();
  if (v.scalar_type() == at::kDouble || !in_place) return false;
  return library == Library::own || (blocks && v.size(0) <= FEW_ROWS);
}

// out [M, N] = bias [N] + onto [M, N] + left [M, K] right, where right(first, count) are columns of the right side in fp32 and
// `product` multiplies with them. Blocks are so small that their memory is used again, for fresh memory costs page faults.
template <class Right, class Multiply>
at::Tensor by_blocks(const at::Tensor& left, int64_t N, const at::Tensor& bias, const at::Tensor& onto, const Right& right,
                     const Multiply& product) {
  constexpr int64_t BLOCK = 1 << 22;  // elements of the left side, of the right side, and of the result, for K up to 65,536
  const int64_t M = left.size(0), K = std::max<int64_t>(left.size(1), 1);
  const int64_t rows = std::clamp<int64_t>(BLOCK / K, 64, 2048);
  // A power of two, since oneDNN is slow for most other widths (findings/wide-weights-by-page-strides.sh).
  const int64_t columns = std::clamp<int64_t>(std::bit_floor(static_cast<uint64_t>(BLOCK / K)), 64, 2048);
  const at::Tensor out = onto.defined() ? onto : at::empty({M, N}, left.options());
  const at::Tensor row = bias.defined() ? widened(bias) : bias;
  for (int64_t m = 0; m < M; m += rows) {
    const int64_t high = std::min(rows, M - m);
    const at::Tensor block = widened(left.narrow(0, m, high));
    for (int64_t n = 0; n < N; n += columns) {
      const int64_t wide = std::min(columns, N - n);
      const at::Tensor target = out.narrow(0, m, high).narrow(1, n, wide);
      target.copy_(product(block, right(n, wide), row.defined() ? row.narrow(0, n, wide) : row,
                           onto.defined() ? widened(target) : onto));
    }
  }
  return out;
}

}  // namespace

bool has_onednn() {
  return onednn().product && onednn().product_and_add && at::globalContext().userEnabledMkldnn();
}

bool is_widened(at::ScalarType dtype) {
  if (dtype != at::kBFloat16 && dtype != at::kHalf) return false;
  return !at::globalContext().userEnabledMkldnn() || !(dtype == at::kHalf ? onednn().fp16 : onednn().bf16);
}

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& onto, Library library) {
  // ATen has no product that adds a matrix and a bias before it rounds.
  const bool low = x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf;
  const bool three_summands = bias.defined() && onto.defined();
  const bool library_onednn = library == Library::onednn || library == Library::onednn_forward;
  const bool by_operator = (library_onednn || (low && three_summands)) && suits_onednn(x, weight);
  const bool blocks = low && (is_widened(x.scalar_type()) || (three_summands && !by_operator));
  if (by_own_kernels(x, weight, library, blocks)) return linear_of_few_rows(x, weight, bias, onto);
  if (blocks)
    return by_blocks(
        x, weight.size(0), bias, onto, [&](int64_t n, int64_t count) { return widened(weight.narrow(0, n, count)); },
        [&](const at::Tensor& v, const at::Tensor& W, const at::Tensor& row, const at::Tensor& sum) {
          return linear(v, W, row, sum, library);
        });
  if (by_operator) return by_onednn(x, weight, bias.defined() ? Bias(bias) : std::nullopt, onto);
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
  const bool blocks = is_widened(G.scalar_type());
  if (by_own_kernels(G, weight, library, blocks)) return few_rows_times_weight(G, weight, onto);
  if (blocks)
    return by_blocks(
        G, weight.size(1), {}, onto, [&](int64_t k, int64_t count) { return widened(weight.narrow(1, k, count)); },
        [&](const at::Tensor& v, const at::Tensor& W, const at::Tensor&, const at::Tensor& sum) {
          return times_weight(v, W, sum, library);
        });
  if (library == Library::onednn && suits_onednn(G, weight)) return by_onednn(G, weight.t(), std::nullopt, onto);
  if (!onto.defined()) return at::mm(G, weight);
  at::Tensor out = onto;
  return at::addmm_out(out, out, G, weight);
}

}  // namespace hydra::cpu
