// Products of the projections over active (token, head) pairs alone: rows are copied together, multiplied, put back.
//
// With M [H * D, C] and sums over the active pairs (t, h):
//   expand     heads[t, h, :] = sum_c x[t, c] M[h, :, c]         query projection; output projection's grad_x
//   sum_heads  x[t, :] = sum_h sum_d heads[t, h, d] M[h, d, :]   output projection; query projection's grad_x
//   outer      M[h, d, c] = sum_t heads[t, h, d] x[t, c]         both projections' grad_M
#pragma once

#include "kernels/block.h"

namespace moh {

// Copies [rows, columns], each with its stride, to panels [wide / kWidth, rows, kWidth], with zeros beyond `columns`.
// The rows of a panel are neighbours; a power of two apart they would fall into the same few sets of the cache.
template <class Isa, class T>
void pack_panels(const T* from, int64_t row_stride, int64_t rows, int64_t column_stride, int64_t columns, float* to) {
  using S = Simd<Isa::kLanes>;
  constexpr int64_t kWidth = VectorProduct<Isa>::kWidth, L = Isa::kLanes;
  for (int64_t c = 0; c < columns; c += kWidth, to += rows * kWidth) {
    const int64_t width = std::min(kWidth, columns - c);
    const T* panel = from + c * column_stride;
    if (width < kWidth) std::fill_n(to, rows * kWidth, 0.0f);
    if (column_stride == 1) {
      for (int64_t r = 0; r < rows; ++r) get<Isa>(panel + r * row_stride, width, to + r * kWidth);
      continue;
    }
    constexpr int64_t kLine = 64 / sizeof(T);  // The panel is transposed, by the numbers of one cache line.
    int64_t r = 0;
    if (row_stride == 1 && width == kWidth)
      for (; r + kLine <= rows; r += kLine)
        for (int64_t j = 0; j < kWidth; j += L)
          for (int64_t i = r; i < r + kLine; i += L) {
            typename S::Floats square[L];
#pragma GCC unroll 16
            for (int64_t n = 0; n < L; ++n) square[n] = S::load(panel + (j + n) * column_stride + i);
            S::transpose(square);
#pragma GCC unroll 16
            for (int64_t n = 0; n < L; ++n) S::store(to + (i + n) * kWidth + j, square[n]);
          }
    for (; r < rows; r += kLine) {
      const int64_t r_end = std::min(rows, r + kLine);
      for (int64_t j = 0; j < width; ++j)
        for (int64_t i = r; i < r_end; ++i)
          to[i * kWidth + j] = static_cast<float>(panel[i * row_stride + j * column_stride]);
    }
  }
}

// Starts sums [rows, wide]: each row is the bias [width], with zeros behind, or only zeros where it is null.
template <class Isa, class T>
void start_sums(const T* bias, int64_t width, int64_t rows, int64_t wide, float* to) {
  std::fill_n(to, (bias == nullptr ? rows : std::min<int64_t>(rows, 1)) * wide, 0.0f);
  if (bias == nullptr || rows == 0) return;
  get<Isa>(bias, width, to);
  for (int64_t r = 1; r < rows; ++r) std::copy_n(to, wide, to + r * wide);
}

// What the products work on: floats, converted from T. bf16x2.h has the other type of cells.
template <class Isa, class T>
struct FloatCells {
  using Cell = float;
  static constexpr int64_t kNumbers = 1;  // A cell holds this many numbers.

  static void row(const T* from, int64_t count, float* to) { get<Isa>(from, count, to); }
  // Joins kNumbers rows into cells; `second` is null where there is none.
  static void join(const T* first, const T*, int64_t count, float* to) { get<Isa>(first, count, to); }
  // Packs [depth, columns] into panels; a cell holds neighbours along the depth.
  static void pack(const T* from, int64_t depth_stride, int64_t depth, int64_t column_stride, int64_t columns,
                   float* to) {
    pack_panels<Isa>(from, depth_stride, depth, column_stride, columns, to);
  }
};

template <class Isa, class T, class Cells = FloatCells<Isa, T>, class Product = VectorProduct<Isa>>
struct Project {
  using Cell = typename Cells::Cell;
  static constexpr int64_t kWidth = Product::kWidth, kNumbers = Cells::kNumbers;
  static constexpr int64_t kRows = kProjectionRows, kChannels = kProjectionChannels;
  static_assert(kRows % kNumbers == 0 && kChannels % kNumbers == 0 && sizeof(Cell) == sizeof(float));

  static int64_t padded(int64_t width) { return Product::padded(width); }

  static int64_t scratch(const Projection& p) {
    const int64_t width = padded(p.width);
    return kRows * kChannels + kRows * width + kChannels * width + kWidth;
  }

  static void expand(const Projection& p, const Rows& tokens, float* scratch) {
    const int64_t width = padded(p.width);
    Cell* rows = reinterpret_cast<Cell*>(scratch);  // [kRows, kChannels / kNumbers]
    float* matrix = scratch + kRows * kChannels;    // panels [width / kWidth, kChannels / kNumbers, kWidth]
    float* result = matrix + kChannels * width;     // [kRows, width]
    const T* x = static_cast<const T*>(p.from);
    const T* m = static_cast<const T*>(p.matrix) + tokens.kv_head * p.width * p.head_stride;
    const T* bias = static_cast<const T*>(p.bias);
    start_sums<Isa>(bias == nullptr ? nullptr : bias + tokens.kv_head * p.width, p.width, tokens.count, width, result);
    for (int64_t first = 0; first < p.channels; first += kChannels) {
      const int64_t depth = std::min(kChannels, p.channels - first), cells = depth / kNumbers;
      for (int64_t i = 0; i < tokens.count; ++i)
        Cells::row(x + tokens.index[i] * p.channels + first, depth, rows + i * (kChannels / kNumbers));
      Cells::pack(m + first * p.channel_stride, p.channel_stride, depth, p.head_stride, p.width, matrix);
      for (int64_t d = 0; d < width; d += kWidth) {
        const auto multiply = [&](auto vectors) {
          Product::template multiply<Product::Into::kAdd, decltype(vectors)::value>(
              tokens.count, rows, kChannels / kNumbers, 1, matrix + d * cells, kWidth, cells, result + d, width);
        };
        // The last panel of a width such as 72 or 80 fills half of its vectors.
        if (p.width - d <= kWidth / 2)
          multiply(std::integral_constant<int, Isa::kVectors / 2>());
        else
          multiply(std::integral_constant<int, Isa::kVectors>());
      }
    }
    T* to = static_cast<T*>(p.to) + tokens.kv_head * p.width;
    for (int64_t i = 0; i < tokens.count; ++i)
      put(result + i * width, p.width, 1.0f, to + tokens.index[i] * p.heads * p.width);
  }

  static void sum_heads(const Projection& p, const Rows* by_head, int64_t first_token, int64_t count,
                        int64_t first_channel, int64_t channels, float* scratch) {
    const int64_t D = p.width, cells = D / kNumbers, wide = padded(channels);
    float* sums = scratch;                      // [kRows, wide]
    float* matrix = sums + kRows * kChannels;   // panels [wide / kWidth, D / kNumbers, kWidth]
    Cell* rows = reinterpret_cast<Cell*>(matrix + padded(D) * kChannels);  // [kRows, D / kNumbers]
    const T* heads = static_cast<const T*>(p.from);
    const T* m = static_cast<const T*>(p.matrix) + first_channel * p.channel_stride;
    int32_t index[kRows];
    const T* bias = static_cast<const T*>(p.bias);
    start_sums<Isa>(bias == nullptr ? nullptr : bias + first_channel, channels, count, wide, sums);
    for (int64_t h = 0; h < p.heads; ++h) {
      const Rows& active = by_head[h];
      const int32_t* end = active.index + active.count;
      const int32_t* at = std::lower_bound(active.index, end, static_cast<int32_t>(first_token));
      int64_t used = 0;
      for (; at < end && *at < first_token + count; ++at, ++used) {
        index[used] = *at - static_cast<int32_t>(first_token);
        Cells::row(heads + (*at * p.heads + h) * D, D, rows + used * cells);
      }
      if (used == 0) continue;
      Cells::pack(m + h * D * p.head_stride, p.head_stride, D, p.channel_stride, channels, matrix);
      for (int64_t c = 0; c < wide; c += kWidth)
        Product::template multiply<Product::Into::kAdd>(used, rows, cells, 1, matrix + c * cells, kWidth, cells,
                                                        sums + c, wide, nullptr, index);
    }
    T* to = static_cast<T*>(p.to) + first_token * p.channels + first_channel;
    for (int64_t i = 0; i < count; ++i) put(sums + i * wide, channels, 1.0f, to + i * p.channels);
  }

  static void outer(const Projection& p, const T* x, const Rows& tokens, int64_t first_channel, int64_t channels,
                    float* scratch) {
    constexpr int64_t kCells = kRows / kNumbers;
    const int64_t D = p.width, wide = padded(channels);
    float* channel_rows = scratch;                     // panels [wide / kWidth, kCells, kWidth], of cells
    float* sums = channel_rows + kRows * kChannels;    // [D, wide]
    Cell* head_rows = reinterpret_cast<Cell*>(sums + padded(D) * kChannels);  // [kCells, D]
    const T* heads = static_cast<const T*>(p.from);
    std::fill_n(sums, D * wide, 0.0f);
    std::fill_n(channel_rows, kCells * wide, 0.0f);
    for (int64_t first = 0; first < tokens.count; first += kRows) {
      const int64_t count = std::min(kRows, tokens.count - first), cells = (count + kNumbers - 1) / kNumbers;
      for (int64_t i = 0; i < cells; ++i) {
        const int64_t one = tokens.index[first + i * kNumbers];
        const int64_t two = i * kNumbers + 1 < count ? tokens.index[first + i * kNumbers + 1] : -1;
        const auto join = [&](const T* from, int64_t stride, int64_t width, auto* to) {
          Cells::join(from + one * stride, two < 0 ? nullptr : from + two * stride, width, to);
        };
        for (int64_t c = 0; c < channels; c += kWidth)
          join(x + first_channel + c, p.channels, std::min(kWidth, channels - c),
               reinterpret_cast<Cell*>(channel_rows + c * kCells + i * kWidth));
        join(heads + tokens.kv_head * D, p.heads * D, D, head_rows + i * D);
      }
      for (int64_t c = 0; c < wide; c += kWidth)
        Product::template multiply<Product::Into::kAdd>(D, head_rows, 1, D, channel_rows + c * kCells, kWidth, cells,
                                                        sums + c, wide);
    }
    T* to = static_cast<T*>(p.to) + tokens.kv_head * D * p.channels + first_channel;
    for (int64_t d = 0; d < D; ++d) put(sums + d * wide, channels, 1.0f, to + d * p.channels);
  }
};

}  // namespace moh
