// The backward pass in bfloat16, by the processor's dot products: what the five products of `Backward` work on.
//
// A Bf16x2 holds two neighbours of a width for scores and dP, two keys for dQ, two rows for dK and dV. Queries, keys,
// values and gradients are read as they are; gate * P and dS are rounded to bfloat16.
#pragma once

#include "kernels/backward.h"
#include "kernels/bf16x2.h"

namespace moh {

template <class Isa, class Product = VectorProduct<Isa>>
class Bf16x2BackwardOperands {
 public:
  using T = c10::BFloat16;
  using S = Simd<Isa::kLanes>;
  using Floats = typename S::Floats;
  using Into = typename Product::Into;
  using Exp2 = typename S::Exp2ToRound;
  static constexpr int kWidth = Product::kWidth;
  static constexpr int64_t kTile = Isa::kKeyTile;

  static int64_t padded(int64_t width) { return InterleavedTile<Isa, Product>::padded(width); }
  static int64_t scratch(const Problem& p, int64_t blocks) {
    using Products = RowProducts<Isa, Product>;
    return Products::scratch(p.width, blocks) + Products::scratch(p.value_width, blocks) +
           blocks * kWidth / 2 * (Product::padded(p.width) + Product::padded(p.value_width) + 2 * kTile) +
           kTile * kWidth * 5 / 2 + InterleavedTile<Isa, Product>::scratch(p.width);
  }
  Bf16x2BackwardOperands(const Problem& p, const Rows& rows, int64_t blocks, float* scratch)
      : p_(p), rows_(rows), all_(blocks * kWidth),
        row_scores_(p.k, p.width, rows, p.scale * kLog2e, blocks, scratch),
        row_grads_(p.v, p.value_width, rows, 1.0f, blocks, scratch += row_scores_.scratch(p.width, blocks)),
        query_rows_(scratch += row_grads_.scratch(p.value_width, blocks)),
        grad_rows_(query_rows_ + all_ / 2 * Product::padded(p.width)),
        scores_(grad_rows_ + all_ / 2 * Product::padded(p.value_width)), grad_weights_(scores_ + kTile * kWidth),
        by_keys_(grad_weights_ + kTile * kWidth),
        weights_(reinterpret_cast<Bf16x2*>(by_keys_ + kTile / 2 * kWidth)), grad_scores_(weights_ + kTile / 2 * all_),
        keys_(p.width, reinterpret_cast<float*>(grad_scores_ + kTile / 2 * all_)) {
    std::fill(query_rows_, scores_, 0.0f);
  }

  void put(int64_t block, const Lanes<Isa>& lanes) {
    const int64_t D = p_.width, Dv = p_.value_width;
    const auto query = [&](int i) { return at<T>(p_.q, rows_.batch, lanes.head[i], lanes.token[i]); };
    const auto grad = [&](int i) { return static_cast<const T*>(p_.grad) + lanes.by_token(p_, rows_.batch, i) * Dv; };
    row_scores_.put(block, lanes.count, query);
    row_grads_.put(block, lanes.count, grad);
    for (int i = 0; i < lanes.count; i += 2) {
      const int64_t place = (block * kWidth + i) / 2;
      const bool two = i + 1 < lanes.count;
      const auto rows_at = [&](float* rows, int64_t width) {
        return reinterpret_cast<Bf16x2*>(rows + place * Product::padded(width));
      };
      Isa::interleave(query(i), two ? query(i + 1) : nullptr, D, rows_at(query_rows_, D));
      Isa::interleave(grad(i), two ? grad(i + 1) : nullptr, Dv, rows_at(grad_rows_, Dv));
    }
  }
  void load(int64_t first, int64_t count) {
    row_scores_.load(first, count);
    row_grads_.load(first, count);
    keys_.load(p_.k, rows_.batch, rows_.kv_head, first, count);
  }
  float* scores(int64_t) const { return scores_; }
  float* grad_weights(int64_t) const { return grad_weights_; }
  int64_t stride() const { return kWidth; }

  template <int V>
  void score(int64_t block, int64_t seen) const {
    row_scores_.template multiply<V>(block, seen, scores_);
  }
  template <int V>
  void differentiate_weights(int64_t block, int64_t seen) const {
    row_grads_.template multiply<V>(block, seen, grad_weights_);
  }
  struct Sink {
    Bf16x2 *weights, *grad_scores;
    float* by_keys;
    int64_t stride;
    [[gnu::always_inline]] void keep(int64_t n, const Floats (&weight)[2], const Floats (&grad_score)[2]) const {
      for (int i = 0; i < 2; ++i) {
        Isa::round(weight[i], weights + (n + i) * stride);
        Isa::round(grad_score[i], grad_scores + (n + i) * stride);
      }
      S::store(by_keys + n / 2 * kWidth, Isa::to_bf16x2(grad_score[0], grad_score[1]));
    }
  };
  Sink sink(int64_t block, int lane) const {
    const int64_t at = (block * kWidth + lane) / 2;
    return {weights_ + at, grad_scores_ + at, by_keys_ + lane, all_ / 2};
  }
  void clear(int64_t block, int64_t from, int64_t to) const {
    for (int64_t n = from; n < to; ++n)
      for (Bf16x2* x : {weights_, grad_scores_})
        std::fill_n(x + n * all_ / 2 + block * kWidth / 2, kWidth / 2, Bf16x2{0});
  }
  template <int V>
  void add_queries(int64_t, int64_t seen, float* grad_queries) const {
    keys_.template add<Into::kAdd, V>(seen, by_keys_, grad_queries);
  }
  void add_keys(int64_t first, int64_t count, int64_t used, float* grad_k, float* grad_v) const {
    const int64_t start = first / 2, depth = (count + 1) / 2;
    // An odd last row shares its Bf16x2 with a lane that has no row. That lane's query and gradient are 0 here, but its
    // weight may be NaN where a key is infinite, and 0 * NaN is NaN.
    if (count % 2 == 1)
      for (int64_t n = 0; n < used; ++n)
        for (Bf16x2* x : {weights_, grad_scores_}) x[n * all_ / 2 + start + depth - 1].bits &= 0xffffu;
    add_rows<Product>(p_.width, used, grad_scores_ + start, all_ / 2, query_rows_, start, depth, grad_k);
    add_rows<Product>(p_.value_width, used, weights_ + start, all_ / 2, grad_rows_, start, depth, grad_v);
  }

 private:
  const Problem& p_;
  const Rows& rows_;
  int64_t all_;                     // The rows of the task, in whole blocks.
  RowProducts<Isa, Product> row_scores_, row_grads_;
  float *query_rows_, *grad_rows_;  // Bf16x2 of two rows, [all / 2, padded D], [all / 2, padded Dv]
  float *scores_, *grad_weights_;   // of one block, [kTile, kWidth]
  float* by_keys_;                  // dS of one block, Bf16x2 of two keys, [kTile / 2, kWidth]
  Bf16x2 *weights_, *grad_scores_;  // gate * P and dS, Bf16x2 of two rows, [kTile, all / 2]
  InterleavedTile<Isa, Product> keys_;
};

}  // namespace moh
