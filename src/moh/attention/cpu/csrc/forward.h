// Attention of a block of active rows over all their keys, by the online softmax (docs/kernel.md derives it).
#pragma once

#include "block.h"

namespace moh {

template <class Isa, class T>
struct Forward {
  using S = Simd<Isa::kLanes>;
  using Floats = typename S::Floats;
  using Product = Tile<Isa>;
  static constexpr int kWidth = Product::kWidth;
  static constexpr int64_t kTile = Isa::kKeyTile;

  static int64_t scratch(const Problem& p, int64_t rows) {
    const int64_t width = p.width + p.value_width;
    const int64_t copies = std::is_same_v<T, float> ? 0 : kTile * width;
    return kWidth * (Product::blocks(rows) * (width + 2) + kTile + 1) + copies;
  }

  static void run(const Problem& p, const Rows& rows, float* scratch) {
    const Blocks<Isa> blocks(p, rows);
    const int64_t D = p.width, Dv = p.value_width, count = blocks.count;
    float* queries = scratch;                    // [block, D, kWidth], times the scale and log2(e)
    float* sums = queries + count * D * kWidth;  // [block, Dv, kWidth], not yet divided by the totals
    float* most = sums + count * Dv * kWidth;    // [block, kWidth]
    float* totals = most + count * kWidth;       // [block, kWidth]
    float* rescale = totals + count * kWidth;    // [kWidth]
    float* scores = rescale + kWidth;            // [kTile, kWidth]
    float* key_copy = scores + kTile * kWidth;
    float* value_copy = key_copy + kTile * D;

    std::fill(sums, most, 0.0f);
    std::fill(most, totals, -kInfinity);
    std::fill(totals, rescale, 0.0f);
    for (int64_t block = 0; block < count; ++block) {
      const Lanes<Isa>& lanes = blocks.lanes[block];
      put_on_lanes<Isa>(
          lanes.count, D, [&](int i) { return at<T>(p.q, rows.batch, lanes.head[i], lanes.token[i]); },
          [&](int) { return p.scale * kLog2e; }, queries + block * D * kWidth);
    }
    const int64_t end = blocks.key_end(p);
    for (int64_t first = blocks.key_begin(p); first < end; first += kTile) {
      const int64_t loaded = std::min(kTile, end - first);
      int64_t key_stride, value_stride;
      const float* keys =
          tile_of<Isa, T>(p.k, rows.batch, rows.kv_head, first, loaded, D, key_copy, &key_stride);
      const float* values =
          tile_of<Isa, T>(p.v, rows.batch, rows.kv_head, first, loaded, Dv, value_copy, &value_stride);
      for (int64_t block = 0; block < count; ++block) {
        const Lanes<Isa>& lanes = blocks.lanes[block];
        const int64_t seen = std::min(loaded, lanes.key_end(p) - first);
        if (seen <= 0 || first + kTile <= lanes.key_begin(p)) continue;
        if (!mask_shows_any(p, rows.batch, lanes, first, seen)) continue;
        Product::template multiply<Product::Into::kSet>(seen, keys, key_stride, 1, queries + block * D * kWidth, kWidth,
                                                        D, scores, kWidth);
        hide<Isa, T>(p, rows.batch, lanes, first, seen, scores, kWidth);
        softmax(scores, seen, most + block * kWidth, totals + block * kWidth, rescale);
        Product::template multiply<Product::Into::kRescale>(Dv, values, 1, value_stride, scores, kWidth, seen,
                                                            sums + block * Dv * kWidth, kWidth, rescale);
      }
    }
    for (int64_t block = 0; block < count; ++block) {
      write(p, rows.batch, blocks.lanes[block], sums + block * Dv * kWidth, most + block * kWidth, totals + block * kWidth);
    }
  }

 private:
  // Scores [count, kWidth] -> weights relative to the largest score so far; `rescale` brings what was summed before to
  // the same scale.
  static void softmax(float* scores, int64_t count, float* most, float* totals, float* rescale) {
    for (int j = 0; j < Isa::kVectors; ++j) {
      float* s = scores + j * Isa::kLanes;
      const Floats before = S::load(most + j * Isa::kLanes);
      Floats now = before;
      for (int64_t n = 0; n < count; ++n) now = S::max(now, S::load(s + n * kWidth));
      const Floats base = now == -kInfinity ? Floats{} : now;  // nothing seen yet: exp2(-inf - 0) is 0
      Floats total{};
      for (int64_t n = 0; n < count; ++n) {
        const Floats weight = S::exp2(S::load(s + n * kWidth) - base);
        S::store(s + n * kWidth, weight);
        total += weight;
      }
      const Floats factor = S::exp2(before - base);
      S::store(rescale + j * Isa::kLanes, factor);
      S::store(totals + j * Isa::kLanes, S::load(totals + j * Isa::kLanes) * factor + total);
      S::store(most + j * Isa::kLanes, now);
    }
  }

  static void write(const Problem& p, int64_t batch, const Lanes<Isa>& lanes, const float* sums, const float* most,
                    const float* totals) {
    const T* gates = static_cast<const T*>(p.gates);
    T* out = static_cast<T*>(p.out);
    float factors[kWidth];
    for (int i = 0; i < lanes.count; ++i) {
      const bool blind = totals[i] == 0.0f;
      factors[i] = blind ? 0.0f : static_cast<float>(gates[lanes.by_token(p, batch, i)]) / totals[i];
      p.lse[lanes.by_head(p, batch, i)] = blind ? kInfinity : most[i] + std::log2(totals[i]);
    }
    take_off_lanes<Isa>(
        lanes.count, p.value_width, sums, [&](int i) { return factors[i]; },
        [&](int i) { return out + lanes.by_token(p, batch, i) * p.value_width; });
  }
};

}  // namespace moh
