// Vectors of `Lanes` floats by the compiler's own vector types, so that one text serves every instruction set.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>
#include <utility>

namespace moh {

// GCC ignores a vector size that depends on a template's argument, hence one struct for each.
template <int Lanes>
struct Vectors;
template <>
struct Vectors<4> {
  typedef float Floats __attribute__((vector_size(16)));
  typedef uint32_t Words __attribute__((vector_size(16)));
  typedef int32_t Ints __attribute__((vector_size(16)));
  typedef uint16_t Shorts __attribute__((vector_size(8)));
};
template <>
struct Vectors<8> {
  typedef float Floats __attribute__((vector_size(32)));
  typedef uint32_t Words __attribute__((vector_size(32)));
  typedef int32_t Ints __attribute__((vector_size(32)));
  typedef uint16_t Shorts __attribute__((vector_size(16)));
};
template <>
struct Vectors<16> {
  typedef float Floats __attribute__((vector_size(64)));
  typedef uint32_t Words __attribute__((vector_size(64)));
  typedef int32_t Ints __attribute__((vector_size(64)));
  typedef uint16_t Shorts __attribute__((vector_size(32)));
};

// Two bfloat16 next to each other, anywhere in memory; as a float they are nothing but its bits.
struct [[gnu::packed, gnu::may_alias]] Bf16x2 {
  uint32_t bits;
  explicit operator float() const {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }
};

template <int Lanes>
struct Simd : Vectors<Lanes> {
  using Floats = typename Vectors<Lanes>::Floats;
  using Words = typename Vectors<Lanes>::Words;
  using Shorts = typename Vectors<Lanes>::Shorts;
  using Every = std::make_integer_sequence<int, Lanes>;

  [[gnu::always_inline]] static Floats load(const float* p) {
    Floats x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  [[gnu::always_inline]] static Floats load(const Bf16x2* p) {
    Floats x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  [[gnu::always_inline]] static void store(float* p, Floats x) { std::memcpy(p, &x, sizeof x); }
  [[gnu::always_inline]] static Floats set(float x) { return x - Floats{}; }  // not x + 0, which turns -0 into 0 and so costs an addition
  [[gnu::always_inline]] static Words bits(Floats x) { return reinterpret_cast<Words>(x); }
  [[gnu::always_inline]] static Floats floats(Words x) { return reinterpret_cast<Floats>(x); }

  [[gnu::always_inline]] static Words widen(const void* p) {
    Shorts x;
    std::memcpy(&x, p, sizeof x);
    return __builtin_convertvector(x, Words);
  }
  [[gnu::always_inline]] static Floats load(const c10::BFloat16* p) { return floats(widen(p) << 16); }
  // Moves the fields into place and rescales the exponent, which makes denormals right too; infinities and NaN keep
  // the largest exponent.
  [[gnu::always_inline]] static Floats load(const c10::Half* p) {
    const Words half = widen(p);
    const Words magnitude = (half & 0x7fffu) << 13;
    const Words finite = bits(floats(magnitude) * 0x1p112f);
    const Words special = magnitude | 0x7f800000u;
    return floats((magnitude >= 0x0f800000u ? special : finite) | ((half & 0x8000u) << 16));
  }

  [[gnu::always_inline]] static Floats max(Floats a, Floats b) { return a > b ? a : b; }
  [[gnu::always_inline]] static Floats min(Floats a, Floats b) { return a < b ? a : b; }

  [[gnu::always_inline]] static float sum(Floats x) {
    float total = 0;
    for (int i = 0; i < Lanes; ++i) total += x[i];
    return total;
  }
  [[gnu::always_inline]] static float largest(Floats x) {
    float most = x[0];
    for (int i = 1; i < Lanes; ++i) most = x[i] > most ? x[i] : most;
    return most;
  }

  // A constant that GCC may not look through: it keeps it in a register during a loop, instead of reading it from
  // memory wherever it is used, and then a maximum with it is one instruction.
  [[gnu::always_inline]] static Floats held(float x) {
    Floats constant = set(x);
#if defined(__x86_64__)
    asm("" : "+v"(constant));
#endif
    return constant;
  }

  // 2^x for x <= 127, within 2.2e-7 of it; 0 for x <= -127 and hardly more up to -126, NaN for NaN. A polynomial
  // (minimax on [-1/2, 1/2] with p(0) = 1) times a power of two whose exponent, biased as floats have it, is x rounded:
  // for -127 that is exactly 0. To be made before a loop, which then finds its constants in registers.
  class Exp2 {
   public:
    // Written out: GCC gives a constructor of its own making no instruction set.
    [[gnu::always_inline]] Exp2()
        : lowest_(held(-127.0f)), round_(held(12583039.0f)), c5_(held(0.001326472731307149f)),
          c4_(held(0.009671512991189957f)), c3_(held(0.05550733581185341f)), c2_(held(0.24022242426872253f)),
          c1_(held(0.6931470036506653f)), c0_(held(1.0f)) {}

    [[gnu::always_inline]] Floats operator()(Floats x) const {
      x = max(lowest_, x);  // if the second is NaN it stays
      const Floats shifted = x + round_;
      const Floats f = x - (shifted - round_);
      const Floats f2 = f * f;
      const Floats p = ((c5_ * f + c4_) * f2 + (c3_ * f + c2_)) * f2 + (c1_ * f + c0_);
      return p * floats(bits(shifted) << 23);
    }

   private:
    Floats lowest_;
    Floats round_;  // 1.5 * 2^23 + 127: adding it leaves the nearest integer and the exponent's bias in the lowest bits
    Floats c5_, c4_, c3_, c2_, c1_, c0_;
  };

  // The sums over the lanes of the vectors v[0], v[1], ..., v[Lanes - 1], which are lost.
  [[gnu::always_inline]] static Floats sums(Floats* v) {
#pragma GCC unroll 4
    for (int width = Lanes; width > 1; width /= 2)
#pragma GCC unroll 8
      for (int i = 0; i < width / 2; ++i) v[i] = add_neighbours(v[2 * i], v[2 * i + 1]);
    return v[0];
  }

  // Neighbours of (a, b) added up: [a0 + a1, a2 + a3, ..., b0 + b1, ...].
  [[gnu::always_inline]] static Floats add_neighbours(Floats a, Floats b) {
    return pick<0, 2>(a, b, Every()) + pick<1, 2>(a, b, Every());
  }

  // Rows become columns: in each quarter of 4 numbers first, where x86 shuffles at the least cost, then whole quarters.
  [[gnu::always_inline]] static void transpose(Floats (&v)[Lanes]) {
#pragma GCC unroll 4
    for (int m = 0; m < Lanes; m += 4) {
      const Floats low01 = quarters<0, 1>(v[m], v[m + 1]), low23 = quarters<0, 1>(v[m + 2], v[m + 3]);
      const Floats high01 = quarters<2, 3>(v[m], v[m + 1]), high23 = quarters<2, 3>(v[m + 2], v[m + 3]);
      v[m] = halves<0>(low01, low23);
      v[m + 1] = halves<2>(low01, low23);
      v[m + 2] = halves<0>(high01, high23);
      v[m + 3] = halves<2>(high01, high23);
    }
    if constexpr (Lanes > 4) exchange<4>(v);
    if constexpr (Lanes > 8) exchange<8>(v);
  }

 private:
  // Numbers First, First + Step, ... of the 2 * Lanes in (a, b).
  template <int First, int Step, int... I>
  [[gnu::always_inline]] static Floats pick(Floats a, Floats b, std::integer_sequence<int, I...>) {
    return shuffle<(First + Step * I)...>(a, b);
  }
  // In each quarter of 4: [a_First, b_First, a_Second, b_Second].
  template <int First, int Second>
  [[gnu::always_inline]] static Floats quarters(Floats a, Floats b) {
    return from_quarters<First, Second>(a, b, Every());
  }
  template <int First, int Second, int... I>
  [[gnu::always_inline]] static Floats from_quarters(Floats a, Floats b, std::integer_sequence<int, I...>) {
    return shuffle<(I / 4 * 4 + (I % 4 < 2 ? First : Second) + I % 2 * Lanes)...>(a, b);
  }
  // In each quarter of 4: [a_First, a_First + 1, b_First, b_First + 1].
  template <int First>
  [[gnu::always_inline]] static Floats halves(Floats a, Floats b) {
    return from_halves<First>(a, b, Every());
  }
  template <int First, int... I>
  [[gnu::always_inline]] static Floats from_halves(Floats a, Floats b, std::integer_sequence<int, I...>) {
    return shuffle<(I / 4 * 4 + First + I % 2 + I % 4 / 2 * Lanes)...>(a, b);
  }
  // Of rows `Size` apart: the second of each two blocks of `Size` numbers of one against the first of the other.
  template <int Size>
  [[gnu::always_inline]] static void exchange(Floats (&v)[Lanes]) {
#pragma GCC unroll 16
    for (int m = 0; m < Lanes; ++m) {
      if (m & Size) continue;
      const Floats a = v[m], b = v[m + Size];
      v[m] = from_blocks<Size, 0>(a, b, Every());
      v[m + Size] = from_blocks<Size, Size>(a, b, Every());
    }
  }
  template <int Size, int First, int... I>
  [[gnu::always_inline]] static Floats from_blocks(Floats a, Floats b, std::integer_sequence<int, I...>) {
    return shuffle<(I / (2 * Size) * 2 * Size + First + I % Size + I / Size % 2 * Lanes)...>(a, b);
  }
  template <int... I>
  [[gnu::always_inline]] static Floats shuffle(Floats a, Floats b) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, I...);
#else
    constexpr typename Vectors<Lanes>::Ints which = {I...};
    return __builtin_shuffle(a, b, which);
#endif
  }
};

}  // namespace moh
