// Vectors of 16 bytes, which every x86-64 and every 64-bit ARM processor has.
#define VECTOR_BYTES 16
#include "products_impl.h"

HYDRA_DEFINE(plain)
