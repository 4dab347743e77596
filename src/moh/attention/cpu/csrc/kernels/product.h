// The small matrix product in which all passes but decoding do their multiplications.
//
// C[i, j] = sum_k A[i, k] B[k, j]: B and C hold the vectors (j is contiguous), A is read one number at a time with any
// strides. Attention uses it with query rows on the lanes (scores, outputs, grad_q) and, backward, with the heads'
// width on the lanes (grad_k, grad_v). Where the processor has dot products of bfloat16, an entry of A may be a Bf16x2,
// which holds k and k + 1, and so is then each lane of B.
#pragma once

#include "isa/simd.h"

namespace moh {

// `Isa` provides kLanes (floats in a register), kVectors (registers that a row of C takes) and kRows (rows of C at
// once: kRows * kVectors accumulators fill the registers that B and A leave); with dot products of bfloat16 also
// dot(acc, a, b). Where `V` is less than kVectors, only the first V vectors of each row of C are computed and written.
template <class Isa>
struct VectorProduct {
  using S = Simd<Isa::kLanes>;
  using Floats = typename S::Floats;
  static constexpr int kWidth = Isa::kLanes * Isa::kVectors;
  static constexpr bool kRowsInOnePiece = false;  // A may have any strides.
  static constexpr int64_t kSide = 1;             // Heights and depths that are multiples of it are fastest.

  [[gnu::always_inline]] static Floats spread(float a) { return S::set(a); }
  [[gnu::always_inline]] static Floats spread(Bf16x2 a) { return S::floats(typename S::Words{} + a.bits); }

  static constexpr int64_t blocks(int64_t rows) { return (rows + kWidth - 1) / kWidth; }
  static constexpr int64_t padded(int64_t width) { return blocks(width) * kWidth; }

  // With X = A B, C becomes X, *rescale X, C + X, or C[:, j] rescale[j] + X (the step of the online softmax).
  enum class Into { kSet, kScaled, kAdd, kRescale };

  template <int V, int N, Into into, class A>
  [[gnu::always_inline]] static void rows(const A* a, int64_t row_stride, int64_t k_stride, const float* b,
                                          int64_t b_stride, int64_t depth, float* c, int64_t c_stride,
                                          const float* rescale, const int32_t* c_rows) {
    Floats acc[N][V];
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) {
        const float* at = c + (c_rows == nullptr ? i : c_rows[i]) * c_stride + j * Isa::kLanes;
        if constexpr (into == Into::kSet || into == Into::kScaled) acc[i][j] = Floats{};
        if constexpr (into == Into::kAdd) acc[i][j] = S::load(at);
        if constexpr (into == Into::kRescale) acc[i][j] = S::load(at) * S::load(rescale + j * Isa::kLanes);
      }
    for (int64_t k = 0; k < depth; ++k) {
      Floats bk[V];
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) bk[j] = S::load(b + k * b_stride + j * Isa::kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) {
        const Floats aik = spread(a[i * row_stride + k * k_stride]);
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) {
          if constexpr (std::is_same_v<A, Bf16x2>)
            acc[i][j] = Isa::dot(acc[i][j], aik, bk[j]);
          else
            acc[i][j] += aik * bk[j];
        }
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) {
        if constexpr (into == Into::kScaled) acc[i][j] *= S::set(*rescale);
        S::store(c + (c_rows == nullptr ? i : c_rows[i]) * c_stride + j * Isa::kLanes, acc[i][j]);
      }
  }

  template <int V, int N, Into into, class A>
  static void remainder(int64_t left, const A* a, int64_t row_stride, int64_t k_stride, const float* b,
                        int64_t b_stride, int64_t depth, float* c, int64_t c_stride, const float* rescale,
                        const int32_t* c_rows) {
    if constexpr (N > 0) {
      if (left == N)
        rows<V, N, into>(a, row_stride, k_stride, b, b_stride, depth, c, c_stride, rescale, c_rows);
      else
        remainder<V, N - 1, into>(left, a, row_stride, k_stride, b, b_stride, depth, c, c_stride, rescale, c_rows);
    }
  }

  // Computes `height` rows of C, each kWidth wide: the first ones, or those that `c_rows` lists.
  template <Into into, int V = Isa::kVectors, class A>
  static void multiply(int64_t height, const A* a, int64_t row_stride, int64_t k_stride, const float* b,
                       int64_t b_stride, int64_t depth, float* c, int64_t c_stride, const float* rescale = nullptr,
                       const int32_t* c_rows = nullptr) {
    const auto at = [&](int64_t i) { return c_rows == nullptr ? c + i * c_stride : c; };
    const auto rows_at = [&](int64_t i) { return c_rows == nullptr ? nullptr : c_rows + i; };
    int64_t i = 0;
    for (; i + Isa::kRows <= height; i += Isa::kRows)
      rows<V, Isa::kRows, into>(a + i * row_stride, row_stride, k_stride, b, b_stride, depth, at(i), c_stride, rescale,
                                rows_at(i));
    remainder<V, Isa::kRows - 1, into>(height - i, a + i * row_stride, row_stride, k_stride, b, b_stride, depth, at(i),
                                       c_stride, rescale, rows_at(i));
  }
};

}  // namespace moh
