// Rotary embedding: numbers i and i + D / 2 of a query or key are rotated by its token's angle, given as cosine and sine.
#pragma once

#include <cstdint>

#include "operators/operators.h"

namespace moh {

// Cosines and sines [1 or B, N, D] of the tokens' angles, in x's dtype.
class Angles {
 public:
  Angles(const at::Tensor& cos, const at::Tensor& sin, int64_t batches, int64_t tokens, int64_t width,
         const at::Tensor& x)
      : cos_(checked(cos, batches, tokens, width, x)), sin_(checked(sin, batches, tokens, width, x)), tokens_(tokens),
        width_(width) {}

  // Rotates one head of a token, x [D], in place; in float32.
  template <class T>
  void rotate(int64_t b, int64_t t, T* x) const {
    const int64_t half = width_ / 2;
    const auto of_token = [&](const at::Tensor& angles) {
      return static_cast<const T*>(angles.const_data_ptr()) + ((angles.size(0) == 1 ? 0 : b * tokens_) + t) * width_;
    };
    const T *__restrict cos = of_token(cos_), *__restrict sin = of_token(sin_);
    T *__restrict first = x, *__restrict second = x + half;
    for (int64_t i = 0; i < half; ++i) {
      const float one = static_cast<float>(first[i]), two = static_cast<float>(second[i]);
      first[i] = static_cast<T>(one * static_cast<float>(cos[i]) - two * static_cast<float>(sin[i]));
      second[i] = static_cast<T>(two * static_cast<float>(cos[i + half]) + one * static_cast<float>(sin[i + half]));
    }
  }

 private:
  static at::Tensor checked(const at::Tensor& angles, int64_t batches, int64_t tokens, int64_t width,
                            const at::Tensor& x) {
    TORCH_CHECK_VALUE(angles.dim() == 3 && (angles.size(0) == 1 || angles.size(0) == batches) &&
                          angles.size(1) == tokens && angles.size(2) == width && width % 2 == 0 &&
                          angles.scalar_type() == x.scalar_type(),
                      "cos and sin must be [1 or ", batches, ", ", tokens, ", D = ", width, "] with an even D, got ",
                      angles.sizes());
    return angles.contiguous();
  }

  at::Tensor cos_, sin_;
  int64_t tokens_, width_;
};

}  // namespace moh
