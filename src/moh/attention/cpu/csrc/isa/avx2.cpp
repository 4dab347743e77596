// The kernels for AVX2 with FMA, which has 16 registers of 8 floats.
#pragma GCC target("avx2,fma,f16c,bmi2")
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi2"))), apply_to = function)
#endif
#include "kernels/table.h"

namespace moh {

struct Avx2 {
  static constexpr int kLanes = 8;
  static constexpr int kVectors = 2;
  static constexpr int kRows = 6;          // 12 accumulators, 2 vectors of B and 1 number of A take 15 of 16 registers.
  static constexpr int64_t kKeyTile = 64;  // 64 keys of width 64 fill half of a 32 KiB L1 cache.
  static constexpr bool kDotsBFloat16 = false;
};

const Kernels& avx2_kernels() {
  static const Kernels table = kernels<Avx2>("avx2");
  return table;
}

}  // namespace moh

#include "isa/target_end.h"
