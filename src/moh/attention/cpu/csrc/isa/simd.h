// Vectors of `Lanes` floats in the compiler's own vector types, so that one text compiles for every instruction set.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>
#include <utility>

namespace moh {

// GCC ignores a vector size that depends on a template argument, so each size is a struct of its own.
template <int Lanes>
struct Vectors;
template <>
struct Vectors<4> {
  typedef float Floats __attribute__((vector_size(16)));
  typedef uint32_t Words __attribute__((vector_size(16)));
  typedef int32_t Ints __attribute__((vector_size(16)));
  typedef uint16_t Shorts __attribute__((vector_size(8)));
  typedef int8_t Bytes __attribute__((vector_size(4)));
};
template <>
struct Vectors<8> {
  typedef float Floats __attribute__((vector_size(32)));
  typedef uint32_t Words __attribute__((vector_size(32)));
  typedef int32_t Ints __attribute__((vector_size(32)));
  typedef uint16_t Shorts __attribute__((vector_size(16)));
  typedef int8_t Bytes __attribute__((vector_size(8)));
};
template <>
struct Vectors<16> {
  typedef float Floats __attribute__((vector_size(64)));
  typedef uint32_t Words __attribute__((vector_size(64)));
  typedef int32_t Ints __attribute__((vector_size(64)));
  typedef uint16_t Shorts __attribute__((vector_size(32)));
  typedef int8_t Bytes __attribute__((vector_size(16)));
};

// Two neighbouring bfloat16, at any address; the first is in the low half. The conversion to float only moves the bits.
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
  using Ints = typename Vectors<Lanes>::Ints;
  using Bytes = typename Vectors<Lanes>::Bytes;
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
  // x - 0 is x for every x, so it compiles to a broadcast; x + 0 would turn -0 into 0 and cost an addition.
  [[gnu::always_inline]] static Floats set(float x) { return x - Floats{}; }
  [[gnu::always_inline]] static Words bits(Floats x) { return reinterpret_cast<Words>(x); }
  [[gnu::always_inline]] static Floats floats(Words x) { return reinterpret_cast<Floats>(x); }

  [[gnu::always_inline]] static Words widen(const void* p) {
    Shorts x;
    std::memcpy(&x, p, sizeof x);
    return __builtin_convertvector(x, Words);
  }
  [[gnu::always_inline]] static Floats load(const c10::BFloat16* p) { return floats(widen(p) << 16); }
  [[gnu::always_inline]] static Floats load(const int8_t* p) {
    struct [[gnu::packed, gnu::may_alias]] At {
      Bytes x;
    };
    const At* at = reinterpret_cast<const At*>(p);
    Ints x;
#if defined(__x86_64__)
    if constexpr (Lanes > 4)  // All but the portable kernels have this instruction, in place of which GCC 12 writes ten.
      asm("vpmovsxbd %1, %0" : "=v"(x) : "m"(*at));
    else
#endif
      x = __builtin_convertvector(at->x, Ints);
    return __builtin_convertvector(x, Floats);
  }
  // The exponent's bias is 15 in float16 and 127 in float32. Once the fields are in place, a product with
  // 2^(127 - 15) corrects it, for denormals too; infinity and NaN (0x7c00 and above) get the largest exponent.
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

  // A constant that is opaque to GCC, so that a loop keeps it in a register instead of reading it from memory at each
  // use; a maximum with it is then one instruction.
  [[gnu::always_inline]] static Floats held(float x) {
    Floats constant = set(x);
#if defined(__x86_64__)
    asm("" : "+v"(constant));
#endif
    return constant;
  }

  // 2^x for x <= 127, with a relative error below 2.2e-7 from -126 up; NaN stays NaN. With n the integer nearest to x
  // and f = x - n in [-1/2, 1/2], it is p(f) 2^n. p is the minimax polynomial of degree 5 with p(0) = 1, so that 2^0 is
  // exactly 1. The exponent field of 2^n is n + 127, and for n = -127 that is the float 0: all x that round to -127 or
  // less, -inf included, give exactly 0. Construct it before a loop, which then has its constants in registers.
  class Exp2 {
   public:
    // GCC compiles an implicit constructor without the instruction set of the pragma, so this one is written out. All
    // powers of two can be had of `unit` times x; this one is for a unit of 1.
    [[gnu::always_inline]] explicit Exp2(float /*unit*/ = 1)
        : lowest_(held(-127.0f)), round_(held(kRound)), c5_(held(0.001326472731307149f)),
          c4_(held(0.009671512991189957f)), c3_(held(0.05550733581185341f)), c2_(held(0.24022242426872253f)),
          c1_(held(0.6931470036506653f)), c0_(held(1.0f)) {}

    [[gnu::always_inline]] Floats operator()(Floats x) const {
      x = max(lowest_, x);  // A NaN in second place is kept, and below -127 the exponent field would wrap.
      const Floats shifted = x + round_;
      const Floats f = x - (shifted - round_);
      const Floats f2 = f * f;
      const Floats p = ((c5_ * f + c4_) * f2 + (c3_ * f + c2_)) * f2 + (c1_ * f + c0_);
      return p * floats(bits(shifted) << 23);
    }

   private:
    Floats lowest_, round_, c5_, c4_, c3_, c2_, c1_, c0_;
  };

  // 2^(unit x) that will be rounded to bfloat16: p of degree 3 has a relative error below 1.1e-4, a twentieth of what
  // rounding adds. Products with the unit, which is positive, are part of additions that are there anyway.
  class Exp2ToRound {
   public:
    [[gnu::always_inline]] explicit Exp2ToRound(float unit = 1)
        : unit_(held(unit)), lowest_(held(-127.0f / unit)), round_(held(kRound)), c3_(held(0.05500885f)),
          c2_(held(0.24221095f)), c1_(held(0.69328293f)), c0_(held(1.0f)) {}

    [[gnu::always_inline]] Floats operator()(Floats x) const {
      x = max(lowest_, x);
      const Floats shifted = unit_ * x + round_;
      const Floats f = unit_ * x - (shifted - round_);
      return (((c3_ * f + c2_) * f + c1_) * f + c0_) * floats(bits(shifted) << 23);
    }

   private:
    Floats unit_, lowest_, round_, c3_, c2_, c1_, c0_;
  };

  // Whether any lane of a comparison's result is set.
  [[gnu::always_inline]] static bool any(Ints mask) {
    uint64_t words[sizeof mask / 8], all = 0;
    std::memcpy(words, &mask, sizeof mask);
    for (const uint64_t word : words) all |= word;
    return all != 0;
  }

  // The sums over the lanes of each of v[0], ..., v[Lanes - 1]; v is overwritten.
  [[gnu::always_inline]] static Floats sums(Floats* v) {
#pragma GCC unroll 4
    for (int width = Lanes; width > 1; width /= 2)
#pragma GCC unroll 8
      for (int i = 0; i < width / 2; ++i) v[i] = add_neighbours(v[2 * i], v[2 * i + 1]);
    return v[0];
  }

  // Adds neighbours of (a, b): [a0 + a1, a2 + a3, ..., b0 + b1, ...].
  [[gnu::always_inline]] static Floats add_neighbours(Floats a, Floats b) {
    return pick<0, 2>(a, b, Every()) + pick<1, 2>(a, b, Every());
  }

  // Turns rows into columns: first within quarters of 4 numbers, where x86 shuffles cheapest, then by whole quarters.
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
  // 1.5 * 2^23 + 127. Floats of this size are whole numbers, so adding it rounds x and leaves n + 127 in the low bits.
  static constexpr float kRound = 12583039.0f;

  // Numbers First, First + Step, ... of the 2 * Lanes numbers in (a, b).
  template <int First, int Step, int... I>
  [[gnu::always_inline]] static Floats pick(Floats a, Floats b, std::integer_sequence<int, I...>) {
    return shuffle<(First + Step * I)...>(a, b);
  }
  // Each quarter of 4 becomes [a_First, b_First, a_Second, b_Second].
  template <int First, int Second>
  [[gnu::always_inline]] static Floats quarters(Floats a, Floats b) {
    return from_quarters<First, Second>(a, b, Every());
  }
  template <int First, int Second, int... I>
  [[gnu::always_inline]] static Floats from_quarters(Floats a, Floats b, std::integer_sequence<int, I...>) {
    return shuffle<(I / 4 * 4 + (I % 4 < 2 ? First : Second) + I % 2 * Lanes)...>(a, b);
  }
  // Each quarter of 4 becomes [a_First, a_First+1, b_First, b_First+1]: halves of quarters.
  template <int First>
  [[gnu::always_inline]] static Floats halves(Floats a, Floats b) {
    return from_halves<First>(a, b, Every());
  }
  template <int First, int... I>
  [[gnu::always_inline]] static Floats from_halves(Floats a, Floats b, std::integer_sequence<int, I...>) {
    return shuffle<(I / 4 * 4 + First + I % 2 + I % 4 / 2 * Lanes)...>(a, b);
  }
  // In rows that are `Size` apart, swaps the upper row's odd blocks of `Size` numbers with the lower row's even ones.
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
