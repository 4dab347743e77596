// The kernels for AVX-512, which has 32 registers of 16 floats.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2"))), apply_to = function)
#endif
#include "isa/avx512.h"
#include "kernels/table.h"

namespace moh {

const Kernels& avx512_kernels() {
  static const Kernels table = kernels<Avx512>("avx512");
  return table;
}

}  // namespace moh

#include "isa/target_end.h"
