// The kernels in the compiler's baseline. 4 floats are one register of SSE2 and of NEON.
#include "kernels/table.h"

namespace moh {

struct Portable {
  static constexpr int kLanes = 4;
  static constexpr int kVectors = 2;
  static constexpr int kRows = 4;  // 8 accumulators leave room for products: SSE2 has 16 registers and no FMA.
  static constexpr int64_t kKeyTile = 64;
  static constexpr bool kDotsBFloat16 = false;
};

const Kernels& portable_kernels() {
  static const Kernels table = kernels<Portable>("portable");
  return table;
}

}  // namespace moh
