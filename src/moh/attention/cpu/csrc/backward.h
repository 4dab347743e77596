// Gradients of a block of active rows: weights from the saved log-sum-exp, no softmax and no N x N matrix.
//
// With P = exp2(S - lse), grad of a head dO = gate * grad and delta = grad . out: dV = P' dO, dS = P * (dO V' - delta),
// dQ = scale * dS K, dK = scale * dS' Q, and dgate = sum(P * dO V') / gate, which unlike delta / gate does not pass
// through the output's rounding: a small gate may have rounded it to 0.
#pragma once

#include "block.h"

namespace moh {

template <class Isa, class T>
struct Backward {
  using S = Simd<Isa::kLanes>;
  using Floats = typename S::Floats;
  using Product = Tile<Isa>;
  static constexpr int kWidth = Product::kWidth;
  static constexpr int64_t kTile = Isa::kKeyTile;

  static int64_t padded(int64_t width) { return Product::padded(width); }

  static int64_t scratch(const Problem& p, int64_t rows) {
    const int64_t lanes = padded(rows);
    return lanes * (2 * p.width + p.value_width + padded(p.width) + padded(p.value_width) + 3 + 2 * kTile) +
           Copies<Isa, T>::scratch(p, Product::blocks(rows));
  }

  static void run(const Problem& p, const Rows& rows, float* grad_k, float* grad_v, float* scratch) {
    const Blocks<Isa> blocks(p, rows);
    const int64_t D = p.width, Dv = p.value_width, count = blocks.count, all = count * kWidth;
    float* queries = scratch;             // [block, D, kWidth], times the scale and log2(e)
    float* grad_queries = queries + all * D;  // [block, D, kWidth], not yet times the scale
    float* grads = grad_queries + all * D;    // [block, Dv, kWidth]: gate * grad
    float* query_rows = grads + all * Dv;     // [all, padded D], times the scale
    float* grad_rows = query_rows + all * padded(D);  // [all, padded Dv]
    float* lse = grad_rows + all * padded(Dv);        // [all]
    float* delta = lse + all;                         // [all]
    float* gate_sums = delta + all;                   // [all]: sum of P * dO V'
    float* weights = gate_sums + all;                 // [kTile, all]
    float* grad_scores = weights + kTile * all;       // [kTile, all]
    const Copies<Isa, T> copies(p, count, grad_scores + kTile * all);

    std::fill(grad_queries, grads, 0.0f);
    std::fill(query_rows, lse, 0.0f);
    std::fill(lse, delta, kInfinity);
    std::fill(delta, weights, 0.0f);
    for (int64_t block = 0; block < count; ++block)
      load(p, rows.batch, blocks.lanes[block], block, queries, grads, query_rows, grad_rows, lse, delta);
    const int64_t end = blocks.key_end(p);
    for (int64_t first = blocks.key_begin(p); first < end; first += kTile) {
      const int64_t loaded = std::min(kTile, end - first);
      int64_t key_stride, value_stride;
      const float* keys =
          tile_of<Isa, T>(p.k, rows.batch, rows.kv_head, first, loaded, D, copies.keys, &key_stride);
      const float* values =
          tile_of<Isa, T>(p.v, rows.batch, rows.kv_head, first, loaded, Dv, copies.values, &value_stride);
      int64_t used = 0;  // keys that any block sees
      int64_t first_block = count, last_block = 0;
      for (int64_t block = 0; block < count; ++block) {
        const Lanes<Isa>& lanes = blocks.lanes[block];
        const int64_t seen = std::min(loaded, lanes.key_end(p) - first);
        float* w = weights + block * kWidth;
        float* g = grad_scores + block * kWidth;
        if (seen <= 0 || first + kTile <= lanes.key_begin(p) ||
            !mask_shows_any(p, rows.batch, lanes, first, seen)) {
          clear(w, g, 0, loaded, all);
          continue;
        }
        used = std::max(used, seen);
        first_block = std::min(first_block, block);
        last_block = block + 1;
        const auto work = [&](auto vectors) {
          constexpr int V = decltype(vectors)::value;
          Product::template multiply<Product::Into::kSet, V>(seen, keys, key_stride, 1, queries + block * D * kWidth,
                                                             kWidth, D, w, all);
          hide<V, T>(p, rows.batch, lanes, first, seen, w, all);
          Product::template multiply<Product::Into::kSet, V>(seen, values, value_stride, 1, grads + block * Dv * kWidth,
                                                             kWidth, Dv, g, all);
          differentiate<V>(w, g, all, seen, lse + block * kWidth, delta + block * kWidth, gate_sums + block * kWidth);
          Product::template multiply<Product::Into::kAdd, V>(D, keys, 1, key_stride, g, all, seen,
                                                             grad_queries + block * D * kWidth, kWidth);
        };
        by_vectors<Isa>(lanes, work);
        clear(w, g, seen, loaded, all);
      }
      if (used == 0) continue;
      const int64_t skip = first_block * kWidth, depth = std::min(last_block * kWidth, rows.count) - skip;
      for (int64_t d = 0; d < padded(D); d += kWidth)
        Product::template multiply<Product::Into::kAdd>(used, grad_scores + skip, all, 1,
                                                        query_rows + skip * padded(D) + d, padded(D), depth,
                                                        grad_k + first * padded(D) + d, padded(D));
      for (int64_t d = 0; d < padded(Dv); d += kWidth)
        Product::template multiply<Product::Into::kAdd>(used, weights + skip, all, 1,
                                                        grad_rows + skip * padded(Dv) + d, padded(Dv), depth,
                                                        grad_v + first * padded(Dv) + d, padded(Dv));
    }
    T* grad_q = static_cast<T*>(p.grad_q);
    const T* gates = static_cast<const T*>(p.gates);
    T* grad_gates = static_cast<T*>(p.grad_gates);
    for (int64_t block = 0; block < count; ++block) {
      const Lanes<Isa>& lanes = blocks.lanes[block];
      for (int i = 0; i < lanes.count; ++i) {
        const int64_t entry = lanes.by_token(p, rows.batch, i);
        grad_gates[entry] = static_cast<T>(gate_sums[block * kWidth + i] / static_cast<float>(gates[entry]));
      }
      take_off_lanes<Isa>(
          lanes.count, D, grad_queries + block * D * kWidth, [&](int) { return p.scale; },
          [&](int i) { return grad_q + lanes.by_head(p, rows.batch, i) * D; });
    }
  }

 private:
  // Scores and dO V' [seen, stride] of a block -> its weights and dS, in V vectors of its lanes; adds to gate_sums.
  template <int V>
  static void differentiate(float* w, float* g, int64_t stride, int64_t seen, const float* lse, const float* delta,
                            float* gate_sums) {
    const typename S::Exp2 exp2;
    for (int j = 0; j < V * Isa::kLanes; j += Isa::kLanes) {
      const Floats shift = S::load(lse + j), less = S::load(delta + j);
      Floats gate_sum = S::load(gate_sums + j);
      for (int64_t n = 0; n < seen; ++n) {
        float *wn = w + n * stride + j, *gn = g + n * stride + j;
        // A weight is at most 1; a huge score whose sum was rounded in another order could say more.
        const Floats weight = exp2(S::min(Floats{}, S::load(wn) - shift));
        S::store(wn, weight);
        const Floats grad = S::load(gn);
        gate_sum += weight * grad;
        S::store(gn, weight * (grad - less));
      }
      S::store(gate_sums + j, gate_sum);
    }
  }

  static void clear(float* weights, float* grad_scores, int64_t from, int64_t to, int64_t stride) {
    for (int64_t n = from; n < to; ++n) {
      std::fill_n(weights + n * stride, kWidth, 0.0f);
      std::fill_n(grad_scores + n * stride, kWidth, 0.0f);
    }
  }

  // A block's queries and gradients, on the lanes and as rows, its log-sum-exps and deltas.
  static void load(const Problem& p, int64_t batch, const Lanes<Isa>& lanes, int64_t block, float* queries,
                   float* grads, float* query_rows, float* grad_rows, float* lse, float* delta) {
    const int64_t D = p.width, Dv = p.value_width;
    const T* gates = static_cast<const T*>(p.gates);
    const auto entry = [&](int i) { return lanes.by_token(p, batch, i); };
    const auto query = [&](int i) { return at<T>(p.q, batch, lanes.head[i], lanes.token[i]); };
    const auto grad = [&](int i) { return static_cast<const T*>(p.grad) + entry(i) * Dv; };
    put_on_lanes<Isa>(lanes.count, D, query, [&](int) { return p.scale * kLog2e; }, queries + block * D * kWidth);
    put_on_lanes<Isa>(lanes.count, Dv, grad, [&](int i) { return static_cast<float>(gates[entry(i)]); },
                      grads + block * Dv * kWidth);
    for (int i = 0; i < lanes.count; ++i) {
      const int64_t row = block * kWidth + i;
      const float gate = static_cast<float>(gates[entry(i)]);
      const T* out = static_cast<const T*>(p.out) + entry(i) * Dv;
      float dot = 0;
      for (int64_t d = 0; d < D; ++d) query_rows[row * padded(D) + d] = p.scale * static_cast<float>(query(i)[d]);
      for (int64_t d = 0; d < Dv; ++d) {
        grad_rows[row * padded(Dv) + d] = gate * static_cast<float>(grad(i)[d]);
        dot += static_cast<float>(grad(i)[d]) * static_cast<float>(out[d]);
      }
      lse[row] = p.lse[lanes.by_head(p, batch, i)];
      delta[row] = dot;
    }
  }
};

}  // namespace moh
