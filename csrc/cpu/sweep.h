// One sweep over the rows of a backward, block by block, so that G, x and y0 are read from memory only once for all
// products with a side of R. E is the dtype of these matrices, T = Sum<E> that of the arithmetic.
//
//   dZ = mask * (G U) [M, R]    dU = G^T Z [N, R]    z = sum_m dZ [R]
//   composed:   Z is given                          dD = dZ^T x [R, K]    dx so far = dZ D
//   effective:  Z = x D^T + d is computed again     dD = dZ^T x [R, K]
//   kept:       Z is given, dA_down = dZ_a^T x, dB_down = dZ_b^T y0    dy0 = G + dZ_b B_down    dx so far = dZ_a A_down
//
// Each thread takes consecutive blocks and has sums of its own. At the end they are added in the order of the threads.
// Where these sums would take more memory than they save (many threads, few rows), there is one set of them instead: first
// each thread computes dZ, dy0 and dx of its rows, then the sums of its columns over all rows.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>

#include "input_dropout.h"

namespace hydra::cpu {

// The dropout mask [M, R]: booleans with the scale 1/(1-p), or values that are scaled already.
template <class T>
struct Mask {
  at::Tensor owner;
  const bool* flags = nullptr;
  const T* values = nullptr;
  T scale = 1;

  Mask(const at::Tensor& mask, double mask_scale) : scale(static_cast<T>(mask_scale)) {
    if (!mask.defined()) return;
    if (mask.scalar_type() == at::kBool) owner = own(mask), flags = owner.const_data_ptr<bool>();
    else owner = in<T>(mask), values = owner.const_data_ptr<T>();
  }
  // Z holds the rows [row, row + rows) of an [M, R] matrix, `stride` elements apart.
  void apply(T* Z, int64_t stride, int64_t row, int64_t rows, int64_t R) const {
    if (!flags && !values) return;
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t r = 0; r < R; ++r) {
        const int64_t e = (row + m) * R + r;
        Z[m * stride + r] *= flags ? (flags[e] ? scale : T(0)) : values[e] * scale;
      }
  }
};

// One product dZ'^T v of the sweep: dZ' is columns [first, first + ranks) of dZ, and v is [M, width].
template <class E>
struct Down {
  int64_t first = 0, ranks = 0, width = 0;
  const E* v = nullptr;
  int64_t v_stride = 0;
};

// R as the sweep stores it: rounded up to whole vectors; the extra ranks are zero.
inline int64_t padded(int64_t R) { return (R + 7) / 8 * 8; }

template <class E>
struct Sweep {
  using T = Sum<E>;
  int64_t M, N, R;
  const E* G;
  int64_t G_stride;
  bool wants_dZ = false;
  const T* U = nullptr;           // [N, padded(R)], where dZ is wanted; in 16 bits the next one
  const Small<E>* U_t = nullptr;  // [R, N]
  const Mask<T>* mask = nullptr;
  bool wants_dU = false;
  const E* Z = nullptr;              // [M, R], or null: then it is computed from the next four
  const E *x = nullptr, *D = nullptr, *d = nullptr;  // [M, K], [R, K], [R] or null
  int64_t x_stride = 0, K = 0;
  Down<E> a, b;  // a.ranks = 0 where dA_down is not wanted, and so on
  const Small<E>* B_down = nullptr;  // [r_b, N], where dy0 is wanted; r_b are the last ranks
  E* dy0 = nullptr;                  // [M, N]
  int64_t r_b = 0;
  const Small<E>* onto_dx = nullptr;  // [ranks, K]: dx so far = dZ[:, :ranks] times it, where wanted
  E* dx = nullptr;                    // [M, K]
  // With input dropout a is of x', onto_dx is A_down with its scale, masked in dx, and the last r_b ranks are apart.
  const InputDropout<E>* drop = nullptr;
  const Small<E>* onto_dx_b = nullptr;  // C [r_b, K], or null
};

constexpr int64_t FLOPS_OF_A_THREAD = 1 << 18;  // with fewer, waking a thread costs more than it saves

// The number of threads for so many operations on so many items.
inline int64_t threads_for(int64_t flops, int64_t items) {
  const int64_t most = std::min<int64_t>(at::get_num_threads(), std::max<int64_t>(items, 1));
  return std::clamp<int64_t>(flops / FLOPS_OF_A_THREAD, 1, most);
}

// Runs f(first, last) on every thread's share of the items.
template <class F>
void spread(int64_t items, int64_t flops, const F& f) {
  const int64_t threads = threads_for(flops, items), share = (items + threads - 1) / threads;
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    const MatrixUnits released;
    for (int64_t t = begin; t < end; ++t) f(std::min(items, t * share), std::min(items, (t + 1) * share));
  });
}

// What a sweep sums: dU, with element (n, r) at dU + n dU_n + r dU_r, and the products a and b, for each copy; and z [R] for
// each thread.
template <class T>
struct Sums {
  int64_t dU, dU_n, dU_r, a, b, size, copies, R, threads;
  Buffer<T> memory, z;

  template <class E>
  Sums(const Sweep<E>& s, int64_t threads)
      : dU(0), dU_n(std::is_same_v<E, T> ? padded(s.R) : 1), dU_r(std::is_same_v<E, T> ? 1 : s.N),
        a(s.wants_dU ? s.N * (std::is_same_v<E, T> ? dU_n : s.R) : 0), b(a + s.a.ranks * s.a.width),
        size((b + s.b.ranks * s.b.width + 15) / 16 * 16), copies(threads), R(s.R), threads(threads), memory(0), z(threads * s.R) {
    const int64_t matrices = s.M * (s.N + std::max(s.K, s.a.width));  // elements of G and x
    if (threads * size > std::max<int64_t>(matrices, 1 << 20)) copies = 1;
    memory = Buffer<T>(copies * size);
  }
  T* of(int64_t copy) const { return memory.data() + copy * size; }
  // Adds the sums of all threads to those of the first, which are the result.
  void reduce() const {
    for (int64_t t = 1; t < threads; ++t)
      for (int64_t r = 0; r < R; ++r) z.data()[r] += z.data()[t * R + r];
    if (copies == 1) return;
    at::parallel_for(0, size, 1 << 14, [&](int64_t begin, int64_t end) {
      for (int64_t t = 1; t < copies; ++t)
        for (int64_t e = begin; e < end; ++e) memory.data()[e] += memory.data()[t * size + e];
    });
  }
};

// Z and dZ of a block, in rows of padded(R); z, dy0 and dx.
template <class E, class T = Sum<E>>
void sweep_rows(const Sweep<E>& s, int64_t row, int64_t rows, bool first, T* Z, T* dZ, T* z) {
  const int64_t R = s.R, stride = padded(R);
  const E* G = s.G + row * s.G_stride;
  if (s.wants_dU && s.Z)
    for (int64_t m = 0; m < rows; ++m) std::copy_n(s.Z + (row + m) * R, R, Z + m * stride);
  else if constexpr (std::is_same_v<E, T>)
    if (s.wants_dU) run(Dots<T>{rows, R, s.K, s.x + row * s.x_stride, s.x_stride, s.D, s.K, s.d, 0, Z, stride});
  if (!s.wants_dZ) return;
  if constexpr (std::is_same_v<E, T>) run(Combine<T>{rows, stride, s.N, G, 1, s.G_stride, s.U, stride, nullptr, 0, dZ, stride});
  else s.U_t->down(G, s.G_stride, rows, nullptr, dZ, stride);
  s.mask->apply(dZ, stride, row, rows, R);
  E* rounded = Scratch<E, 0>::of(rows * R);  // dZ as all products read it, so that db0's and dB_down's parts cancel as they must
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t r = 0; r < R; ++r) dZ[m * stride + r] = rounded[m * R + r] = dZ[m * stride + r];
  for (int64_t r = 0; r < R; ++r) {
    T total = 0;
    for (int64_t m = 0; m < rows; ++m) total += dZ[m * stride + r];
    z[r] = first ? total : z[r] + total;
  }
  if (s.dy0) s.B_down->up(rounded + R - s.r_b, R, rows, nullptr, G, s.G_stride, s.dy0 + row * s.N, s.N);
  if (!s.dx) return;
  E* dx = s.dx + row * s.K;
  s.onto_dx->up(rounded, R, rows, nullptr, nullptr, 0, dx, s.K);
  if (!s.drop) return;
  s.drop->apply(dx, s.K, row, rows, 0, s.K, dx, s.K);
  if (s.onto_dx_b) s.onto_dx_b->up(rounded + R - s.r_b, R, rows, nullptr, dx, s.K, dx, s.K);
}

// Share `part` of `parts` of the columns.
struct Share {
  int64_t part, parts;
  int64_t first(int64_t columns) const { return columns * part / parts; }
  int64_t last(int64_t columns) const { return columns * (part + 1) / parts; }
};

// dU and the products a and b of a block, for a share of their columns.
template <class E, class T = Sum<E>>
void sweep_sums(const Sweep<E>& s, int64_t row, int64_t rows, int64_t ahead, bool first, Share share, const T* Z, const T* dZ,
                T* sums, const Sums<T>& at) {
  const int64_t stride = padded(s.R);
  const E* G = s.G + row * s.G_stride;
  const auto products = [&](const auto& visit) {
    for (auto [product, offset] : {std::pair(&s.a, at.a), std::pair(&s.b, at.b)}) {
      if (!product->ranks) continue;
      Down<E> down = *product;
      const int64_t begin = share.first(down.width), end = share.last(down.width);
      const E* v = down.v + row * down.v_stride;
      if (s.drop && product == &s.a) {
        E* masked = Scratch<E, 4>::of(rows * down.width);
        s.drop->apply(v, down.v_stride, row, rows, begin, end, masked, down.width);
        v = masked, down.v_stride = down.width;
      }
      visit(down, v, begin, end, sums + offset);
    }
  };
  if constexpr (std::is_same_v<E, T>) {
    const auto onto = [&](T* out) { return first ? nullptr : out; };
    if (s.wants_dU) {
      const int64_t begin = share.first(s.N), end = share.last(s.N);
      T* dU = sums + at.dU + begin * stride;
      run(Combine<T>{end - begin, stride, rows, G + begin, s.G_stride, 1, Z, stride, onto(dU), stride, dU, stride,
                     ahead * s.G_stride, 0});
    }
    products([&](const Down<E>& down, const E* v, int64_t begin, int64_t end, T* out) {
      run(Combine<T>{down.ranks, end - begin, rows, dZ + down.first, stride, 1, v + begin, down.v_stride, onto(out + begin),
                     down.width, out + begin, down.width, 0, s.drop ? 0 : ahead * down.v_stride});
    });
  } else {
    const int64_t ld = outer_rows(rows);
    E* left = Scratch<E, 0>::of(s.R * ld);
    const auto transpose = [&](const T* in) {
      for (int64_t r = 0; r < s.R; ++r)
        for (int64_t m = 0; m < ld; ++m) left[r * ld + m] = m < rows ? in[m * stride + r] : T(0);
    };
    if (s.wants_dU) {
      transpose(Z);
      outer(left, ld, s.R, G, s.G_stride, rows, share.first(s.N), share.last(s.N), !first, sums + at.dU, s.N);
    }
    if (s.a.ranks || s.b.ranks) transpose(dZ);
    products([&](const Down<E>& down, const E* v, int64_t begin, int64_t end, T* out) {
      outer(left + down.first * ld, ld, down.ranks, v, down.v_stride, rows, begin, end, !first, out, down.width);
    });
  }
}

template <class E, class T = Sum<E>>
Sums<T> sweep(const Sweep<E>& s) {
  const int64_t width = s.N + std::max(s.K, std::max(s.a.width, s.b.width)), stride = padded(s.R);
  const int64_t threads = threads_for(8 * s.M * width * s.R, s.M);
  Sums<T> at(s, threads);
  // Blocks of x and G that fit into the L2 cache. Matrix units want more rows, since each block reads and writes the sums.
  const bool widens = std::is_same_v<E, T>;
  const int64_t least = widens ? 8 : 32, most = widens ? 32 : 128, bytes = widens ? 256 << 10 : 1 << 20;
  const int64_t block = std::clamp<int64_t>(bytes / (std::max<int64_t>(width, 1) * sizeof(E)), least, most) / least * least;
  const int64_t rows_of_thread = (s.M + threads - 1) / threads;
  const bool shared = at.copies < threads;
  const Buffer<T> all(shared ? 2 * s.M * stride : 0);
  // Runs f(row, rows, whether another whole block follows) on the blocks of [begin, end); at least once: sums over no rows
  // must be written too.
  const auto blocks = [&](int64_t begin, int64_t end, const auto& f) {
    int64_t row = begin;
    do {
      f(row, std::max<int64_t>(0, std::min(block, end - row)), row + 2 * block <= end);
      row += block;
    } while (row < end);
  };
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    const MatrixUnits released;
    const Buffer<T> own_Z(block * stride), own_dZ(block * stride);
    std::fill_n(own_Z.data(), block * stride, T(0));  // the extra ranks
    for (int64_t t = begin; t < end; ++t) {
      const int64_t first = std::min(s.M, t * rows_of_thread), last = std::min(s.M, first + rows_of_thread);
      blocks(first, last, [&](int64_t row, int64_t rows, bool more) {
        T *Z = own_Z.data(), *dZ = own_dZ.data();
        if (shared) Z = all.data() + row * stride, dZ = Z + s.M * stride, std::fill_n(Z, rows * stride, T(0));
        sweep_rows(s, row, rows, row == first, Z, dZ, at.z.data() + t * s.R);
        if (!shared) sweep_sums(s, row, rows, more ? block : 0, row == first, {0, 1}, Z, dZ, at.of(t), at);
      });
    }
  });
  if (shared)
    at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      const MatrixUnits released;
      for (int64_t t = begin; t < end; ++t)
        blocks(0, s.M, [&](int64_t row, int64_t rows, bool more) {
          const T* Z = all.data() + row * stride;
          sweep_sums(s, row, rows, more ? block : 0, row == 0, {t, threads}, Z, Z + s.M * stride, at.of(0), at);
        });
    });
  at.reduce();
  return at;
}

}  // namespace hydra::cpu
