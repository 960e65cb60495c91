#if defined(__x86_64__) && defined(__GNUC__)
#include <cstdint>
#include <type_traits>
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,fma,f16c,prefer-vector-width=512")
#endif
#define VECTOR_BYTES 64
#include "products_impl.h"

HYDRA_DEFINE(avx512)
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
