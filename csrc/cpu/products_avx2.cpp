#if defined(__x86_64__) && defined(__GNUC__)
#include <cstdint>
#include <type_traits>
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define VECTOR_BYTES 32
#include "products_impl.h"

HYDRA_DEFINE(avx2)
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
