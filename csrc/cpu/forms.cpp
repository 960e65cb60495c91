// The forms on a CPU. The products with W0 are in large.h; those with a side of R are in small.h. E is the dtype of x, W0
// and h, T = Sum<E> that of the arithmetic.
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
#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/sum.h>

#include "../host.h"
#include "adapters.h"
#include "large.h"

namespace hydra::cpu {
namespace {

// What a small operand is prepared for: for fewer rows than these its two bf16 parts would cost more than they save.
constexpr int64_t ROWS_FOR_MATRIX_UNITS = 64;
int use(int64_t rows, Use which) { return rows < ROWS_FOR_MATRIX_UNITS ? 0 : which; }

template <class T>
Forward effective_forward(const at::Tensor& x, const Operands& op, Needs needs, const Adapters<T>& ad, Library library) {
  const int64_t K = x.size(1);
  const auto [D, d] = stacked_down<T>(ad, Rows<T>(op.weight), K);
  at::Tensor bias = at::empty({ad.N}, x.options());
  bool with_bias = ad.bias(bias.mutable_data_ptr<T>(), true);
  if (d.defined()) {
    T* b = bias.mutable_data_ptr<T>();
    if (!with_bias) std::fill_n(b, ad.N, T(0));
    const Buffer<T> U = ad.U();
    run(Dots<T>{1, ad.N, ad.R, vector<T>(d), ad.R, U.data(), padded(ad.R), b, ad.N, b, ad.N});
    with_bias = true;
  }
  const at::Tensor W = effective_weight(ad, Rows<T>(op.weight), op.weight, D);
  const bool wants_dU = needs.any(A_UP, B_UP, SCALE_A, SCALE_B);
  return {linear(x, W, with_bias ? bias : at::Tensor(), {}, library),
          {wants_dU || needs.any(A_DOWN, B_DOWN) ? x : at::Tensor(), wants_dU || needs.any(X) ? D : at::Tensor(),
           wants_dU ? d : at::Tensor()}};
}

// Z = mask * (Z as f(m, count, Z of these rows) leaves it), block by block; then g(m, count, Z of these rows in E).
template <class E, class F, class Then>
void bottleneck(at::Tensor& Z, const Mask<Sum<E>>& mask, int64_t flops, const F& f, const Then& then) {
  const int64_t M = Z.size(0), R = Z.size(1);
  constexpr int64_t BLOCK = std::is_same_v<E, Sum<E>> ? 32 : 64;  // rows at a time
  spread(M, flops, [&](int64_t first, int64_t last) {
    const Buffer<Sum<E>> z(BLOCK * R);
    for (int64_t m = first; m < last; m += BLOCK) {
      const int64_t count = std::min(BLOCK, last - m);
      f(m, count, z.data());
      mask.apply(z.data(), R, m, count, R);
      E* rounded = Z.mutable_data_ptr<E>() + m * R;
      for (int64_t e = 0; e < count * R; ++e) rounded[e] = z.data()[e];
      then(m, count, rounded);
    }
  });
}

// A_down [r_a, K] as it stands beside x' and beside its mask: with 1/(1-p).
template <class E, class T = Sum<E>>
at::Tensor scaled_A_down(const Adapters<T>& ad, const InputDropout<E>& drop) {
  return drop.scale() == 1 || !ad.r_a ? ad.A_down : at::mul(ad.A_down, at::Scalar(drop.scale()));
}

template <class E, class T = Sum<E>>
Forward composed_forward(const at::Tensor& x, const Operands& op, Needs needs, const Adapters<T>& ad, Library library) {
  const int64_t M = x.size(0), K = x.size(1), N = ad.N, R = ad.R;
  const Rows<E> rows(x);
  const auto [D, d] = stacked_down<E>(ad, Rows<E>(op.weight), K);
  const InputDropout<E> drop(op, K);
  const Buffer<T> U = ad.U_transposed(), bias(N);
  const Small<E> up(U.data(), R, N, use(M, UP));
  const bool apart = drop.on() && ad.r_a;  // A_down reads x'
  const int64_t of_a = apart ? ad.r_a : 0;
  const at::Tensor scaled = apart ? scaled_A_down(ad, drop) : at::Tensor();
  const Small<E> down_a(vector<T>(scaled), of_a, K, use(M, DOWN)), down(vector<T>(D) + of_a * K, R - of_a, K, use(M, DOWN));
  const T* d_of = vector<T>(d);
  // In fp32 the GEMM adds to b0 + u + Z U^T. In 16 bits b0, which may cancel x W0^T, must not be rounded before their sum.
  const bool b0_apart = !std::is_same_v<E, T>;
  const T* base = ad.bias(bias.data(), !b0_apart) ? bias.data() : nullptr;
  at::Tensor Z = at::empty({M, R}, x.options()), h = at::empty({M, N}, x.options());
  bottleneck<E>(
      Z, Mask<T>(op.mask, op.mask_scale), 2 * M * R * (K + N),
      [&](int64_t m, int64_t count, T* z) {
        if (apart) down_a.down(drop.rows(rows.row(m), rows.stride, m, count), K, count, d_of, z, R);
        if (R > of_a) down.down(rows.row(m), rows.stride, count, d_of ? d_of + of_a : nullptr, z + of_a, R);
      },
      [&](int64_t m, int64_t count, const E* z) {
        up.up(z, R, count, base, nullptr, 0, h.mutable_data_ptr<E>() + m * N, N);
      });
  h = linear(x, op.weight, b0_apart ? op.bias : at::Tensor(), h, library);
  const bool wants_dU = needs.any(A_UP, B_UP, SCALE_A, SCALE_B);
  return {h, {needs.any(A_DOWN, B_DOWN) ? x : at::Tensor(), wants_dU ? Z : at::Tensor(), needs.any(X) ? in<E>(D) : at::Tensor()}};
}

template <class E, class T = Sum<E>>
Forward kept_forward(const at::Tensor& x, const Operands& op, Needs needs, const Adapters<T>& ad, Library library) {
  const int64_t M = x.size(0), K = x.size(1), N = ad.N, R = ad.R, r_a = ad.r_a, r_b = ad.r_b;
  const Rows<E> rows(x);
  const Buffer<T> U = ad.U_transposed(), u(N);
  const T* row = ad.bias(u.data(), false) ? u.data() : nullptr;
  const InputDropout<E> drop(op, K);
  const at::Tensor scaled = scaled_A_down(ad, drop);
  const Small<E> A_down(vector<T>(scaled), r_a, K, use(M, DOWN)), B_down(vector<T>(ad.B_down), r_b, N, use(M, DOWN));
  const Small<E> up(U.data(), R, N, use(M, UP));
  const at::Tensor y0 = linear(x, op.weight, op.bias, {}, library);
  at::Tensor Z = at::empty({M, R}, x.options()), h = needs.any(B_DOWN) ? at::empty({M, N}, x.options()) : y0;
  const E* y = y0.const_data_ptr<E>();
  bottleneck<E>(
      Z, Mask<T>(op.mask, op.mask_scale), 2 * M * (r_a * K + r_b * N + R * N),
      [&](int64_t m, int64_t count, T* z) {
        const E* x_rows = drop.on() && r_a ? drop.rows(rows.row(m), rows.stride, m, count) : rows.row(m);
        if (r_a) A_down.down(x_rows, drop.on() ? K : rows.stride, count, vector<T>(ad.a_d), z, R);
        B_down.down(y + m * N, N, count, vector<T>(ad.b_d), z + r_a, R);
      },
      [&](int64_t m, int64_t count, const E* z) {
        up.up(z, R, count, row, y + m * N, N, h.mutable_data_ptr<E>() + m * N, N);
      });
  const bool wants_dU = needs.any(A_UP, B_UP, SCALE_A, SCALE_B);
  return {h, {needs.any(A_DOWN) ? x : at::Tensor(), wants_dU ? Z : at::Tensor(), needs.any(B_DOWN) ? y0 : at::Tensor()}};
}

// W0 + U D in 16 bits, for dx = G (W0 + U D). A pass over [N, K] costs less than one over [M, K] from so many times N rows
// on. In the backward nothing like b0 cancels G W0, so it is as exact as the naive layer's rounded G + dZ_b B_down.
constexpr int64_t ROWS_OVER_N = 2;

template <OfLow E>
at::Tensor rounded_effective_weight(const Adapters<float>& ad, const Rows<E>& W, const at::Tensor& weight, const at::Tensor& D) {
  const int64_t N = ad.N, R = ad.R, K = weight.size(1);
  at::Tensor out = at::empty({N, K}, weight.options().memory_format(at::MemoryFormat::Contiguous));
  const Buffer<float> U = ad.U();
  const Buffer<E> rows(N * R);
  for (int64_t n = 0; n < N; ++n)
    for (int64_t r = 0; r < R; ++r) rows.data()[n * R + r] = U.data()[n * padded(R) + r];
  const Small<E> up(vector<float>(D), R, K, UP);
  spread(N, 2 * R * N * K, [&](int64_t first, int64_t last) {
    constexpr int64_t BLOCK = 64;
    for (int64_t n = first; n < last; n += BLOCK)
      up.up(rows.data() + n * R, R, std::min(BLOCK, last - n), nullptr, W.row(n), W.stride,
            out.mutable_data_ptr<E>() + n * K, K);
  });
  return out;
}

// The gradients that follow from the sums of a sweep, except those of the down projections.
template <class T>
void from_sums(Gradients& grads, const at::Tensor& G, const Operands& op, const Adapters<T>& ad, Needs needs,
               const Sums<T>& sums) {
  const T *dU = sums.of(0) + sums.dU, *z = sums.z.data();
  const auto options = G.options().dtype(c10::CppTypeToScalarType<T>::value);
  const bool of_bias_a = ad.a_u.defined() && needs.any(SCALE_A), of_bias_b = ad.b_u.defined() && needs.any(SCALE_B);
  at::Tensor g;
  if (needs.any(BIAS, A_UP_BIAS, B_UP_BIAS) || of_bias_a || of_bias_b) g = at::sum(G, 0, false, c10::CppTypeToScalarType<T>::value);

  const auto branch = [&](Gradient up, Gradient scale, Gradient down_bias, Gradient up_bias, const at::Tensor& matrix,
                          const at::Tensor& bias, T s, int64_t first, int64_t ranks) {
    if (needs.any(up)) {
      grads[up] = at::empty({ad.N, ranks}, options);
      T* out = grads[up].template mutable_data_ptr<T>();
      if (sums.dU_r == 1) scaled_copy(dU + first, sums.dU_n, s, out, ranks, ad.N, ranks);
      else
        for (int64_t n = 0; n < ad.N; ++n)
          for (int64_t r = 0; r < ranks; ++r) out[n * ranks + r] = s * dU[n + (first + r) * sums.dU_r];
    }
    if (needs.any(scale)) {
      double total = 0;
      const T *values = vector<T>(matrix), *of_bias = vector<T>(bias), *sums_of_G = vector<T>(g);
      for (int64_t n = 0; n < ad.N; ++n)
        for (int64_t r = 0; r < ranks; ++r) total += dU[n * sums.dU_n + (first + r) * sums.dU_r] * values[n * ranks + r];
      for (int64_t n = 0; of_bias && n < ad.N; ++n) total += sums_of_G[n] * of_bias[n];
      const at::Tensor& operand = scale == SCALE_A ? op.scale_a.tensor : op.scale_b.tensor;
      grads[scale] = at::empty({}, operand.options()).fill_(total);
    }
    if (needs.any(down_bias)) {
      grads[down_bias] = at::empty({ranks}, options);
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

// dB_down [r_b, N] = T W0^T + z b0^T.
template <class E, class T = Sum<E>>
void through_W0(const T* T_rows, const T* z, const T* b0, int64_t r_b, const Rows<E>& W, int64_t N, int64_t K, T* out) {
  for (int64_t r = 0; b0 && r < r_b; ++r)
    for (int64_t n = 0; n < N; ++n) out[r * N + n] = z[r] * b0[n];
  const Small<E> small(T_rows, r_b, K, DOWN);
  spread(N, 2 * r_b * N * K, [&](int64_t first, int64_t last) {
    if constexpr (std::is_same_v<E, T>) {
      run(Dots<T>{r_b, last - first, K, T_rows, K, W.row(first), W.stride, b0 ? out + first : nullptr, N, out + first, N});
    } else {
      constexpr int64_t BLOCK = 64;
      const Buffer<T> block(BLOCK * r_b);
      for (int64_t n = first; n < last; n += BLOCK) {
        const int64_t count = std::min(BLOCK, last - n);
        small.down(W.row(n), W.stride, count, nullptr, block.data(), r_b);
        for (int64_t i = 0; i < count; ++i)
          for (int64_t r = 0; r < r_b; ++r) out[r * N + n + i] = (b0 ? out[r * N + n + i] : 0) + block.data()[i * r_b + r];
      }
    }
  });
}

template <class E, class T = Sum<E>>
Gradients backward_of(const at::Tensor& G_any, const Operands& op, const Saved& saved, Needs needs, Plan plan) {
  const Rows<E> G(G_any);
  const Adapters<T> ad(op, G.owner.size(1));
  const int64_t M = G.owner.size(0), N = ad.N, R = ad.R, r_a = ad.r_a, r_b = ad.r_b;
  const bool kept = plan.form == Form::kept, effective = plan.form == Form::effective;
  const Rows<E> x(saved[0]), y0(kept ? saved[2] : at::Tensor());
  const at::Tensor D = in<T>(effective ? saved[1] : kept ? at::Tensor() : saved[2]);
  const at::Tensor Z = own(effective ? at::Tensor() : saved[1]), d = own(effective ? saved[2] : at::Tensor());
  const int64_t K = x.owner.defined() ? x.owner.size(1) : op.weight.defined() ? op.weight.size(1) : 0;
  const Mask<T> mask(op.mask, op.mask_scale);
  const bool wants_dU = needs.any(A_UP, B_UP, SCALE_A, SCALE_B);
  const bool wants_dZ = needs.any(A_DOWN, B_DOWN, A_DOWN_BIAS, B_DOWN_BIAS) || (needs.any(X) && !effective) ||
                        (needs.any(BIAS) && r_b);
  const auto options = G.owner.options().dtype(c10::CppTypeToScalarType<T>::value);
  Gradients grads;

  Sweep<E> s{M, N, R, G.data, G.stride, wants_dZ};
  const bool in_E = std::is_same_v<E, T>;
  const Buffer<T> U = wants_dZ ? in_E ? ad.U() : ad.U_transposed() : Buffer<T>(0);
  const Small<E> U_t(U.data(), wants_dZ && !in_E ? R : 0, N, use(M, DOWN));
  s.U = U.data(), s.U_t = &U_t;
  s.mask = &mask, s.wants_dU = wants_dU, s.K = K, s.r_b = r_b;
  if (wants_dU && !effective) s.Z = vector<E>(Z);
  if constexpr (std::is_same_v<E, T>)
    if (wants_dU && effective) s.x = x.data, s.x_stride = x.stride, s.D = vector<T>(D), s.d = vector<T>(d);
  const InputDropout<E> drop(op, K);
  if (drop.on() && r_a) s.drop = &drop;
  // In the composed and the effective form dA_down and T are rows of one product, unless A_down reads another x.
  const bool both = !kept && !s.drop && needs.any(A_DOWN) && needs.any(B_DOWN);
  if (needs.any(A_DOWN)) s.a = {0, both ? R : r_a, K, x.data, x.stride};
  if (needs.any(B_DOWN) && kept) s.b = {r_a, r_b, N, y0.data, y0.stride};
  if (needs.any(B_DOWN) && !kept && !both) s.b = {r_a, r_b, K, x.data, x.stride};
  at::Tensor dx, dy0 = G.owner;
  const bool rowwise = op.mask.defined() || s.drop;  // dropout, which no weight can hold
  const bool through_sum = !std::is_same_v<E, T> && plan.form == Form::composed && !rowwise && M >= ROWS_OVER_N * N;
  const int64_t ranks = !needs.any(X) || effective || through_sum ? 0 : kept || s.drop ? r_a : R;
  const at::Tensor scaled = s.drop ? scaled_A_down(ad, drop) : ad.A_down;
  const Small<E> onto_dx(ranks ? vector<T>(kept || s.drop ? scaled : D) : nullptr, ranks, K, use(M, UP));
  const int64_t ranks_b = ranks && s.drop && !kept ? r_b : 0;
  const Small<E> onto_dx_b(ranks_b ? vector<T>(D) + r_a * K : nullptr, ranks_b, K, use(M, UP));
  if (ranks_b) s.onto_dx_b = &onto_dx_b;
  const Small<E> B_down(needs.any(X) && kept ? vector<T>(ad.B_down) : nullptr, needs.any(X) && kept ? r_b : 0, N, use(M, UP));
  if (needs.any(X) && kept) dy0 = at::empty({M, N}, G.owner.options()), s.B_down = &B_down, s.dy0 = dy0.mutable_data_ptr<E>();
  if (ranks) dx = at::empty({M, K}, G.owner.options()), s.onto_dx = &onto_dx, s.dx = dx.mutable_data_ptr<E>();
  const Sums<T> sums = wants_dU || wants_dZ ? sweep(s) : Sums<T>(s, 1);
  from_sums(grads, G.owner, op, ad, needs, sums);
  if (needs.any(A_DOWN)) {
    grads[A_DOWN] = at::empty({r_a, K}, options);
    T* out = grads[A_DOWN].template mutable_data_ptr<T>();
    const T scale = s.drop ? static_cast<T>(drop.scale()) : T(1);
    for (int64_t e = 0; e < r_a * K; ++e) out[e] = scale * sums.of(0)[sums.a + e];
  }
  if (needs.any(B_DOWN)) {
    grads[B_DOWN] = at::empty({r_b, N}, options);
    T *out = grads[B_DOWN].template mutable_data_ptr<T>(), *rows = sums.of(0) + (both ? sums.a + r_a * K : sums.b);
    if (kept) std::copy_n(rows, r_b * N, out);
    else through_W0<E>(rows, sums.z.data() + r_a, vector<T>(ad.b0), r_b, Rows<E>(op.weight), N, K, out);
  }
  if (needs.any(X)) {
    if constexpr (std::is_same_v<E, T>)
      if (effective) {
        dx = times_weight(G.owner, effective_weight(ad, Rows<T>(op.weight), op.weight, D), {}, plan.library);
      }
    if constexpr (!std::is_same_v<E, T>)
      if (through_sum) dx = times_weight(dy0, rounded_effective_weight(ad, Rows<E>(op.weight), op.weight, D), {}, plan.library);
    if (!effective && !through_sum) dx = times_weight(dy0, op.weight, dx, plan.library);
    grads[X] = dx;
  }
  if constexpr (!std::is_same_v<E, T>)  // each gradient in its operand's dtype
    each_operand([&](Gradient i, const auto& operand) {
      if constexpr (!is_number<decltype(operand)>)
        if (grads[i].defined()) grads[i] = grads[i].to(i == BIAS ? G.owner.scalar_type() : tensor_of(operand).scalar_type());
    }, op);
  return grads;
}

template <class E>
Forward forward_of(const at::Tensor& x, const Operands& op, Needs needs, Plan plan) {
  const Adapters<Sum<E>> ad(op, op.weight.size(0));
  if constexpr (std::is_same_v<E, Sum<E>>)
    if (plan.form == Form::effective) return effective_forward<E>(x, op, needs, ad, plan.library);
  if (plan.form == Form::composed) return composed_forward<E>(x, op, needs, ad, plan.library);
  return kept_forward<E>(x, op, needs, ad, plan.library);
}

}  // namespace

Forward forward(const at::Tensor& x, const Operands& op, Needs needs, Plan plan) {
  switch (x.scalar_type()) {
    case at::kDouble: return forward_of<double>(x, op, needs, plan);
    case at::kBFloat16: return forward_of<c10::BFloat16>(x, op, needs, plan);
    case at::kHalf: return forward_of<c10::Half>(x, op, needs, plan);
    default: return forward_of<float>(x, op, needs, plan);
  }
}

Gradients backward(const at::Tensor& G, const Operands& op, const Saved& saved, Needs needs, Plan plan) {
  switch (G.scalar_type()) {
    case at::kDouble: return backward_of<double>(G, op, saved, needs, plan);
    case at::kBFloat16: return backward_of<c10::BFloat16>(G, op, saved, needs, plan);
    case at::kHalf: return backward_of<c10::Half>(G, op, saved, needs, plan);
    default: return backward_of<float>(G, op, saved, needs, plan);
  }
}

}  // namespace hydra::cpu
