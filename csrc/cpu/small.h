// Products of blocks of rows with a small operand S [R, columns]. E is the dtype of the rows, Sum<E> that of S and of sums.
//
//   down    out[m, r] = base[r] + sum_c v[m, c] S[r, c]                 Z = x D^T + d, dZ = G U, (dB_down)^T = W0 T^T
//   up      out[m, c] = base[m, c] + row[c] + sum_r Z[m, r] S[r, c]     Z U^T, dZ D, dy0 = G + dZ_b B_down
//   outer   out[r, c] += sum_m Z[m, r] v[m, c]                          dU^T, dD, C
//
// float and double go to products.h. bf16 goes to matrix units (AMX, AVX512-BF16) where torch's oneDNN has kernels for them,
// with S as hi + lo, two bf16 numbers, so that S counts as if it were fp32. Elsewhere, and for fp16, blocks are widened to
// fp32.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <optional>
#include <type_traits>
#include <vector>

#include "memory.h"
#include "products.h"

namespace hydra::cpu {

template <class E>
concept OfLow = std::is_same_v<E, c10::BFloat16> || std::is_same_v<E, c10::Half>;

template <class E>
using Sum = std::conditional_t<OfLow<E>, float, E>;

template <OfLow E>
constexpr Low LOW = std::is_same_v<E, c10::Half> ? Low::fp16 : Low::bf16;
template <OfLow E>
const uint16_t* bits(const E* p) { return reinterpret_cast<const uint16_t*>(p); }
template <OfLow E>
uint16_t* bits(E* p) { return reinterpret_cast<uint16_t*>(p); }

// Whether this processor, this torch and its settings (torch.backends.mkldnn, ONEDNN_MAX_CPU_ISA) have matrix units.
bool has_matrix_units();

// A thread that has used matrix units gives their registers back at the end, as torch's own loops do.
struct MatrixUnits {
  ~MatrixUnits();
};

// Scratch memory of a thread, which grows and stays; each WHICH is another.
template <class T, int WHICH>
struct Scratch {
  static T* of(int64_t size) {
    thread_local std::vector<T> memory;
    if (static_cast<int64_t>(memory.size()) < size) memory.resize(size);
    return memory.data();
  }
};

// S [ranks, columns] as hi + lo: [parts ranks, columns], of one part where S is bf16 already.
struct Halves {
  int64_t ranks, columns, parts;
  Buffer<c10::BFloat16> memory;
  Halves(const float* S, int64_t ranks, int64_t columns);
};

// What S is prepared for, for matrix units: each use has a layout of its own. Unprepared, S serves all uses, by widened blocks.
enum Use : int { DOWN = 1, UP = 2 };

template <class E>
class Small {
 public:
  // S stays the caller's.
  Small(const E* S, int64_t ranks, int64_t columns, int) : S_(S), R_(ranks), columns_(columns) {}

  void down(const E* v, int64_t stride, int64_t rows, const E* base, E* out, int64_t ld_out) const {
    run(Dots<E>{rows, R_, columns_, v, stride, S_, columns_, base, 0, out, ld_out});
  }
  void up(const E* Z, int64_t ld_z, int64_t rows, const E* row, const E* base, int64_t ld_base, E* out, int64_t ld_out) const {
    run(Combine<E>{rows, columns_, R_, Z, 1, ld_z, S_, columns_, base ? base : row, base ? ld_base : 0, out, ld_out});
    for (int64_t m = 0; base && row && m < rows; ++m)
      for (int64_t c = 0; c < columns_; ++c) out[m * ld_out + c] += row[c];
  }

 private:
  const E* S_;
  int64_t R_, columns_;
};

template <OfLow E>
class Small<E> {
 public:
  Small(const float* S, int64_t ranks, int64_t columns, int uses);

  void down(const E* v, int64_t stride, int64_t rows, const float* base, float* out, int64_t ld_out) const;
  void up(const E* Z, int64_t ld_z, int64_t rows, const float* row, const E* base, int64_t ld_base, E* out, int64_t ld_out) const;

 private:
  const float* S_;
  int64_t R_, columns_;
  int64_t parts_ = 2;  // 1 where S is bf16 already
  int64_t depth_ = 0, ld_up_ = 0;
  Buffer<c10::BFloat16> down_{0}, up_{0};  // in pairs: [columns / 2, parts R, 2] and [depth / 2, ld_up, 2], zero beyond S
};

// S [ranks, rows] of C = B_down W0, to be multiplied with the columns [first, last) of v [rows, *].
template <class E>
class Left {
 public:
  Left(const E* S, int64_t ranks, int64_t rows) : S_(S), R_(ranks), rows_(rows) {}
  void times(const E* v, int64_t stride, int64_t first, int64_t last, E* out, int64_t ld_out) const {
    run(Combine<E>{R_, last - first, rows_, S_, 1, rows_, v + first, stride, nullptr, 0, out + first, ld_out});
  }

 private:
  const E* S_;
  int64_t R_, rows_;
};

template <OfLow E>
class Left<E> {
 public:
  Left(const float* S, int64_t ranks, int64_t rows);
  void times(const E* v, int64_t stride, int64_t first, int64_t last, float* out, int64_t ld_out) const;

 private:
  const float* S_;
  int64_t R_, rows_;
  std::optional<Halves> halves_;  // for matrix units
};

// Columns [first, last) of out [ranks, ld_out]; Z_t is Z^T [ranks, outer_rows(rows)], zero beyond `rows`, in rows of ld_z.
// `add` to out, or write it.
inline int64_t outer_rows(int64_t rows) { return (rows + 31) / 32 * 32; }
template <OfLow E>
void outer(const E* Z_t, int64_t ld_z, int64_t ranks, const E* v, int64_t stride, int64_t rows, int64_t first, int64_t last,
           bool add, float* out, int64_t ld_out);

}  // namespace hydra::cpu
