// Products of a matrix with a few vectors, without the columns of inactive heads. Reading the matrix is the work.
#pragma once

#include "isa/simd.h"
#include "kernels/problem.h"

namespace moh {

template <class Isa, class T>
struct FewTokens {
  using S = Simd<Isa::kLanes>;
  using Floats = typename S::Floats;
  static constexpr int L = Isa::kLanes;

  // to[r] = the sum of m[r, i] x[i] over the columns i of all segments.
  static void dot_rows(const T* m, int64_t stride, int64_t rows, const float* x, const Segment* segments,
                       int64_t count, float* to) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) dots<4>(m + r * stride, stride, x, segments, count, to + r);
    for (; r < rows; ++r) dots<1>(m + r * stride, stride, x, segments, count, to + r);
  }

 private:
  // N rows share the loads of x. Each has two sums, since an addition to a single one would wait for the one before.
  template <int N>
  static void dots(const T* m, int64_t stride, const float* x, const Segment* segments, int64_t count, float* to) {
    Floats even[N]{}, odd[N]{};
    float rest[N]{};
    for (int64_t s = 0; s < count; ++s) {
      const int64_t end = segments[s].first + segments[s].count;
      int64_t i = segments[s].first;
      for (; i + 2 * L <= end; i += 2 * L) {
        const Floats x0 = S::load(x + i), x1 = S::load(x + i + L);
#pragma GCC unroll 4
        for (int r = 0; r < N; ++r) {
          even[r] += x0 * S::load(m + r * stride + i);
          odd[r] += x1 * S::load(m + r * stride + i + L);
        }
      }
      for (; i < end; ++i)
#pragma GCC unroll 4
        for (int r = 0; r < N; ++r) rest[r] += x[i] * static_cast<float>(m[r * stride + i]);
    }
    for (int r = 0; r < N; ++r) to[r] = rest[r] + S::sum(even[r] + odd[r]);
  }
};

}  // namespace moh
