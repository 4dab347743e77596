// Aggregated attention (TransNeXt): a window of neighbours and pooled keys under one softmax, for active rows alone.
//
// For the head h of token n, with u = q / |q|, s = temperature_h * length_n * (u + embedding_h):
//   scores     s . k_m + local_bias_hm over the neighbours m in the image, s . pooled_k_p + pooled_bias_hnp over p
//   weights    a = softmax of both together; the neighbours' have c_m = u . tokens_hm + token_bias_hm added
//   out        gate * (sum_m (a_m + c_m) v_m + sum_p a_p pooled_v_p)
// Backward, with G = grad . v for every key:
//   dgate      sum (a + c) G
//   dscores    a * (da - sum a da) with da = gate * G, and dc = da for the neighbours; the rest by the chain rule
//
// The backward pass computes the softmax again, since all keys of a row are at hand at once. Weights from a saved
// denominator would not quite add up to 1, and the gradient of the temperature, a sum with much cancellation, would
// show it. Without a window (places = 0) this is plain attention with a bias that has a gradient.
//
// All rows of a block share the pooled keys, so those parts are small matrix products (product.h). A neighbour is
// another key for every row, so those parts are dot products with the head's width on the lanes.
#pragma once

#include "kernels/block.h"

namespace moh {

template <class Isa>
struct AggregatedAttention {
  using S = Simd<Isa::kLanes>;
  using Floats = typename S::Floats;
  static constexpr int64_t L = Isa::kLanes;
  // Rows of one round: a multiple of every kRows, and the scores of 49 pooled keys and a window fill 13 KiB.
  static constexpr int64_t kBlock = 48;

  using Product = VectorProduct<Isa>;

  static int64_t padded(int64_t count) { return (count + L - 1) / L * L; }

  // The memory of one task. Padding holds zeros, so that whole vectors can be added up.
  struct Buffers {
    int64_t D, P, W, Dw, Pw, Ww, columns;  // ..w are rounded up to whole vectors; columns = Ww + Pw.
    float *key_columns, *value_rows;       // Pooled: [D, Pw], [P, Dw]
    float *token_columns;                  // [D, Ww]
    float *keys, *values;                  // [tokens, Dw]
    float *unit, *scaled, *sums;           // [kBlock, Dw]
    float *weights, *extra;                // [kBlock, columns] (neighbours first), [kBlock, Ww]
    // Backward only.
    float *key_rows, *value_columns;       // Pooled: [P, Dw], [D, Pw]
    float *token_rows;                     // [W, Dw]
    float *grad_keys, *grad_values;        // [tokens, Dw]
    float *grad_key_rows, *grad_value_rows;  // Pooled: [P, Dw]
    float *grad_tokens;                    // [D, Ww]
    float *grads, *gated, *grad_unit;      // [kBlock, Dw]
    float *grad_scores, *grad_extra;       // [kBlock, columns], [kBlock, Ww]
    float* inverse_norms;                  // [kBlock]
    int64_t size = 0;

    Buffers(const Aggregate& p, int64_t tokens, bool backward, float* scratch)
        : D(p.width), P(p.pooled), W(p.places), Dw(padded(D)), Pw(padded(P)), Ww(padded(W)), columns(Ww + Pw) {
      const auto take = [&](int64_t count) {
        float* at = scratch + size;
        size += count;
        return at;
      };
      if (W == 0) tokens = 0;
      key_columns = take(D * Pw), value_rows = take(P * Dw), token_columns = take(D * Ww);
      keys = take(tokens * Dw), values = take(tokens * Dw);
      unit = take(kBlock * Dw), scaled = take(kBlock * Dw), sums = take(kBlock * Dw);
      weights = take(kBlock * columns), extra = take(kBlock * Ww), inverse_norms = take(kBlock);
      if (!backward) return;
      key_rows = take(P * Dw), value_columns = take(D * Pw), token_rows = take(W * Dw);
      grad_keys = take(tokens * Dw), grad_values = take(tokens * Dw);
      grad_key_rows = take(P * Dw), grad_value_rows = take(P * Dw), grad_tokens = take(D * Ww);
      grads = take(kBlock * Dw), gated = take(kBlock * Dw), grad_unit = take(kBlock * Dw);
      grad_scores = take(kBlock * columns), grad_extra = take(kBlock * Ww);
    }
  };

  static int64_t scratch(const Aggregate& p, int64_t tokens, bool backward) {
    return Buffers(p, tokens, backward, nullptr).size;
  }

  // Writes `out` of these rows. `scratch` has room for the tokens [first_near(rows), end_near(rows)).
  static void forward(const Aggregate& p, const Rows& rows, float* scratch) {
    const int64_t first_token = first_near(p, rows), end = end_near(p, rows);
    const Buffers b(p, end - first_token, false, scratch);
    load_keys(p, b, rows, first_token, end);
    for (int64_t first = 0; first < rows.count; first += kBlock) {
      const Rows block{rows.batch, rows.kv_head, rows.index + first, std::min(kBlock, rows.count - first)};
      score(p, b, block, first_token);
      for (int64_t r = 0; r < block.count; ++r) softmax(b.weights + r * b.columns, b.columns);
      product<Product::Into::kSet>(block.count, b.weights + b.Ww, b.columns, 1, b.value_rows, b.Dw, b.P, b.sums, b.Dw,
                                   b.Dw);
      for (int64_t r = 0; r < block.count; ++r) {
        float* sum = b.sums + r * b.Dw;
        each_neighbour(p, block.index[r], [&](int64_t w, int64_t m) {
          add(b.weights[r * b.columns + w] + b.extra[r * b.Ww + w], b.values + (m - first_token) * b.Dw, b.Dw, sum);
        });
        const float gate = p.gates[entry(p, block, r)];
        float* to = p.out + entry(p, block, r) * b.D;
        for (int64_t d = 0; d < b.D; ++d) to[d] = gate * sum[d];
      }
    }
  }

  // Handles all active rows of one head in one batch row: writes their gradients and adds to the sums `to`.
  static void backward(const Aggregate& p, const Rows& rows, const AggregateSums& to, float* scratch) {
    const Buffers b(p, p.tokens, true, scratch);
    load_keys(p, b, rows, 0, p.tokens);
    load_transposed(p, b, rows);
    std::fill(b.grad_keys, b.grads, 0.0f);
    for (int64_t first = 0; first < rows.count; first += kBlock)
      backward_block(p, b, {rows.batch, rows.kv_head, rows.index + first, std::min(kBlock, rows.count - first)}, to);
    const int64_t h = rows.kv_head;
    for (int64_t n = 0; n < (b.W > 0 ? p.tokens : 0); ++n) {
      const int64_t at = ((rows.batch * p.tokens + n) * p.heads + h) * b.D;
      std::copy_n(b.grad_keys + n * b.Dw, b.D, p.grad_k + at);
      std::copy_n(b.grad_values + n * b.Dw, b.D, p.grad_v + at);
    }
    for (int64_t n = 0; n < b.P; ++n) {
      const int64_t at = ((rows.batch * b.P + n) * p.heads + h) * b.D;
      std::copy_n(b.grad_key_rows + n * b.Dw, b.D, p.grad_pooled_k + at);
      std::copy_n(b.grad_value_rows + n * b.Dw, b.D, p.grad_pooled_v + at);
    }
    for (int64_t d = 0; d < b.D; ++d)
      for (int64_t w = 0; w < b.W; ++w) to.tokens[d * b.W + w] += b.grad_tokens[d * b.Ww + w];
  }

  // The tokens whose keys some row of the task sees: the window reaches side / 2 rows of the image and as many columns.
  static int64_t first_near(const Aggregate& p, const Rows& rows) {
    return std::max<int64_t>(0, rows.index[0] - p.side / 2 * (p.columns + 1));
  }
  static int64_t end_near(const Aggregate& p, const Rows& rows) {
    return std::min<int64_t>(p.tokens, rows.index[rows.count - 1] + p.side / 2 * (p.columns + 1) + 1);
  }

 private:
  static int64_t entry(const Aggregate& p, const Rows& rows, int64_t r) {
    return (rows.batch * p.tokens + rows.index[r]) * p.heads + rows.kv_head;
  }

  // C [height, columns] = A [height, depth] B [depth, columns], where columns is a multiple of L.
  template <typename Product::Into into>
  static void product(int64_t height, const float* a, int64_t row_stride, int64_t k_stride, const float* b,
                      int64_t b_stride, int64_t depth, float* c, int64_t c_stride, int64_t columns) {
    int64_t j = 0;
    for (; j + Product::kWidth <= columns; j += Product::kWidth)
      Product::template multiply<into>(height, a, row_stride, k_stride, b + j, b_stride, depth, c + j, c_stride);
    for (; j < columns; j += L)
      Product::template multiply<into, 1>(height, a, row_stride, k_stride, b + j, b_stride, depth, c + j, c_stride);
  }

  [[gnu::always_inline]] static Floats dot_lanes(const float* a, const float* b, int64_t count) {
    Floats sum{};
    for (int64_t i = 0; i < count; i += L) sum += S::load(a + i) * S::load(b + i);
    return sum;
  }
  [[gnu::always_inline]] static void add(float factor, const float* from, int64_t count, float* to) {
    for (int64_t i = 0; i < count; i += L) S::store(to + i, S::load(to + i) + factor * S::load(from + i));
  }
  // to[i] = the sum over the lanes of sums[i]; sums is overwritten.
  static void reduce(Floats* sums, int64_t count, float* to) {
    int64_t i = 0;
    for (; i + L <= count; i += L) S::store(to + i, S::sums(sums + i));
    for (; i < count; ++i) to[i] = S::sum(sums[i]);
  }

  // Calls see(place in the window, neighbour) for the neighbours inside the image.
  template <class See>
  [[gnu::always_inline]] static void each_neighbour(const Aggregate& p, int64_t token, const See& see) {
    const int64_t side = p.side, reach = side / 2, row = token / p.columns, column = token % p.columns;
    const int64_t left = std::max<int64_t>(0, reach - column), right = std::min(side, p.columns - column + reach);
    for (int64_t i = std::max<int64_t>(0, reach - row); i < std::min(side, p.rows - row + reach); ++i)
      for (int64_t j = left; j < right; ++j) see(i * side + j, token + (i - reach) * p.columns + j - reach);
  }

  static const float* at(const TokenView& x, int64_t batch, int64_t token, int64_t head) {
    return x.data + batch * x.batch + token * x.token + head * x.head;
  }
  static void copy_rows(const TokenView& x, const Rows& rows, int64_t first, int64_t end, int64_t D, int64_t Dw,
                        float* to) {
    for (int64_t n = first; n < end; ++n, to += Dw) {
      std::copy_n(at(x, rows.batch, n, rows.kv_head), D, to);
      std::fill(to + D, to + Dw, 0.0f);
    }
  }
  static void copy_columns(const TokenView& x, const Rows& rows, int64_t count, int64_t D, int64_t stride, float* to) {
    std::fill_n(to, D * stride, 0.0f);
    for (int64_t n = 0; n < count; ++n) {
      const float* from = at(x, rows.batch, n, rows.kv_head);
      for (int64_t d = 0; d < D; ++d) to[d * stride + n] = from[d];
    }
  }

  static void load_keys(const Aggregate& p, const Buffers& b, const Rows& rows, int64_t first, int64_t end) {
    copy_columns(p.pooled_k, rows, b.P, b.D, b.Pw, b.key_columns);
    copy_rows(p.pooled_v, rows, 0, b.P, b.D, b.Dw, b.value_rows);
    if (b.W == 0) return;
    copy_rows(p.k, rows, first, end, b.D, b.Dw, b.keys);
    copy_rows(p.v, rows, first, end, b.D, b.Dw, b.values);
    for (int64_t d = 0; d < b.D; ++d) {
      std::copy_n(p.token_weights + (rows.kv_head * b.D + d) * b.W, b.W, b.token_columns + d * b.Ww);
      std::fill(b.token_columns + d * b.Ww + b.W, b.token_columns + (d + 1) * b.Ww, 0.0f);
    }
  }
  static void load_transposed(const Aggregate& p, const Buffers& b, const Rows& rows) {
    copy_rows(p.pooled_k, rows, 0, b.P, b.D, b.Dw, b.key_rows);
    copy_columns(p.pooled_v, rows, b.P, b.D, b.Pw, b.value_columns);
    std::fill_n(b.token_rows, b.W * b.Dw, 0.0f);
    for (int64_t d = 0; d < b.D; ++d)
      for (int64_t w = 0; w < b.W; ++w) b.token_rows[w * b.Dw + d] = b.token_columns[d * b.Ww + w];
  }

  // Computes u, s, the scores (-inf where there is no key) and the additional weights c of the neighbours.
  static void score(const Aggregate& p, const Buffers& b, const Rows& rows, int64_t first_token) {
    const int64_t h = rows.kv_head;
    const float* embedding = p.embedding + h * b.D;
    for (int64_t r = 0; r < rows.count; ++r) {
      const float* q = at(p.q, rows.batch, rows.index[r], h);
      float *unit = b.unit + r * b.Dw, *scaled = b.scaled + r * b.Dw, square = 0;
      for (int64_t d = 0; d < b.D; ++d) square += q[d] * q[d];
      const float inverse = 1.0f / std::max(std::sqrt(square), kSmallestNorm);
      const float scale = p.temperature[h] * p.length[rows.index[r]];
      b.inverse_norms[r] = inverse;
      for (int64_t d = 0; d < b.D; ++d) {
        unit[d] = inverse * q[d];
        scaled[d] = scale * (unit[d] + embedding[d]);
      }
      std::fill(unit + b.D, unit + b.Dw, 0.0f);
      std::fill(scaled + b.D, scaled + b.Dw, 0.0f);
    }
    product<Product::Into::kSet>(rows.count, b.scaled, b.Dw, 1, b.key_columns, b.Pw, b.D, b.weights + b.Ww, b.columns,
                                 b.Pw);
    if (b.W > 0)
      product<Product::Into::kSet>(rows.count, b.unit, b.Dw, 1, b.token_columns, b.Ww, b.D, b.extra, b.Ww, b.Ww);
    Floats sums[kMaxPlaces];
    float dots[kMaxPlaces];
    for (int64_t r = 0; r < rows.count; ++r) {
      float* scores = b.weights + r * b.columns;
      const float* bias = p.pooled_bias + (h * p.tokens + rows.index[r]) * b.P;
      for (int64_t n = 0; n < b.P; ++n) scores[b.Ww + n] += bias[n];
      std::fill(scores + b.Ww + b.P, scores + b.columns, -kInfinity);
      if (b.W == 0) continue;
      const float* scaled = b.scaled + r * b.Dw;
      std::fill_n(sums, b.W, Floats{});
      std::fill_n(scores, b.Ww, -kInfinity);
      each_neighbour(p, rows.index[r], [&](int64_t w, int64_t m) {
        sums[w] = dot_lanes(scaled, b.keys + (m - first_token) * b.Dw, b.Dw);
        scores[w] = 0;
      });
      reduce(sums, b.W, dots);
      for (int64_t w = 0; w < b.W; ++w) {
        scores[w] += dots[w] + p.local_bias[h * b.W + w];
        b.extra[r * b.Ww + w] += p.token_bias[h * b.W + w];
      }
    }
  }

  // Turns scores into weights.
  static void softmax(float* scores, int64_t count) {
    Floats most = S::set(-kInfinity);
    for (int64_t n = 0; n < count; n += L) most = S::max(most, S::load(scores + n));
    const float largest = S::largest(most);
    Floats total{};
    const typename S::Exp2 exp2;
    for (int64_t n = 0; n < count; n += L) {
      const Floats weight = exp2(kLog2e * (S::load(scores + n) - largest));
      S::store(scores + n, weight);
      total += weight;
    }
    const float inverse = 1.0f / S::sum(total);
    for (int64_t n = 0; n < count; n += L) S::store(scores + n, inverse * S::load(scores + n));
  }

  static void backward_block(const Aggregate& p, const Buffers& b, const Rows& rows, const AggregateSums& to) {
    const int64_t R = rows.count, h = rows.kv_head;
    score(p, b, rows, 0);
    for (int64_t r = 0; r < R; ++r) {
      softmax(b.weights + r * b.columns, b.columns);
      const float gate = p.gates[entry(p, rows, r)];
      const float* grad = p.grad + entry(p, rows, r) * b.D;
      float *grads = b.grads + r * b.Dw, *gated = b.gated + r * b.Dw;
      std::fill(grads, grads + b.Dw, 0.0f);
      std::fill(gated, gated + b.Dw, 0.0f);
      for (int64_t d = 0; d < b.D; ++d) grads[d] = grad[d], gated[d] = gate * grad[d];
    }
    // grad_scores holds G = grad . v until the softmax is differentiated in place.
    product<Product::Into::kSet>(R, b.grads, b.Dw, 1, b.value_columns, b.Pw, b.D, b.grad_scores + b.Ww, b.columns,
                                 b.Pw);
    Floats sums[kMaxPlaces];
    for (int64_t r = 0; r < R; ++r) {
      float *G = b.grad_scores + r * b.columns, *weights = b.weights + r * b.columns;
      float *extra = b.extra + r * b.Ww, *grad_extra = b.grad_extra + r * b.Ww;
      const float gate = p.gates[entry(p, rows, r)];
      float of_extra = 0;  // This is the sum of c G.
      if (b.W > 0) {
        std::fill_n(sums, b.W, Floats{});
        std::fill_n(G, b.Ww, 0.0f);
        each_neighbour(p, rows.index[r], [&](int64_t w, int64_t m) {
          sums[w] = dot_lanes(b.grads + r * b.Dw, b.values + m * b.Dw, b.Dw);
          add(weights[w] + extra[w], b.gated + r * b.Dw, b.Dw, b.grad_values + m * b.Dw);
        });
        reduce(sums, b.W, G);
        for (int64_t w = 0; w < b.Ww; ++w) {
          of_extra += extra[w] * G[w];  // G is 0 outside of the image.
          grad_extra[w] = gate * G[w];
        }
        for (int64_t w = 0; w < b.W; ++w) to.token_bias[w] += grad_extra[w];
      }
      const float of_softmax = S::sum(dot_lanes(weights, G, b.columns));
      p.grad_gates[entry(p, rows, r)] = of_softmax + of_extra;
      for (int64_t n = 0; n < b.columns; n += L)
        S::store(G + n, gate * S::load(weights + n) * (S::load(G + n) - of_softmax));
      for (int64_t w = 0; w < b.W; ++w) to.local_bias[w] += G[w];
      float* bias = to.pooled_bias + rows.index[r] * b.P;
      for (int64_t n = 0; n < b.P; ++n) bias[n] += G[b.Ww + n];
    }
    const float* grad_pooled = b.grad_scores + b.Ww;
    product<Product::Into::kAdd>(b.P, b.weights + b.Ww, 1, b.columns, b.gated, b.Dw, R, b.grad_value_rows, b.Dw, b.Dw);
    product<Product::Into::kAdd>(b.P, grad_pooled, 1, b.columns, b.scaled, b.Dw, R, b.grad_key_rows, b.Dw, b.Dw);
    float* grad_scaled = b.sums;
    product<Product::Into::kSet>(R, grad_pooled, b.columns, 1, b.key_rows, b.Dw, b.P, grad_scaled, b.Dw, b.Dw);
    if (b.W > 0) {
      product<Product::Into::kAdd>(b.D, b.unit, 1, b.Dw, b.grad_extra, b.Ww, R, b.grad_tokens, b.Ww, b.Ww);
      product<Product::Into::kSet>(R, b.grad_extra, b.Ww, 1, b.token_rows, b.Dw, b.W, b.grad_unit, b.Dw, b.Dw);
    } else {
      std::fill_n(b.grad_unit, R * b.Dw, 0.0f);
    }
    for (int64_t r = 0; r < R; ++r) {
      float *grad_s = grad_scaled + r * b.Dw, *grad_u = b.grad_unit + r * b.Dw;
      const float *scores = b.grad_scores + r * b.columns, *unit = b.unit + r * b.Dw, *scaled = b.scaled + r * b.Dw;
      if (b.W > 0)
        each_neighbour(p, rows.index[r], [&](int64_t w, int64_t m) {
          add(scores[w], b.keys + m * b.Dw, b.Dw, grad_s);
          add(scores[w], scaled, b.Dw, b.grad_keys + m * b.Dw);
        });
      const float length = p.length[rows.index[r]], scale = p.temperature[h] * length;
      const float* embedding = p.embedding + h * b.D;
      float along = 0, of_temperature = 0;
      for (int64_t d = 0; d < b.D; ++d) {
        of_temperature += grad_s[d] * (unit[d] + embedding[d]);
        to.embedding[d] += scale * grad_s[d];
        grad_u[d] += scale * grad_s[d];
        along += grad_u[d] * unit[d];
      }
      *to.temperature += length * of_temperature;
      // du/dq = (1 - u u') / |q|, but where kSmallestNorm took the place of |q|, the divisor is a constant.
      const float inverse = b.inverse_norms[r], part = inverse < 1.0f / kSmallestNorm ? along : 0.0f;
      float* grad_q = p.grad_q + entry(p, rows, r) * b.D;
      for (int64_t d = 0; d < b.D; ++d) grad_q[d] = inverse * (grad_u[d] - part * unit[d]);
    }
  }
};

}  // namespace moh
