// Memory of the CPU steps: matrices that are read, and buffers of one pass.
#pragma once

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/ScalarType.h>

#include <algorithm>
#include <limits>

namespace hydra::cpu {

// t as contiguous memory, with torch's lazy negation carried out.
inline at::Tensor own(const at::Tensor& t) {
  return t.defined() ? (t.is_neg() ? t.resolve_neg() : t).contiguous() : t;
}

// t as contiguous memory of T.
template <class T>
at::Tensor in(const at::Tensor& t) {
  constexpr auto dtype = c10::CppTypeToScalarType<T>::value;
  if (!t.defined() || t.scalar_type() == dtype) return own(t);  // Tensor::to would be a dispatch even for nothing
  return own(t).to(dtype);
}

// A matrix with contiguous rows: t itself where it has them, else a copy.
template <class T>
struct Rows {
  at::Tensor owner;
  const T* data = nullptr;
  int64_t stride = 0;

  Rows() = default;
  explicit Rows(const at::Tensor& t) {
    if (!t.defined()) return;
    owner = (t.size(1) <= 1 || t.stride(1) == 1) && !t.is_neg() ? t : own(t);
    data = owner.const_data_ptr<T>();
    stride = owner.stride(0);
  }
  const T* row(int64_t i) const { return data + i * stride; }
};

template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : memory_(c10::GetCPUAllocator()->allocate(size * sizeof(T))) {
    // As torch fills its own memory: NaN in a result shows that something was read before it was written.
    const auto& context = at::globalContext();
    if (context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory())
      std::fill_n(data(), size, std::numeric_limits<T>::quiet_NaN());
  }
  T* data() const { return static_cast<T*>(memory_.get()); }

 private:
  at::DataPtr memory_;
};

}  // namespace hydra::cpu
