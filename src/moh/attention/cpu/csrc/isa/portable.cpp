// Kernels in whatever the compiler's baseline has: 4 floats are one register of SSE2 and of NEON.
#include "kernels/table.h"

namespace moh {

struct Portable {
  static constexpr int kLanes = 4;
  static constexpr int kVectors = 2;
  static constexpr int kRows = 4;  // 8 accumulators: SSE2 has 16 registers and no fused multiply-add
  static constexpr int64_t kKeyTile = 64;
};

const Kernels& portable_kernels() {
  static const Kernels table = kernels<Portable>("portable");
  return table;
}

}  // namespace moh
