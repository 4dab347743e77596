// What a layer computes for a few tokens: products of a matrix with a few vectors, without the columns of inactive heads,
// and an MLP's activation. Reading the matrix is the work.
#pragma once

#include <cmath>

#include "isa/simd.h"
#include "kernels/problem.h"

namespace moh {

// Asks for a row's next `bytes` from p on, a line of the cache at a time. An address behind the end does no harm.
template <int64_t bytes>
[[gnu::always_inline]] inline void prefetch_lines(const void* p) {
  constexpr int64_t kLine = 64;
#pragma GCC unroll 4
  for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(static_cast<const char*>(p) + i);
}

// T is the matrix's type and X that of x.
template <class Isa, class T, class X = float>
struct FewTokens {
  using S = Simd<Isa::kLanes>;
  using Floats = typename S::Floats;
  static constexpr int L = Isa::kLanes;

  // to[r] = the sum of m[r, i] x[i] over the columns i of all segments.
  static void dot_rows(const T* m, int64_t stride, int64_t rows, const X* x, const Segment* segments,
                       int64_t count, float* to) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) dots<4>(m + r * stride, stride, x, segments, count, to + r);
    for (; r < rows; ++r) dots<1>(m + r * stride, stride, x, segments, count, to + r);
  }

 private:
  // N rows share the loads of x. Each has two sums, since an addition to a single one would wait for the one before.
  // The N rows behind are asked for meanwhile: a row is too short for the processor to foresee them.
  template <int N>
  static void dots(const T* m, int64_t stride, const X* x, const Segment* segments, int64_t count, float* to) {
    Floats even[N]{}, odd[N]{};
    float rest[N]{};
    for (int64_t s = 0; s < count; ++s) {
      const int64_t end = segments[s].first + segments[s].count;
      int64_t i = segments[s].first;
      for (; i + 2 * L <= end; i += 2 * L) {
        const Floats x0 = S::load(x + i), x1 = S::load(x + i + L);
#pragma GCC unroll 4
        for (int r = 0; r < N; ++r) {
          prefetch_lines<2 * L * sizeof(T)>(m + (r + N) * stride + i);
          even[r] += x0 * S::load(m + r * stride + i);
          odd[r] += x1 * S::load(m + r * stride + i + L);
        }
      }
      for (; i < end; ++i)
#pragma GCC unroll 4
        for (int r = 0; r < N; ++r) rest[r] += static_cast<float>(x[i]) * static_cast<float>(m[r * stride + i]);
    }
    for (int r = 0; r < N; ++r) to[r] = rest[r] + S::sum(even[r] + odd[r]);
  }
};

template <class Isa>
struct Activations {
  using S = Simd<Isa::kLanes>;
  using Floats = typename S::Floats;
  static constexpr int L = Isa::kLanes;

  // to[i] = activation(x[i]), times factor[i] where there are factors. GELU itself takes the library's erf, a number at a
  // time; the others are x / (1 + e^-z): SiLU with z = x, and GELU by tanh with z = 2 sqrt(2 / pi) (x + 0.044715 x^3), as
  // 1 + tanh(y) = 2 / (1 + e^(-2 y)).
  static void run(Activation kind, const float* x, const float* factor, int64_t count, float* to) {
    if (kind == Activation::kExactGelu) {
      for (int64_t i = 0; i < count; ++i)
        to[i] = 0.5f * x[i] * (1.0f + std::erf(x[i] * 0.7071067811865475f)) * (factor != nullptr ? factor[i] : 1.0f);
      return;
    }
    const typename S::Exp2 exp2;
    const bool cubic = kind == Activation::kGelu;
    const Floats linear = S::set(-kLog2e * (cubic ? 1.5957691216057308f : 1.0f));
    const Floats cube = S::set(cubic ? 0.044715f : 0.0f), one = S::set(1.0f), most = S::set(127.0f);
    for (int64_t i = 0; i < count; i += L) {
      const size_t bytes = static_cast<size_t>(std::min<int64_t>(L, count - i)) * sizeof(float);
      Floats a{}, f = one;
      std::memcpy(&a, x + i, bytes);
      if (factor != nullptr) std::memcpy(&f, factor + i, bytes);
      const Floats power = S::min(linear * a * (one + cube * a * a), most);
      const Floats result = a / (one + exp2(power)) * f;
      std::memcpy(to + i, &result, bytes);
    }
  }
};

}  // namespace moh
