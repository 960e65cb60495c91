// Which instruction set runs: the one that torch uses, so that ATEN_CPU_CAPABILITY sets both.
#include "products.h"

#include <ATen/Version.h>

#include <string>

namespace hydra::cpu {

#define HYDRA_DECLARE(ISA)                   \
  namespace ISA {                            \
  void run(const Dots<float>& product);      \
  void run(const Dots<double>& product);     \
  void run(const Combine<float>& product);   \
  void run(const Combine<double>& product);  \
  int64_t lanes();                           \
  void run(const Pack& copy);                \
  void run(const Panels& product);           \
  void run(const Widen& copy);               \
  void run(const Narrow& copy);              \
  void run(const Pair& copy);                \
  void run(const Split& parts);              \
  void run(const Keep& mask);                \
  void run(const Masked<uint16_t>& copy);    \
  void run(const Masked<uint32_t>& copy);    \
  void run(const Masked<uint64_t>& copy);    \
  }
HYDRA_DECLARE(plain)
#ifdef __x86_64__
HYDRA_DECLARE(avx2)
HYDRA_DECLARE(avx512)
#endif

namespace {

enum class Isa { plain, avx2, avx512 };

Isa isa() {
  static const Isa found = [] {
    const std::string capability = at::get_cpu_capability();
    return capability == "AVX512" ? Isa::avx512 : capability == "AVX2" ? Isa::avx2 : Isa::plain;
  }();
  return found;
}

template <class Product>
void dispatch(const Product& product) {
#ifdef __x86_64__
  switch (isa()) {
    case Isa::avx512: return avx512::run(product);
    case Isa::avx2: return avx2::run(product);
    default: break;
  }
#endif
  plain::run(product);
}

}  // namespace

const char* instructions() {
  return isa() == Isa::avx512 ? "avx512" : isa() == Isa::avx2 ? "avx2" : "plain";
}

int64_t lanes() {
#ifdef __x86_64__
  switch (isa()) {
    case Isa::avx512: return avx512::lanes();
    case Isa::avx2: return avx2::lanes();
    default: break;
  }
#endif
  return plain::lanes();
}

void run(const Dots<float>& product) { dispatch(product); }
void run(const Dots<double>& product) { dispatch(product); }
void run(const Combine<float>& product) { dispatch(product); }
void run(const Combine<double>& product) { dispatch(product); }
void run(const Pack& copy) { dispatch(copy); }
void run(const Panels& product) { dispatch(product); }
void run(const Widen& copy) { dispatch(copy); }
void run(const Narrow& copy) { dispatch(copy); }
void run(const Pair& copy) { dispatch(copy); }
void run(const Split& parts) { dispatch(parts); }
void run(const Keep& mask) { dispatch(mask); }
void run(const Masked<uint16_t>& copy) { dispatch(copy); }
void run(const Masked<uint32_t>& copy) { dispatch(copy); }
void run(const Masked<uint64_t>& copy) { dispatch(copy); }

}  // namespace hydra::cpu
