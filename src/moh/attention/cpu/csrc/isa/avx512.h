// What the kernels of avx512.cpp, avx512_bf16.cpp and amx.cpp have in common.
#pragma once

#include <cstdint>

namespace moh {

struct Avx512 {
  static constexpr int kLanes = 16;
  static constexpr int kVectors = 2;
  static constexpr int kRows = 12;         // 24 accumulators, 2 vectors of B and 1 number of A take 27 of 32 registers.
  static constexpr int64_t kKeyTile = 64;
  static constexpr bool kDotsBFloat16 = false;
};

}  // namespace moh
