// What the kernels share: tiles between global and shared memory, products of tiles, conversions, sums.
//
// A tile is 64 rows of 128 bytes of x, G or W0 in shared memory. The other factor of a product has at most 64 ranks; it
// lies beside the tile rank by rank, with the index that the product sums over innermost. So one function computes both
//     rows       out[i, r] = sum_k tile[i, k] other[r, k]      (x D^T, G [A_up, B_up], W0 T^T)
//     columns    out[k, r] = sum_i tile[i, k] other[r, i]      (G^T Z, x^T dZ, W0^T B_down^T)
// A warp computes 16 outputs i or k by 8 ranks in a step: in bf16 and fp16 on tensor cores, in fp32 by fused multiply-adds,
// always with fp32 sums. Each thread prefetches its share of the next tile into registers.
#pragma once

#include "kernels.h"

#ifdef CUDA_ON_HOST
#include "cuda_on_host.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define SHARED_ARRAY(type, name, size) __shared__ alignas(16) type name[size]
#endif

#include <type_traits>

namespace {

constexpr int THREADS = 128, WARPS = 4, ROWS = 64;
constexpr int64_t SPLIT_COLUMNS = 64;  // a multiple of every tile's columns
#ifdef CUDA_ON_HOST
constexpr int64_t PROGRAMS = 4;  // so few that a test's shapes have parts of several tiles
#else
constexpr int64_t PROGRAMS = 528;  // blocks that keep memory busy: four on each of 132 multiprocessors
#endif

template <typename P> constexpr int COLUMNS = 128 / sizeof(P);
// 16 bytes more than the data, so that the eight rows that a warp reads at once lie in different banks.
template <typename P> constexpr int STRIDE = COLUMNS<P> + 16 / sizeof(P);
template <typename P> constexpr int ROW_STRIDE = ROWS + 16 / sizeof(P);  // of the other factor, summed over rows
// Warps that share 16 columns of a tile divide the ranks.
template <typename P> constexpr int SHARERS = WARPS * 16 / COLUMNS<P>;

__host__ __device__ constexpr int64_t cdiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The number of parts into which a sum of `steps` steps is divided: parts of whole steps and equal size, the last one
// excepted, each computed by `blocks` blocks, so that all blocks run at once. 0 where there are no steps.
constexpr int64_t splits_of(int64_t steps, int64_t blocks) {
  if (steps == 0 || blocks == 0) return 0;
  return cdiv(steps, cdiv(steps, PROGRAMS > blocks ? PROGRAMS / blocks : 1));
}

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline void assign(float& to, float v) { to = v; }
__device__ inline void assign(__half& to, float v) { to = __float2half_rn(v); }
__device__ inline void assign(__nv_bfloat16& to, float v) { to = __float2bfloat16_rn(v); }

// v rounded to T.
template <typename T>
__device__ float rounded(float v) {
  T t;
  assign(t, v);
  return to_float(t);
}

// The bits of an element of an adapter, which is a T or, where wide is set, fp32; 0 where it is outside. They are converted
// only when they are stored, so that a load does not have to wait for the one before it.
template <typename T>
__device__ uint32_t bits_of(const void* ptr, int64_t i, bool wide, bool inside = true) {
  if (!inside) return 0;
  return wide ? static_cast<const uint32_t*>(ptr)[i] : static_cast<const uint16_t*>(ptr)[i];
}

template <typename T>
__device__ float value_of(uint32_t bits, bool wide) {
  const auto half = static_cast<uint16_t>(bits);
  return wide ? reinterpret_cast<const float&>(bits) : to_float(reinterpret_cast<const T&>(half));
}
template <>
__device__ inline float value_of<float>(uint32_t bits, bool) { return reinterpret_cast<const float&>(bits); }

template <typename T>
__device__ float load(const void* ptr, int64_t i, bool wide) { return value_of<T>(bits_of<T>(ptr, i, wide), wide); }

template <typename T>
__device__ void store(void* ptr, int64_t i, float v, bool wide) {
  if (wide) static_cast<float*>(ptr)[i] = v;
  else assign(static_cast<T*>(ptr)[i], v);
}

template <typename T>
__device__ float scale_of(const void* ptr, float value, bool wide) {
  return ptr == nullptr ? value : load<T>(ptr, 0, wide);
}

// A matrix in global memory, and whether its rows are aligned to 16 bytes.
template <typename T>
struct Matrix {
  const T* ptr;
  int64_t rows, columns, stride;
  bool lines;

  __device__ Matrix(const void* p, int64_t rows, int64_t columns, int64_t stride)
      : ptr(static_cast<const T*>(p)), rows(rows), columns(columns), stride(stride),
        lines((reinterpret_cast<uintptr_t>(p) | static_cast<uint64_t>(stride) * sizeof(T)) % 16 == 0) {}
};

// A thread's share of a tile of HEIGHT rows, in registers between a matrix of T and shared memory of P; zero outside.
template <typename T, typename P, int HEIGHT = ROWS>
struct Share {
  static constexpr int WIDTH = 16 / sizeof(T), LANES = COLUMNS<P> / WIDTH, STEPS = cdiv(HEIGHT * LANES, THREADS);
  uint4 lines[STEPS];

  __device__ void load(const Matrix<T>& from, int64_t row, int64_t column) {
    const int64_t k = column + threadIdx.x % LANES * WIDTH;
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      const int i = threadIdx.x / LANES + step * (THREADS / LANES);
      const T* ptr = from.ptr + (row + i) * from.stride + k;
      lines[step] = uint4{0, 0, 0, 0};
      if (i >= HEIGHT || row + i < 0 || row + i >= from.rows) continue;
      if (from.lines && k + WIDTH <= from.columns) {
        lines[step] = *reinterpret_cast<const uint4*>(ptr);
      } else {
        T elements[WIDTH];
#pragma unroll
        for (int e = 0; e < WIDTH; ++e) elements[e] = k + e < from.columns ? ptr[e] : T(0.0f);
#pragma unroll
        for (int e = 0; e < WIDTH; ++e) reinterpret_cast<T*>(&lines[step])[e] = elements[e];
      }
    }
  }

  __device__ void store(P* tile) const {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      const int i = threadIdx.x / LANES + step * (THREADS / LANES);
      if (i >= HEIGHT) continue;
      P* to = tile + i * STRIDE<P> + threadIdx.x % LANES * WIDTH;
      if constexpr (std::is_same_v<T, P>) {
        *reinterpret_cast<uint4*>(to) = lines[step];
      } else {
#pragma unroll
        for (int e = 0; e < WIDTH; ++e) to[e] = to_float(reinterpret_cast<const T*>(&lines[step])[e]);
      }
    }
  }
};

// A thread's share of the other factor, RANKS by DEPTH: its element (r, k) is element(r, k), converted when it is stored.
// Neighbouring threads take neighbouring ranks where RANKS_FIRST is set, else neighbouring k: as memory holds the source.
template <typename S, int RANKS, int DEPTH, bool RANKS_FIRST>
struct Other {
  static constexpr int STEPS = RANKS * DEPTH / THREADS;
  S held[STEPS];

  template <typename Element>
  __device__ void load(const Element& element) {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      const int i = threadIdx.x + step * THREADS;
      held[step] = RANKS_FIRST ? element(i % RANKS, i / RANKS) : element(i / DEPTH, i % DEPTH);
    }
  }

  template <typename P, typename Convert>
  __device__ void store(P* to, int stride, const Convert& convert) const {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      const int i = threadIdx.x + step * THREADS;
      to[RANKS_FIRST ? i % RANKS * stride + i / RANKS : i / DEPTH * stride + i % DEPTH] = convert(held[step]);
    }
  }
};

// Loads and stores the whole factor in batches, which takes few registers. Neighbouring threads take neighbouring ranks.
template <int RANKS, int DEPTH, typename P, typename Element, typename Convert>
__device__ void fill(P* to, int stride, const Element& element, const Convert& convert) {
  constexpr int STEPS = RANKS * DEPTH / THREADS, BATCH = smaller(STEPS, 8);
  decltype(element(0, 0)) held[BATCH];
#pragma unroll 1
  for (int first = threadIdx.x; first < RANKS * DEPTH; first += BATCH * THREADS) {
#pragma unroll
    for (int step = 0; step < BATCH; ++step)
      held[step] = element((first + step * THREADS) % RANKS, (first + step * THREADS) / RANKS);
#pragma unroll
    for (int step = 0; step < BATCH; ++step) {
      const int i = first + step * THREADS;
      to[i % RANKS * stride + i / RANKS] = convert(held[step]);
    }
  }
}

struct Same {
  template <typename T> __device__ T operator()(T v) const { return v; }
};

#ifndef CUDA_ON_HOST
// c += a b for 16 x 16 a, 16 x 8 b; fragments as PTX lays out those of mma.m16n8k16.
template <typename T>
__device__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#define MMA(type)                                                                                        \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, " \
      "{%8, %9}, {%0, %1, %2, %3};"                                                                      \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                   \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (std::is_same_v<T, __half>) MMA("f16");
  else MMA("bf16");
#undef MMA
}
#endif

// acc[n] += a other^T, 16 by 8 outputs: a(i, k) is element [i, k] of the tile, or [k, i] where TRANSPOSED is set. Lane
// 4 g + t has the outputs g and g + 8 of the ranks 8 n + 2 t and 8 n + 2 t + 1.
template <bool TRANSPOSED, int DEPTH, typename P, int N>
__device__ void product(float (&acc)[N][4], const P* a, const P* other, int stride) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const auto at = [&](int i, int k) { return TRANSPOSED ? k * STRIDE<P> + i : i * STRIDE<P> + k; };
  if constexpr (std::is_same_v<P, float>) {
#pragma unroll 2
    for (int k = 0; k < DEPTH; k += 4) {
      float upper[4], lower[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) upper[e] = a[at(g, k + e)], lower[e] = a[at(g + 8, k + e)];
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float4 line = *reinterpret_cast<const float4*>(&other[(8 * n + 2 * t + j) * stride + k]);
          const float b[4] = {line.x, line.y, line.z, line.w};
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            acc[n][j] = __fmaf_rn(upper[e], b[e], acc[n][j]);
            acc[n][2 + j] = __fmaf_rn(lower[e], b[e], acc[n][2 + j]);
          }
        }
      }
    }
  } else {
    const auto bits = [](const P& v) { return static_cast<uint32_t>(reinterpret_cast<const uint16_t&>(v)); };
#pragma unroll
    for (int k = 0; k < DEPTH; k += 16) {
      uint32_t fragment_a[4], fragment_b[2];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int i = g + j % 2 * 8, first = k + 2 * t + j / 2 * 8;
        fragment_a[j] = TRANSPOSED ? bits(a[at(i, first + 1)]) << 16 | bits(a[at(i, first)])
                                   : *reinterpret_cast<const uint32_t*>(&a[at(i, first)]);
      }
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j)
          fragment_b[j] = *reinterpret_cast<const uint32_t*>(&other[(8 * n + g) * stride + k + 2 * t + 8 * j]);
        mma<P>(acc[n], fragment_a, fragment_b);
      }
    }
  }
}

// Calls put(i, r, value) for each output of `product` that this thread has; r counts from the first of the 8 N ranks.
template <int N, typename Put>
__device__ void each_output(const float (&acc)[N][4], const Put& put) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int j = 0; j < 4; ++j) put(g + j / 2 * 8, 8 * n + 2 * t + j % 2, acc[n][j]);
  }
}

// out[r, k] = sum_m x[m, k] convert(element(m, r)), for the rows [first, last) of x and one tile of columns.
template <typename P, int RANKS, bool RANKS_FIRST, typename T, typename Element, typename Convert>
__device__ void columns_of_rows(
    const Matrix<T>& x, int64_t first, int64_t last, int64_t column, int ranks, float* out, const Element& element,
    const Convert& convert) {
  using S = decltype(element(first, 0));
  SHARED_ARRAY(P, tile, ROWS * STRIDE<P>);
  SHARED_ARRAY(P, other_tile, RANKS * ROW_STRIDE<P>);
  constexpr int N = RANKS / 8 / SHARERS<P>;
  const int warp = threadIdx.x / 32, group = warp / SHARERS<P>, first_rank = warp % SHARERS<P> * N * 8;
  const auto of_rows = [&](int64_t row) {
    return [&element, row, last](int r, int i) { return row + i < last ? element(row + i, r) : S(0.0f); };
  };
  Matrix<T> inside = x;
  inside.rows = last;
  Share<T, P> share;
  Other<S, RANKS, ROWS, RANKS_FIRST> other;
  float acc[N][4] = {};
  share.load(inside, first, column);
  other.load(of_rows(first));
  for (int64_t row = first; row < last; row += ROWS) {
    __syncthreads();
    share.store(tile);
    other.store(other_tile, ROW_STRIDE<P>, convert);
    __syncthreads();
    if (row + ROWS < last) {
      share.load(inside, row + ROWS, column);
      other.load(of_rows(row + ROWS));
    }
    product<true, ROWS>(acc, tile + group * 16, other_tile + first_rank * ROW_STRIDE<P>, ROW_STRIDE<P>);
  }
  each_output(acc, [&](int i, int r, float v) {
    const int64_t k = column + group * 16 + i;
    if (k < x.columns && first_rank + r < ranks) out[(first_rank + r) * x.columns + k] = v;
  });
}

// The sum over the block's threads, in the same order each time; every thread gets it.
__device__ inline float block_sum(float v) {
  SHARED_ARRAY(float, sums, THREADS);
  sums[threadIdx.x] = v;
  for (unsigned half = THREADS / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  __syncthreads();
  v = sums[0];
  __syncthreads();
  return v;
}

// Element i of P arrays of this size, summed over the arrays.
__device__ inline float sum_of_partials(const float* ptr, int64_t P, int64_t size, int64_t i) {
  float sum = 0.0f;
#pragma unroll 4
  for (int64_t p = 0; p < P; ++p) sum += ptr[p * size + i];
  return sum;
}

// What a mask multiplies element i by; the mask is of T, or of bytes that are 0 or 1.
template <typename T>
__device__ float mask_at(const void* mask, int64_t i, bool bytes, float scale) {
  if (mask == nullptr) return 1.0f;
  return scale * (bytes ? static_cast<const uint8_t*>(mask)[i] : to_float(static_cast<const T*>(mask)[i]));
}

// Calls run<T, RANKS>() with the type and the ranks padded to 16, 32 or 64; cudaErrorInvalidValue where none fits.
template <typename Run>
int dispatch(HydraType type, int64_t ranks, const Run& run) {
  const auto by_rank = [&]<typename T>(T) {
    if (ranks <= 16) return run.template operator()<T, 16>();
    return ranks <= 32 ? run.template operator()<T, 32>() : run.template operator()<T, 64>();
  };
  if (ranks > 64) return 1;
  if (type == HYDRA_FLOAT32) return by_rank(float());
  if (type == HYDRA_FLOAT16) return by_rank(__half());
  return type == HYDRA_BFLOAT16 ? by_rank(__nv_bfloat16()) : 1;
}

#ifndef CUDA_ON_HOST
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, void* stream, Arguments... arguments) {
  kernel<<<grid, THREADS, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return static_cast<int>(cudaGetLastError());
}
#endif

}  // namespace
