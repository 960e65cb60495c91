// Memory of the CPU steps: matrices that are read, buffers of one pass, and fresh outputs.
#pragma once

#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <limits>

namespace hydra::cpu {

// A matrix whose rows are contiguous, t itself where its rows are.
template <class T>
struct Rows {
  at::Tensor owner;
  const T* data = nullptr;
  int64_t stride = 0;

  Rows() = default;
  explicit Rows(const at::Tensor& t) {
    if (!t.defined()) return;
    owner = t.size(1) <= 1 || t.stride(1) == 1 ? t : t.contiguous();
    data = owner.const_data_ptr<T>();
    stride = owner.stride(0);
  }
  const T* row(int64_t i) const { return data + i * stride; }
};

template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : memory_(c10::GetCPUAllocator()->allocate(size * sizeof(T))) {
    // As torch does with its own: whoever reads what nobody wrote, shows it.
    const auto& context = at::globalContext();
    if (context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory())
      std::fill_n(data(), size, std::numeric_limits<T>::quiet_NaN());
  }
  T* data() const { return static_cast<T*>(memory_.get()); }

 private:
  at::DataPtr memory_;
};

// A new [rows, columns] of like's dtype. Where the system leaves it to the program, a large one is asked for in huge
// pages: the first touch of 20 MB in small pages takes the time of a tenth of a GEMM.
inline at::Tensor fresh(int64_t rows, int64_t columns, const at::Tensor& like) {
  at::Tensor t = at::empty({rows, columns}, like.options());
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t PAGE = 4096, LARGE = 4 << 20;
  if (t.nbytes() >= LARGE) {
    const auto first = (reinterpret_cast<uintptr_t>(t.mutable_data_ptr()) + PAGE - 1) / PAGE * PAGE;
    const auto last = (reinterpret_cast<uintptr_t>(t.mutable_data_ptr()) + t.nbytes()) / PAGE * PAGE;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a hint: where it fails, nothing changes
  }
#endif
  return t;
}

}  // namespace hydra::cpu
