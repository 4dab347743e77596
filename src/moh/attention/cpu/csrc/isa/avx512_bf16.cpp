// The kernels for AVX-512 with dot products of bfloat16.
#include "isa/avx512_bf16.h"

namespace moh {
namespace {

struct NoSession {
  NoSession() {}  // This is not trivial, so that an unused session causes no warning.
};

}  // namespace

const Kernels& avx512_bf16_kernels() {
  using Isa = Avx512BFloat16;
  static const Kernels table = Bf16x2Kernels<Isa, VectorProduct<Isa>, NoSession>::table("avx512_bf16");
  return table;
}

}  // namespace moh

#include "isa/target_end.h"
