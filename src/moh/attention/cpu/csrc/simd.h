// Vectors of `Lanes` floats by the compiler's own vector types, so that one text serves every instruction set.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>

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

  // 2^x for x <= 127, within 1e-7 of it; 0 below -126, NaN for NaN. A polynomial of degree 5 (minimax on [-1/2, 1/2],
  // relative error 7.5e-8) times a power of two that is added to the exponent's bits.
  [[gnu::always_inline]] static Floats exp2(Floats x) {
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the lowest bits
    const Floats shifted = (x < -126.0f ? set(-126.0f) : x) + kRound;
    const Floats f = (x < -126.0f ? set(-126.0f) : x) - (shifted - kRound);
    Floats p = set(1.3276472454890609e-3f);
    p = p * f + 9.675541892647743e-3f;
    p = p * f + 5.550713092088699e-2f;
    p = p * f + 2.4022120237350464e-1f;
    p = p * f + 6.931469440460205e-1f;
    p = p * f + 1.0000001192092896f;
    const Floats scaled = floats(bits(p) + (bits(shifted) << 23));
    return x < -126.0f ? Floats{} : scaled;
  }
};

}  // namespace moh
