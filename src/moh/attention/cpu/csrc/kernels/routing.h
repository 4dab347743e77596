// Scores of a router, x W', for a few outputs: they lie on the lanes, and x is read number by number, once per vector.
#pragma once

#include "kernels/block.h"

namespace moh {

template <class Isa>
struct RouterScores {
  using S = Simd<Isa::kLanes>;
  using Product = VectorProduct<Isa>;
  static constexpr int64_t L = Isa::kLanes;
  static constexpr int64_t kTokens = 48;  // This many tokens are converted to floats at a time; kRows divides it.

  static int64_t padded(int64_t outputs) { return (outputs + L - 1) / L * L; }

  // Adds the rows of one matrix [rows, channels] as outputs `first`, ... to panels [padded / L, channels, L], which
  // begin as zeros.
  template <class T>
  static void pack(const T* matrix, int64_t stride, int64_t rows, int64_t channels, int64_t first, float* to) {
    for (int64_t r = 0; r < rows; ++r) {
      float* at = to + (first + r) / L * L * channels + (first + r) % L;
      for (int64_t c = 0; c < channels; ++c) at[c * L] = static_cast<float>(matrix[r * stride + c]);
    }
  }

  // Writes [tokens, padded(outputs)]; `scratch` has kTokens * channels floats, which T = float does not need.
  template <class T>
  static void run(const T* x, int64_t tokens, int64_t channels, const float* panels, int64_t outputs, float* to,
                  float* scratch) {
    const int64_t wide = padded(outputs);
    for (int64_t first = 0; first < tokens; first += kTokens) {
      const int64_t count = std::min(kTokens, tokens - first);
      const float* rows;
      if constexpr (std::is_same_v<T, float>) {
        rows = x + first * channels;
      } else {
        get<Isa>(x + first * channels, count * channels, scratch);
        rows = scratch;
      }
      for (int64_t o = 0; o < wide; o += L)
        Product::template multiply<Product::Into::kSet, 1>(count, rows, channels, 1, panels + o * channels, L, channels,
                                                           to + first * wide + o, wide);
    }
  }
};

}  // namespace moh
