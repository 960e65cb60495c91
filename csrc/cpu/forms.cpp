// The forms on a CPU. The products with W0 are ATen's; those with a side of R are in products.h.
//
//   U = [s_a A_up, s_b B_up] [N, R]    u = s_a a_u + s_b b_u [N]    C = B_down W0    c = B_down b0
//   D = [A_down; C] [R, K]    d = [a_d, c + b_d] [R]
//
//   composed    Z = mask * (x D^T + d)    h = x W0^T + Z U^T + (b0 + u)          dx = G W0 + dZ D
//   effective   h = x W^T + (b0 + u + U d), W = W0 + U D                         dx = G W
//   kept        y0 = x W0^T + b0    Z_a = mask_a * (x A_down^T + a_d)    Z_b = mask_b * (y0 B_down^T + b_d)
//               h = y0 + Z U^T + u            dx = (G + dZ_b B_down) W0 + dZ_a A_down
//
//   dU = G^T Z    dA_up = s_a dU_a    ds_a = <dU_a, A_up> + a_u . g    da_u = s_a g    da_d = z_a    (b likewise)
//   z = sum_m dZ    g = sum_m G    db0 = g + z_b B_down
//   composed, effective: dD = dZ^T x, dA_down its first rows, dB_down = (the others) W0^T + z_b b0^T
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/sum.h>

#include "../host.h"
#include "sweep.h"

namespace hydra::cpu {
namespace {

constexpr int64_t BLOCK = 32;  // rows of an output that a thread computes at a time

template <class T>
T number(const Scale& scale) {
  return static_cast<T>(scale.tensor.defined() ? scale.tensor.item<double>() : scale.value);
}

template <class T>
const T* vector(const at::Tensor& t) {
  return t.defined() ? t.const_data_ptr<T>() : nullptr;
}

// out[n, r] = s in[n, r].
template <class T>
void scaled_copy(const T* in, int64_t in_stride, T s, T* out, int64_t out_stride, int64_t rows, int64_t ranks) {
  const auto copy = [=](auto width) {  // the compiler vectorises loops of a known width
    for (int64_t n = 0; n < rows; ++n)
      for (int64_t r = 0; r < static_cast<int64_t>(width); ++r) out[n * out_stride + r] = s * in[n * in_stride + r];
  };
  if (ranks == 8) copy(std::integral_constant<int64_t, 8>());
  else if (ranks == 4) copy(std::integral_constant<int64_t, 4>());
  else copy(ranks);
}

// The adapters, contiguous; U is made where it is needed.
template <class T>
struct Adapters {
  int64_t N, r_a, r_b, R;
  at::Tensor A_down, A_up, B_down, B_up, a_d, a_u, b_d, b_u, b0;
  T s_a, s_b;

  explicit Adapters(const Operands& op, int64_t N)
      : N(N), r_a(op.r_a()), r_b(op.r_b()), R(r_a + r_b), A_down(own(op.A_down)), A_up(own(op.A_up)),
        B_down(own(op.B_down)), B_up(own(op.B_up)), a_d(own(op.A_down_bias)), a_u(own(op.A_up_bias)),
        b_d(own(op.B_down_bias)), b_u(own(op.B_up_bias)), b0(own(op.bias)), s_a(number<T>(op.scale_a)),
        s_b(number<T>(op.scale_b)) {}

  // U [N, padded(R)].
  Buffer<T> U() const {
    const int64_t stride = padded(R);
    Buffer<T> out(N * stride);
    scaled_copy(vector<T>(A_up), r_a, s_a, out.data(), stride, N, r_a);
    scaled_copy(vector<T>(B_up), r_b, s_b, out.data() + r_a, stride, N, r_b);
    for (int64_t n = 0; R < stride && n < N; ++n) std::fill_n(out.data() + n * stride + R, stride - R, T(0));
    return out;
  }

  // U^T [R, N].
  Buffer<T> U_transposed() const {
    Buffer<T> out(N * R);
    const auto transpose = [this](const T* up, int64_t ranks, T s, T* rows) {
      constexpr int64_t LINE = 16;  // rows of `up` at a time; transposed, they fill whole cache lines
      for (int64_t first = 0; first < N; first += LINE)
        for (int64_t r = 0; r < ranks; ++r)
          for (int64_t n = first; n < std::min(N, first + LINE); ++n) rows[r * N + n] = s * up[n * ranks + r];
    };
    transpose(vector<T>(A_up), r_a, s_a, out.data());
    transpose(vector<T>(B_up), r_b, s_b, out.data() + r_a * N);
    return out;
  }

  // Writes u, or b0 + u. False where all of it is absent: then nothing is written.
  bool bias(T* out, bool with_b0) const {
    bool found = false;
    const auto add = [&](const at::Tensor& t, T s) {
      if (!t.defined()) return;
      const T* v = t.const_data_ptr<T>();
      for (int64_t n = 0; n < N; ++n) out[n] = (found ? out[n] : T(0)) + s * v[n];
      found = true;
    };
    if (with_b0) add(b0, 1);
    add(a_u, s_a);
    add(b_u, s_b);
    return found;
  }
};

// D [R, K], and d [R], which is undefined where it is zero.
template <class T>
std::pair<at::Tensor, at::Tensor> stacked_down(const Adapters<T>& ad, const Rows<T>& W, int64_t K) {
  if (!ad.r_b) return {ad.A_down, ad.a_d};
  const at::Tensor& like = ad.B_down;
  at::Tensor D = at::empty({ad.R, K}, like.options()), d;
  T* rows = D.mutable_data_ptr<T>();
  if (ad.r_a) std::copy_n(vector<T>(ad.A_down), ad.r_a * K, rows);
  T* C = rows + ad.r_a * K;
  spread(K, 2 * ad.r_b * ad.N * K, [&](int64_t first, int64_t last) {
    run(Combine<T>{ad.r_b, last - first, ad.N, vector<T>(ad.B_down), 1, ad.N, W.data + first, W.stride, nullptr, 0,
                   C + first, K});
  });
  if (ad.a_d.defined() || ad.b_d.defined() || ad.b0.defined()) {
    d = at::empty({ad.R}, like.options());
    T* out = d.mutable_data_ptr<T>();
    for (int64_t r = 0; r < ad.r_a; ++r) out[r] = ad.a_d.defined() ? vector<T>(ad.a_d)[r] : T(0);
    for (int64_t r = 0; r < ad.r_b; ++r) out[ad.r_a + r] = ad.b_d.defined() ? vector<T>(ad.b_d)[r] : T(0);
    T* c = out + ad.r_a;
    if (ad.b0.defined())
      run(Dots<T>{1, ad.r_b, ad.N, vector<T>(ad.b0), ad.N, vector<T>(ad.B_down), ad.N, c, ad.r_b, c, ad.r_b});
  }
  return {D, d};
}

// W0 + U D.
template <class T>
at::Tensor effective_weight(const Adapters<T>& ad, const Rows<T>& W, const at::Tensor& weight, const at::Tensor& D) {
  const int64_t K = weight.size(1);
  at::Tensor out = at::empty({ad.N, K}, weight.options());
  const Buffer<T> U = ad.U();
  spread(ad.N, 2 * ad.R * ad.N * K, [&](int64_t first, int64_t last) {
    run(Combine<T>{last - first, K, ad.R, U.data() + first * padded(ad.R), 1, padded(ad.R), vector<T>(D), K,
                   W.row(first), W.stride, out.mutable_data_ptr<T>() + first * K, K});
  });
  return out;
}

// out = v matrix^T + bias.
void affine(at::Tensor& out, const at::Tensor& v, const at::Tensor& matrix, const at::Tensor& bias) {
  if (bias.defined()) at::addmm_out(out, bias, v, matrix.t());
  else at::mm_out(out, v, matrix.t());
}

// With few rows and a weight that no cache holds, oneDNN's x W0^T takes 0.76 (16 rows of 4096) to 0.94 (256 rows) of MKL's
// time on the processors measured (Sapphire Rapids). With more rows or a smaller weight it takes as long or longer.
constexpr int64_t ROWS_FOR_ONEDNN = 256, WEIGHT_FOR_ONEDNN = 1 << 23;

// y0 = v matrix^T + bias, by the faster library for these sizes.
at::Tensor frozen_output(const at::Tensor& v, const at::Tensor& matrix, const at::Tensor& bias) {
  using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, std::string_view,
                               c10::List<std::optional<at::Scalar>>, std::optional<std::string_view>);
  static const auto onednn = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
  const bool pays = v.size(0) <= ROWS_FOR_ONEDNN && matrix.numel() >= WEIGHT_FOR_ONEDNN;
  if (pays && onednn && v.scalar_type() == at::kFloat && at::globalContext().userEnabledMkldnn() && v.is_contiguous() &&
      matrix.is_contiguous())
    return onednn->typed<Signature>().call(v, matrix, bias.defined() ? std::optional(bias) : std::nullopt, "none",
                                           c10::List<std::optional<at::Scalar>>(), "");
  at::Tensor out = at::empty({v.size(0), matrix.size(0)}, v.options());
  affine(out, v, matrix, bias);
  return out;
}

template <class T>
Forward effective_forward(const at::Tensor& x, const Operands& op, Needs needs, const Adapters<T>& ad) {
  const int64_t K = x.size(1);
  const auto [D, d] = stacked_down(ad, Rows<T>(op.weight), K);
  at::Tensor bias = at::empty({ad.N}, x.options()), h = at::empty({x.size(0), ad.N}, x.options());
  bool with_bias = ad.bias(bias.mutable_data_ptr<T>(), true);
  if (d.defined()) {
    T* b = bias.mutable_data_ptr<T>();
    if (!with_bias) std::fill_n(b, ad.N, T(0));
    const Buffer<T> U = ad.U();
    run(Dots<T>{1, ad.N, ad.R, vector<T>(d), ad.R, U.data(), padded(ad.R), b, ad.N, b, ad.N});
    with_bias = true;
  }
  affine(h, x, effective_weight(ad, Rows<T>(op.weight), op.weight, D), with_bias ? bias : at::Tensor());
  const bool wants_dU = needs.any(A_UP, B_UP, SCALE_A, SCALE_B);
  return {h, {wants_dU || needs.any(A_DOWN, B_DOWN) ? x : at::Tensor(), wants_dU || needs.any(X) ? D : at::Tensor(),
              wants_dU ? d : at::Tensor()}};
}

template <class T>
Forward composed_forward(const at::Tensor& x, const Operands& op, Needs needs, const Adapters<T>& ad) {
  const int64_t M = x.size(0), K = x.size(1), N = ad.N, R = ad.R;
  const Rows<T> rows(x), W(op.weight);
  const auto [D, d] = stacked_down(ad, W, K);
  const Mask<T> mask(op.mask, op.mask_scale);
  const Buffer<T> U = ad.U_transposed(), bias(N);
  const T* base = ad.bias(bias.data(), true) ? bias.data() : nullptr;
  at::Tensor Z = at::empty({M, R}, x.options()), h = at::empty({M, N}, x.options());
  // The low-rank part comes first, because the GEMM adds to it.
  spread(M, 2 * M * R * (K + N), [&, &D = D, &d = d](int64_t first, int64_t last) {
    for (int64_t m = first; m < last; m += BLOCK) {
      const int64_t count = std::min(BLOCK, last - m);
      T* z = Z.mutable_data_ptr<T>() + m * R;
      run(Dots<T>{count, R, K, rows.row(m), rows.stride, vector<T>(D), K, vector<T>(d), 0, z, R});
      mask.apply(z, R, m, count, R);
      run(Combine<T>{count, N, R, z, 1, R, U.data(), N, base, 0, h.mutable_data_ptr<T>() + m * N, N});
    }
  });
  at::addmm_out(h, h, x, op.weight.t());
  const bool wants_dU = needs.any(A_UP, B_UP, SCALE_A, SCALE_B);
  return {h, {needs.any(A_DOWN, B_DOWN) ? x : at::Tensor(), wants_dU ? Z : at::Tensor(), needs.any(X) ? D : at::Tensor()}};
}

template <class T>
Forward kept_forward(const at::Tensor& x, const Operands& op, Needs needs, const Adapters<T>& ad) {
  const int64_t M = x.size(0), K = x.size(1), N = ad.N, R = ad.R, r_a = ad.r_a, r_b = ad.r_b;
  const Rows<T> rows(x);
  const Mask<T> mask(op.mask, op.mask_scale);
  const Buffer<T> U = ad.U_transposed(), u(N);
  const bool with_u = ad.bias(u.data(), false);
  at::Tensor y0 = frozen_output(x, op.weight, op.bias), Z = at::empty({M, R}, x.options());
  at::Tensor h = needs.any(B_DOWN) ? at::empty({M, N}, x.options()) : y0;
  spread(M, 2 * M * (r_a * K + r_b * N + R * N), [&](int64_t first, int64_t last) {
    for (int64_t m = first; m < last; m += BLOCK) {
      const int64_t count = std::min(BLOCK, last - m);
      T *z = Z.mutable_data_ptr<T>() + m * R, *out = h.mutable_data_ptr<T>() + m * N;
      const T* y = y0.const_data_ptr<T>() + m * N;
      run(Dots<T>{count, r_a, K, rows.row(m), rows.stride, vector<T>(ad.A_down), K, vector<T>(ad.a_d), 0, z, R});
      run(Dots<T>{count, r_b, N, y, N, vector<T>(ad.B_down), N, vector<T>(ad.b_d), 0, z + r_a, R});
      mask.apply(z, R, m, count, R);
      run(Combine<T>{count, N, R, z, 1, R, U.data(), N, y, N, out, N});
      for (int64_t i = 0; with_u && i < count; ++i)
        for (int64_t n = 0; n < N; ++n) out[i * N + n] += u.data()[n];
    }
  });
  const bool wants_dU = needs.any(A_UP, B_UP, SCALE_A, SCALE_B);
  return {h, {needs.any(A_DOWN) ? x : at::Tensor(), wants_dU ? Z : at::Tensor(), needs.any(B_DOWN) ? y0 : at::Tensor()}};
}

// The gradients that follow from the sums of a sweep, except those of the down projections.
template <class T>
void from_sums(Gradients& grads, const at::Tensor& G, const Operands& op, const Adapters<T>& ad, Needs needs,
               const Sums<T>& sums) {
  const T *dU = sums.of(0) + sums.dU, *z = sums.of(0) + sums.z;
  const int64_t stride = padded(ad.R);
  const bool of_bias_a = ad.a_u.defined() && needs.any(SCALE_A), of_bias_b = ad.b_u.defined() && needs.any(SCALE_B);
  at::Tensor g;
  if (needs.any(BIAS, A_UP_BIAS, B_UP_BIAS) || of_bias_a || of_bias_b) g = at::sum(G, 0);

  const auto branch = [&](Gradient up, Gradient scale, Gradient down_bias, Gradient up_bias, const at::Tensor& matrix,
                          const at::Tensor& bias, T s, int64_t first, int64_t ranks) {
    if (needs.any(up)) {
      grads[up] = at::empty({ad.N, ranks}, G.options());
      scaled_copy(dU + first, stride, s, grads[up].template mutable_data_ptr<T>(), ranks, ad.N, ranks);
    }
    if (needs.any(scale)) {
      double total = 0;
      const T *values = vector<T>(matrix), *of_bias = vector<T>(bias), *sums_of_G = vector<T>(g);
      for (int64_t n = 0; n < ad.N; ++n)
        for (int64_t r = 0; r < ranks; ++r) total += dU[n * stride + first + r] * values[n * ranks + r];
      for (int64_t n = 0; of_bias && n < ad.N; ++n) total += sums_of_G[n] * of_bias[n];
      const at::Tensor& operand = scale == SCALE_A ? op.scale_a.tensor : op.scale_b.tensor;
      grads[scale] = at::empty({}, operand.options()).fill_(total);
    }
    if (needs.any(down_bias)) {
      grads[down_bias] = at::empty({ranks}, G.options());
      std::copy_n(z + first, ranks, grads[down_bias].template mutable_data_ptr<T>());
    }
    if (needs.any(up_bias)) grads[up_bias] = at::mul(g, at::Scalar(s));
  };
  if (ad.r_a) branch(A_UP, SCALE_A, A_DOWN_BIAS, A_UP_BIAS, ad.A_up, ad.a_u, ad.s_a, 0, ad.r_a);
  if (ad.r_b) branch(B_UP, SCALE_B, B_DOWN_BIAS, B_UP_BIAS, ad.B_up, ad.b_u, ad.s_b, ad.r_a, ad.r_b);
  if (needs.any(BIAS)) {
    grads[BIAS] = g;  // last, since this overwrites g
    T* out = grads[BIAS].template mutable_data_ptr<T>();
    if (ad.r_b)
      run(Combine<T>{1, ad.N, ad.r_b, z + ad.r_a, 1, 0, vector<T>(ad.B_down), ad.N, out, ad.N, out, ad.N});
  }
}

template <class T>
Gradients backward_of(const at::Tensor& G_any, const Operands& op, const Saved& saved, Needs needs, Form form) {
  const Rows<T> G(G_any);
  const Adapters<T> ad(op, G.owner.size(1));
  const int64_t M = G.owner.size(0), N = ad.N, R = ad.R, r_a = ad.r_a, r_b = ad.r_b;
  const bool kept = form == Form::kept, effective = form == Form::effective;
  const Rows<T> x(saved[0]), y0(kept ? saved[2] : at::Tensor());
  const at::Tensor D = own(effective ? saved[1] : kept ? at::Tensor() : saved[2]);
  const at::Tensor Z = own(effective ? at::Tensor() : saved[1]), d = own(effective ? saved[2] : at::Tensor());
  const int64_t K = x.owner.defined() ? x.owner.size(1) : op.weight.defined() ? op.weight.size(1) : 0;
  const Mask<T> mask(op.mask, op.mask_scale);
  const bool wants_dU = needs.any(A_UP, B_UP, SCALE_A, SCALE_B);
  const bool wants_dZ = needs.any(A_DOWN, B_DOWN, A_DOWN_BIAS, B_DOWN_BIAS) || (needs.any(X) && !effective) ||
                        (needs.any(BIAS) && r_b);
  Gradients grads;

  Sweep<T> s{M, N, R, G.data, G.stride};
  const Buffer<T> U = wants_dZ ? ad.U() : Buffer<T>(0);
  s.U = wants_dZ ? U.data() : nullptr;
  s.mask = &mask, s.wants_dU = wants_dU, s.K = K, s.r_b = r_b;
  if (wants_dU && !effective) s.Z = vector<T>(Z);
  if (wants_dU && effective) s.x = x.data, s.x_stride = x.stride, s.D = vector<T>(D), s.d = vector<T>(d);
  // In the composed and the effective form dA_down and T are rows of one product.
  const bool both = !kept && needs.any(A_DOWN) && needs.any(B_DOWN);
  if (needs.any(A_DOWN)) s.a = {0, both ? R : r_a, K, x.data, x.stride};
  if (needs.any(B_DOWN) && kept) s.b = {r_a, r_b, N, y0.data, y0.stride};
  if (needs.any(B_DOWN) && !kept && !both) s.b = {r_a, r_b, K, x.data, x.stride};
  at::Tensor dx, dy0 = G.owner;
  if (needs.any(X)) {
    dx = at::empty({M, K}, G.owner.options());
    if (kept) dy0 = at::empty({M, N}, G.owner.options()), s.B_down = vector<T>(ad.B_down), s.dy0 = dy0.mutable_data_ptr<T>();
    s.R_E = kept ? r_a : R, s.E = vector<T>(kept ? ad.A_down : D);
    if (!effective && s.R_E) s.dx = dx.mutable_data_ptr<T>();
  }
  if (wants_dU || wants_dZ) {
    const Sums<T> sums = sweep(s);
    from_sums(grads, G.owner, op, ad, needs, sums);
    if (needs.any(A_DOWN)) {
      grads[A_DOWN] = at::empty({r_a, K}, G.owner.options());
      std::copy_n(sums.of(0) + sums.a, r_a * K, grads[A_DOWN].template mutable_data_ptr<T>());
    }
    if (needs.any(B_DOWN)) {
      grads[B_DOWN] = at::empty({r_b, N}, G.owner.options());
      T *out = grads[B_DOWN].template mutable_data_ptr<T>(), *T_rows = sums.of(0) + (both ? sums.a + r_a * K : sums.b);
      if (kept) std::copy_n(T_rows, r_b * N, out);
      else {
        const Rows<T> W(op.weight);
        const T *z = sums.of(0) + sums.z + r_a, *b0 = vector<T>(ad.b0);
        for (int64_t r = 0; b0 && r < r_b; ++r)
          for (int64_t n = 0; n < N; ++n) out[r * N + n] = z[r] * b0[n];
        spread(N, 2 * r_b * N * K, [&](int64_t first, int64_t last) {
          run(Dots<T>{r_b, last - first, K, T_rows, K, W.row(first), W.stride, b0 ? out + first : nullptr, N, out + first, N});
        });
      }
    }
  } else {
    from_sums(grads, G.owner, op, ad, needs, Sums<T>{0, 0, 0, 0, 0, 1, Buffer<T>(0)});
  }
  if (needs.any(X)) {
    if (effective) at::mm_out(dx, G.owner, effective_weight(ad, Rows<T>(op.weight), op.weight, D));
    else if (s.dx) at::addmm_out(dx, dx, dy0, op.weight);
    else at::mm_out(dx, dy0, op.weight);
    grads[X] = dx;
  }
  return grads;
}

template <class T>
Forward forward_of(const at::Tensor& x, const Operands& op, Needs needs, Form form) {
  const Adapters<T> ad(op, op.weight.size(0));
  switch (form) {
    case Form::composed: return composed_forward<T>(x, op, needs, ad);
    case Form::effective: return effective_forward<T>(x, op, needs, ad);
    default: return kept_forward<T>(x, op, needs, ad);
  }
}

}  // namespace

Forward forward(const at::Tensor& x, const Operands& op, Needs needs, Form form) {
  return x.scalar_type() == at::kDouble ? forward_of<double>(x, op, needs, form) : forward_of<float>(x, op, needs, form);
}

Gradients backward(const at::Tensor& G, const Operands& op, const Saved& saved, Needs needs, Form form) {
  return G.scalar_type() == at::kDouble ? backward_of<double>(G, op, saved, needs, form)
                                        : backward_of<float>(G, op, saved, needs, form);
}

}  // namespace hydra::cpu
