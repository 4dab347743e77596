// A few queries against a long cache: the width of a head lies on the lanes, so that keys and values are read once.
//
// A call works through a range of the keys and leaves a partial softmax, so that threads can share one cache.
#pragma once

#include <optional>

#include "kernels/block.h"

namespace moh {

template <class Isa, class T>
struct Decode {
  using S = Simd<Isa::kLanes>;
  using Floats = typename S::Floats;
  static constexpr int L = Isa::kLanes;
  static constexpr int64_t kTile = Isa::kKeyTile;
  static constexpr int kSums = 8;  // This many registers collect a row's weighted values at a time.

  static int64_t scratch(const Problem& p, int64_t rows) {
    return rows * (p.width + kTile) + Copies<Isa, T>::scratch(p, 1);
  }

  static void run(const Problem& p, const Rows& rows, int64_t key_begin, int64_t key_end, const Partial& to,
                  float* scratch) {
    const int64_t D = p.width, Dv = p.value_width, R = rows.count;
    float* queries = scratch;              // [R, D], times the scale and log2(e)
    float* scores = queries + R * D;       // [R, kTile]
    const Copies<Isa, T> copies(p, 1, scores + R * kTile);
    const int32_t group = static_cast<int32_t>(p.group);
    const auto token = [&](int64_t r) { return rows.index[r] / group; };
    const auto head = [&](int64_t r) { return rows.kv_head * group + rows.index[r] % group; };

    for (int64_t r = 0; r < R; ++r) {
      const T* q = at<T>(p.q, rows.batch, head(r), token(r));
      for (int64_t d = 0; d < D; ++d) queries[r * D + d] = p.scale * kLog2e * static_cast<float>(q[d]);
    }
    std::fill_n(to.max, R, -kInfinity);
    std::fill_n(to.total, R, 0.0f);
    std::fill_n(to.sum, R * Dv, 0.0f);
    for (int64_t first = key_begin; first < key_end; first += kTile) {
      const int64_t loaded = std::min(kTile, key_end - first);
      int64_t key_stride, value_stride;
      const float* keys = tile_of<Isa, T>(p.k, rows.batch, rows.kv_head, first, loaded, D, copies.keys, &key_stride);
      for (int64_t r = 0; r < R; ++r)
        meanwhile(next_rows(p.k, D, rows, first + kTile, key_end, r, R), [&](const auto& prefetch) {
          score(prefetch, queries + r * D, keys, key_stride, loaded, D, scores + r * kTile);
        });
      const float* values =
          tile_of<Isa, T>(p.v, rows.batch, rows.kv_head, first, loaded, Dv, copies.values, &value_stride);
      for (int64_t r = 0; r < R; ++r) {
        float* s = scores + r * kTile;
        hide_row(p, rows.batch, head(r), token(r), first, loaded, s);
        const float rescale = softmax(s, loaded, to.max + r, to.total + r);
        meanwhile(next_rows(p.v, Dv, rows, first + kTile, key_end, r, R), [&](const auto& prefetch) {
          add_values<kSums>(prefetch, s, values, value_stride, loaded, Dv, rescale, to.sum + r * Dv);
        });
      }
    }
  }

 protected:
  // The part of the next tile that is prefetched while a row works through this one: each of the `parts` rows takes its
  // share, so that memory is never idle. Rows below 256 bytes are left to the processor, which foresees them.
  static std::optional<Prefetch<T>> next_rows(const View& x, int64_t width, const Rows& rows, int64_t first,
                                              int64_t end, int64_t part, int64_t parts) {
    if (part >= parts || width * sizeof(T) < 256) return std::nullopt;
    return Prefetch<T>(x, width, rows, first, end, part, parts);
  }
  template <class Work>
  static void meanwhile(const std::optional<Prefetch<T>>& next, const Work& work) {
    if (next.has_value())
      work(*next);
    else
      work([](int64_t) {});
  }

  // Calls `prefetch` for every key, in order, except for the last ones where count is not a multiple of L.
  template <class Prefetcher>
  static void score(const Prefetcher& prefetch, const float* q, const float* keys, int64_t stride, int64_t count,
                    int64_t D, float* scores) {
    const int64_t whole = D / L * L;
    int64_t n = 0;
    for (; n + L <= count; n += L) {
      Floats sums[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; i += 4) {  // Four keys share the loads of the query.
        const float* k = keys + (n + i) * stride;
        for (int j = 0; j < 4; ++j) prefetch(n + i + j);
        Floats a{}, b{}, c{}, d{};
        for (int64_t x = 0; x < whole; x += L) {
          const Floats qx = S::load(q + x);
          a += qx * S::load(k + x);
          b += qx * S::load(k + stride + x);
          c += qx * S::load(k + 2 * stride + x);
          d += qx * S::load(k + 3 * stride + x);
        }
        sums[i] = a, sums[i + 1] = b, sums[i + 2] = c, sums[i + 3] = d;
      }
      S::store(scores + n, S::sums(sums));
      if (whole < D)
        for (int i = 0; i < L; ++i)
          for (int64_t x = whole; x < D; ++x) scores[n + i] += q[x] * keys[(n + i) * stride + x];
    }
    for (; n < count; ++n) {
      Floats a{};
      for (int64_t x = 0; x < whole; x += L) a += S::load(q + x) * S::load(keys + n * stride + x);
      float total = S::sum(a);
      for (int64_t x = whole; x < D; ++x) total += q[x] * keys[n * stride + x];
      scores[n] = total;
    }
  }

  static void hide_row(const Problem& p, int64_t batch, int64_t head, int64_t token, int64_t first, int64_t count,
                       float* scores) {
    if (p.mask.kind != MaskKind::kNone) {  // It comes first, as in `hide`.
      const int64_t row = batch * p.mask.batch + head * p.mask.head + token * p.mask.query + first * p.mask.key;
      for (int64_t n = 0; n < count; ++n) scores[n] = masked<T>(p.mask, row + n * p.mask.key, scores[n]);
    }
    const int64_t from = p.key_begin(token) - first, to = p.key_end(token) - first;
    for (int64_t n = 0; n < std::min(from, count); ++n) scores[n] = -kInfinity;
    for (int64_t n = std::max<int64_t>(to, 0); n < count; ++n) scores[n] = -kInfinity;
  }

  // The online softmax of the forward pass, for one row with keys on the lanes; returns r, the factor for earlier sums.
  static float softmax(float* scores, int64_t count, float* most, float* total) {
    for (int64_t n = count; n % L; ++n) scores[n] = -kInfinity;  // There is room: kTile is a multiple of L.
    Floats now = S::set(*most);
    for (int64_t n = 0; n < count; n += L) now = S::max(now, S::load(scores + n));
    const float largest = S::largest(now);
    const float base = largest == -kInfinity ? 0.0f : largest;
    Floats sum{};
    const typename S::Exp2 exp2;
    for (int64_t n = 0; n < count; n += L) {
      const Floats weight = exp2(S::load(scores + n) - base);
      S::store(scores + n, weight);
      sum += weight;
    }
    const float rescale = exp2(S::set(*most - base))[0];
    *total = *total * rescale + S::sum(sum);
    *most = largest;
    return rescale;
  }

  // sum [Dv] = rescale * sum + weights [count] V [count, Dv], N registers at a time. Calls `prefetch` for every key,
  // once per part of a wide row.
  template <int N, class Prefetcher>
  static void add_values(const Prefetcher& prefetch, const float* weights, const float* values, int64_t stride,
                         int64_t count, int64_t Dv, float rescale, float* sum) {
    int64_t d = 0;
    for (; d + N * L <= Dv; d += N * L) {
      Floats acc[N];
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) acc[j] = rescale * S::load(sum + d + j * L);
      for (int64_t n = 0; n < count; ++n) {
        prefetch(n);
        const Floats w = S::set(weights[n]);
#pragma GCC unroll 8
        for (int j = 0; j < N; ++j) acc[j] += w * S::load(values + n * stride + d + j * L);
      }
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) S::store(sum + d + j * L, acc[j]);
    }
    if constexpr (N > 1) {
      add_values<N / 2>(prefetch, weights, values + d, stride, count, Dv - d, rescale, sum + d);
    } else {
      for (; d < Dv; ++d) {
        float total = rescale * sum[d];
        for (int64_t n = 0; n < count; ++n) total += weights[n] * values[n * stride + d];
        sum[d] = total;
      }
    }
  }
};

}  // namespace moh
