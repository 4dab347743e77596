// Kernels for AVX-512 with dot products of bfloat16.
#include "isa/avx512_bf16.h"

namespace moh {
namespace {

struct NoSession {
  NoSession() {}  // not trivial, so that an unused one is no warning
};

}  // namespace

const Kernels& avx512_bf16_kernels() {
  static const Kernels table = PairKernels<Avx512BFloat16, Tile<Avx512BFloat16>, NoSession>::table("avx512_bf16");
  return table;
}

}  // namespace moh
