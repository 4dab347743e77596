// Kernels for AVX-512: 32 registers of 16 floats.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")
#ifdef __clang__
#error "this compiler does not take instruction sets from a pragma: use GCC"
#endif
#include "kernels.h"

namespace moh {

struct Avx512 {
  static constexpr int kLanes = 16;
  static constexpr int kVectors = 2;
  static constexpr int kRows = 12;         // 24 accumulators, 2 vectors of B and 1 number of A: 27 of 32 registers
  static constexpr int64_t kKeyTile = 64;
};

const Kernels& avx512_kernels() {
  static const Kernels table = kernels<Avx512>("avx512");
  return table;
}

}  // namespace moh
