// Products of a bfloat16 matrix with a few vectors by dot products of two numbers at a time: nothing is converted.
#pragma once

#include <algorithm>
#include <cstring>

#include "kernels/few_tokens.h"

namespace moh {

template <class Isa>
struct Bf16x2FewTokens {
  using T = c10::BFloat16;
  using S = Simd<Isa::kLanes>;
  using Floats = typename S::Floats;
  static constexpr int64_t kNumbers = 2 * Isa::kLanes;  // These many bfloat16 are one vector.

  // As `FewTokens::dot_rows`, with x in bfloat16.
  static void dot_rows(const T* m, int64_t stride, int64_t rows, const T* x, const Segment* segments, int64_t count,
                       float* to) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) dots<4>(m + r * stride, stride, x, segments, count, to + r);
    for (; r < rows; ++r) dots<1>(m + r * stride, stride, x, segments, count, to + r);
  }

 private:
  template <int N>
  static void dots(const T* m, int64_t stride, const T* x, const Segment* segments, int64_t count, float* to) {
    Floats even[N]{}, odd[N]{};
    for (int64_t s = 0; s < count; ++s) {
      const int64_t end = segments[s].first + segments[s].count;
      int64_t i = segments[s].first;
      for (; i + 2 * kNumbers <= end; i += 2 * kNumbers) {
        const Floats x0 = load(x + i), x1 = load(x + i + kNumbers);
#pragma GCC unroll 4
        for (int r = 0; r < N; ++r) {
          prefetch_lines<2 * kNumbers * sizeof(T)>(m + (r + N) * stride + i);
          even[r] = Isa::dot(even[r], x0, load(m + r * stride + i));
          odd[r] = Isa::dot(odd[r], x1, load(m + r * stride + i + kNumbers));
        }
      }
      for (; i < end; i += kNumbers) {  // What is missing in the last vector counts as zeros, in x and in the matrix.
        const int64_t left = std::min(kNumbers, end - i);
        const Floats last = load_some(x + i, left);
#pragma GCC unroll 4
        for (int r = 0; r < N; ++r) even[r] = Isa::dot(even[r], last, load_some(m + r * stride + i, left));
      }
    }
    for (int r = 0; r < N; ++r) to[r] = S::sum(even[r] + odd[r]);
  }

  [[gnu::always_inline]] static Floats load(const T* p) { return S::load(reinterpret_cast<const Bf16x2*>(p)); }
  [[gnu::always_inline]] static Floats load_some(const T* p, int64_t count) {
    Floats x{};
    std::memcpy(&x, p, static_cast<size_t>(count) * sizeof(T));
    return x;
  }
};

}  // namespace moh
