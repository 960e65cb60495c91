// x as the parallel branch reads it under input dropout: x' = mask * x, made block by block where x is read, never stored.
// Where elements are kept or dropped, the scale 1/(1-p) is A_down's, which stands beside x' and beside its mask everywhere.
#pragma once

#include <cmath>

#include "../operands.h"
#include "small.h"

namespace hydra::cpu {

template <class E>
class InputDropout {
 public:
  InputDropout(const Operands& op, int64_t K) : K_(K), scale_(1 / (1 - op.input_p)) {
    if (op.input_seed.defined()) {
      seed_ = static_cast<uint64_t>(op.input_seed.item<int64_t>()), from_seed_ = true;
      threshold_ = static_cast<uint64_t>(std::nearbyint(std::ldexp(op.input_p, 32)));
    } else if (op.input_mask.defined() && op.input_mask.scalar_type() == at::kBool) {
      owner_ = own(op.input_mask), flags_ = reinterpret_cast<const uint8_t*>(owner_.const_data_ptr<bool>());
    } else if (op.input_mask.defined()) {
      owner_ = in<E>(op.input_mask), values_ = owner_.const_data_ptr<E>();
    }
  }

  bool on() const { return from_seed_ || flags_ || values_; }
  // What A_down is multiplied with wherever it stands beside x' or beside the mask.
  double scale() const { return scale_; }

  // mask * v for columns [first, last) of rows [row, row + rows) of the whole: v and out begin at the first of the rows, and
  // out may be v. 1/(1-p) is left out.
  void apply(const E* v, int64_t ld_v, int64_t row, int64_t rows, int64_t first, int64_t last, E* out, int64_t ld_out) const {
    if (values_) {
      for (int64_t m = 0; m < rows; ++m)
        for (int64_t c = first; c < last; ++c) out[m * ld_out + c] = v[m * ld_v + c] * values_[(row + m) * K_ + c];
      return;
    }
    const uint8_t* keep = flags_ ? flags_ + row * K_ : nullptr;
    int64_t ld = K_, begin = 0;
    if (from_seed_) {
      begin = first / 4 * 4, ld = last - begin;
      uint8_t* made = Scratch<uint8_t, 0>::of(rows * ld);
      run(Keep{row, rows, begin, ld, seed_, threshold_, made});
      keep = made;
    }
    using Bits = std::conditional_t<sizeof(E) == 2, uint16_t, std::conditional_t<sizeof(E) == 4, uint32_t, uint64_t>>;
    run(Masked<Bits>{rows, last - first, reinterpret_cast<const Bits*>(v) + first, ld_v, keep + first - begin, ld,
                     reinterpret_cast<Bits*>(out) + first, ld_out});
  }

  // x' of whole rows, in scratch memory, in rows of K.
  const E* rows(const E* x, int64_t ld_x, int64_t row, int64_t count) const {
    E* out = Scratch<E, 4>::of(count * K_);
    apply(x, ld_x, row, count, 0, K_, out, K_);
    return out;
  }

 private:
  int64_t K_;
  double scale_;
  bool from_seed_ = false;
  uint64_t seed_ = 0, threshold_ = 0;
  at::Tensor owner_;
  const uint8_t* flags_ = nullptr;
  const E* values_ = nullptr;
};

}  // namespace hydra::cpu
