// The kernels of amx.cpp on tiles in memory, for tests on processors without a matrix unit.
#include "isa/avx512_bf16.h"

#include <c10/util/Exception.h>

#include "isa/amx.h"

namespace moh {
namespace {

constexpr int kSide = 16;
thread_local uint32_t tiles[8][kSide][kSide];
thread_local bool in_session = false;

struct Session {
  Session() {
    in_session = true;
    std::memset(tiles, 0xff, sizeof tiles);  // These are NaN: no task may rely on tiles of the one before.
  }
  ~Session() { in_session = false; }
};

struct Memory {
  template <int T>
  static void zero() {
    std::memset(tiles[T], 0, sizeof tiles[T]);
  }
  template <int T>
  static void load(const void* from, int64_t stride) {
    for (int r = 0; r < kSide; ++r) std::memcpy(tiles[T][r], static_cast<const char*>(from) + r * stride, 4 * kSide);
  }
  template <int T>
  static void store(void* to, int64_t stride) {
    for (int r = 0; r < kSide; ++r) std::memcpy(static_cast<char*>(to) + r * stride, tiles[T][r], 4 * kSide);
  }
  // The order of additions differs from that of the vectors, as a matrix unit's does.
  template <int C, int A, int B>
  static void dot() {
    TORCH_INTERNAL_ASSERT(in_session, "tiles are used outside of a session");
    for (int i = 0; i < kSide; ++i)
      for (int j = 0; j < kSide; ++j) {
        float even = 0, odd = 0;
        for (int k = 0; k < kSide; ++k) {
          const uint32_t a = tiles[A][i][k], b = tiles[B][k][j];
          even += number(a << 16) * number(b << 16);
          odd += number(a & 0xffff0000u) * number(b & 0xffff0000u);
        }
        const float sum = number(tiles[C][i][j]) + (even + odd);
        std::memcpy(&tiles[C][i][j], &sum, sizeof sum);
      }
  }

 private:
  static float number(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }
};

}  // namespace

const Kernels& amx_imitated_kernels() {
  using Isa = Avx512BFloat16;
  static const Kernels table = Bf16x2Kernels<Isa, TiledProduct<Isa, Memory>, Session>::table("amx_imitated");
  return table;
}

}  // namespace moh

#include "isa/target_end.h"
