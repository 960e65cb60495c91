// The two kinds of product with a side of R = r_a + r_b. A call runs on one thread.
//
//   dots      out[i, j] = base[i, j] + sum_p left[i, p] right[j, p]      Z = x D^T, dZ = G U, dB_down = T W0^T
//   combine   out[i, c] = base[i, c] + sum_p left(p, i) right[p, c]      dD = dZ^T x, dU = Z^T G, C = B_down W0,
//                                                                        Z U^T, dZ D, W0 + U D
//
// base may be out itself, one row for all i (ld_base = 0), or null, which means zeros. The rows of right, out and base are
// contiguous; in dots those of left too. Sums run over blocks of p, in an order that depends only on the sizes.
#pragma once

#include <cstdint>

namespace hydra::cpu {

template <class T>
struct Dots {
  int64_t rows, columns, depth;
  const T* left;  // [rows, depth]
  int64_t ld_left;
  const T* right;  // [columns, depth]
  int64_t ld_right;
  const T* base;
  int64_t ld_base;
  T* out;  // [rows, columns]
  int64_t ld_out;
};

template <class T>
struct Combine {
  int64_t rows, columns, depth;
  const T* left;  // element (p, i) at p * left_p + i * left_i
  int64_t left_p, left_i;
  const T* right;  // [depth, columns]
  int64_t ld_right;
  const T* base;
  int64_t ld_base;
  T* out;  // [rows, columns]
  int64_t ld_out;
  int64_t left_ahead = 0, right_ahead = 0;  // to prefetch: how far beyond the current elements the caller's next ones lie
};

// Products with W0 of few rows: their right side is packed into panels, which stay in the L1 cache.
//
//   pack      out = panels of right [depth, columns]: one after another, each [depth, 2 lanes()], or the last [depth, lanes()] where
//             that is enough; columns beyond `columns` are zero, as unset memory may hold numbers that are slow
//   panels    out[i, c] = sum_p left[i, p] right[p, c]    added to out, or in its place

// Numbers of fp32 in a vector of this processor.
int64_t lanes();

struct Pack {
  int64_t depth, columns;
  const float* in;  // element (p, c) at p * in_p + c * in_c; one of the two strides is 1
  int64_t in_p, in_c;
  float* out;  // [depth * columns, rounded up to lanes()]
};

struct Panels {
  int64_t rows, columns, depth;
  const float* left;  // [rows, depth]
  int64_t ld_left;
  bool left_ahead;  // to prefetch: left comes from memory, and more of its rows follow
  const float* right;  // packed
  bool add;
  float* out;  // [rows, columns]
  int64_t ld_out;
};

// Numbers of 16 bits are handled as their bits here.
//
//   widen    out[i, c] = in[i, c], from bf16 or fp16 to fp32
//   narrow   out[i, c] = in[i, c] + row[c] + base[i, c], summed in fp32 and rounded to 16 bits once; row and base may be null
//   pair     bf16: out[p / 2, c] = in[p, c] and above it in[p + 1, c], as matrix units read their right operand; an odd last row
//            meets zeros
//   split    bf16: hi = in rounded to bf16, lo = (in - hi) rounded to bf16; *exact: whether all of lo is zero
enum class Low { bf16, fp16 };

struct Widen {
  Low dtype;
  int64_t rows, columns;
  const uint16_t* in;
  int64_t ld_in;
  float* out;
  int64_t ld_out;
};

struct Narrow {
  Low dtype;
  int64_t rows, columns;
  const float* in;
  int64_t ld_in;
  const float* row;
  const uint16_t* base;
  int64_t ld_base;
  uint16_t* out;
  int64_t ld_out;
};

struct Pair {
  int64_t rows, columns;
  const uint16_t* in;
  int64_t ld_in;
  uint32_t* out;
  int64_t ld_out;
};

struct Split {
  int64_t size;
  const float* in;
  uint16_t *hi, *lo;
  bool* exact;
};

// Input dropout, as hydra_kernels/backend/philox.py has it.
//
//   keep     out[i, c] = 1 where Philox keeps element (row + i, first + c) of x, else 0; first is a multiple of 4
//   masked   out[i, c] = in[i, c] where keep[i, c], else 0; out may be in
struct Keep {
  int64_t row, rows, first, columns;
  uint64_t seed, threshold;  // kept from this word on; up to 2^32
  uint8_t* out;              // [rows, columns]
};

template <class T>  // a number's bits
struct Masked {
  int64_t rows, columns;
  const T* in;
  int64_t ld_in;
  const uint8_t* keep;
  int64_t ld_keep;
  T* out;
  int64_t ld_out;
};

// The instruction set that this processor has and ATEN_CPU_CAPABILITY allows: "avx512", "avx2" or "plain".
const char* instructions();

void run(const Dots<float>& product);
void run(const Dots<double>& product);
void run(const Combine<float>& product);
void run(const Combine<double>& product);
void run(const Pack& copy);
void run(const Panels& product);
void run(const Widen& copy);
void run(const Narrow& copy);
void run(const Pair& copy);
void run(const Split& parts);
void run(const Keep& mask);
void run(const Masked<uint16_t>& copy);
void run(const Masked<uint32_t>& copy);
void run(const Masked<uint64_t>& copy);

}  // namespace hydra::cpu
