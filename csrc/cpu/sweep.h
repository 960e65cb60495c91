// One sweep over the rows of a backward, block by block, so that G, x and y0 are read from memory only once for all
// products with a side of R.
//
//   dZ = mask * (G U) [M, R]    dU = G^T Z [N, R]    z = sum_m dZ [R]
//   composed:   Z is given                          dD = dZ^T x [R, K]    dx so far = dZ D
//   effective:  Z = x D^T + d is computed again     dD = dZ^T x [R, K]
//   kept:       Z is given, dA_down = dZ_a^T x, dB_down = dZ_b^T y0    dy0 = G + dZ_b B_down    dx so far = dZ_a A_down
//
// Each thread takes consecutive blocks and has sums of its own. At the end they are added in the order of the threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>

#include "memory.h"
#include "products.h"

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
    owner = own(mask);
    if (owner.scalar_type() == at::kBool) flags = owner.const_data_ptr<bool>();
    else values = owner.const_data_ptr<T>();
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
template <class T>
struct Down {
  int64_t first = 0, ranks = 0, width = 0;
  const T* v = nullptr;
  int64_t v_stride = 0;
};

// R as the sweep stores it: rounded up to whole vectors; the extra ranks are zero.
inline int64_t padded(int64_t R) { return (R + 7) / 8 * 8; }

template <class T>
struct Sweep {
  int64_t M, N, R;
  const T* G;
  int64_t G_stride;
  const T* U = nullptr;  // [N, padded(R)]; null where dZ is not wanted
  const Mask<T>* mask = nullptr;
  bool wants_dU = false;
  const T* Z = nullptr;              // [M, R], or null: then it is computed from the next four
  const T *x = nullptr, *D = nullptr, *d = nullptr;  // [M, K], [R, K], [R] or null
  int64_t x_stride = 0, K = 0;
  Down<T> a, b;  // a.ranks = 0 where dA_down is not wanted, and so on
  const T* B_down = nullptr;  // [r_b, N], where dy0 is wanted; r_b are the last ranks
  T* dy0 = nullptr;           // [M, N]
  int64_t r_b = 0;
  const T* E = nullptr;  // [R_E, K]: dx so far = dZ[:, :R_E] E, where wanted
  T* dx = nullptr;       // [M, K]
  int64_t R_E = 0;
};

// What a sweep sums, for each thread: dU [N, padded(R)], the products a and b, and z [R], at these offsets.
template <class T>
struct Sums {
  int64_t dU, a, b, z, size, threads;
  Buffer<T> memory;

  T* of(int64_t thread) const { return memory.data() + thread * size; }
  // Adds the sums of all threads to those of the first, which are the result.
  void reduce() const {
    if (threads == 1) return;
    at::parallel_for(0, size, 1 << 14, [&](int64_t begin, int64_t end) {
      for (int64_t t = 1; t < threads; ++t)
        for (int64_t e = begin; e < end; ++e) memory.data()[e] += memory.data()[t * size + e];
    });
  }
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
    for (int64_t t = begin; t < end; ++t) f(std::min(items, t * share), std::min(items, (t + 1) * share));
  });
}

template <class T>
void sweep_block(const Sweep<T>& s, int64_t row, int64_t rows, int64_t ahead, bool first, T* Z, T* dZ, T* sums, const Sums<T>& at) {
  const int64_t R = s.R, stride = padded(R);
  const T* G = s.G + row * s.G_stride;
  const auto onto = [&](T* out) { return first ? nullptr : out; };
  if (s.wants_dU) {
    if (s.Z)
      for (int64_t m = 0; m < rows; ++m) std::copy_n(s.Z + (row + m) * R, R, Z + m * stride);
    else
      run(Dots<T>{rows, R, s.K, s.x + row * s.x_stride, s.x_stride, s.D, s.K, s.d, 0, Z, stride});
    T* dU = sums + at.dU;
    run(Combine<T>{s.N, stride, rows, G, s.G_stride, 1, Z, stride, onto(dU), stride, dU, stride, ahead * s.G_stride, 0});
  }
  if (!s.U) return;
  run(Combine<T>{rows, stride, s.N, G, 1, s.G_stride, s.U, stride, nullptr, 0, dZ, stride});
  s.mask->apply(dZ, stride, row, rows, R);
  T* z = sums + at.z;
  for (int64_t r = 0; r < R; ++r) {
    T total = 0;
    for (int64_t m = 0; m < rows; ++m) total += dZ[m * stride + r];
    z[r] = first ? total : z[r] + total;
  }
  for (auto [down, offset] : {std::pair(&s.a, at.a), std::pair(&s.b, at.b)}) {
    T* out = sums + offset;
    if (down->ranks)
      run(Combine<T>{down->ranks, down->width, rows, dZ + down->first, stride, 1, down->v + row * down->v_stride,
                     down->v_stride, onto(out), down->width, out, down->width, 0, ahead * down->v_stride});
  }
  if (s.dy0)
    run(Combine<T>{rows, s.N, s.r_b, dZ + R - s.r_b, 1, stride, s.B_down, s.N, G, s.G_stride, s.dy0 + row * s.N, s.N});
  if (s.dx) run(Combine<T>{rows, s.K, s.R_E, dZ, 1, stride, s.E, s.K, nullptr, 0, s.dx + row * s.K, s.K});
}

template <class T>
Sums<T> sweep(const Sweep<T>& s) {
  const int64_t width = s.N + std::max(s.K, std::max(s.a.width, s.b.width));
  const int64_t threads = threads_for(8 * s.M * width * s.R, s.M);
  Sums<T> at{0, s.N * padded(s.R) * s.wants_dU, 0, 0, 0, threads, Buffer<T>(0)};
  at.b = at.a + s.a.ranks * s.a.width;
  at.z = at.b + s.b.ranks * s.b.width;
  at.size = (at.z + s.R + 15) / 16 * 16;
  at.memory = Buffer<T>(at.size * threads);
  // Blocks of x and G that fit into the L2 cache.
  const int64_t block = std::clamp<int64_t>((256 << 10) / (std::max<int64_t>(width, 1) * sizeof(T)), 8, 32) / 8 * 8;
  const int64_t rows_of_thread = (s.M + threads - 1) / threads;
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    Buffer<T> Z(block * padded(s.R)), dZ(block * padded(s.R));
    std::fill_n(Z.data(), block * padded(s.R), T(0));
    for (int64_t t = begin; t < end; ++t) {
      const int64_t last = std::min(s.M, (t + 1) * rows_of_thread);
      const int64_t begin_row = std::min(s.M, t * rows_of_thread);
      int64_t row = begin_row;
      do {  // at least once: sums over no rows must be written too
        const int64_t rows = std::max<int64_t>(0, std::min(block, last - row));
        sweep_block(s, row, rows, row + 2 * block <= last ? block : 0, row == begin_row, Z.data(), dZ.data(), at.of(t), at);
        row += block;
      } while (row < last);
    }
  });
  at.reduce();
  return at;
}

}  // namespace hydra::cpu
