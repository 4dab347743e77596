// Kernels for AVX-512 with dot products of bfloat16: those of avx512.cpp, but for bfloat16 attention forward and
// bfloat16 projections.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,bmi2")
#ifdef __clang__
#error "this compiler does not take instruction sets from a pragma: use GCC"
#endif
#include <immintrin.h>

#include "avx512.h"
#include "pairs.h"

namespace moh {

struct Avx512BFloat16 : Avx512 {
  using Floats = Simd<kLanes>::Floats;

  // acc + a0 b0 + a1 b1 in every lane.
  [[gnu::always_inline]] static Floats dot(Floats acc, Floats a, Floats b) {
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  // Each lane's two numbers as a pair.
  [[gnu::always_inline]] static Floats pairs(Floats first, Floats second) {
    constexpr auto half = [](int i) { return static_cast<short>(i / 2 + i % 2 * 16); };
    const __m512i order = _mm512_set_epi16(
        half(31), half(30), half(29), half(28), half(27), half(26), half(25), half(24), half(23), half(22), half(21),
        half(20), half(19), half(18), half(17), half(16), half(15), half(14), half(13), half(12), half(11), half(10),
        half(9), half(8), half(7), half(6), half(5), half(4), half(3), half(2), half(1), half(0));
    return reinterpret_cast<Floats>(
        _mm512_permutexvar_epi16(order, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first))));
  }
  // Two rows, number by number; without a second one, zeros.
  static void interleave(const c10::BFloat16* first, const c10::BFloat16* second, int64_t count, Pair* to) {
    using S = Simd<kLanes>;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      const S::Words low = S::widen(first + i), high = second == nullptr ? S::Words{} : S::widen(second + i) << 16;
      S::store(reinterpret_cast<float*>(to + i), S::floats(low | high));
    }
    for (; i < count; ++i) to[i].bits = first[i].x | (second == nullptr ? 0u : uint32_t{second[i].x} << 16);
  }
};

namespace {

using Isa = Avx512BFloat16;
using Attention = Forward<Isa, c10::BFloat16, PairOperands<Isa>>;
using Projections = Project<Isa, c10::BFloat16, PairCells<Isa>>;

bool serves(const Problem& p) { return p.dtype == DType::kBFloat16 && PairOperands<Isa>::serves(p); }
bool serves(const Projection& p) { return p.dtype == DType::kBFloat16 && PairCells<Isa>::serves(p); }

}  // namespace

const Kernels& avx512_bf16_kernels() {
  static const Kernels table = [] {
    Kernels k = avx512_kernels();
    k.name = "avx512_bf16";
    k.forward_scratch = [](const Problem& p, int64_t rows) {
      return serves(p) ? Attention::scratch(p, rows) : avx512_kernels().forward_scratch(p, rows);
    };
    k.forward = [](const Problem& p, const Rows& rows, float* scratch) {
      serves(p) ? Attention::run(p, rows, scratch) : avx512_kernels().forward(p, rows, scratch);
    };
    k.expand = [](const Projection& p, const Rows& tokens, float* scratch) {
      serves(p) ? Projections::expand(p, tokens, scratch) : avx512_kernels().expand(p, tokens, scratch);
    };
    k.sum_heads = [](const Projection& p, const Rows* by_head, int64_t first_token, int64_t tokens,
                     int64_t first_channel, int64_t channels, float* scratch) {
      (serves(p) ? Projections::sum_heads : avx512_kernels().sum_heads)(p, by_head, first_token, tokens, first_channel,
                                                                       channels, scratch);
    };
    k.outer = [](const Projection& p, const void* x, const Rows& tokens, int64_t first_channel, int64_t channels,
                 float* scratch) {
      serves(p) ? Projections::outer(p, static_cast<const c10::BFloat16*>(x), tokens, first_channel, channels, scratch)
                : avx512_kernels().outer(p, x, tokens, first_channel, channels, scratch);
    };
    return k;
  }();
  return table;
}

}  // namespace moh
