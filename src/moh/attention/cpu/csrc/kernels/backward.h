// Gradients of a block of active rows, with weights from what the softmax has kept: no second one, no N x N matrix.
//
//   P = 2^(S - m) / l,   dP = grad V',   delta = grad . out
//   dS = scale * P * (gate * dP - delta),   dV = (gate * P)' grad,   dQ = dS K,   dK = dS' Q
//   dgate = sum(P * dP)
//
// Everything is linear in P, so 1 / l is multiplied into a row's gate, delta and dgate instead. dgate is not delta / gate, which would carry the rounding of the output: a small gate may have rounded that to 0.
#pragma once

#include "kernels/block.h"

namespace moh {

// to [used, padded width] += factors' rows, over `count` rows from `first` on; the factors of a key lie `stride` after
// those of the one before.
template <class Product, class Factor>
void add_rows(int64_t width, int64_t used, const Factor* factors, int64_t stride, const float* rows, int64_t first,
              int64_t count, float* to) {
  const int64_t padded = Product::padded(width);
  for (int64_t d = 0; d < padded; d += Product::kWidth)
    Product::template multiply<Product::Into::kAdd>(used, factors, stride, 1, rows + first * padded + d, padded, count,
                                                    to + d, padded);
}

// What the products work on: floats. bf16x2_backward.h has the other type of operands.
template <class Isa, class T>
class FloatBackwardOperands {
 public:
  using S = Simd<Isa::kLanes>;
  using Floats = typename S::Floats;
  using Product = VectorProduct<Isa>;
  using Into = typename Product::Into;
  using Exp2 = typename S::Exp2;
  static constexpr int kWidth = Product::kWidth;
  static constexpr int64_t kTile = Isa::kKeyTile;

  static int64_t padded(int64_t width) { return width; }  // the rows of `add_queries`; only `width` hold results
  // Floats of memory for tasks of `blocks` blocks.
  static int64_t scratch(const Problem& p, int64_t blocks) {
    return blocks * kWidth *
               (p.width + p.value_width + Product::padded(p.width) + Product::padded(p.value_width) + 2 * kTile) +
           Copies<Isa, T>::scratch(p, blocks);
  }
  FloatBackwardOperands(const Problem& p, const Rows& rows, int64_t blocks, float* scratch)
      : p_(p), rows_(rows), all_(blocks * kWidth), queries_(scratch), grads_(queries_ + all_ * p.width),
        query_rows_(grads_ + all_ * p.value_width), grad_rows_(query_rows_ + all_ * Product::padded(p.width)),
        weights_(grad_rows_ + all_ * Product::padded(p.value_width)), grad_scores_(weights_ + kTile * all_),
        copies_(p, blocks, grad_scores_ + kTile * all_) {
    std::fill(query_rows_, weights_, 0.0f);
  }

  // Puts a block's queries, times the scale and log2(e), and its gradients on the lanes, and keeps both as rows too:
  // scores and dP need the former, grad_k and grad_v the latter.
  void put(int64_t block, const Lanes<Isa>& lanes) {
    const int64_t D = p_.width, Dv = p_.value_width;
    const auto query = [&](int i) { return at<T>(p_.q, rows_.batch, lanes.head[i], lanes.token[i]); };
    const auto grad = [&](int i) { return static_cast<const T*>(p_.grad) + lanes.by_token(p_, rows_.batch, i) * Dv; };
    put_on_lanes<Isa>(lanes.count, D, query, [&](int) { return p_.scale * kLog2e; }, queries_ + block * D * kWidth);
    put_on_lanes<Isa>(lanes.count, Dv, grad, [](int) { return 1.0f; }, grads_ + block * Dv * kWidth);
    for (int i = 0; i < lanes.count; ++i) {
      const int64_t row = block * kWidth + i;
      get<Isa>(query(i), D, query_rows_ + row * Product::padded(D));
      get<Isa>(grad(i), Dv, grad_rows_ + row * Product::padded(Dv));
    }
  }
  // Selects the tile of keys and values that is worked through next.
  void load(int64_t first, int64_t count) {
    keys_ = tile_of<Isa, T>(p_.k, rows_.batch, rows_.kv_head, first, count, p_.width, copies_.keys, &key_stride_);
    values_ = tile_of<Isa, T>(p_.v, rows_.batch, rows_.kv_head, first, count, p_.value_width, copies_.values,
                              &value_stride_);
  }
  // The scores and dP of a block, [kTile, kWidth] with rows `stride()` apart.
  float* scores(int64_t block) const { return weights_ + block * kWidth; }
  float* grad_weights(int64_t block) const { return grad_scores_ + block * kWidth; }
  int64_t stride() const { return all_; }

  // Compute both in the first V vectors of the block's lanes, scores in units of log2.
  template <int V>
  void score(int64_t block, int64_t seen) const {
    Product::template multiply<Into::kSet, V>(seen, keys_, key_stride_, 1, queries_ + block * p_.width * kWidth, kWidth,
                                              p_.width, scores(block), all_);
  }
  template <int V>
  void differentiate_weights(int64_t block, int64_t seen) const {
    Product::template multiply<Into::kSet, V>(seen, values_, value_stride_, 1,
                                              grads_ + block * p_.value_width * kWidth, kWidth, p_.value_width,
                                              grad_weights(block), all_);
  }
  // Stores gate * P and dS of keys n and n + 1 for one vector of a block's lanes.
  struct Sink {
    float *weights, *grad_scores;
    int64_t stride;
    [[gnu::always_inline]] void keep(int64_t n, const Floats (&weight)[2], const Floats (&grad_score)[2]) const {
      for (int i = 0; i < 2; ++i) {
        S::store(weights + (n + i) * stride, weight[i]);
        S::store(grad_scores + (n + i) * stride, grad_score[i]);
      }
    }
  };
  Sink sink(int64_t block, int lane) const { return {scores(block) + lane, grad_weights(block) + lane, all_}; }
  // Sets both to 0 for keys [from, to), which the block does not see but others of the task do.
  void clear(int64_t block, int64_t from, int64_t to) const {
    for (int64_t n = from; n < to; ++n) {
      std::fill_n(scores(block) + n * all_, kWidth, 0.0f);
      std::fill_n(grad_weights(block) + n * all_, kWidth, 0.0f);
    }
  }
  // grad_queries [padded D, kWidth] += keys' dS for one block.
  template <int V>
  void add_queries(int64_t block, int64_t seen, float* grad_queries) const {
    Product::template multiply<Into::kAdd, V>(p_.width, keys_, 1, key_stride_, grad_weights(block), all_, seen,
                                              grad_queries, kWidth);
  }
  // grad_k [used, padded D] += dS queries and grad_v [used, padded Dv] += (gate * P) grads, over `count` rows.
  void add_keys(int64_t first, int64_t count, int64_t used, float* grad_k, float* grad_v) const {
    add_rows<Product>(p_.width, used, grad_scores_ + first, all_, query_rows_, first, count, grad_k);
    add_rows<Product>(p_.value_width, used, weights_ + first, all_, grad_rows_, first, count, grad_v);
  }

 private:
  const Problem& p_;
  const Rows& rows_;
  int64_t all_;                      // The rows of the task, in whole blocks.
  float *queries_, *grads_;          // [block, D, kWidth], [block, Dv, kWidth]
  float *query_rows_, *grad_rows_;   // [all, padded D], [all, padded Dv]
  float *weights_, *grad_scores_;    // [kTile, all]
  Copies<Isa, T> copies_;
  const float *keys_ = nullptr, *values_ = nullptr;
  int64_t key_stride_ = 0, value_stride_ = 0;
};

template <class Isa, class T, class Operands = FloatBackwardOperands<Isa, T>>
struct Backward {
  using S = Simd<Isa::kLanes>;
  using Floats = typename S::Floats;
  using Product = VectorProduct<Isa>;
  static constexpr int kWidth = Product::kWidth;
  static constexpr int64_t kTile = Isa::kKeyTile;
  static_assert(kTile % 2 == 0, "keys are taken two by two");

  static int64_t scratch(const Problem& p, int64_t rows) {
    const int64_t blocks = Product::blocks(rows);
    return blocks * kWidth * (Operands::padded(p.width) + 4) + Operands::scratch(p, blocks);
  }

  static void run(const Problem& p, const Rows& rows, float* grad_k, float* grad_v, float* scratch) {
    const Blocks<Isa> blocks(p, rows);
    const int64_t D = p.width, count = blocks.count, all = count * kWidth;
    const int64_t Dp = Operands::padded(D);
    float* grad_queries = scratch;            // [block, padded D, kWidth]
    float* most = grad_queries + all * Dp;    // [all]
    float* gates = most + all;                // [all], divided by the softmax's denominator
    float* delta = gates + all;               // [all], likewise, times the scale
    float* grad_gates = delta + all;          // [all], to be divided likewise
    Operands operands(p, rows, count, grad_gates + all);

    std::fill(grad_queries, most, 0.0f);
    std::fill(most, gates, kInfinity);  // Lanes without a row get weights 2^(s - inf) = 0.
    std::fill(gates, grad_gates + all, 0.0f);
    for (int64_t block = 0; block < count; ++block) {
      operands.put(block, blocks.lanes[block]);
      load(p, rows.batch, blocks.lanes[block], most + block * kWidth, gates + block * kWidth, delta + block * kWidth);
    }
    const int64_t end = blocks.key_end(p);
    for (int64_t first = blocks.key_begin(p); first < end; first += kTile) {
      const int64_t loaded = std::min(kTile, end - first);
      operands.load(first, loaded);
      int64_t used = 0;  // The number of keys up to the last that any block sees.
      int64_t first_block = count, last_block = 0;
      for (int64_t block = 0; block < count; ++block) {
        const Lanes<Isa>& lanes = blocks.lanes[block];
        const int64_t seen = std::min(loaded, lanes.key_end(p) - first);
        if (seen <= 0 || first + kTile <= lanes.key_begin(p) ||
            !mask_shows_any(p, rows.batch, lanes, first, seen)) {
          operands.clear(block, 0, loaded);
          continue;
        }
        used = std::max(used, seen);
        first_block = std::min(first_block, block);
        last_block = block + 1;
        const auto work = [&](auto vectors) {
          constexpr int V = decltype(vectors)::value;
          operands.template score<V>(block, seen);
          hide<V, T>(p, rows.batch, lanes, first, seen, operands.scores(block), operands.stride());
          operands.template differentiate_weights<V>(block, seen);
          for (int lane = 0; lane < V * Isa::kLanes; lane += Isa::kLanes)
            differentiate(operands, block, lane, seen, p.scale, most, gates, delta, grad_gates);
          operands.template add_queries<V>(block, seen, grad_queries + block * Dp * kWidth);
        };
        by_vectors<Isa>(lanes, work);
        operands.clear(block, seen, loaded);
      }
      if (used == 0) continue;
      const int64_t skip = first_block * kWidth, depth = std::min(last_block * kWidth, rows.count) - skip;
      operands.add_keys(skip, depth, used, grad_k + first * Product::padded(D),
                        grad_v + first * Product::padded(p.value_width));
    }
    T* grad_q = static_cast<T*>(p.grad_q);
    for (int64_t block = 0; block < count; ++block) {
      const Lanes<Isa>& lanes = blocks.lanes[block];
      for (int i = 0; i < lanes.count; ++i)
        static_cast<T*>(p.grad_gates)[lanes.by_token(p, rows.batch, i)] =
            static_cast<T>(grad_gates[block * kWidth + i] * share(p, rows.batch, lanes, i));
      take_off_lanes<Isa>(
          lanes.count, D, grad_queries + block * Dp * kWidth, [](int) { return 1.0f; },
          [&](int i) { return grad_q + lanes.by_head(p, rows.batch, i) * D; });
    }
  }

 private:
  // Turns scores and dP of one vector of a block's lanes, from `lane` on, into gate * P and dS, and adds to dgate.
  [[gnu::always_inline]] static void differentiate(const Operands& operands, int64_t block, int lane, int64_t seen,
                                                   float scale, const float* most, const float* gates,
                                                   const float* delta, float* grad_gates) {
    const typename Operands::Exp2 exp2;
    const int64_t row = block * kWidth + lane, stride = operands.stride();
    const typename Operands::Sink sink = operands.sink(block, lane);
    const float *scores = operands.scores(block) + lane, *grad_weights = operands.grad_weights(block) + lane;
    const Floats shift = S::load(most + row), gate = S::load(gates + row), scaled_delta = S::load(delta + row);
    const Floats slope = S::set(scale) * gate;
    Floats grad_gate = S::load(grad_gates + row);
    const auto key = [&](int64_t n, Floats& weight, Floats& grad_score) {
      // The weight of the largest score is 1, but one that was summed in another order may exceed it.
      weight = exp2(S::min(Floats{}, S::load(scores + n * stride) - shift));
      const Floats grad = S::load(grad_weights + n * stride);
      grad_gate += weight * grad;
      grad_score = weight * (slope * grad - scaled_delta);
      weight *= gate;
    };
    Floats weight[2], grad_score[2];
    int64_t n = 0;
    for (; n + 2 <= seen; n += 2) {
      key(n, weight[0], grad_score[0]);
      key(n + 1, weight[1], grad_score[1]);
      sink.keep(n, weight, grad_score);
    }
    if (n < seen) {  // Keys come in twos, so one row beyond may be overwritten with zeros.
      key(n, weight[0], grad_score[0]);
      weight[1] = grad_score[1] = Floats{};
      sink.keep(n, weight, grad_score);
    }
    S::store(grad_gates + row, grad_gate);
  }

  // What turns 2^(s - m) of lane i into weights: 1 / l, or 0 where the row saw no key.
  static float share(const Problem& p, int64_t batch, const Lanes<Isa>& lanes, int i) {
    const float total = p.totals[lanes.by_head(p, batch, i)];
    return total == 0.0f ? 0.0f : 1.0f / total;
  }

  // Loads m, gate / l and scale * delta / l of a block's rows.
  static void load(const Problem& p, int64_t batch, const Lanes<Isa>& lanes, float* most, float* gates, float* delta) {
    const int64_t Dv = p.value_width;
    for (int i = 0; i < lanes.count; ++i) {
      const int64_t entry = lanes.by_token(p, batch, i);
      const T *grad = static_cast<const T*>(p.grad) + entry * Dv, *out = static_cast<const T*>(p.out) + entry * Dv;
      Floats dots{};
      int64_t d = 0;
      for (; d + Isa::kLanes <= Dv; d += Isa::kLanes) dots += S::load(grad + d) * S::load(out + d);
      float dot = S::sum(dots);
      for (; d < Dv; ++d) dot += static_cast<float>(grad[d]) * static_cast<float>(out[d]);
      const float part = share(p, batch, lanes, i);
      most[i] = p.most[lanes.by_head(p, batch, i)];
      gates[i] = part * static_cast<float>(static_cast<const T*>(p.gates)[entry]);
      delta[i] = part * p.scale * dot;
    }
  }
};

}  // namespace moh
