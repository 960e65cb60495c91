// The loops of products.h in vectors of VECTOR_BYTES. The file of each instruction set includes this one.

#include "products.h"

#include <type_traits>

#ifdef __x86_64__
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 sees it in its own header
#endif
#include <immintrin.h>
#endif

namespace hydra::cpu {
namespace {  // each instruction set has its own copy, and the linker must not merge them

#define HYDRA_INLINE inline __attribute__((always_inline))

// Aligned only as its elements are, because rows may start anywhere.
template <class T, int LANES>
struct VectorOf {
  typedef T type __attribute__((vector_size(LANES * sizeof(T)), aligned(alignof(T)), may_alias));
};
template <class T, int LANES>
using Vector = typename VectorOf<T, LANES>::type;

template <class T, int LANES>
HYDRA_INLINE Vector<T, LANES>& at(T* p) { return *reinterpret_cast<Vector<T, LANES>*>(p); }
template <class T, int LANES>
HYDRA_INLINE const Vector<T, LANES>& at(const T* p) { return *reinterpret_cast<const Vector<T, LANES>*>(p); }

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// A tile of dots has TALL x WIDE accumulators: 8 at least, since two of them are added to in a cycle and each takes four.
constexpr int TALL = VECTOR_BYTES >= 64 ? 4 : 2, WIDE = 4;
constexpr int ROWS = VECTOR_BYTES >= 64 ? 16 : 8;  // a tile of combine has so many rows, an accumulator each
constexpr int64_t DOTS_DEPTH = 1024;  // length of a block of p, whose operands stay in the L1 cache

template <class T, int LANES>
HYDRA_INLINE T sum(Vector<T, LANES> v) {
  T total[LANES];
  at<T, LANES>(total) = v;
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) total[l] += total[l + half];
  return total[0];
}

// A tile of at most TALL x WIDE dots. It always computes TALL x WIDE, and stores those that exist.
template <class T>
void dots_tile(const Dots<T>& d, int64_t i0, int64_t j0, int64_t p0, int64_t depth, const T* base, int64_t ld_base) {
  constexpr int LANES = VECTOR_BYTES / sizeof(T);
  using V = Vector<T, LANES>;
  const int64_t rows = least(TALL, d.rows - i0), columns = least(WIDE, d.columns - j0);
  const T *left[TALL], *right[WIDE];
  for (int i = 0; i < TALL; ++i) left[i] = d.left + (i0 + least(i, rows - 1)) * d.ld_left + p0;
  for (int j = 0; j < WIDE; ++j) right[j] = d.right + (j0 + least(j, columns - 1)) * d.ld_right + p0;
  V acc[TALL][WIDE] = {};
  int64_t p = 0;
  for (; p + LANES <= depth; p += LANES) {
    V r[WIDE];
    for (int j = 0; j < WIDE; ++j) r[j] = at<T, LANES>(right[j] + p);
    for (int i = 0; i < TALL; ++i) {
      const V l = at<T, LANES>(left[i] + p);
      if (j0 == 0) __builtin_prefetch(left[i] + p + TALL * d.ld_left);  // rows of the next tile; each is on a page of its own
      for (int j = 0; j < WIDE; ++j) acc[i][j] += l * r[j];
    }
  }
  if (p < depth) {
    T l[TALL][LANES] = {}, r[WIDE][LANES] = {};
    for (int64_t q = p; q < depth; ++q) {
      for (int i = 0; i < TALL; ++i) l[i][q - p] = left[i][q];
      for (int j = 0; j < WIDE; ++j) r[j][q - p] = right[j][q];
    }
    for (int i = 0; i < TALL; ++i)
      for (int j = 0; j < WIDE; ++j) acc[i][j] += at<T, LANES>(l[i]) * at<T, LANES>(r[j]);
  }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) {
      const T total = sum<T, LANES>(acc[i][j]);
      d.out[(i0 + i) * d.ld_out + j0 + j] = base ? base[(i0 + i) * ld_base + j0 + j] + total : total;
    }
}

template <class T>
void run_dots(const Dots<T>& d) {
  const T* base = d.base;
  int64_t ld_base = d.ld_base, p0 = 0;
  do {  // at least once: an empty sum must be written too
    const int64_t depth = least(DOTS_DEPTH, d.depth - p0);
    for (int64_t i0 = 0; i0 < d.rows; i0 += TALL)
      for (int64_t j0 = 0; j0 < d.columns; j0 += WIDE) dots_tile(d, i0, j0, p0, depth, base, ld_base);
    base = d.out, ld_base = d.ld_out, p0 += DOTS_DEPTH;
  } while (p0 < d.depth);
}

template <class T, bool AHEAD>
struct CombineBlock {
  const Combine<T>& c;
  int64_t p0, depth;
  const T* base;
  int64_t ld_base;

  template <int R, int LANES>
  HYDRA_INLINE void tile(int64_t i0, int64_t c0) const {
    using V = Vector<T, LANES>;
    const T* left = c.left + p0 * c.left_p + i0 * c.left_i;
    const T* right = c.right + p0 * c.ld_right + c0;
    V acc[R] = {};
    for (int64_t p = 0; p < depth; ++p, left += c.left_p, right += c.ld_right) {
      const V r = at<T, LANES>(right);
      if (AHEAD) __builtin_prefetch(right + c.right_ahead, 0, 2), __builtin_prefetch(left + c.left_ahead, 0, 2);
      else __builtin_prefetch(right + 8 * LANES);
      for (int i = 0; i < R; ++i) acc[i] += left[i * c.left_i] * r;
    }
    for (int i = 0; i < R; ++i) {
      T* out = c.out + (i0 + i) * c.ld_out + c0;
      at<T, LANES>(out) = base ? at<T, LANES>(base + (i0 + i) * ld_base + c0) + acc[i] : acc[i];
    }
  }

  // All columns from c0 on, in vectors of LANES, then in ever shorter ones down to single elements.
  template <int R, int LANES>
  HYDRA_INLINE void columns(int64_t i0, int64_t c0) const {
    for (; c0 + LANES <= c.columns; c0 += LANES) tile<R, LANES>(i0, c0);
    if constexpr (LANES > 1) columns<R, LANES / 2>(i0, c0);
  }

  // All rows from i0 on, R at a time.
  template <int R>
  HYDRA_INLINE void rows(int64_t i0) const {
    for (; i0 + R <= c.rows; i0 += R) columns<R, VECTOR_BYTES / sizeof(T)>(i0, 0);
    if constexpr (R > 1) rows<R / 2>(i0);
  }
};

template <class T>
void run_combine(const Combine<T>& c) {
  const T* base = c.base;
  int64_t ld_base = c.ld_base, p0 = 0;
  // Each long row is on a page of its own: 32 at a time. Of short ones as many as fit into the L1 cache.
  const int64_t block = c.columns > 64 ? 32 : 512;
  do {
    const int64_t depth = least(block, c.depth - p0);
    if (c.left_ahead || c.right_ahead) CombineBlock<T, true>{c, p0, depth, base, ld_base}.template rows<ROWS>(0);
    else CombineBlock<T, false>{c, p0, depth, base, ld_base}.template rows<ROWS>(0);
    base = c.out, ld_base = c.ld_out, p0 += block;
  } while (p0 < c.depth);
}

constexpr int FLOATS = VECTOR_BYTES / sizeof(float);
// A tile of a panel has so many rows, two accumulators each. With two vectors of the panel and one of left they fit into the
// 16 registers of AVX2, and the 32 of AVX-512.
constexpr int TILE_ROWS = VECTOR_BYTES >= 64 ? 12 : 6;

void run_pack(const Pack& k) {
  float* out = k.out;
  for (int64_t c0 = 0; c0 < k.columns; c0 += 2 * FLOATS) {
    const int64_t count = least(2 * FLOATS, k.columns - c0), width = count > FLOATS ? 2 * FLOATS : FLOATS;
    const float* in = k.in + c0 * k.in_c;
    if (count < width)
      for (int64_t p = 0; p < k.depth; ++p)
        for (int64_t c = count; c < width; ++c) out[p * width + c] = 0;
    if (k.in_c != 1)
      for (int64_t c = 0; c < count; ++c)
        for (int64_t p = 0; p < k.depth; ++p) out[p * width + c] = in[p * k.in_p + c * k.in_c];
    else if (count < 2 * FLOATS)
      for (int64_t p = 0; p < k.depth; ++p)
        for (int64_t c = 0; c < count; ++c) out[p * width + c] = in[p * k.in_p + c];
    out += k.depth * width;
  }
  // Whole panels in order of rows, since each long row is on a page of its own.
  constexpr int64_t AHEAD = 8;
  for (int64_t p = 0; k.in_c == 1 && p < k.depth; ++p) {
    const float* in = k.in + p * k.in_p;
    out = k.out + p * 2 * FLOATS;
    for (int64_t c = 0; c + 2 * FLOATS <= k.columns; c += 2 * FLOATS, out += k.depth * 2 * FLOATS) {
      __builtin_prefetch(in + c + AHEAD * k.in_p);
      at<float, FLOATS>(out) = at<float, FLOATS>(in + c);
      at<float, FLOATS>(out + FLOATS) = at<float, FLOATS>(in + c + FLOATS);
    }
  }
}

// `rows` of left [<= R] times one panel of VECTORS; the first `columns` of it are stored.
template <int R, int VECTORS>
void panel_tile(const Panels& p, int64_t rows, int64_t i0, const float* right, int64_t c0, int64_t columns, bool ahead) {
  if constexpr (R > 1)
    if (rows < R) return panel_tile<R - 1, VECTORS>(p, rows, i0, right, c0, columns, ahead);
  using V = Vector<float, FLOATS>;
  constexpr int64_t LINE = 16;
  const float* left = p.left + i0 * p.ld_left;
  V acc[R][VECTORS] = {};
  for (int64_t q = 0; q < p.depth;) {
    if (ahead)
      for (int i = 0; i < R; ++i) __builtin_prefetch(left + (R + i) * p.ld_left + q);
    for (const int64_t end = least(p.depth, q + LINE); q < end; ++q, right += VECTORS * FLOATS) {
      V r[VECTORS];
      for (int v = 0; v < VECTORS; ++v) r[v] = at<float, FLOATS>(right + v * FLOATS);
      for (int i = 0; i < R; ++i)
        for (int v = 0; v < VECTORS; ++v) acc[i][v] += left[i * p.ld_left + q] * r[v];
    }
  }
  for (int i = 0; i < R; ++i) {
    float *out = p.out + (i0 + i) * p.ld_out + c0, sums[VECTORS * FLOATS];
    const bool whole = columns == VECTORS * FLOATS;
    for (int v = 0; v < VECTORS; ++v) {
      if (!whole) at<float, FLOATS>(sums + v * FLOATS) = acc[i][v];
      else at<float, FLOATS>(out + v * FLOATS) = p.add ? at<float, FLOATS>(out + v * FLOATS) + acc[i][v] : acc[i][v];
    }
    for (int64_t c = 0; !whole && c < columns; ++c) out[c] = p.add ? out[c] + sums[c] : sums[c];
  }
}

// Tiles of almost equal height, since one of a single row takes as long as a whole one.
void run_panels(const Panels& p) {
  const int64_t tiles = (p.rows + TILE_ROWS - 1) / TILE_ROWS;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t i0 = p.rows * t / tiles, rows = p.rows * (t + 1) / tiles - i0;
    const float* right = p.right;
    for (int64_t c0 = 0; c0 < p.columns; c0 += 2 * FLOATS) {
      const int64_t columns = least(2 * FLOATS, p.columns - c0);
      const bool ahead = p.left_ahead && c0 == 0;
      if (columns > FLOATS) panel_tile<TILE_ROWS, 2>(p, rows, i0, right, c0, columns, ahead), right += p.depth * 2 * FLOATS;
      else panel_tile<TILE_ROWS, 1>(p, rows, i0, right, c0, columns, ahead);
    }
  }
}

template <class To, class From>
HYDRA_INLINE To bits_of(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  __builtin_memcpy(&result, &value, sizeof(To));
  return result;
}

struct Bf16 {
  static HYDRA_INLINE float widened(uint16_t bits) { return bits_of<float>(uint32_t(bits) << 16); }

  // To the nearest, ties to even; NaN stays NaN.
  static HYDRA_INLINE uint16_t narrowed(float value) {
    const uint32_t bits = bits_of<uint32_t>(value);
    return static_cast<uint16_t>(value != value ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
};

// VECTOR_BYTES says which instructions there are: in C++ GCC 12 defines no __AVX2__ after `#pragma GCC target`.
struct Fp16 {
  static HYDRA_INLINE float widened(uint16_t bits) {
#if VECTOR_BYTES >= 32
    return _cvtsh_ss(bits);
#else
    const uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
    const uint32_t normal = (exponent + (exponent == 31 ? 224 : 112)) << 23 | fraction << 13;
    const uint32_t small = bits_of<uint32_t>(fraction * 0x1p-24f);
    return bits_of<float>(sign | (exponent == 0 ? small : normal));
#endif
  }

  // To the nearest, ties to even; from 65520 on infinity; NaN stays NaN.
  static HYDRA_INLINE uint16_t narrowed(float value) {
#if VECTOR_BYTES >= 32
    return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
#else
    const uint32_t bits = bits_of<uint32_t>(value), size = bits & 0x7fffffff, sign = bits >> 16 & 0x8000;
    // 1/2 has the last place of fp16's subnormal numbers, so that the addition rounds to it.
    const uint32_t small = bits_of<uint32_t>(bits_of<float>(size) + 0.5f) - bits_of<uint32_t>(0.5f);
    const uint32_t normal = ((size + 0xfff + (size >> 13 & 1)) >> 13) - (112 << 10);
    const uint32_t result = size > 0x7f800000 ? 0x7e00 : size >= 0x477ff000 ? 0x7c00 : size < 0x38800000 ? small : normal;
    return static_cast<uint16_t>(sign | result);
#endif
  }
};

template <class D>
void widen_rows(const Widen& w) {
  for (int64_t i = 0; i < w.rows; ++i) {
    const uint16_t* in = w.in + i * w.ld_in;
    float* out = w.out + i * w.ld_out;
    int64_t c = 0;
#if VECTOR_BYTES >= 32  // the compiler finds no vectors of fp16 by itself
    for (; std::is_same_v<D, Fp16> && c + 8 <= w.columns; c += 8)
      _mm256_storeu_ps(out + c, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + c))));
#endif
    for (; c < w.columns; ++c) out[c] = D::widened(in[c]);
  }
}

void run_widen(const Widen& w) {
  if (w.dtype == Low::fp16) widen_rows<Fp16>(w);
  else widen_rows<Bf16>(w);
}

template <class D, bool ROW, bool BASE>
void narrow_rows(const Narrow& n) {
  for (int64_t i = 0; i < n.rows; ++i) {
    const float *in = n.in + i * n.ld_in, *row = n.row;
    const uint16_t* base = n.base + i * n.ld_base;
    uint16_t* out = n.out + i * n.ld_out;
    int64_t c = 0;
#if VECTOR_BYTES >= 32
    for (; std::is_same_v<D, Fp16> && c + 8 <= n.columns; c += 8) {
      __m256 sum = _mm256_loadu_ps(in + c);
      if (ROW) sum = _mm256_add_ps(sum, _mm256_loadu_ps(row + c));
      if (BASE) sum = _mm256_add_ps(sum, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(base + c))));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + c), _mm256_cvtps_ph(sum, _MM_FROUND_TO_NEAREST_INT));
    }
#endif
#pragma GCC ivdep  // out may be base itself
    for (; c < n.columns; ++c)
      out[c] = D::narrowed(in[c] + (ROW ? row[c] : 0) + (BASE ? D::widened(base[c]) : 0));
  }
}

template <class D>
void narrow_all(const Narrow& n) {
  if (n.row && n.base) narrow_rows<D, true, true>(n);
  else if (n.row) narrow_rows<D, true, false>(n);
  else if (n.base) narrow_rows<D, false, true>(n);
  else narrow_rows<D, false, false>(n);
}

void run_narrow(const Narrow& n) {
  if (n.dtype == Low::fp16) narrow_all<Fp16>(n);
  else narrow_all<Bf16>(n);
}

void run_pair(const Pair& pair) {
  for (int64_t p = 0; p < pair.rows; p += 2) {
    const uint16_t *even = pair.in + p * pair.ld_in, *odd = even + pair.ld_in;
    uint32_t* out = pair.out + p / 2 * pair.ld_out;
    if (p + 1 < pair.rows)
      for (int64_t c = 0; c < pair.columns; ++c) out[c] = even[c] | uint32_t(odd[c]) << 16;
    else
      for (int64_t c = 0; c < pair.columns; ++c) out[c] = even[c];
  }
}

void run_split(const Split& s) {
  uint32_t rests = 0;
  for (int64_t i = 0; i < s.size; ++i) {
    s.hi[i] = Bf16::narrowed(s.in[i]);
    s.lo[i] = Bf16::narrowed(s.in[i] - Bf16::widened(s.hi[i]));
    rests |= s.lo[i] & 0x7fff;
  }
  *s.exact = rests == 0;
}

// Philox works on words of 32 bits, each in the lower half of 64: what the upper half holds is never read.
constexpr int COUNTERS = VECTOR_BYTES / 8;  // at a time
using Words = Vector<uint64_t, COUNTERS>;
constexpr uint64_t LOW = 0xFFFFFFFF;

// The whole products of the lower halves.
HYDRA_INLINE Words widening_product(Words words, uint64_t factor) {
#if VECTOR_BYTES == 64
  return (Words)_mm512_mul_epu32((__m512i)words, _mm512_set1_epi64(factor));
#elif VECTOR_BYTES == 32
  return (Words)_mm256_mul_epu32((__m256i)words, _mm256_set1_epi64x(factor));
#else
  return (words & LOW) * factor;
#endif
}

void run_keep(const Keep& k) {
  constexpr int CHAINS = 4;  // independent ones, since a round waits for the one before
  const int64_t groups = (k.columns + 3) / 4;
  Words lane;
  for (int l = 0; l < COUNTERS; ++l) lane[l] = l;
  for (int64_t i = 0; i < k.rows; ++i)
    for (int64_t g = 0; g < groups; g += CHAINS * COUNTERS) {
      Words c0[CHAINS], c1[CHAINS], c2[CHAINS] = {}, c3[CHAINS] = {};
      for (int j = 0; j < CHAINS; ++j) {
        c0[j] = lane + static_cast<uint64_t>(k.first / 4 + g + j * COUNTERS);
        c1[j] = Words{} + static_cast<uint64_t>(k.row + i);
      }
      uint32_t low = static_cast<uint32_t>(k.seed), high = static_cast<uint32_t>(k.seed >> 32);
      for (int round = 0; round < 10; ++round) {
        for (int j = 0; j < CHAINS; ++j) {
          const Words a = widening_product(c0[j], 0xD2511F53), b = widening_product(c2[j], 0xCD9E8D57);
          c0[j] = (b >> 32) ^ c1[j] ^ low, c1[j] = b;
          c2[j] = (a >> 32) ^ c3[j] ^ high, c3[j] = a;
        }
        low += 0x9E3779B9, high += 0xBB67AE85;
      }
      uint32_t four[CHAINS * COUNTERS];
      for (int j = 0; j < CHAINS; ++j) {
        const auto kept = [&](Words word, int place) { return (Words)((word & LOW) >= k.threshold) & (uint64_t(1) << 8 * place); };
        const Words bytes = kept(c0[j], 0) | kept(c1[j], 1) | kept(c2[j], 2) | kept(c3[j], 3);
        for (int l = 0; l < COUNTERS; ++l) four[j * COUNTERS + l] = static_cast<uint32_t>(bytes[l]);
      }
      const int64_t left = k.columns - 4 * g;
      __builtin_memcpy(k.out + i * k.columns + 4 * g, four, left < static_cast<int64_t>(sizeof(four)) ? left : sizeof(four));
    }
}

template <class T>
void run_masked(const Masked<T>& m) {
  for (int64_t i = 0; i < m.rows; ++i) {
    const T* in = m.in + i * m.ld_in;
    const uint8_t* keep = m.keep + i * m.ld_keep;
    T* out = m.out + i * m.ld_out;
#pragma GCC ivdep
    for (int64_t c = 0; c < m.columns; ++c) out[c] = keep[c] ? in[c] : T(0);
  }
}

}  // namespace
}  // namespace hydra::cpu

#define HYDRA_DEFINE(ISA)                                                    \
  namespace hydra::cpu::ISA {                                                \
  void run(const Dots<float>& product) { run_dots(product); }               \
  void run(const Dots<double>& product) { run_dots(product); }              \
  void run(const Combine<float>& product) { run_combine(product); }         \
  void run(const Combine<double>& product) { run_combine(product); }        \
  int64_t lanes() { return FLOATS; }                                        \
  void run(const Pack& copy) { run_pack(copy); }                            \
  void run(const Panels& product) { run_panels(product); }                  \
  void run(const Widen& copy) { run_widen(copy); }                          \
  void run(const Narrow& copy) { run_narrow(copy); }                        \
  void run(const Pair& copy) { run_pair(copy); }                            \
  void run(const Split& parts) { run_split(parts); }                        \
  void run(const Keep& mask) { run_keep(mask); }                            \
  void run(const Masked<uint16_t>& copy) { run_masked(copy); }              \
  void run(const Masked<uint32_t>& copy) { run_masked(copy); }              \
  void run(const Masked<uint64_t>& copy) { run_masked(copy); }              \
  }
