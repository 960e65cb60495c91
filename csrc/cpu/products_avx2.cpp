#if defined(__x86_64__) && defined(__GNUC__)
#include <cstdint>
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define VECTOR_BYTES 32
#include "products_impl.h"

HYDRA_DEFINE(avx2)
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
