// Decoding from a bfloat16 cache by AVX-512's dot products of bfloat16: the numbers of the cache are never converted.
//
// A Bf16x2 holds two neighbours of the width for the scores, and two keys for the outputs: their rows are interleaved
// in registers. The weights are rounded to bfloat16, their totals are not.
#pragma once

#include <immintrin.h>

#include "kernels/decode.h"

namespace moh {

template <class Isa>
struct Bf16x2Decode : Decode<Isa, c10::BFloat16> {
  using T = c10::BFloat16;
  using Base = Decode<Isa, T>;
  using S = typename Base::S;
  using Floats = typename Base::Floats;
  using Base::kTile;
  using Base::L;
  static_assert(L == 16 && kTile % (2 * L) == 0);

  static bool handles(const Problem& p) { return p.width % 2 == 0 && p.k.token % 2 == 0; }
  static int64_t scratch(const Problem&, int64_t rows) { return rows * (kTile + kTile / 2 + 1); }

  static void run(const Problem& p, const Rows& rows, int64_t key_begin, int64_t key_end, const Partial& to,
                  float* scratch) {
    const int64_t Dv = p.value_width, R = rows.count;
    float* scores = scratch;                                             // [R, kTile]
    Bf16x2* weights = reinterpret_cast<Bf16x2*>(scores + R * kTile);     // [R, kTile / 2]
    float* rescale = reinterpret_cast<float*>(weights + R * kTile / 2);  // [R]
    const int32_t group = static_cast<int32_t>(p.group);
    std::fill_n(to.max, R, -kInfinity);
    std::fill_n(to.total, R, 0.0f);
    std::fill_n(to.sum, R * Dv, 0.0f);
    for (int64_t first = key_begin; first < key_end; first += kTile) {
      const int64_t loaded = std::min(kTile, key_end - first);
      const Bf16x2* keys = reinterpret_cast<const Bf16x2*>(at<T>(p.k, rows.batch, rows.kv_head, first));
      const T* values = at<T>(p.v, rows.batch, rows.kv_head, first);
      for (int64_t r = 0; r < R; ++r) {
        const int64_t token = rows.index[r] / group, head = rows.kv_head * group + rows.index[r] % group;
        const Bf16x2* q = reinterpret_cast<const Bf16x2*>(at<T>(p.q, rows.batch, head, token));
        float* s = scores + r * kTile;
        Base::meanwhile(Base::next_rows(p.k, p.width, rows, first + kTile, key_end, r, R), [&](const auto& prefetch) {
          score(prefetch, q, keys, p.k.token / 2, loaded, p.width / 2, p.scale * kLog2e, s);
        });
        Base::hide_row(p, rows.batch, head, token, first, loaded, s);
        rescale[r] = Base::softmax(s, loaded, to.max + r, to.total + r);
        for (int64_t n = 0; n < loaded; n += 2 * L) {
          const Floats second = n + L < loaded ? S::load(s + n + L) : Floats{};
          const __m512bh both = _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(second),
                                                    reinterpret_cast<__m512>(S::load(s + n)));
          std::memcpy(weights + r * kTile / 2 + n / 2, &both, sizeof both);
        }
      }
      int64_t r = 0;
      const auto add = [&](auto number) {
        constexpr int N = decltype(number)::value;
        for (; r + N <= R; r += N)
          Base::meanwhile(Base::next_rows(p.v, Dv, rows, first + kTile, key_end, r, /*parts=*/1),
                          [&](const auto& prefetch) {
                            add_values<N>(prefetch, weights + r * kTile / 2, values, p.v.token, loaded, Dv, rescale + r,
                                          to.sum + r * Dv);
                          });
      };
      add(std::integral_constant<int, 4>());  // This many rows share the loads of values.
      add(std::integral_constant<int, 2>());
      add(std::integral_constant<int, 1>());
    }
  }

 private:
  [[gnu::always_inline]] static Floats pick(Floats a, __m512i which, Floats b) {
    return reinterpret_cast<Floats>(
        _mm512_permutex2var_ps(reinterpret_cast<__m512>(a), which, reinterpret_cast<__m512>(b)));
  }
  [[gnu::always_inline]] static Floats first_of(const Bf16x2* from, int64_t count) {
    return reinterpret_cast<Floats>(_mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << count) - 1), from));
  }

  template <class Prefetcher>
  static void score(const Prefetcher& prefetch, const Bf16x2* q, const Bf16x2* keys, int64_t stride, int64_t count,
                    int64_t width, float scale, float* scores) {
    const int64_t whole = width / L * L, rest = width - whole;
    int64_t n = 0;
    for (; n + L <= count; n += L) {
      Floats sums[L];
#pragma GCC unroll 4
      for (int i = 0; i < L; i += 4) {  // Four keys share the loads of the query.
        const Bf16x2* k = keys + (n + i) * stride;
        for (int j = 0; j < 4; ++j) prefetch(n + i + j);
        Floats a{}, b{}, c{}, d{};
        for (int64_t x = 0; x < whole; x += L) {
          const Floats qx = S::load(q + x);
          a = Isa::dot(a, qx, S::load(k + x));
          b = Isa::dot(b, qx, S::load(k + stride + x));
          c = Isa::dot(c, qx, S::load(k + 2 * stride + x));
          d = Isa::dot(d, qx, S::load(k + 3 * stride + x));
        }
        if (rest > 0) {
          const Floats qx = first_of(q + whole, rest);
          a = Isa::dot(a, qx, first_of(k + whole, rest));
          b = Isa::dot(b, qx, first_of(k + stride + whole, rest));
          c = Isa::dot(c, qx, first_of(k + 2 * stride + whole, rest));
          d = Isa::dot(d, qx, first_of(k + 3 * stride + whole, rest));
        }
        sums[i] = a, sums[i + 1] = b, sums[i + 2] = c, sums[i + 3] = d;
      }
      S::store(scores + n, scale * S::sums(sums));
    }
    for (; n < count; ++n) {
      Floats a{};
      for (int64_t x = 0; x < whole; x += L) a = Isa::dot(a, S::load(q + x), S::load(keys + n * stride + x));
      if (rest > 0) a = Isa::dot(a, first_of(q + whole, rest), first_of(keys + n * stride + whole, rest));
      scores[n] = scale * S::sum(a);
    }
  }

  // sum [N, Dv] = rescale * sum + weights [N, count] V [count, Dv]; rows of weights are kTile / 2 apart.
  template <int N, class Prefetcher>
  static void add_values(const Prefetcher& prefetch, const Bf16x2* weights, const T* values, int64_t stride,
                         int64_t count, int64_t Dv, const float* rescale, float* sum) {
    int64_t d = 0;
    // Whole rows at a time are read faster, but with four rows the sums would not fit into the registers.
    if constexpr (N <= 2)
      for (; d + 8 * L <= Dv; d += 8 * L)
        add_part<N, 4>(prefetch, weights, values + d, stride, count, ~0u, rescale, sum + d, Dv);
    for (; d + 4 * L <= Dv; d += 4 * L)
      add_part<N, 2>(prefetch, weights, values + d, stride, count, ~0u, rescale, sum + d, Dv);
    for (; d + 2 * L <= Dv; d += 2 * L)
      add_part<N, 1>(prefetch, weights, values + d, stride, count, ~0u, rescale, sum + d, Dv);
    if (d == Dv) return;
    const int64_t rest = Dv - d;
    float last[N * 2 * L] = {};
    for (int r = 0; r < N; ++r) std::copy_n(sum + r * Dv + d, rest, last + r * 2 * L);
    add_part<N, 1>(prefetch, weights, values + d, stride, count, (1u << rest) - 1, rescale, last, 2 * L);
    for (int r = 0; r < N; ++r) std::copy_n(last + r * 2 * L, rest, sum + r * Dv + d);
  }

  // The same for V times 32 numbers of each row; `mask` has a bit for each of the last 32 that exists.
  template <int N, int V, class Prefetcher>
  static void add_part(const Prefetcher& prefetch, const Bf16x2* weights, const T* values, int64_t stride,
                       int64_t count, uint32_t mask, const float* rescale, float* sum, int64_t sum_stride) {
    // Interleaving works within quarters: numbers 8 g + i go to `low` and 8 g + 4 + i to `high` (i < 4). The sums are
    // kept in that order meanwhile.
    const __m512i to_low = _mm512_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    const __m512i to_high = _mm512_setr_epi32(4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    const __m512i to_first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i to_second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    Floats low[N][V], high[N][V];
#pragma GCC unroll 4
    for (int r = 0; r < N; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) {
        const float* at = sum + r * sum_stride + 2 * j * L;
        const Floats first = rescale[r] * S::load(at), second = rescale[r] * S::load(at + L);
        low[r][j] = pick(first, to_low, second);
        high[r][j] = pick(first, to_high, second);
      }
    const auto add = [&](int64_t n, auto has_second) {
      prefetch(n);
      if (decltype(has_second)::value) prefetch(n + 1);
      const T* row = values + n * stride;
      Floats a[V], b[V];
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) {
        const __mmask32 known = j + 1 < V ? ~0u : mask;
        const __m512i x = _mm512_maskz_loadu_epi16(known, row + 2 * j * L);
        const __m512i y =
            decltype(has_second)::value ? _mm512_maskz_loadu_epi16(known, row + stride + 2 * j * L) : __m512i{};
        a[j] = reinterpret_cast<Floats>(_mm512_unpacklo_epi16(x, y));
        b[j] = reinterpret_cast<Floats>(_mm512_unpackhi_epi16(x, y));
      }
#pragma GCC unroll 4
      for (int r = 0; r < N; ++r) {
        const Floats w = VectorProduct<Isa>::spread(weights[r * kTile / 2 + n / 2]);
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) {
          low[r][j] = Isa::dot(low[r][j], w, a[j]);
          high[r][j] = Isa::dot(high[r][j], w, b[j]);
        }
      }
    };
    int64_t n = 0;
    for (; n + 2 <= count; n += 2) add(n, std::true_type());
    if (n < count) add(n, std::false_type());
#pragma GCC unroll 4
    for (int r = 0; r < N; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) {
        float* at = sum + r * sum_stride + 2 * j * L;
        S::store(at, pick(low[r][j], to_first, high[r][j]));
        S::store(at + L, pick(low[r][j], to_second, high[r][j]));
      }
  }
};

}  // namespace moh
