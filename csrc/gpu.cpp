// The composed form on a GPU: the kernels of cuda/kernels.h, and cuBLAS for the products with W0.
//
//   forward    compose, down, then h = Z U^T + u, h += x W0^T. The GEMM adds to the adapter's part before it rounds, so
//              that small updates survive low precision. With a b0, which may cancel W0 x, x W0^T + b0 comes first.
//   backward   grad_z, dx = dZ D, dx += G W0, grad_w, reduce
//   by sweep   sm90_sweep, dx = dZ D, dx += G W0, reduce; where it serves the sizes and dU and dD both are wanted
#ifdef HYDRA_WITH_CUDA
#include <ATen/ops/add.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "cuda/kernels.h"
#include "host.h"

namespace hydra::gpu {
namespace {

// The current stream of a device, for the launchers; null on a CPU, where tests run the kernels.
void* stream_of(at::Device device) {
  return device.is_cuda() ? c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle() : nullptr;
}

void check(int status, const char* kernel) {
  TORCH_CHECK(status == 0, "hydra_kernels: CUDA error ", status, " at the launch of ", kernel,
              ", which a kernel before it may have left");
}

HydraType type_of(const at::Tensor& t) {
  return t.scalar_type() == at::kFloat ? HYDRA_FLOAT32 : t.scalar_type() == at::kHalf ? HYDRA_FLOAT16 : HYDRA_BFLOAT16;
}

at::Tensor contiguous(const at::Tensor& t) {
  return t.defined() ? (t.is_neg() ? t.resolve_neg() : t).contiguous() : t;
}
at::Tensor rows(const at::Tensor& t) { return (t.size(1) <= 1 || t.stride(1) == 1) && !t.is_neg() ? t : contiguous(t); }
const void* pointer(const at::Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }
template <class T = void>
T* output(const at::Tensor& t) { return t.defined() ? static_cast<T*>(t.mutable_data_ptr()) : nullptr; }

// The dtype in which the kernels read all adapters and scales: the base's where all of them have it, else float32.
at::ScalarType adapter_dtype(const at::Tensor& like, const Operands& op) {
  for (const at::Tensor& t : {op.A_down, op.A_up, op.B_down, op.B_up, op.A_down_bias, op.A_up_bias, op.B_down_bias,
                              op.B_up_bias, op.scale_a.tensor, op.scale_b.tensor})
    if (t.defined() && t.scalar_type() != like.scalar_type()) return at::kFloat;
  return like.scalar_type();
}

// What forward and backward share: sizes, adapters as the kernels read them, scales.
struct Call {
  int64_t N;
  int32_t r_a, r_b;
  at::Tensor weight, bias, A_down, A_up, B_down, B_up, a_d, a_u, b_d, b_u, mask, s_a, s_b;
  float scale_a, scale_b, mask_scale;
  HydraType type, adapter_type;
  at::TensorOptions options;
  void* stream;

  Call(const at::Tensor& like, const Operands& op, int64_t N)
      : N(N), r_a(op.r_a()), r_b(op.r_b()), weight(op.weight.defined() ? rows(op.weight) : op.weight),
        bias(contiguous(op.bias)), mask(contiguous(op.mask)), scale_a(op.scale_a.value), scale_b(op.scale_b.value),
        mask_scale(op.mask_scale), type(type_of(like)), options(like.options()), stream(stream_of(like.device())) {
    const auto dtype = adapter_dtype(like, op);
    const auto read = [dtype](const at::Tensor& t) { return t.defined() ? contiguous(t.to(dtype)) : t; };
    A_down = read(op.A_down), A_up = read(op.A_up), B_down = read(op.B_down), B_up = read(op.B_up);
    a_d = read(op.A_down_bias), a_u = read(op.A_up_bias), b_d = read(op.B_down_bias), b_u = read(op.B_up_bias);
    s_a = read(op.scale_a.tensor), s_b = read(op.scale_b.tensor);
    adapter_type = type_of(r_a ? A_up : B_up);
  }

  int64_t R() const { return r_a + r_b; }
  int32_t mask_bytes() const { return mask.defined() && mask.scalar_type() == at::kBool; }
  at::Tensor floats(bool wanted, at::IntArrayRef shape) const {
    return wanted ? at::empty(shape, options.dtype(at::kFloat)) : at::Tensor();
  }
  at::Tensor empty(bool wanted, at::IntArrayRef shape) const { return wanted ? at::empty(shape, options) : at::Tensor(); }
};

// x W0^T + Z U^T + b0 + u.
at::Tensor around_cublas(const Call& c, const at::Tensor& x, const at::Tensor& Z, const at::Tensor& U, const at::Tensor& u) {
  const at::Tensor& W = c.weight;
  if (c.bias.defined()) {
    at::Tensor h = at::addmm(c.bias, x, W.t());
    at::addmm_out(h, h, Z, U.t());
    return u.defined() ? h.add_(u) : h;
  }
  at::Tensor h = u.defined() ? at::addmm(u, Z, U.t()) : at::mm(Z, U.t());
  return at::addmm_out(h, h, x, W.t());
}

}  // namespace

Forward forward(const at::Tensor& x_any, const Operands& op, Needs needs) {
  const c10::OptionalDeviceGuard guard(x_any.device());
  const at::Tensor x = rows(x_any);
  const int64_t M = x.size(0), K = x.size(1);
  TORCH_CHECK(K > 0 && op.weight.size(0) > 0, "hydra_linear: backend 'native' takes no layer without features on a GPU");
  const Call c(x, op, op.weight.size(0));
  const int64_t N = c.N, R = c.R();
  const bool with_d = c.a_d.defined() || c.b_d.defined() || (c.bias.defined() && c.r_b);
  const at::Tensor D = c.empty(true, {R, K}), rest = c.empty(c.r_b && c.type != HYDRA_FLOAT32, {c.r_b, K});
  const at::Tensor U = c.empty(true, {N, R}), u = c.empty(c.a_u.defined() || c.b_u.defined(), {N});
  const at::Tensor d = c.floats(with_d, {R}), Z = c.empty(true, {M, R});
  const at::Tensor C = c.floats(c.r_b, {hydra_compose_splits(N, K), c.r_b, K});
  const HydraComposeArguments compose{
      .w_ptr = pointer(c.weight),
      .bias_ptr = pointer(c.bias),
      .A_down_ptr = pointer(c.A_down),
      .A_up_ptr = pointer(c.A_up),
      .B_down_ptr = pointer(c.B_down),
      .B_up_ptr = pointer(c.B_up),
      .A_down_bias_ptr = pointer(c.a_d),
      .A_up_bias_ptr = pointer(c.a_u),
      .B_down_bias_ptr = pointer(c.b_d),
      .B_up_bias_ptr = pointer(c.b_u),
      .scale_a_ptr = pointer(c.s_a),
      .scale_b_ptr = pointer(c.s_b),
      .D_ptr = output(D),
      .rest_ptr = output(rest),
      .d_ptr = output<float>(d),
      .U_ptr = output(U),
      .u_ptr = output(u),
      .C_ptr = output<float>(C),
      .N = N,
      .K = K,
      .stride_wn = c.weight.stride(0),
      .r_a = c.r_a,
      .r_b = c.r_b,
      .scale_a = c.scale_a,
      .scale_b = c.scale_b,
      .type = c.type,
      .adapter_type = c.adapter_type,
  };
  check(hydra_compose(&compose, c.stream), "compose");
  const at::Tensor z = c.floats(true, {hydra_down_splits(M, K), M, R});
  const HydraDownArguments down{
      .x_ptr = pointer(x),
      .D_ptr = pointer(D),
      .rest_ptr = pointer(rest),
      .d_ptr = output<float>(d),
      .mask_ptr = pointer(c.mask),
      .Z_ptr = output(Z),
      .z_ptr = output<float>(z),
      .M = M,
      .K = K,
      .stride_xm = x.stride(0),
      .R = static_cast<int32_t>(R),
      .r_a = c.r_a,
      .mask_bytes = c.mask_bytes(),
      .mask_scale = c.mask_scale,
      .type = c.type,
  };
  check(hydra_down(&down, c.stream), "down");
  const bool from_Z = needs.any(A_UP, B_UP, SCALE_A, SCALE_B);
  return {around_cublas(c, x, Z, U, u),
          {needs.any(A_DOWN, B_DOWN) ? x_any : at::Tensor(), from_Z ? Z : at::Tensor(), needs.any(X) ? D : at::Tensor()}};
}

Gradients backward(const at::Tensor& G_any, const Operands& op, const Saved& saved, Needs needs, bool sweep) {
  const c10::OptionalDeviceGuard guard(G_any.device());
  const at::Tensor G = rows(G_any), x = needs.any(A_DOWN, B_DOWN) ? rows(saved[0]) : at::Tensor();
  const at::Tensor Z = contiguous(saved[1]), D = contiguous(saved[2]);
  const int64_t M = G.size(0), N = G.size(1), K = x.defined() ? x.size(1) : 0;
  const Call c(G, op, N);
  const int64_t R = c.R();

  const bool of_scales = needs.any(SCALE_A, SCALE_B), of_g = needs.any(BIAS, A_UP_BIAS, B_UP_BIAS);
  const int64_t ranks = R + (of_g || of_scales);  // of the sweep
  const int64_t blocks = sweep && x.defined() && needs.any(A_UP, B_UP)
                             ? hydra_sm90_sweep_blocks(N, K, ranks, false, c.type) : 0;
  const int64_t P = blocks ? hydra_sm90_sweep_partials(M, N, K, ranks, false, c.type) : hydra_grad_z_partials(M, R, c.type);
  const int64_t P_z = blocks ? P * blocks : hydra_grad_z_sums(M), Q = blocks ? blocks : hydra_grad_z_splits(M, N, R, c.type);
  const int64_t S = blocks ? P : x.defined() ? hydra_grad_w_splits(M, K) : 0;
  const bool z_sums_wanted = needs.any(A_DOWN_BIAS, B_DOWN_BIAS) ||
                             (c.r_b && (needs.any(BIAS) || (needs.any(B_DOWN) && c.bias.defined())));
  const bool dZ_wanted = blocks ? needs.any(X) : z_sums_wanted || x.defined() || needs.any(X);
  const at::Tensor dZ = c.empty(dZ_wanted, {M, R});
  const at::Tensor dU = c.floats(needs.any(A_UP, B_UP), {P, N, R}), g = c.floats(of_g, {P, N});
  const at::Tensor z_sums = c.floats(z_sums_wanted, {P_z, R}), scales = c.floats(of_scales, {P_z, R});
  const at::Tensor up_bias = c.floats(of_scales, {P, Q, 2}), dz = c.floats(!blocks && (dZ_wanted || of_scales), {Q, M, R});
  const at::Tensor dD = c.floats(x.defined(), {S, R, K});
  const HydraGradZArguments grad_z{
      .G_ptr = pointer(G),
      .A_up_ptr = pointer(c.A_up),
      .B_up_ptr = pointer(c.B_up),
      .A_up_bias_ptr = needs.any(SCALE_A) ? pointer(c.a_u) : nullptr,
      .B_up_bias_ptr = needs.any(SCALE_B) ? pointer(c.b_u) : nullptr,
      .scale_a_ptr = pointer(c.s_a),
      .scale_b_ptr = pointer(c.s_b),
      .Z_ptr = pointer(Z),
      .mask_ptr = pointer(c.mask),
      .dZ_ptr = output(dZ),
      .dU_ptr = output<float>(dU),
      .g_ptr = output<float>(g),
      .z_sums_ptr = output<float>(z_sums),
      .scales_ptr = output<float>(scales),
      .up_bias_ptr = output<float>(up_bias),
      .dz_ptr = output<float>(dz),
      .M = M,
      .N = N,
      .stride_gm = G.stride(0),
      .r_a = c.r_a,
      .r_b = c.r_b,
      .mask_bytes = c.mask_bytes(),
      .mask_scale = c.mask_scale,
      .scale_a = c.scale_a,
      .scale_b = c.scale_b,
      .type = c.type,
      .adapter_type = c.adapter_type,
  };
  const HydraSm90SweepArguments swept{
      .x_ptr = pointer(x),
      .G_ptr = grad_z.G_ptr,
      .Z_ptr = const_cast<void*>(pointer(Z)),  // read, since D is absent
      .D_ptr = nullptr,
      .rest_ptr = nullptr,
      .d_ptr = nullptr,
      .A_up_ptr = grad_z.A_up_ptr,
      .B_up_ptr = grad_z.B_up_ptr,
      .A_up_bias_ptr = grad_z.A_up_bias_ptr,
      .B_up_bias_ptr = grad_z.B_up_bias_ptr,
      .scale_a_ptr = grad_z.scale_a_ptr,
      .scale_b_ptr = grad_z.scale_b_ptr,
      .mask_ptr = grad_z.mask_ptr,
      .dZ_ptr = grad_z.dZ_ptr,
      .dU_ptr = grad_z.dU_ptr,
      .dD_ptr = output<float>(dD),
      .g_ptr = grad_z.g_ptr,
      .z_sums_ptr = grad_z.z_sums_ptr,
      .scales_ptr = grad_z.scales_ptr,
      .up_bias_ptr = grad_z.up_bias_ptr,
      .M = M,
      .N = N,
      .K = K,
      .stride_xm = x.defined() ? x.stride(0) : 0,
      .stride_gm = grad_z.stride_gm,
      .r_a = c.r_a,
      .r_b = c.r_b,
      .mask_bytes = grad_z.mask_bytes,
      .mask_scale = c.mask_scale,
      .scale_a = c.scale_a,
      .scale_b = c.scale_b,
      .type = c.type,
      .adapter_type = c.adapter_type,
  };
  if (blocks) check(hydra_sm90_sweep(&swept, c.stream), "sm90_sweep");
  else check(hydra_grad_z(&grad_z, c.stream), "grad_z");

  Gradients grads;
  if (needs.any(X)) {
    grads[X] = at::mm(dZ, D);
    at::addmm_out(grads[X], grads[X], G, c.weight);
  }
  if (x.defined() && !blocks) {
    const HydraGradWArguments grad_w{
        .x_ptr = pointer(x),
        .dZ_ptr = pointer(dZ),
        .dD_ptr = output<float>(dD),
        .M = M,
        .K = K,
        .stride_xm = x.stride(0),
        .R = static_cast<int32_t>(R),
        .type = c.type,
    };
    check(hydra_grad_w(&grad_w, c.stream), "grad_w");
  }

  const auto like = [&](Gradient gradient, const at::Tensor& operand) {
    if (needs.any(gradient)) grads[gradient] = at::empty(operand.sizes(), operand.options());
    return output(grads[gradient]);
  };
  if (needs.any(BIAS)) grads[BIAS] = at::empty({N}, c.options);
  const bool through_W0 = needs.any(B_DOWN);
  const at::Tensor T = c.floats(through_W0, {c.r_b, K});
  const at::Tensor dB = c.floats(through_W0, {through_W0 ? hydra_reduce_splits(N, K) : 0, N, c.r_b});
  const HydraReduceArguments reduce{
      .dU_ptr = output<float>(dU),
      .g_ptr = output<float>(g),
      .z_sums_ptr = output<float>(z_sums),
      .scales_ptr = output<float>(scales),
      .up_bias_ptr = output<float>(up_bias),
      .dD_ptr = output<float>(dD),
      .w_ptr = through_W0 ? pointer(c.weight) : nullptr,
      .bias_ptr = through_W0 ? pointer(c.bias) : nullptr,
      .B_down_ptr = pointer(c.B_down),
      .scale_a_ptr = pointer(c.s_a),
      .scale_b_ptr = pointer(c.s_b),
      .dA_down_ptr = like(A_DOWN, c.A_down),
      .dA_up_ptr = like(A_UP, c.A_up),
      .dB_down_ptr = like(B_DOWN, c.B_down),
      .dB_up_ptr = like(B_UP, c.B_up),
      .dA_down_bias_ptr = like(A_DOWN_BIAS, c.a_d),
      .dA_up_bias_ptr = like(A_UP_BIAS, c.a_u),
      .dB_down_bias_ptr = like(B_DOWN_BIAS, c.b_d),
      .dB_up_bias_ptr = like(B_UP_BIAS, c.b_u),
      .dscale_a_ptr = like(SCALE_A, c.s_a),
      .dscale_b_ptr = like(SCALE_B, c.s_b),
      .dbias_ptr = output(grads[BIAS]),
      .T_ptr = output<float>(T),
      .dB_ptr = output<float>(dB),
      .P = P,
      .P_z = P_z,
      .Q = Q,
      .S = S,
      .N = N,
      .K = K,
      .stride_wn = c.weight.defined() ? c.weight.stride(0) : 0,
      .r_a = c.r_a,
      .r_b = c.r_b,
      .scale_a = c.scale_a,
      .scale_b = c.scale_b,
      .type = c.type,
      .adapter_type = c.adapter_type,
  };
  check(hydra_reduce(&reduce, c.stream), "reduce");
  const auto in_dtype_of = [&](Gradient gradient, const at::Tensor& operand) {
    if (grads[gradient].defined()) grads[gradient] = grads[gradient].to(operand.scalar_type());
  };
  in_dtype_of(A_DOWN, op.A_down), in_dtype_of(A_UP, op.A_up), in_dtype_of(B_DOWN, op.B_down), in_dtype_of(B_UP, op.B_up);
  in_dtype_of(A_DOWN_BIAS, op.A_down_bias), in_dtype_of(A_UP_BIAS, op.A_up_bias);
  in_dtype_of(B_DOWN_BIAS, op.B_down_bias), in_dtype_of(B_UP_BIAS, op.B_up_bias);
  in_dtype_of(SCALE_A, op.scale_a.tensor), in_dtype_of(SCALE_B, op.scale_b.tensor);
  return grads;
}

}  // namespace hydra::gpu
#endif
