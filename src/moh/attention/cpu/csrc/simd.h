// Vectors of `Lanes` floats by the compiler's own vector types, so that one text serves every instruction set.
#pragma once

#include <cstring>
#include <utility>

#include "problem.h"

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

template <int Lanes>
struct Simd : Vectors<Lanes> {
  using Floats = typename Vectors<Lanes>::Floats;
  using Words = typename Vectors<Lanes>::Words;
  using Shorts = typename Vectors<Lanes>::Shorts;

  [[gnu::always_inline]] static Floats load(const float* p) {
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

  // 2^x for x <= 127, within 2e-7 of it; 0 for x <= -127 and hardly more up to -126, NaN for NaN. A polynomial
  // (minimax on [-1/2, 1/2] with p(0) = 1) times a power of two that is added to the exponent's bits, which for -127
  // leaves exactly 0.
  [[gnu::always_inline]] static Floats exp2(Floats x) {
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the lowest bits
    x = max(set(-127.0f), x);              // if the second is NaN it stays
    const Floats shifted = x + kRound;
    const Floats f = x - (shifted - kRound);
    Floats p = set(0.001326472731307149f);
    p = p * f + 0.009671512991189957f;
    p = p * f + 0.05550733581185341f;
    p = p * f + 0.24022242426872253f;
    p = p * f + 0.6931470036506653f;
    p = p * f + 1.0f;
    const Floats scaled = floats(bits(p) + (bits(shifted) << 23));
    return x == x ? scaled : x;  // the sum of bits could make a number of a NaN
  }

  // One of two vectors' numbers by turns, from their first or second half: [a0, b0, a1, b1, ...].
  [[gnu::always_inline]] static Floats interleave_first(Floats a, Floats b) { return interleave<0>(a, b); }
  [[gnu::always_inline]] static Floats interleave_second(Floats a, Floats b) { return interleave<Lanes / 2>(a, b); }

  // Neighbours of (a, b) added up: [a0 + a1, a2 + a3, ..., b0 + b1, ...].
  [[gnu::always_inline]] static Floats add_pairs(Floats a, Floats b) {
    return pick<0, 2>(a, b, std::make_integer_sequence<int, Lanes>()) +
           pick<1, 2>(a, b, std::make_integer_sequence<int, Lanes>());
  }

  // Rows become columns. Each round deals the cards of the two halves by turns; log2(Lanes) rounds transpose.
  [[gnu::always_inline]] static void transpose(Floats (&v)[Lanes]) {
#pragma GCC unroll 4
    for (int round = 1; round < Lanes; round *= 2) {
      Floats dealt[Lanes];
#pragma GCC unroll 8
      for (int i = 0; i < Lanes / 2; ++i) {
        dealt[2 * i] = interleave_first(v[i], v[i + Lanes / 2]);
        dealt[2 * i + 1] = interleave_second(v[i], v[i + Lanes / 2]);
      }
#pragma GCC unroll 16
      for (int i = 0; i < Lanes; ++i) v[i] = dealt[i];
    }
  }

 private:
  // Numbers First, First + Step, ... of the 2 * Lanes in (a, b).
  template <int First, int Step, int... I>
  [[gnu::always_inline]] static Floats pick(Floats a, Floats b, std::integer_sequence<int, I...>) {
    return shuffle<(First + Step * I)...>(a, b);
  }
  template <int First, int... I>
  [[gnu::always_inline]] static Floats deal(Floats a, Floats b, std::integer_sequence<int, I...>) {
    return shuffle<(First + I / 2 + (I % 2) * Lanes)...>(a, b);
  }
  template <int First>
  [[gnu::always_inline]] static Floats interleave(Floats a, Floats b) {
    return deal<First>(a, b, std::make_integer_sequence<int, Lanes>());
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
