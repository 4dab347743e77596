// Products of bfloat16 on the tiles of the processor's matrix unit (AMX), 16 rows of 64 bytes each.
//
// A tile of A holds 16 rows of 16 Bf16x2, a tile of B a Bf16x2 for each of 16 lanes in each of 16 rows, a tile of C 16
// rows of 16 sums. The vectors compute what does not fill a tile (the last rows, the last of the depth), and products
// whose rows of A do not lie in one piece.
#pragma once

#include <algorithm>
#include <type_traits>

#include "kernels/product.h"

namespace moh {

// `Tiles` provides eight tiles with zero<T>(), load<T>(from, bytes between rows), store<T>(to, bytes between rows) and
// dot<C, A, B>(), which adds the product of A and B to C.
template <class Isa, class Tiles>
struct TiledProduct : VectorProduct<Isa> {
  using Vectors = VectorProduct<Isa>;
  using S = typename Vectors::S;
  using Into = typename Vectors::Into;
  using Vectors::kWidth;
  static constexpr bool kRowsInOnePiece = true;
  static constexpr int64_t kSide = 16;
  static_assert(Isa::kLanes == kSide && Isa::kVectors <= 2);

  // The same as `VectorProduct::multiply`, whose order of additions it does not keep.
  template <Into into, int V = Isa::kVectors>
  static void multiply(int64_t height, const Bf16x2* a, int64_t row_stride, int64_t k_stride, const float* b,
                       int64_t b_stride, int64_t depth, float* c, int64_t c_stride, const float* rescale = nullptr,
                       const int32_t* c_rows = nullptr) {
    const int64_t rows = height / kSide * kSide, deep = depth / kSide * kSide;
    if (k_stride != 1 || rows == 0 || deep == 0 || (c_rows != nullptr && into != Into::kAdd))
      return Vectors::template multiply<into, V>(height, a, row_stride, k_stride, b, b_stride, depth, c, c_stride,
                                                 rescale, c_rows);
    if (c_rows != nullptr) {
      scatter<V>(rows, a, row_stride, b, b_stride, deep, c, c_stride, c_rows);
    } else {
      if constexpr (into == Into::kRescale) scale<V>(rows, c, c_stride, rescale);
      constexpr bool kFresh = into == Into::kSet || into == Into::kScaled;
      int64_t i = 0;
      for (; i + 2 * kSide <= rows; i += 2 * kSide)
        block<2, V, kFresh>(a + i * row_stride, row_stride, b, b_stride, deep, c + i * c_stride, c_stride);
      if (i < rows) block<1, V, kFresh>(a + i * row_stride, row_stride, b, b_stride, deep, c + i * c_stride, c_stride);
    }
    if (deep < depth)
      Vectors::template multiply<Into::kAdd, V>(rows, a + deep, row_stride, 1, b + deep * b_stride, b_stride,
                                                depth - deep, c, c_stride, nullptr, c_rows);
    if constexpr (into == Into::kScaled) {
      float factor[kSide];
      std::fill_n(factor, kSide, *rescale);
      for (int j = 0; j < V; ++j) scale<1>(rows, c + j * kSide, c_stride, factor);
    }
    if (rows < height)
      Vectors::template multiply<into, V>(height - rows, a + rows * row_stride, row_stride, 1, b, b_stride, depth,
                                          c_rows == nullptr ? c + rows * c_stride : c, c_stride, rescale,
                                          c_rows == nullptr ? nullptr : c_rows + rows);
  }

 private:
  template <int V>
  static void scale(int64_t rows, float* c, int64_t c_stride, const float* factors) {
    typename S::Floats factor[V];
    for (int j = 0; j < V; ++j) factor[j] = S::load(factors + j * kSide);
    for (int64_t i = 0; i < rows; ++i)
      for (int j = 0; j < V; ++j) {
        float* at = c + i * c_stride + j * kSide;
        S::store(at, S::load(at) * factor[j]);
      }
  }

  // Computes 16 N rows of C, 16 V wide; `fresh` ones start from 0. Tiles 0 to 3 hold C, 4 and 5 A, 6 and 7 B: with
  // 2 x 2 tiles of C, every loaded tile of A and B is used twice.
  template <int N, int V, bool fresh>
  static void block(const Bf16x2* a, int64_t row_stride, const float* b, int64_t b_stride, int64_t depth, float* c,
                    int64_t c_stride) {
    const auto a_at = [&](int i, int64_t k) { return a + i * kSide * row_stride + k; };
    const auto b_at = [&](int j, int64_t k) { return b + k * b_stride + j * kSide; };
    const auto c_at = [&](int i, int j) { return c + i * kSide * c_stride + j * kSide; };
    const int64_t a_bytes = 4 * row_stride, b_bytes = 4 * b_stride, c_bytes = 4 * c_stride;
    const auto begin = [&](auto tile, int i, int j) {
      if constexpr (fresh)
        Tiles::template zero<decltype(tile)::value>();
      else
        Tiles::template load<decltype(tile)::value>(c_at(i, j), c_bytes);
    };
    begin(Number<0>(), 0, 0);
    if constexpr (V == 2) begin(Number<1>(), 0, 1);
    if constexpr (N == 2) begin(Number<2>(), 1, 0);
    if constexpr (N == 2 && V == 2) begin(Number<3>(), 1, 1);
    for (int64_t k = 0; k < depth; k += kSide) {
      Tiles::template load<6>(b_at(0, k), b_bytes);
      Tiles::template load<4>(a_at(0, k), a_bytes);
      Tiles::template dot<0, 4, 6>();
      if constexpr (V == 2) {
        Tiles::template load<7>(b_at(1, k), b_bytes);
        Tiles::template dot<1, 4, 7>();
      }
      if constexpr (N == 2) {
        Tiles::template load<5>(a_at(1, k), a_bytes);
        Tiles::template dot<2, 5, 6>();
        if constexpr (V == 2) Tiles::template dot<3, 5, 7>();
      }
    }
    Tiles::template store<0>(c_at(0, 0), c_bytes);
    if constexpr (V == 2) Tiles::template store<1>(c_at(0, 1), c_bytes);
    if constexpr (N == 2) Tiles::template store<2>(c_at(1, 0), c_bytes);
    if constexpr (N == 2 && V == 2) Tiles::template store<3>(c_at(1, 1), c_bytes);
  }

  // Adds to the rows of C that `c_rows` lists, 16 at a time.
  template <int V>
  static void scatter(int64_t rows, const Bf16x2* a, int64_t row_stride, const float* b, int64_t b_stride,
                      int64_t depth, float* c, int64_t c_stride, const int32_t* c_rows) {
    alignas(64) float sums[kSide * V * kSide];
    for (int64_t i = 0; i < rows; i += kSide) {
      block<1, V, true>(a + i * row_stride, row_stride, b, b_stride, depth, sums, V * kSide);
      for (int64_t r = 0; r < kSide; ++r)
        for (int j = 0; j < V; ++j) {
          float* at = c + c_rows[i + r] * c_stride + j * kSide;
          S::store(at, S::load(at) + S::load(sums + (r * V + j) * kSide));
        }
    }
  }

  template <int T>
  using Number = std::integral_constant<int, T>;
};

}  // namespace moh
