// What the forward and the backward pass share: rows on the lanes, tiles of keys and values, masks.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels/problem.h"
#include "kernels/product.h"

namespace moh {

constexpr float kLog2e = 1.44269504088896341f;  // The softmax is computed with powers of two.
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();

// The rows of one block, one per lane. Lanes from `count` on repeat the last row's token, so that they neither widen
// the range of keys nor need a case of their own. They hold zeros, unless their whole vector is left out
// (`by_vectors`), and are never written out.
template <class Isa>
struct Lanes {
  static constexpr int kWidth = VectorProduct<Isa>::kWidth;
  using Ints = typename Simd<Isa::kLanes>::Ints;

  int count = 0;
  int32_t token[kWidth];
  int32_t head[kWidth];  // The number among all query heads.

  void fill(const Problem& p, const Rows& rows, int64_t first) {
    count = static_cast<int>(std::min<int64_t>(kWidth, rows.count - first));
    for (int i = 0; i < kWidth; ++i) {
      const int32_t row = rows.index[first + std::min(i, count - 1)];
      token[i] = row / static_cast<int32_t>(p.group);
      head[i] = static_cast<int32_t>(rows.kv_head * p.group) + row % static_cast<int32_t>(p.group);
    }
  }
  Ints tokens(int vector) const {
    Ints x;
    std::memcpy(&x, token + vector * Isa::kLanes, sizeof x);
    return x;
  }
  int64_t key_begin(const Problem& p) const { return p.key_begin(token[0]); }
  int64_t key_end(const Problem& p) const { return p.key_end(token[kWidth - 1]); }
  // The index of lane i in [B, Nq, H] and in [B, H, Nq].
  int64_t by_token(const Problem& p, int64_t batch, int i) const {
    return (batch * p.queries + token[i]) * p.heads + head[i];
  }
  int64_t by_head(const Problem& p, int64_t batch, int i) const {
    return (batch * p.heads + head[i]) * p.queries + token[i];
  }
};

// Calls work(std::integral_constant<int, V>()) with the number of vectors that the block's rows need, since the last
// block of a task often has few rows.
template <class Isa, class Work>
void by_vectors(const Lanes<Isa>& lanes, const Work& work) {
  if (lanes.count <= Isa::kLanes)
    work(std::integral_constant<int, 1>());
  else
    work(std::integral_constant<int, Isa::kVectors>());
}

// The blocks of one task, in token order. Tiles start at multiples of kKeyTile for every task, so that a row's sums
// are taken in the same order whichever rows share its task.
template <class Isa>
struct Blocks {
  int64_t count;
  Lanes<Isa> lanes[std::max(kForwardBlocks, kBackwardBlocks)];

  Blocks(const Problem& p, const Rows& rows) : count(VectorProduct<Isa>::blocks(rows.count)) {
    for (int64_t block = 0; block < count; ++block) lanes[block].fill(p, rows, block * VectorProduct<Isa>::kWidth);
  }
  int64_t key_begin(const Problem& p) const { return lanes[0].key_begin(p) / Isa::kKeyTile * Isa::kKeyTile; }
  int64_t key_end(const Problem& p) const { return lanes[count - 1].key_end(p); }
};

template <class T>
const T* at(const View& x, int64_t batch, int64_t head, int64_t token) {
  return static_cast<const T*>(x.data) + batch * x.batch + head * x.head + token * x.token;
}

// Converts `count` numbers to floats.
template <class Isa, class T>
[[gnu::always_inline]] inline void get(const T* from, int64_t count, float* to) {
  using S = Simd<Isa::kLanes>;
  int64_t i = 0;
  for (; i + Isa::kLanes <= count; i += Isa::kLanes) S::store(to + i, S::load(from + i));
  for (; i < count; ++i) to[i] = static_cast<float>(from[i]);
}

// Writes to = factor * from for `count` numbers.
template <class T>
[[gnu::always_inline]] inline void put(const float* from, int64_t count, float factor, T* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(factor * from[i]);
}

// Whether tiles of x are copied before `blocks` blocks work through them. Numbers other than floats always are, since
// they are converted. Floats are copied where rows lie far apart, because each token holds all heads. Rows whole pages
// apart fall into the same few sets of the cache, which can't hold a tile of them, and a long sequence spreads over
// more pages than the processor caches addresses for.
template <class T>
bool is_copied(const View& x, int64_t keys, int64_t width, int64_t blocks) {
  const int64_t apart = x.token * static_cast<int64_t>(sizeof(T));
  return !std::is_same_v<T, float> || (blocks >= kBlocksPerCopy && x.token > width &&
                                       (apart % kPageBytes == 0 || keys * apart >= kFarBytes));
}

// Where the copies lie; null where there is none.
template <class Isa, class T>
struct Copies {
  float *keys, *values;

  Copies(const Problem& p, int64_t blocks, float* to) {
    const bool copies_keys = is_copied<T>(p.k, p.keys, p.width, blocks);
    keys = copies_keys ? to : nullptr;
    const bool copies_values = is_copied<T>(p.v, p.keys, p.value_width, blocks);
    values = copies_values ? to + (copies_keys ? Isa::kKeyTile * p.width : 0) : nullptr;
  }
  static int64_t scratch(const Problem& p, int64_t blocks) {
    return Isa::kKeyTile * ((is_copied<T>(p.k, p.keys, p.width, blocks) ? p.width : 0) +
                            (is_copied<T>(p.v, p.keys, p.value_width, blocks) ? p.value_width : 0));
  }
};

// Prefetches rows of x for the next tile: the products read several rows at once, a pattern that the processor does not
// foresee. Rows are requested one at a time between other work. A whole tile at once fills the queue of cache misses
// and stalls the loads behind it; row by row, 256 tokens took 7 to 10 % less on Zen 4. Always inlined, since GCC
// drops calls of functions that only prefetch.
template <class T>
class Prefetch {
 public:
  // Rows from `first` up to `end`; of each `parts` cache lines of a row, the one numbered `part`.
  Prefetch(const View& x, int64_t width, const Rows& rows, int64_t first, int64_t end, int64_t part, int64_t parts)
      : rows_(end > first ? at<T>(x, rows.batch, rows.kv_head, first) : nullptr), stride_(x.token), width_(width),
        count_(end - first), begin_(kLine * part), step_(kLine * parts) {}
  // Requests row first + n, if it is before `end`, into the L2 cache (locality 2): the current tile fills L1.
  [[gnu::always_inline]] void operator()(int64_t n) const {
    if (n >= count_) return;
    for (int64_t d = begin_; d < width_; d += step_) __builtin_prefetch(rows_ + n * stride_ + d, 0, 2);
  }

 private:
  static constexpr int64_t kLine = 64 / sizeof(T);
  const T* rows_;
  int64_t stride_, width_, count_, begin_, step_;
};

// Prefetches both keys and values.
template <class T>
struct PrefetchBoth {
  Prefetch<T> keys, values;

  PrefetchBoth(const Problem& p, const Rows& rows, int64_t first, int64_t end, int64_t part = 0, int64_t parts = 1)
      : keys(p.k, p.width, rows, first, end, part, parts), values(p.v, p.value_width, rows, first, end, part, parts) {}
  [[gnu::always_inline]] void operator()(int64_t n) const {
    keys(n);
    values(n);
  }
};

// A tile of keys or values as floats, copied to `copy` unless that is null.
template <class Isa, class T>
const float* tile_of(const View& x, int64_t batch, int64_t head, int64_t first, int64_t count, int64_t width,
                     float* copy, int64_t* stride) {
  const T* from = at<T>(x, batch, head, first);
  if constexpr (std::is_same_v<T, float>)
    if (copy == nullptr) {
      *stride = x.token;
      return from;
    }
  for (int64_t n = 0; n < count; ++n, from += x.token) get<Isa>(from, width, copy + n * width);
  *stride = width;
  return copy;
}

// Whether a bool mask shows any of these keys to any lane. Additive masks are assumed to.
template <class Isa>
bool mask_shows_any(const Problem& p, int64_t batch, const Lanes<Isa>& lanes, int64_t first, int64_t count) {
  if (p.mask.kind != MaskKind::kBool) return true;
  const Mask& m = p.mask;
  const char* previous = nullptr;
  for (int i = 0; i < lanes.count; ++i) {
    const char* row = static_cast<const char*>(m.data) + batch * m.batch + lanes.head[i] * m.head +
                      lanes.token[i] * m.query + first * m.key;
    if (row == previous) continue;
    previous = row;
    for (int64_t n = 0; n < count; ++n)
      if (row[n * m.key]) return true;
  }
  return false;
}

// The score after the mask's entry `index` is applied.
template <class T>
[[gnu::always_inline]] inline float masked(const Mask& m, int64_t index, float score) {
  if (m.kind == MaskKind::kBool) return static_cast<const char*>(m.data)[index] ? score : -kInfinity;
  // Only -inf hides a key. The lowest finite number, which many masks use, would overflow to -inf in units of log2, and
  // a row with nothing else would give 0 instead of its softmax; hence the bound. std::max keeps a NaN in first place.
  const float bias = static_cast<float>(static_cast<const T*>(m.data)[index]);
  return score + (bias == -kInfinity ? bias : std::max(kLog2e * bias, -kLargest));
}

// Applies the mask to scores [count, stride] of keys from `first` on, in the first V vectors of a block's lanes.
template <int V, class T, class Isa>
void apply_mask(const Problem& p, int64_t batch, const Lanes<Isa>& lanes, int64_t first, int64_t count, float* scores,
                int64_t stride) {
  using S = Simd<Isa::kLanes>;
  const Mask& m = p.mask;
  if (m.head == 0 && m.query == 0) {  // The mask is the same for every row, as for padding.
    for (int64_t n = 0; n < count; ++n) {
      const float change = masked<T>(m, batch * m.batch + (first + n) * m.key, 0.0f);
      if (change == 0.0f) continue;
      for (int j = 0; j < V; ++j) {
        float* s = scores + n * stride + j * Isa::kLanes;
        // A hidden score may be NaN, so it is set to -inf and not added to.
        S::store(s, m.kind == MaskKind::kBool ? S::set(-kInfinity) : S::load(s) + change);
      }
    }
    return;
  }
  for (int i = 0; i < V * Isa::kLanes; ++i) {
    const int64_t row = batch * m.batch + lanes.head[i] * m.head + lanes.token[i] * m.query + first * m.key;
    for (int64_t n = 0; n < count; ++n) {
      float* s = scores + n * stride + i;
      *s = masked<T>(m, row + n * m.key, *s);
    }
  }
}

// Applies the mask, causality and the window, likewise. The mask comes first: whatever it holds for keys that the other
// two hide, NaN and +inf included, is overwritten.
template <int V, class T, class Isa>
void hide(const Problem& p, int64_t batch, const Lanes<Isa>& lanes, int64_t first, int64_t count, float* scores,
          int64_t stride) {
  using S = Simd<Isa::kLanes>;
  using Ints = typename S::Ints;
  constexpr int kWidth = VectorProduct<Isa>::kWidth;
  const auto hidden = S::set(-kInfinity);
  if (p.mask.kind != MaskKind::kNone) apply_mask<V, T>(p, batch, lanes, first, count, scores, stride);
  if (p.causal) {
    const int64_t from = std::max<int64_t>(first, lanes.token[0] + 1);
    for (int64_t n = from; n < first + count; ++n)
      for (int j = 0; j < V; ++j) {
        float* s = scores + (n - first) * stride + j * Isa::kLanes;
        const Ints key = Ints{} + static_cast<int32_t>(n);
        S::store(s, lanes.tokens(j) >= key ? S::load(s) : hidden);
      }
  }
  if (p.window > 0) {
    const int64_t end = std::min(first + count, lanes.token[kWidth - 1] + 1 - p.window);
    for (int64_t n = first; n < end; ++n)
      for (int j = 0; j < V; ++j) {
        float* s = scores + (n - first) * stride + j * Isa::kLanes;
        const Ints seen_until = Ints{} + static_cast<int32_t>(n + p.window);
        S::store(s, lanes.tokens(j) < seen_until ? S::load(s) : hidden);
      }
  }
}

// Writes rows `from(i)` of `width` numbers to [width, kWidth], one row per lane, times `factor(i)`; the lanes beyond
// get zeros. Rows of Bf16x2 are only moved.
template <class Isa, class From, class Factor>
void put_on_lanes(int count, int64_t width, From from, Factor factor, float* to) {
  using S = Simd<Isa::kLanes>;
  constexpr int kWidth = VectorProduct<Isa>::kWidth, L = Isa::kLanes;
  constexpr bool kMoves = std::is_same_v<decltype(from(0)), const Bf16x2*>;
  decltype(from(0)) rows[kWidth];
  float factors[kWidth];
  for (int i = 0; i < kWidth; ++i) {
    rows[i] = from(std::min(i, count - 1));
    factors[i] = i < count ? factor(i) : 0.0f;
  }
  for (int first = 0; first < kWidth; first += L) {
    int64_t d = 0;
    for (; d + L <= width; d += L) {
      typename S::Floats square[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) {
        square[i] = first + i < count ? S::load(rows[first + i] + d) : typename S::Floats{};
        if constexpr (!kMoves) square[i] *= factors[first + i];
      }
      S::transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) S::store(to + (d + i) * kWidth + first, square[i]);
    }
    for (; d < width; ++d)
      for (int i = first; i < first + L; ++i) {
        const float number = i < count ? static_cast<float>(rows[i][d]) : 0.0f;
        to[d * kWidth + i] = kMoves ? number : factors[i] * number;
      }
  }
}

// The inverse: writes lane i of [width, kWidth], times `factor(i)`, to the row `to(i)`, for the first `count` lanes.
template <class Isa, class To, class Factor>
void take_off_lanes(int count, int64_t width, const float* from, Factor factor, To to) {
  using S = Simd<Isa::kLanes>;
  constexpr int kWidth = VectorProduct<Isa>::kWidth, L = Isa::kLanes;
  for (int first = 0; first < count; first += L) {
    const int last = std::min(first + L, count);
    decltype(to(0)) rows[L];
    float factors[L];
    for (int i = 0; i < last - first; ++i) rows[i] = to(first + i), factors[i] = factor(first + i);
    int64_t d = 0;
    for (; d + L <= width; d += L) {
      typename S::Floats square[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) square[i] = S::load(from + (d + i) * kWidth + first);
      S::transpose(square);
      if constexpr (std::is_same_v<std::remove_pointer_t<decltype(to(0))>, float>) {
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i)
          if (first + i < last) S::store(rows[i] + d, square[i] * factors[i]);
      } else if constexpr (std::is_same_v<std::remove_pointer_t<decltype(to(0))>, c10::BFloat16> &&
                           Isa::kDotsBFloat16) {
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i)
          if (first + i < last) Isa::round(square[i] * factors[i], reinterpret_cast<Bf16x2*>(rows[i] + d));
      } else {
        float numbers[L][L];
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) S::store(numbers[i], square[i]);
        for (int i = 0; i < last - first; ++i) put(numbers[i], L, factors[i], rows[i] + d);
      }
    }
    for (; d < width; ++d)
      for (int i = first; i < last; ++i) put(from + d * kWidth + i, 1, factors[i - first], rows[i - first] + d);
  }
}

}  // namespace moh
