// The kernels for processors with a matrix unit (AMX): those of avx512_bf16.cpp with the products of attention and
// projections on its tiles. Decoding and the gradients of weights stay on the vectors.
//
// Tests run the same kernels on imitated tiles too (amx_imitated.cpp), and `amx_works` checks a product on the processor
// itself before they are used.
#include "isa/avx512_bf16.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>

#include "isa/amx.h"

namespace moh {

#if !__has_include(<amxbf16intrin.h>)  // The assembler next to GCC 10 and older may not know the instructions.

bool amx_works() { return false; }
const Kernels& amx_kernels() { return avx512_bf16_kernels(); }

#else

namespace {

// Written in assembly because GCC's intrinsics don't accept a template argument as the tile's number.
struct Registers {
  template <int T>
  static void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
  }
  template <int T>
  static void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
  }
  template <int T>
  static void store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
  }
  template <int C, int A, int B>
  static void dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
};

// Each thread configures its tiles and releases them afterwards, since other libraries use tiles of other shapes.
class Session {
 public:
  Session() {
    alignas(64) Form form{};
    form.palette = 1;
    for (int t = 0; t < 8; ++t) form.rows[t] = 16, form.bytes[t] = 64;
    asm volatile("ldtilecfg %0" ::"m"(form));
  }
  ~Session() { asm volatile("tilerelease"); }
  Session(const Session&) = delete;

 private:
  struct Form {
    uint8_t palette, first_row, unused[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  };
  static_assert(sizeof(Form) == 64);
};

// Linux grants tiles to a process only on request (ARCH_REQ_XCOMP_PERM for the state component XTILEDATA).
bool permitted() {
  constexpr long kRequest = 0x1023, kTiles = 18;
  return syscall(SYS_arch_prctl, kRequest, kTiles) == 0;
}

bool multiplies_right() {
  using Isa = Avx512BFloat16;
  using Tiled = TiledProduct<Isa, Registers>;
  constexpr int64_t kHeight = 32, kDepth = 32;
  Bf16x2 a[kHeight * kDepth];
  float b[kDepth * Tiled::kWidth], tiled[kHeight * Tiled::kWidth], vectors[kHeight * Tiled::kWidth];
  // The numbers are small and whole, so the sums are exact in any order of additions.
  const auto two = [](int64_t i) {
    const c10::BFloat16 low(static_cast<float>(i % 7 - 3)), high(static_cast<float>(i % 5 - 2));
    return Bf16x2{low.x | uint32_t{high.x} << 16};
  };
  for (int64_t i = 0; i < kHeight * kDepth; ++i) a[i] = two(i);
  for (int64_t i = 0; i < kDepth * Tiled::kWidth; ++i) b[i] = static_cast<float>(two(3 * i + i / 11));
  const auto into = [&](float* c, auto product) {
    using Product = decltype(product);
    Product::template multiply<Tiled::Into::kSet>(kHeight, a, kDepth, 1, b, Tiled::kWidth, kDepth, c, Tiled::kWidth);
    Product::template multiply<Tiled::Into::kAdd, 1>(kHeight / 2, a, kDepth, 1, b, Tiled::kWidth, kDepth, c,
                                                     Tiled::kWidth);
  };
  const Session session;
  into(tiled, Tiled());
  into(vectors, VectorProduct<Isa>());
  return std::memcmp(tiled, vectors, sizeof tiled) == 0;
}

}  // namespace

bool amx_works() {
  static const bool works = permitted() && multiplies_right();
  return works;
}

const Kernels& amx_kernels() {
  using Isa = Avx512BFloat16;
  static const Kernels table = Bf16x2Kernels<Isa, TiledProduct<Isa, Registers>, Session>::table("amx");
  return table;
}

#endif

}  // namespace moh

#include "isa/target_end.h"
