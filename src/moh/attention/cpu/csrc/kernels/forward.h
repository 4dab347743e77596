// Attention of a block of active rows over all their keys, by the online softmax (docs/kernel.md derives it).
#pragma once

#include "kernels/block.h"

namespace moh {

// What the products work on: floats, either the tensors themselves or converted copies of their tiles. bf16x2.h has the
// other type of operands.
template <class Isa, class T>
class FloatOperands {
 public:
  using Exp2 = typename Simd<Isa::kLanes>::Exp2;
  using Product = VectorProduct<Isa>;
  static constexpr int kWidth = Product::kWidth;

  static int64_t padded(int64_t width) { return width; }  // the rows of sums; only `width` hold results
  // Floats of memory for tasks of `blocks` blocks.
  static int64_t scratch(const Problem& p, int64_t blocks) {
    return blocks * p.width * kWidth + Copies<Isa, T>::scratch(p, blocks);
  }
  FloatOperands(const Problem& p, const Rows& rows, int64_t blocks, float* scratch)
      : p_(p), rows_(rows), queries_(scratch), copies_(p, blocks, scratch + blocks * p.width * kWidth) {}

  // Puts a block's queries on the lanes, [D, kWidth], times the scale and log2(e).
  void put(int64_t block, const Lanes<Isa>& lanes) {
    put_on_lanes<Isa>(
        lanes.count, p_.width, [&](int i) { return at<T>(p_.q, rows_.batch, lanes.head[i], lanes.token[i]); },
        [&](int) { return p_.scale * kLog2e; }, queries_ + block * p_.width * kWidth);
  }
  // Selects the tile of keys and values that is worked through next.
  void load(int64_t first, int64_t count) {
    keys_ = tile_of<Isa, T>(p_.k, rows_.batch, rows_.kv_head, first, count, p_.width, copies_.keys, &key_stride_);
    values_ = tile_of<Isa, T>(p_.v, rows_.batch, rows_.kv_head, first, count, p_.value_width, copies_.values,
                              &value_stride_);
  }
  // Writes a block's scores [seen, kWidth] to the first V vectors of its lanes; `unit()` times these are in units of
  // log2.
  static constexpr float unit() { return 1.0f; }
  template <int V>
  void score(int64_t block, int64_t seen, float* scores) const {
    Product::template multiply<Product::Into::kSet, V>(seen, keys_, key_stride_, 1,
                                                       queries_ + block * p_.width * kWidth, kWidth, p_.width, scores,
                                                       kWidth);
  }
  // Stores the weights of keys n and n + 1, for one vector of lanes from `lane` on, where their scores were.
  [[gnu::always_inline]] void keep(float* scores, int64_t n, int lane, typename Simd<Isa::kLanes>::Floats first,
                                   typename Simd<Isa::kLanes>::Floats second) const {
    Simd<Isa::kLanes>::store(scores + n * kWidth + lane, first);
    Simd<Isa::kLanes>::store(scores + (n + 1) * kWidth + lane, second);
  }
  // sums [padded Dv, kWidth] = sums (times rescale [kWidth], for kRescale) + values' weights: o' of docs/kernel.md.
  template <typename Product::Into into, int V>
  void add(int64_t seen, const float* scores, const float* rescale, float* sums) const {
    Product::template multiply<into, V>(p_.value_width, values_, 1, value_stride_, scores, kWidth, seen, sums, kWidth,
                                        rescale);
  }

 private:
  const Problem& p_;
  const Rows& rows_;
  float* queries_;
  Copies<Isa, T> copies_;
  const float *keys_ = nullptr, *values_ = nullptr;
  int64_t key_stride_ = 0, value_stride_ = 0;
};

template <class Isa, class T, class Operands = FloatOperands<Isa, T>>
struct Forward {
  using S = Simd<Isa::kLanes>;
  using Floats = typename S::Floats;
  using Product = VectorProduct<Isa>;
  static constexpr int kWidth = Product::kWidth;
  static constexpr int64_t kTile = Isa::kKeyTile;
  static_assert(kTile % 2 == 0, "the softmax takes keys two by two");
  // Weights may reach 2^8 before earlier sums are rescaled, which costs a pass over them.
  static constexpr float kHeadroom = 8.0f;

  static int64_t scratch(const Problem& p, int64_t rows) {
    const int64_t blocks = Product::blocks(rows);
    return kWidth * (blocks * (Operands::padded(p.value_width) + 3) + kTile + 1) + Operands::scratch(p, blocks);
  }

  static void run(const Problem& p, const Rows& rows, float* scratch) {
    const Blocks<Isa> blocks(p, rows);
    const int64_t Dv = Operands::padded(p.value_width), count = blocks.count;
    // o, the largest score, m, l and r of docs/kernel.md; both scores are still to be multiplied by `unit()`.
    float* sums = scratch;                     // [block, padded Dv, kWidth]
    float* most = sums + count * Dv * kWidth;  // [block, kWidth]
    float* bases = most + count * kWidth;      // [block, kWidth]
    float* totals = bases + count * kWidth;    // [block, kWidth]
    float* rescale = totals + count * kWidth;  // [kWidth]
    float* scores = rescale + kWidth;          // [kTile, kWidth]
    Operands operands(p, rows, count, scores + kTile * kWidth);

    std::fill(sums, most, 0.0f);
    std::fill(most, totals, -kInfinity);  // and the bases
    std::fill(totals, rescale, 0.0f);
    const int64_t begin = blocks.key_begin(p), end = blocks.key_end(p);
    const PrefetchBoth<T> first_tile(p, rows, begin, end);
    for (int64_t block = 0, n = 0; block < count; ++block) {
      for (; n < kTile * (block + 1) / count; ++n) first_tile(n);
      operands.put(block, blocks.lanes[block]);
    }
    int64_t working = 0, until = 0;  // Blocks [working, until) see keys of the tile; rows are in token order.
    for (int64_t first = begin; first < end; first += kTile) {
      const int64_t loaded = std::min(kTile, end - first);
      operands.load(first, loaded);
      while (blocks.lanes[working].key_end(p) <= first) ++working;
      while (until < count && blocks.lanes[until].key_begin(p) < first + kTile) ++until;
      for (int64_t block = working; block < until; ++block) {
        const Lanes<Isa>& lanes = blocks.lanes[block];
        const int64_t seen = std::min(loaded, lanes.key_end(p) - first);
        if (!mask_shows_any(p, rows.batch, lanes, first, seen)) continue;
        const auto work = [&](auto vectors) {
          constexpr int V = decltype(vectors)::value;
          operands.template score<V>(block, seen, scores);
          hide<V, T>(p, rows.batch, lanes, first, seen, scores, kWidth);
          const PrefetchBoth<T> next(p, rows, first + kTile, end, block - working, until - working);
          const int64_t at = block * kWidth;
          if (softmax<V>(operands, next, scores, seen, most + at, bases + at, totals + at, rescale))
            operands.template add<Product::Into::kRescale, V>(seen, scores, rescale, sums + at * Dv);
          else
            operands.template add<Product::Into::kAdd, V>(seen, scores, nullptr, sums + at * Dv);
        };
        by_vectors<Isa>(lanes, work);
      }
    }
    for (int64_t block = 0; block < count; ++block)
      write(p, operands.unit(), rows.batch, blocks.lanes[block], sums + block * Dv * kWidth, most + block * kWidth,
            bases + block * kWidth, totals + block * kWidth);
  }

 private:
  // Turns scores [count, kWidth] into weights 2^(unit (s - m')) relative to a base m' that the largest score so far exceeds by
  // at most `kHeadroom`, and computes r = 2^(m - m'), which brings earlier sums to the same scale; returns whether any r
  // differs from 1. An odd count is rounded up: one row of scores beyond may be overwritten with weights of 0. The
  // `next` keys and values are prefetched meanwhile.
  template <int V>
  static bool softmax(const Operands& operands, const PrefetchBoth<T>& next, float* scores, int64_t count, float* most,
                      float* bases, float* totals, float* rescale) {
    const typename Operands::Exp2 exp2(operands.unit());
    const float headroom = kHeadroom / operands.unit();
    const auto score = [&](int64_t n, int j) { return S::load(scores + n * kWidth + j * Isa::kLanes); };
    Floats even[V], odd[V], base[V], total[V];
    for (int j = 0; j < V; ++j) even[j] = odd[j] = S::set(-kInfinity);
    for (int64_t n = 0; n < count; n += 2)  // two chains of comparisons, since one would wait for each result
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) {
        even[j] = S::max(even[j], score(n, j));
        odd[j] = S::max(odd[j], score(std::min(n + 1, count - 1), j));
      }
    bool rises = false;
    for (int j = 0; j < V; ++j) {
      const int lane = j * Isa::kLanes;
      const Floats largest = S::max(S::load(most + lane), S::max(even[j], odd[j])), before = S::load(bases + lane);
      const auto over = largest > before + headroom;
      const Floats now = over ? largest : before;
      // Nothing has been seen while m' is -inf: -inf - -inf would be NaN, but 2^(-inf - 0) is 0, also for r.
      base[j] = now == -kInfinity ? Floats{} : now;
      total[j] = Floats{};
      rises |= S::any(over & (before > -kInfinity));  // Sums are 0 while nothing has been seen.
      S::store(most + lane, largest);
      S::store(bases + lane, now);
      S::store(rescale + lane, exp2(before - base[j]));
    }
    const auto weight = [&](int64_t n, int j) {
      const Floats x = exp2(score(n, j) - base[j]);
      total[j] += x;
      return x;
    };
    int64_t n = 0;
    for (; n + 2 <= count; n += 2) {
      next(n);
      next(n + 1);
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) {
        const Floats first = weight(n, j), second = weight(n + 1, j);
        operands.keep(scores, n, j * Isa::kLanes, first, second);
      }
    }
    if (n < count)
      for (int j = 0; j < V; ++j) operands.keep(scores, n, j * Isa::kLanes, weight(n, j), Floats{});
    for (int j = 0; j < V; ++j) {
      const int lane = j * Isa::kLanes;
      S::store(totals + lane, S::load(totals + lane) * S::load(rescale + lane) + total[j]);
    }
    return rises;
  }

  static void write(const Problem& p, float unit, int64_t batch, const Lanes<Isa>& lanes, const float* sums, const float* most,
                    const float* bases, const float* totals) {
    const T* gates = static_cast<const T*>(p.gates);
    T* out = static_cast<T*>(p.out);
    float factors[kWidth];
    for (int i = 0; i < lanes.count; ++i) {
      const bool blind = totals[i] == 0.0f;  // The row saw no key: otherwise its largest score alone adds 1 or more.
      factors[i] = blind ? 0.0f : static_cast<float>(gates[lanes.by_token(p, batch, i)]) / totals[i];
      if (p.most == nullptr) continue;
      p.most[lanes.by_head(p, batch, i)] = blind ? kInfinity : unit * most[i];
      p.totals[lanes.by_head(p, batch, i)] = blind ? 0.0f : totals[i] * std::exp2(unit * (bases[i] - most[i]));
    }
    take_off_lanes<Isa>(
        lanes.count, p.value_width, sums, [&](int i) { return factors[i]; },
        [&](int i) { return out + lanes.by_token(p, batch, i) * p.value_width; });
  }
};

}  // namespace moh
