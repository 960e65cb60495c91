#include "check.h"

#include <ATen/autocast_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <cmath>

namespace hydra {
namespace {

// Whether t is an ordinary tensor in memory: no fake tensor, no wrapper, no lazy negation, not nested, not without storage.
bool plain(const at::Tensor& t) {
  constexpr c10::DispatchKeySet special(
      {c10::DispatchKey::Python, c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::FuncTorchGradWrapper,
       c10::DispatchKey::Functionalize, c10::DispatchKey::Negative, c10::DispatchKey::NestedTensor,
       c10::DispatchKey::ZeroTensor});
  return !t.unsafeGetTensorImpl()->key_set().has_any(special) && t.layout() == at::kStrided && !t.is_meta();
}

bool served(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16;
}

struct Judge {
  at::Device device;
  at::ScalarType dtype;

  bool fits(const at::Tensor& t, at::IntArrayRef shape) const {
    return plain(t) && t.sizes() == shape && t.scalar_type() == dtype && t.device() == device;
  }
  bool fits_if_given(const at::Tensor& t, at::IntArrayRef shape) const { return !t.defined() || fits(t, shape); }
  bool fits(const Scale& s) const {
    return s.tensor.defined() ? plain(s.tensor) && s.tensor.dim() == 0 && s.tensor.device() == device &&
                                    served(s.tensor.scalar_type())
                              : std::isfinite(s.value);
  }
};

bool branch(Judge judge, const at::Tensor& down, const at::Tensor& up, const at::Tensor& down_bias,
            const at::Tensor& up_bias, int64_t fan_in, int64_t N, int64_t* rank) {
  *rank = 0;
  if (!down.defined()) return !up.defined() && !down_bias.defined() && !up_bias.defined();
  if (!up.defined() || down.dim() != 2 || down.size(0) == 0) return false;
  const bool low = judge.dtype == at::kHalf || judge.dtype == at::kBFloat16;
  if (low && down.scalar_type() == at::kFloat) judge.dtype = at::kFloat;
  const int64_t r = *rank = down.size(0);
  return judge.fits(down, {r, fan_in}) && judge.fits(up, {N, r}) && judge.fits_if_given(down_bias, {r}) &&
         judge.fits_if_given(up_bias, {N});
}

}  // namespace

bool vouch_for(const at::Tensor& x, const Operands& op, Sizes* sizes) {
  // A dispatch mode, a transform or a trace must see torch's operators.
  if (c10::impl::TorchDispatchModeTLS::any_modes_set() ||
      c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
      c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::Tracer))
    return false;
  const at::Tensor& W = op.weight;
  if (!x.defined() || !W.defined() || !plain(x) || !plain(W) || x.dim() == 0 || W.dim() != 2 || W.requires_grad()) return false;
  const Judge judge{W.device(), W.scalar_type()};
  const auto dtype = judge.dtype;
  if (!served(dtype)) return false;
  const int64_t N = W.size(0), K = W.size(1);
  if (x.size(-1) != K || x.scalar_type() != dtype || x.device() != judge.device) return false;
  if (at::autocast::is_autocast_enabled(judge.device.type())) return false;
  int64_t M = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) M *= x.size(i);
  *sizes = {M, K, N, 0, 0};
  return judge.fits_if_given(op.bias, {N}) &&
         branch(judge, op.A_down, op.A_up, op.A_down_bias, op.A_up_bias, K, N, &sizes->r_a) &&
         branch(judge, op.B_down, op.B_up, op.B_down_bias, op.B_up_bias, N, N, &sizes->r_b) &&
         judge.fits_if_given(op.mask, {M, sizes->r_a + sizes->r_b}) && !(op.mask.defined() && op.mask.requires_grad()) &&
         judge.fits_if_given(op.input_mask, {M, K}) && !(op.input_mask.defined() && op.input_mask.requires_grad()) &&
         !op.input_seed.defined() &&
         judge.fits(op.scale_a) && judge.fits(op.scale_b);
}

}  // namespace hydra
