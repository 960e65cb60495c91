#include "few_rows.h"

#include <ATen/ops/empty.h>

#include "adapters.h"
#include "small.h"

namespace hydra::cpu {
namespace {

constexpr int64_t DEPTH = 256;    // length of a block of sums: a panel of it stays in the L1 cache
constexpr int64_t COLUMNS = 128;  // of W0 that are packed at a time: DEPTH x COLUMNS stays in the L2 cache
constexpr int64_t W0_ROWS = 96;   // whose sums are kept at a time; whole tiles
constexpr int64_t X_ROWS = 128;   // that are packed at a time
constexpr int64_t G_ROWS = 1024;  // whose sums are kept at a time, of COLUMNS
constexpr int64_t BY_DOTS = 8;    // rows of x up to which dots, which pack nothing, are faster

int64_t up_to_lanes(int64_t columns) { return (columns + lanes() - 1) / lanes() * lanes(); }

// [rows, columns] of v in fp32, where they stand or widened into `room`.
template <class E>
const float* in_fp32(const E* v, int64_t& stride, int64_t rows, int64_t columns, float* room) {
  if constexpr (std::is_same_v<E, float>) return v;
  else {
    run(Widen{LOW<E>, rows, columns, bits(v), stride, room, columns});
    stride = columns;
    return room;
  }
}

// out = sums + row + base, where row [columns] and base may be null and base may be out.
template <class E>
void store(int64_t rows, int64_t columns, const float* sums, int64_t ld_sums, const float* row, const E* base, E* out, int64_t ld) {
  if constexpr (std::is_same_v<E, float>) {
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t c = 0; c < columns; ++c)
        out[m * ld + c] = sums[m * ld_sums + c] + (row ? row[c] : 0) + (base ? base[m * ld + c] : 0);
  } else {
    run(Narrow{LOW<E>, rows, columns, sums, ld_sums, row, bits(base), ld, bits(out), ld});
  }
}

// Calls then(first, count, sums [count, ld], ld) for blocks of W0's rows [first, first + count), with sums = W0 x^T.
template <class E, class Then>
void by_dots(const float* x, int64_t M, const Rows<E>& W, int64_t K, int64_t first, int64_t last, const Then& then) {
  const Small<E> small(x, M, K, 0);
  float* sums = Scratch<float, 5>::of(W0_ROWS * M);
  for (int64_t n = first; n < last; n += W0_ROWS) {
    const int64_t count = std::min(W0_ROWS, last - n);
    small.down(W.row(n), W.stride, count, nullptr, sums, M);
    then(n, count, sums, M);
  }
}

template <class E, class Then>
void by_panels(const float* packed, int64_t M, const Rows<E>& W, int64_t K, int64_t first, int64_t last, const Then& then) {
  const int64_t ld = up_to_lanes(M);
  float *sums = Scratch<float, 5>::of(W0_ROWS * ld), *room = Scratch<float, 6>::of(W0_ROWS * DEPTH);
  for (int64_t n = first; n < last; n += W0_ROWS) {
    const int64_t count = std::min(W0_ROWS, last - n);
    int64_t k = 0;
    do {  // at least once: an empty sum must be written too
      const int64_t depth = std::min(DEPTH, K - k);
      int64_t stride = W.stride;
      const float* left = in_fp32(W.row(n) + k, stride, count, depth, room);
      run(Panels{count, M, depth, left, stride, std::is_same_v<E, float>, packed + k * ld, k > 0, sums, ld});
      k += DEPTH;
    } while (k < K);
    then(n, count, sums, ld);
  }
}

template <class E>
at::Tensor linear_in(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& onto) {
  const int64_t N = weight.size(0), K = weight.size(1);
  const at::Tensor out = onto.defined() ? onto : at::empty({x.size(0), N}, x.options());
  const at::Tensor row = in<float>(bias);
  const at::Tensor all = in<float>(x);
  const Rows<E> W(weight);
  const int64_t blocks = (x.size(0) + X_ROWS - 1) / X_ROWS;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t m = x.size(0) * block / blocks, M = x.size(0) * (block + 1) / blocks - m;
    const float* rows = all.const_data_ptr<float>() + m * K;
    E* to = out.mutable_data_ptr<E>() + m * N;
    const auto then = [&](int64_t n, int64_t count, const float* sums, int64_t ld) {
      float* turned = Scratch<float, 7>::of(M * W0_ROWS);
      for (int64_t i = 0; i < M; ++i)
        for (int64_t j = 0; j < count; ++j) turned[i * W0_ROWS + j] = sums[j * ld + i];
      store(M, count, turned, W0_ROWS, row.defined() ? row.const_data_ptr<float>() + n : nullptr, onto.defined() ? to + n : nullptr,
            to + n, N);
    };
    const int64_t flops = 2 * M * N * K;
    if (M <= BY_DOTS) {
      spread(N, flops, [&](int64_t first, int64_t last) { by_dots(rows, M, W, K, first, last, then); });
      continue;
    }
    const Buffer<float> packed(K * up_to_lanes(M));
    spread((K + DEPTH - 1) / DEPTH, M * K, [&](int64_t first, int64_t last) {
      for (int64_t k = first * DEPTH; k < std::min(K, last * DEPTH); k += DEPTH)
        run(Pack{std::min(DEPTH, K - k), M, rows + k, 1, K, packed.data() + k * up_to_lanes(M)});
    });
    spread(N, flops, [&](int64_t first, int64_t last) { by_panels(packed.data(), M, W, K, first, last, then); });
  }
  return out;
}

template <class E>
at::Tensor times_weight_in(const at::Tensor& G, const at::Tensor& weight, const at::Tensor& onto) {
  const int64_t N = weight.size(0), K = weight.size(1), panel = 2 * lanes();
  const at::Tensor out = onto.defined() ? onto : at::empty({G.size(0), K}, G.options());
  const at::Tensor rows = in<float>(G);
  const Rows<E> W(weight);
  for (int64_t m = 0; m < G.size(0); m += G_ROWS) {
    const int64_t M = std::min(G_ROWS, G.size(0) - m);
    const float* left = rows.const_data_ptr<float>() + m * N;
    E* to = out.mutable_data_ptr<E>() + m * K;
    spread((K + panel - 1) / panel, 2 * M * N * K, [&](int64_t first, int64_t last) {
      float *packed = Scratch<float, 5>::of(DEPTH * COLUMNS), *room = Scratch<float, 6>::of(DEPTH * COLUMNS);
      float* sums = Scratch<float, 7>::of(M * COLUMNS);
      const int64_t end = std::min(K, last * panel);
      for (int64_t k = first * panel; k < end; k += COLUMNS) {
        const int64_t count = std::min(COLUMNS, end - k);
        int64_t n = 0;
        do {  // at least once: an empty sum must be written too
          const int64_t depth = std::min(DEPTH, N - n);
          int64_t stride = W.stride;
          const float* right = in_fp32(W.row(n) + k, stride, depth, count, room);
          run(Pack{depth, count, right, stride, 1, packed});
          run(Panels{M, count, depth, left + n, N, false, packed, n > 0, sums, COLUMNS});
          n += DEPTH;
        } while (n < N);
        store(M, count, sums, COLUMNS, static_cast<const float*>(nullptr), onto.defined() ? to + k : nullptr, to + k, K);
      }
    });
  }
  return out;
}

}  // namespace

at::Tensor linear_of_few_rows(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& onto) {
  switch (x.scalar_type()) {
    case at::kBFloat16: return linear_in<c10::BFloat16>(x, weight, bias, onto);
    case at::kHalf: return linear_in<c10::Half>(x, weight, bias, onto);
    default: return linear_in<float>(x, weight, bias, onto);
  }
}

at::Tensor few_rows_times_weight(const at::Tensor& G, const at::Tensor& weight, const at::Tensor& onto) {
  switch (G.scalar_type()) {
    case at::kBFloat16: return times_weight_in<c10::BFloat16>(G, weight, onto);
    case at::kHalf: return times_weight_in<c10::Half>(G, weight, onto);
    default: return times_weight_in<float>(G, weight, onto);
  }
}

}  // namespace hydra::cpu
