// What the kernels of avx512_bf16.cpp and amx.cpp have in common: dot products of bfloat16, and when they are used.
//
// The pragma sets the instruction set of everything after it, so a source includes this file first, and target_end.h last.
#pragma once

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,bmi2")
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,bmi2"))), apply_to = function)
#endif
#include <immintrin.h>

#include "isa/avx512.h"
#include "kernels/bf16x2_backward.h"
#include "kernels/bf16x2_decode.h"
#include "kernels/bf16x2_few_tokens.h"

namespace moh {

struct Avx512BFloat16 : Avx512 {
  using Floats = Simd<kLanes>::Floats;
  static constexpr bool kDotsBFloat16 = true;

  // acc + a0 b0 + a1 b1 in every lane.
  [[gnu::always_inline]] static Floats dot(Floats acc, Floats a, Floats b) {
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  // Rounds two vectors to bfloat16; lane i holds first[i] in its low half and second[i] in its high half.
  [[gnu::always_inline]] static Floats to_bf16x2(Floats first, Floats second) {
    constexpr auto half = [](int i) { return static_cast<short>(i / 2 + i % 2 * 16); };
    const __m512i order = _mm512_set_epi16(
        half(31), half(30), half(29), half(28), half(27), half(26), half(25), half(24), half(23), half(22), half(21),
        half(20), half(19), half(18), half(17), half(16), half(15), half(14), half(13), half(12), half(11), half(10),
        half(9), half(8), half(7), half(6), half(5), half(4), half(3), half(2), half(1), half(0));
    return reinterpret_cast<Floats>(
        _mm512_permutexvar_epi16(order, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first))));
  }
  // Rounds a vector to 16 neighbouring bfloat16.
  [[gnu::always_inline]] static void round(Floats x, Bf16x2* to) {
    const __m256bh numbers = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(x));
    std::memcpy(to, &numbers, sizeof numbers);
  }
  // Interleaves two rows number by number; a missing second row counts as zeros.
  static void interleave(const c10::BFloat16* first, const c10::BFloat16* second, int64_t count, Bf16x2* to) {
    using S = Simd<kLanes>;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      const S::Words low = S::widen(first + i), high = second == nullptr ? S::Words{} : S::widen(second + i) << 16;
      S::store(reinterpret_cast<float*>(to + i), S::floats(low | high));
    }
    for (; i < count; ++i) to[i].bits = first[i].x | (second == nullptr ? 0u : uint32_t{second[i].x} << 16);
  }
  // The same for `count` rows, two by two, transposed: to [width, kTwos], with zeros for missing rows.
  template <int64_t kTwos>
  static void interleave_transposed(const c10::BFloat16* rows, int64_t stride, int64_t count, int64_t width,
                                    Bf16x2* to) {
    static_assert(kTwos % kLanes == 0);
    for (int64_t n = 0; n < kTwos && 2 * n < count; n += kLanes)
      for (int64_t d = 0; d < width; d += 2 * kLanes) {
        const auto* from = rows + 2 * n * stride + d;
        interleave_square<false>(from, stride, count - 2 * n, width - d, to + d * kTwos + n, kTwos);
        interleave_square<true>(from, stride, count - 2 * n, width - d, to + d * kTwos + n, kTwos);
      }
  }

 private:
  // Of up to 32 rows and 32 places, the first or the last four of each eight places: what unpacking joins in a register.
  template <bool kLast>
  static void interleave_square(const c10::BFloat16* rows, int64_t stride, int64_t count, int64_t width, Bf16x2* to,
                                int64_t to_stride) {
    using S = Simd<kLanes>;
    const __mmask32 places = width >= 2 * kLanes ? ~0u : (1u << width) - 1;
    Floats square[kLanes];
#pragma GCC unroll 16
    for (int64_t i = 0; i < kLanes; ++i) {
      const c10::BFloat16* row = rows + 2 * i * stride;
      const __m512i first = _mm512_maskz_loadu_epi16(2 * i < count ? places : 0, row);
      const __m512i second = _mm512_maskz_loadu_epi16(2 * i + 1 < count ? places : 0, row + stride);
      const __m512i both = kLast ? _mm512_unpackhi_epi16(first, second) : _mm512_unpacklo_epi16(first, second);
      square[i] = reinterpret_cast<Floats>(both);
    }
    S::transpose(square);
#pragma GCC unroll 16
    for (int64_t i = 0; i < kLanes; ++i) {
      const int64_t place = i / 4 * 8 + i % 4 + (kLast ? 4 : 0);
      if (place < width) S::store(reinterpret_cast<float*>(to + place * to_stride), square[i]);
    }
  }
};

// The kernels of avx512.cpp, with attention and projections of bfloat16 replaced where `handles` allows. `Product` does
// their products; decoding and `outer` stay on the vectors. A `Session` lives as long as a task that uses `Product`.
template <class Isa, class Product, class Session>
struct Bf16x2Kernels {
  using Attention = Forward<Isa, c10::BFloat16, Bf16x2Operands<Isa, Product>>;
  using Gradients = Backward<Isa, c10::BFloat16, Bf16x2BackwardOperands<Isa, Product>>;
  using Projections = Project<Isa, c10::BFloat16, Bf16x2Cells<Isa>, Product>;

  static bool handles(const Problem& p) {
    return p.dtype == DType::kBFloat16 && fits_bf16x2(p);
  }
  static bool decodes(const Problem& p) { return p.dtype == DType::kBFloat16 && Bf16x2Decode<Isa>::handles(p); }
  static bool handles(const Projection& p) { return p.dtype == DType::kBFloat16 && Bf16x2Cells<Isa>::handles(p); }

  static int64_t forward_scratch(const Problem& p, int64_t rows) {
    return handles(p) ? Attention::scratch(p, rows) : avx512_kernels().forward_scratch(p, rows);
  }
  static void forward(const Problem& p, const Rows& rows, float* scratch) {
    if (!handles(p)) return avx512_kernels().forward(p, rows, scratch);
    const Session session;
    Attention::run(p, rows, scratch);
  }
  static int64_t backward_scratch(const Problem& p, int64_t rows) {
    return handles(p) ? Gradients::scratch(p, rows) : avx512_kernels().backward_scratch(p, rows);
  }
  static void backward(const Problem& p, const Rows& rows, float* grad_k, float* grad_v, float* scratch) {
    if (!handles(p)) return avx512_kernels().backward(p, rows, grad_k, grad_v, scratch);
    const Session session;
    Gradients::run(p, rows, grad_k, grad_v, scratch);
  }
  static int64_t decode_scratch(const Problem& p, int64_t rows) {
    return decodes(p) ? Bf16x2Decode<Isa>::scratch(p, rows) : avx512_kernels().decode_scratch(p, rows);
  }
  static void decode(const Problem& p, const Rows& rows, int64_t key_begin, int64_t key_end, const Partial& to,
                     float* scratch) {
    (decodes(p) ? Bf16x2Decode<Isa>::run : avx512_kernels().decode)(p, rows, key_begin, key_end, to, scratch);
  }
  static void expand(const Projection& p, const Rows& tokens, float* scratch) {
    if (!handles(p)) return avx512_kernels().expand(p, tokens, scratch);
    const Session session;
    Projections::expand(p, tokens, scratch);
  }
  static void sum_heads(const Projection& p, const Rows* by_head, int64_t first_token, int64_t tokens,
                        int64_t first_channel, int64_t channels, float* scratch) {
    if (!handles(p))
      return avx512_kernels().sum_heads(p, by_head, first_token, tokens, first_channel, channels, scratch);
    const Session session;
    Projections::sum_heads(p, by_head, first_token, tokens, first_channel, channels, scratch);
  }
  static void outer(const Projection& p, const void* x, const Rows& tokens, int64_t first_channel, int64_t channels,
                    float* scratch) {
    if (!handles(p)) return avx512_kernels().outer(p, x, tokens, first_channel, channels, scratch);
    Projections::outer(p, static_cast<const c10::BFloat16*>(x), tokens, first_channel, channels, scratch);
  }
  static void dot_rows(DType dtype, const void* matrix, int64_t stride, int64_t rows, const void* x,
                       const Segment* segments, int64_t count, float* to) {
    if (dtype != DType::kBFloat16)
      return avx512_kernels().dot_rows(dtype, matrix, stride, rows, x, segments, count, to);
    using T = c10::BFloat16;
    Bf16x2FewTokens<Isa>::dot_rows(static_cast<const T*>(matrix), stride, rows, static_cast<const T*>(x), segments,
                                   count, to);
  }

  static Kernels table(const char* name) {
    Kernels k = avx512_kernels();
    k.name = name;
    k.forward_scratch = forward_scratch;
    k.forward = forward;
    k.backward_scratch = backward_scratch;
    k.backward = backward;
    k.decode_scratch = decode_scratch;
    k.decode = decode;
    k.expand = expand;
    k.sum_heads = sum_heads;
    k.outer = outer;
    k.dot_bfloat16 = true;
    k.dot_rows = dot_rows;
    return k;
  }
};

}  // namespace moh
