#include "small.h"

#include <ATen/Context.h>
#include <ATen/native/CPUBlas.h>

#include <string>

#include "amx.h"

namespace hydra::cpu {
namespace {

using c10::BFloat16;

// Columns at a time: what is widened or paired stays in the L1 cache.
constexpr int64_t CHUNK = 256, OUTER_CHUNK = 128;

int64_t even(int64_t n) { return (n + 1) / 2 * 2; }

thread_local bool used = false;  // whether this thread holds the registers of matrix units

// C [M, N] (+)= A [M, K] B [K, N], with B in pairs of rows and K even.
void multiply(int64_t M, int64_t N, int64_t K, const BFloat16* A, int64_t lda, const BFloat16* B, int64_t ldb, bool add, float* C,
              int64_t ldc) {
#ifdef CPUBLAS_BRGEMM_BF16BF16F32
  used = true;
  at::native::cpublas::brgemm(M, N, K, lda, ldb, ldc, add, A, B, C);
#endif
}

// Gives the registers back that brgemm has set up: it sets them up again at its next call.
void release_matrix_units() {
#ifdef CPUBLAS_BRGEMM_BF16BF16F32
  if (used) at::native::cpublas::brgemm_release();
  used = false;
#endif
}

// Only beside has_matrix_units(): torch's settings hold for AMX too.
bool has_amx() { return amx::available(); }

template <OfLow E>
const float* widened(const E* in, int64_t ld_in, int64_t rows, int64_t columns) {
  float* out = Scratch<float, 0>::of(rows * columns);
  run(Widen{LOW<E>, rows, columns, bits(in), ld_in, out, columns});
  return out;
}

// `outer` with its left side [ranks, rows] in fp32.
template <OfLow E>
void outer_widened(const float* left, int64_t ld_left, int64_t ranks, const E* v, int64_t stride, int64_t rows, int64_t first,
                   int64_t last, bool add, float* out, int64_t ld_out) {
  float* right = Scratch<float, 3>::of(rows * OUTER_CHUNK);
  for (int64_t c = first; c < last; c += OUTER_CHUNK) {
    const int64_t count = std::min(OUTER_CHUNK, last - c);
    run(Widen{LOW<E>, rows, count, bits(v) + c, stride, right, count});
    run(Combine<float>{ranks, count, rows, left, 1, ld_left, right, count, add ? out + c : nullptr, ld_out, out + c, ld_out});
  }
}

}  // namespace

bool has_matrix_units() {
#ifdef CPUBLAS_BRGEMM_BF16BF16F32
  static const bool found = [] {
    if (std::string(instructions()) != "avx512" || !__builtin_cpu_supports("avx512bf16")) return false;
    const BFloat16 pair[2] = {1, 2};
    float sum = 0;
    try {  // a torch that was built without these kernels says so only here
      multiply(1, 1, 2, pair, 2, pair, 1, false, &sum, 1);
      at::native::cpublas::brgemm_release();
    } catch (const c10::Error&) {
      return false;
    }
    return sum == 5;
  }();
  return found && at::globalContext().userEnabledMkldnn();
#else
  return false;
#endif
}

MatrixUnits::~MatrixUnits() { release_matrix_units(); }

Halves::Halves(const float* S, int64_t R, int64_t columns) : ranks(R), columns(columns), parts(1), memory(2 * R * columns) {
  bool exact = true;
  run(Split{R * columns, S, bits(memory.data()), bits(memory.data() + R * columns), &exact});
  if (!exact) parts = 2;
}

template <OfLow E>
Small<E>::Small(const float* S, int64_t R, int64_t columns, int uses) : S_(S), R_(R), columns_(columns) {
  if constexpr (std::is_same_v<E, BFloat16>) {
    if (!has_matrix_units() || R == 0 || uses == 0) return;
    const Halves halves(S, R, columns);
    parts_ = halves.parts;
    const int64_t P = parts_ * R;
    if (uses & DOWN && columns % 2 == 0) {
      down_ = Buffer<BFloat16>(columns * P);
      const auto* in = reinterpret_cast<const uint32_t*>(halves.memory.data());  // a pair at a time
      auto* out = reinterpret_cast<uint32_t*>(down_.data());
      const int64_t pairs = columns / 2;
      constexpr int64_t LINE = 16;  // pairs at a time: their lines of `out` stay in the L1 cache
      for (int64_t first = 0; first < pairs; first += LINE)
        for (int64_t r = 0; r < P; ++r)
          for (int64_t pair = first; pair < std::min(pairs, first + LINE); ++pair) out[pair * P + r] = in[r * pairs + pair];
    }
    if (uses & UP) {
      depth_ = has_amx() ? amx::depths(P) : even(P), ld_up_ = has_amx() ? amx::tiles(columns) : columns;
      up_ = Buffer<BFloat16>(depth_ * ld_up_);
      if (depth_ > even(P) || ld_up_ > columns) std::fill_n(up_.data(), depth_ * ld_up_, BFloat16(0));
      run(Pair{P, columns, bits(halves.memory.data()), columns, reinterpret_cast<uint32_t*>(up_.data()), ld_up_});
    }
  }
}

template <OfLow E>
void Small<E>::down(const E* v, int64_t stride, int64_t rows, const float* base, float* out, int64_t ld_out) const {
  if (rows == 0 || R_ == 0) return;
  if constexpr (std::is_same_v<E, BFloat16>)
    if (down_.data()) {
      const int64_t P = parts_ * R_;
      float* sums = Scratch<float, 1>::of(rows * P);
      multiply(rows, P, columns_, v, stride, down_.data(), P, false, sums, P);
      for (int64_t m = 0; m < rows; ++m)
        for (int64_t r = 0; r < R_; ++r)
          out[m * ld_out + r] = (base ? base[r] : 0) + sums[m * P + r] + (parts_ == 2 ? sums[m * P + R_ + r] : 0);
      return;
    }
  int64_t ld_base = 0, c = 0;
  do {  // at least once: an empty sum must be written too
    const int64_t count = std::min(CHUNK, columns_ - c);
    run(Dots<float>{rows, R_, count, widened(v + c, stride, rows, count), count, S_ + c, columns_, base, ld_base, out, ld_out});
    base = out, ld_base = ld_out, c += CHUNK;
  } while (c < columns_);
}

template <OfLow E>
void Small<E>::up(const E* Z, int64_t ld_z, int64_t rows, const float* row, const E* base, int64_t ld_base, E* out,
                  int64_t ld_out) const {
  if (rows == 0) return;
  BFloat16* left = nullptr;  // Z once for each part of S, and zeros
  if constexpr (std::is_same_v<E, BFloat16>)
    if (up_.data()) {
      left = Scratch<BFloat16, 1>::of(amx::tiles(rows) * depth_);
      for (int64_t m = 0; m < rows; ++m) {
        BFloat16* to = left + m * depth_;
        for (int64_t part = 0; part < parts_; ++part) std::copy_n(Z + m * ld_z, R_, to + part * R_);
        std::fill(to + parts_ * R_, to + depth_, BFloat16(0));
      }
      if (has_amx()) {
        release_matrix_units();
        return amx::run(amx::Up{rows, columns_, depth_, bits(left), reinterpret_cast<const uint32_t*>(up_.data()), ld_up_, row,
                                bits(base), ld_base, bits(out), ld_out});
      }
    }
  float* sums = Scratch<float, 2>::of(rows * CHUNK);
  const float* wide = left ? nullptr : widened(Z, ld_z, rows, R_);
  for (int64_t c = 0; c < columns_; c += CHUNK) {
    const int64_t count = std::min(CHUNK, columns_ - c);
    if (left) multiply(rows, count, depth_, left, depth_, up_.data() + 2 * c, ld_up_, false, sums, CHUNK);
    else run(Combine<float>{rows, count, R_, wide, 1, R_, S_ + c, columns_, nullptr, 0, sums, CHUNK});
    run(Narrow{LOW<E>, rows, count, sums, CHUNK, row ? row + c : nullptr, base ? bits(base) + c : nullptr, ld_base, bits(out) + c,
               ld_out});
  }
}

template <OfLow E>
Left<E>::Left(const float* S, int64_t R, int64_t rows) : S_(S), R_(R), rows_(rows) {
  if (std::is_same_v<E, BFloat16> && has_matrix_units()) halves_.emplace(S, R, rows);
}

template <OfLow E>
void Left<E>::times(const E* v, int64_t stride, int64_t first, int64_t last, float* out, int64_t ld_out) const {
  constexpr int64_t BLOCK = 128;
  const int64_t width = last - first;
  int64_t row = 0;
  if (!halves_) {
    do {  // at least once: an empty sum must be written too
      const int64_t count = std::min(BLOCK, rows_ - row);
      outer_widened(S_ + row, rows_, R_, v + row * stride, stride, count, first, last, row > 0, out, ld_out);
      row += BLOCK;
    } while (row < rows_);
    return;
  }
  if constexpr (std::is_same_v<E, BFloat16>) {
    const Halves& S = *halves_;
    const int64_t P = S.parts * R_;
    BFloat16* left = Scratch<BFloat16, 3>::of(P * BLOCK);
    const Buffer<float> sums(S.parts == 2 ? P * width : 0);
    float* target = S.parts == 2 ? sums.data() : out + first;
    const int64_t ld = S.parts == 2 ? width : ld_out;
    do {
      const int64_t count = std::min(BLOCK, rows_ - row);
      for (int64_t p = 0; p < P; ++p)
        for (int64_t i = 0; i < BLOCK; ++i) left[p * BLOCK + i] = i < count ? S.memory.data()[p * rows_ + row + i] : BFloat16(0);
      outer(left, BLOCK, P, v + row * stride + first, stride, count, 0, width, row > 0, target, ld);
      row += BLOCK;
    } while (row < rows_);
    for (int64_t r = 0; S.parts == 2 && r < R_; ++r)
      for (int64_t c = 0; c < width; ++c) out[r * ld_out + first + c] = target[r * ld + c] + target[(R_ + r) * ld + c];
  }
}

template <OfLow E>
void outer(const E* Z_t, int64_t ld_z, int64_t ranks, const E* v, int64_t stride, int64_t rows, int64_t first, int64_t last,
           bool add, float* out, int64_t ld_out) {
  if (ranks == 0) return;
  if constexpr (std::is_same_v<E, BFloat16>)
    if (has_matrix_units() && rows > 0) {
      const bool by_amx = has_amx();
      const int64_t depth = by_amx ? outer_rows(rows) : even(rows);
      if (by_amx) release_matrix_units();
      for (int64_t c = first; c < last; c += OUTER_CHUNK) {
        const int64_t count = std::min(OUTER_CHUNK, last - c), ld = by_amx ? amx::tiles(count) : count;
        BFloat16* pairs = Scratch<BFloat16, 2>::of(depth * OUTER_CHUNK);
        run(Pair{rows, count, bits(v) + c, stride, reinterpret_cast<uint32_t*>(pairs), ld});
        std::fill_n(pairs + even(rows) * ld, (depth - even(rows)) * ld, BFloat16(0));
        if (by_amx)
          amx::run(amx::Outer{ranks, count, depth, bits(Z_t), ld_z, reinterpret_cast<uint32_t*>(pairs), ld, add, out + c, ld_out});
        else multiply(ranks, count, depth, Z_t, ld_z, pairs, count, add, out + c, ld_out);
      }
      return;
    }
  outer_widened(widened(Z_t, ld_z, ranks, rows), rows, ranks, v, stride, rows, first, last, add, out, ld_out);
}

#define HYDRA_FOR(E)       \
  template class Small<E>; \
  template class Left<E>;  \
  template void outer(const E*, int64_t, int64_t, const E*, int64_t, int64_t, int64_t, int64_t, bool, float*, int64_t);
HYDRA_FOR(c10::BFloat16)
HYDRA_FOR(c10::Half)

}  // namespace hydra::cpu
