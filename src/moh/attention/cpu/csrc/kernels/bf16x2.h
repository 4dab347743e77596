// The forward pass and the projections in bfloat16, by the processor's dot products of two numbers at a time.
//
// Products run over Bf16x2. For the scores these hold two neighbours of a row's width, for the outputs two keys. Keys
// are read where they lie. Queries are put on the lanes unscaled, and so exact. A tile of values is copied once for all
// blocks, with the rows of two keys interleaved. Weights are rounded to bfloat16, their totals are not. `Product` is
// `VectorProduct`, or another with the same interface (amx.h).
#pragma once

#include "kernels/forward.h"
#include "kernels/projection.h"

namespace moh {

// Whether rows consist of whole Bf16x2: their widths and distances are even. Both passes share this condition, since
// the backward pass has to compute its weights from the same scores.
inline bool fits_bf16x2(const Problem& p) {
  return p.width % 2 == 0 && p.k.token % 2 == 0 && p.value_width % 2 == 0 && p.v.token % 2 == 0;
}

// A copy of a tile of keys or values with the rows of two keys interleaved, for products that run over keys. It is
// transposed too where the rows of a product's first factor have to lie in one piece.
template <class Isa, class Product>
class InterleavedTile {
 public:
  using T = c10::BFloat16;
  using Into = typename Product::Into;
  static constexpr int kWidth = Product::kWidth;
  static constexpr int64_t kTile = Isa::kKeyTile;
  static constexpr bool kTransposed = Product::kRowsInOnePiece;

  // Of the sums' rows: those beyond `width` hold no result.
  static int64_t padded(int64_t width) { return round_up(width, Product::kSide); }
  static int64_t scratch(int64_t width) { return (kTile / 2 + 1) * padded(width); }
  InterleavedTile(int64_t width, float* scratch)
      : width_(width), key_stride_(kTransposed ? 1 : width), place_stride_(kTransposed ? kTile / 2 : 1),
        copy_(reinterpret_cast<Bf16x2*>(scratch)), last_(copy_ + kTile / 2 * padded(width)) {}

  void load(const View& x, int64_t batch, int64_t head, int64_t first, int64_t count) {
    const T* from = at<T>(x, batch, head, first);
    if constexpr (kTransposed) {
      Isa::template interleave_transposed<kTile / 2>(from, x.token, count, width_, copy_);
    } else {
      for (int64_t n = 0; n < count; n += 2, from += 2 * x.token)
        Isa::interleave(from, n + 1 < count ? from + x.token : nullptr, width_, copy_ + n / 2 * width_);
    }
  }
  // sums [padded width, kWidth] = sums (times rescale [kWidth], for kRescale) + the product of the first `seen` keys with
  // their factors [kTile / 2, kWidth], two keys to a Bf16x2.
  template <Into into, int V>
  void add(int64_t seen, const float* factors, float* sums, const float* rescale = nullptr) const {
    const int64_t whole = seen / 2;
    Product::template multiply<into, V>(padded(width_), copy_, place_stride_, key_stride_, factors, kWidth, whole, sums,
                                        kWidth, rescale);
    if (2 * whole >= seen) return;
    // An odd last key is added by itself: its neighbour in the copy is not seen here and may be NaN, and 0 * NaN is
    // NaN. This also holds where it has no neighbour, so that the order of additions does not depend on where a task's
    // keys end.
    for (int64_t d = 0; d < width_; ++d)
      last_[d].bits = copy_[whole * key_stride_ + d * place_stride_].bits & 0xffffu;
    Product::template multiply<Into::kAdd, V>(width_, last_, 1, width_, factors + whole * kWidth, kWidth, 1, sums,
                                              kWidth);
  }

 private:
  int64_t width_, key_stride_, place_stride_;
  Bf16x2 *copy_, *last_;  // [kTile / 2, width] or transposed, [width]
};

// Keys times queries, or values times gradients, over Bf16x2 of their width: rows of x, by rows on the lanes. Rows of x
// stay where they lie, but for tiles they are copied side by side, with zeros up to a whole tile's depth: far apart in
// memory they would push each other out of the cache. The scores of both passes are computed here, and so are equal to the bit but for the factor's place.
template <class Isa, class Product>
class RowProducts {
 public:
  using T = c10::BFloat16;
  static constexpr int kWidth = Product::kWidth;

  static constexpr bool kCopies = Product::kRowsInOnePiece;

  static int64_t depth(int64_t width) { return round_up(width / 2, Product::kSide); }
  static int64_t scratch(int64_t width, int64_t blocks) {
    return depth(width) * (blocks * kWidth + (kCopies ? Isa::kKeyTile : 0));
  }
  // The products are multiplied by `factor`, which no pass over them is spent on where it is 1.
  RowProducts(const View& x, int64_t width, const Rows& rows, float factor, int64_t blocks, float* scratch)
      : x_(x), width_(width), depth_(depth(width)), rows_(rows), factor_(factor), on_lanes_(scratch),
        copy_(reinterpret_cast<Bf16x2*>(scratch + blocks * depth_ * kWidth)) {}

  // Puts a block's rows `from(i)` on the lanes, unscaled.
  template <class From>
  void put(int64_t block, int count, From from) {
    const auto row = [&](int i) { return reinterpret_cast<const Bf16x2*>(from(i)); };
    float* to = on_lanes_ + block * depth_ * kWidth;
    put_on_lanes<Isa>(count, width_ / 2, row, [](int) { return 1.0f; }, to);
    std::fill_n(to + width_ / 2 * kWidth, (depth_ - width_ / 2) * kWidth, 0.0f);
  }
  void load(int64_t first, int64_t count) {
    tile_ = reinterpret_cast<const Bf16x2*>(at<T>(x_, rows_.batch, rows_.kv_head, first));
    apart_ = x_.token / 2;
    if constexpr (kCopies) {
      for (int64_t n = 0; n < count; ++n) {
        std::memcpy(copy_ + n * depth_, tile_ + n * apart_, width_ * sizeof(T));
        std::fill_n(copy_ + n * depth_ + width_ / 2, depth_ - width_ / 2, Bf16x2{0});
      }
      tile_ = copy_, apart_ = depth_;
    }
  }
  // to [seen, kWidth] = products, in the first V vectors of a block's lanes; up to a whole tile's height, rows beyond may be
  // overwritten.
  template <int V>
  void multiply(int64_t block, int64_t seen, float* to) const {
    using Into = typename Product::Into;
    const float* rows = on_lanes_ + block * depth_ * kWidth;
    const int64_t height = round_up(seen, Product::kSide);
    if (factor_ == 1.0f)
      Product::template multiply<Into::kSet, V>(height, tile_, apart_, 1, rows, kWidth, depth_, to, kWidth);
    else
      Product::template multiply<Into::kScaled, V>(height, tile_, apart_, 1, rows, kWidth, depth_, to, kWidth, &factor_);
  }

 private:
  const View& x_;
  int64_t width_, depth_;
  const Rows& rows_;
  float factor_;
  float* on_lanes_;  // Bf16x2, [block, depth, kWidth]
  Bf16x2* copy_;     // [kKeyTile, depth], where rows are copied
  const Bf16x2* tile_ = nullptr;
  int64_t apart_ = 0;  // Bf16x2 from one row of the tile to the next
};

// What products of queries and keys are multiplied by where their powers of two are taken, at no cost: 1 if they have to be
// in units of log2 before, since an additive mask follows, or since the scale is negative, so that the largest score is
// that of the smallest product, or too small to divide by.
inline float unit_of(const Problem& p) {
  return p.scale > 1e-30f && p.mask.kind != MaskKind::kAdditive ? p.scale * kLog2e : 1.0f;
}

template <class Isa, class Product = VectorProduct<Isa>>
class Bf16x2Operands {
 public:
  using S = Simd<Isa::kLanes>;
  using Exp2 = typename S::Exp2ToRound;
  static constexpr int kWidth = Product::kWidth;
  static constexpr int64_t kTile = Isa::kKeyTile;

  static int64_t padded(int64_t width) { return InterleavedTile<Isa, Product>::padded(width); }
  static int64_t scratch(const Problem& p, int64_t blocks) {
    return RowProducts<Isa, Product>::scratch(p.width, blocks) + kTile / 2 * kWidth +
           InterleavedTile<Isa, Product>::scratch(p.value_width);
  }
  Bf16x2Operands(const Problem& p, const Rows& rows, int64_t blocks, float* scratch)
      : p_(p), rows_(rows), unit_(unit_of(p)), scores_(p.k, p.width, rows, p.scale * kLog2e / unit_, blocks, scratch),
        weights_(scratch + RowProducts<Isa, Product>::scratch(p.width, blocks)),
        values_(p.value_width, weights_ + kTile / 2 * kWidth) {}

  void put(int64_t block, const Lanes<Isa>& lanes) {
    scores_.put(block, lanes.count,
                [&](int i) { return at<c10::BFloat16>(p_.q, rows_.batch, lanes.head[i], lanes.token[i]); });
  }
  void load(int64_t first, int64_t count) {
    scores_.load(first, count);
    values_.load(p_.v, rows_.batch, rows_.kv_head, first, count);
  }
  float unit() const { return unit_; }
  template <int V>
  void score(int64_t block, int64_t seen, float* scores) const {
    scores_.template multiply<V>(block, seen, scores);
  }
  [[gnu::always_inline]] void keep(float*, int64_t n, int lane, typename S::Floats first,
                                   typename S::Floats second) const {
    S::store(weights_ + n / 2 * kWidth + lane, Isa::to_bf16x2(first, second));
  }
  template <typename Product::Into into, int V>
  void add(int64_t seen, const float*, const float* rescale, float* sums) const {
    values_.template add<into, V>(seen, weights_, sums, rescale);
  }

 private:
  const Problem& p_;
  const Rows& rows_;
  float unit_;
  RowProducts<Isa, Product> scores_;
  float* weights_;  // Bf16x2 of two keys, [kTile / 2, kWidth]
  InterleavedTile<Isa, Product> values_;
};

// Projections of even width and channels. A Bf16x2 holds two neighbours of the width or the channels, or two tokens.
template <class Isa>
struct Bf16x2Cells {
  using T = c10::BFloat16;
  using Cell = Bf16x2;
  static constexpr int64_t kNumbers = 2;

  static bool handles(const Projection& p) { return p.width % 2 == 0 && p.channels % 2 == 0; }

  static void row(const T* from, int64_t count, Bf16x2* to) { std::memcpy(to, from, count * sizeof(T)); }
  static void join(const T* first, const T* second, int64_t count, Bf16x2* to) {
    Isa::interleave(first, second, count, to);
  }
  static void pack(const T* from, int64_t depth_stride, int64_t depth, int64_t column_stride, int64_t columns,
                   float* to) {
    constexpr int64_t kWidth = VectorProduct<Isa>::kWidth;
    if (depth_stride == 1 && column_stride % 2 == 0) {
      pack_panels<Isa>(reinterpret_cast<const Bf16x2*>(from), 1, depth / 2, column_stride / 2, columns, to);
      return;
    }
    for (int64_t c = 0; c < columns; c += kWidth, to += depth / 2 * kWidth) {
      const int64_t width = std::min(kWidth, columns - c);
      Bf16x2* panel = reinterpret_cast<Bf16x2*>(to);
      if (width < kWidth) std::fill_n(to, depth / 2 * kWidth, 0.0f);
      for (int64_t r = 0; r < depth; r += 2, panel += kWidth) {
        const T *first = from + r * depth_stride + c * column_stride, *second = first + depth_stride;
        if (column_stride == 1)
          Isa::interleave(first, second, width, panel);
        else
          for (int64_t j = 0; j < width; ++j)
            Isa::interleave(first + j * column_stride, second + j * column_stride, 1, panel + j);
      }
    }
  }
};

}  // namespace moh
