// The adapters of a call as the CPU forms read them: U, u, C, D, d and W0 + U D of forms.cpp.
#pragma once

#include <ATen/ops/empty.h>

#include "../operands.h"
#include "sweep.h"

namespace hydra::cpu {

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

// The adapters, contiguous and in the dtype of the arithmetic; U is made where it is needed.
template <class T>
struct Adapters {
  int64_t N, r_a, r_b, R;
  at::Tensor A_down, A_up, B_down, B_up, a_d, a_u, b_d, b_u, b0;
  T s_a, s_b;

  explicit Adapters(const Operands& op, int64_t N)
      : N(N), r_a(op.r_a()), r_b(op.r_b()), R(r_a + r_b), A_down(in<T>(op.A_down)), A_up(in<T>(op.A_up)),
        B_down(in<T>(op.B_down)), B_up(in<T>(op.B_up)), a_d(in<T>(op.A_down_bias)), a_u(in<T>(op.A_up_bias)),
        b_d(in<T>(op.B_down_bias)), b_u(in<T>(op.B_up_bias)), b0(in<T>(op.bias)), s_a(number<T>(op.scale_a)),
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
template <class E, class T = Sum<E>>
std::pair<at::Tensor, at::Tensor> stacked_down(const Adapters<T>& ad, const Rows<E>& W, int64_t K) {
  if (!ad.r_b) return {ad.A_down, ad.a_d};
  const at::Tensor& like = ad.B_down;
  at::Tensor D = at::empty({ad.R, K}, like.options()), d;
  T* rows = D.mutable_data_ptr<T>();
  if (ad.r_a) std::copy_n(vector<T>(ad.A_down), ad.r_a * K, rows);
  T* C = rows + ad.r_a * K;
  const Left<E> B_down(vector<T>(ad.B_down), ad.r_b, ad.N);
  spread(K, 2 * ad.r_b * ad.N * K, [&](int64_t first, int64_t last) { B_down.times(W.data, W.stride, first, last, C, K); });
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

}  // namespace hydra::cpu
