// Products of the projections over active (token, head) pairs alone: rows are copied together, multiplied, put back.
//
// With M [H * D, C] and the pairs (t, h) that are active:
//   expand     heads[t, h, :] = sum_c x[t, c] M[h, :, c]   query projection; gradient of what the output projection reads
//   sum_heads  x[t, :] = sum_h sum_d heads[t, h, d] M[h, d, :]   output projection; gradient of the query projection's x
//   outer      M[h, d, c] = sum_t heads[t, h, d] x[t, c]   gradients of both weights
#pragma once

#include "block.h"

namespace moh {

template <class Isa, class T>
struct Project {
  using Product = Tile<Isa>;
  static constexpr int64_t kWidth = Product::kWidth;
  static constexpr int64_t kRows = kProjectionRows, kChannels = kProjectionChannels;

  static int64_t padded(int64_t width) { return Product::padded(width); }

  static int64_t scratch(const Projection& p) {
    const int64_t width = padded(p.width);
    return kRows * kChannels + kRows * width + kChannels * width + kWidth;
  }

  static void expand(const Projection& p, const Rows& tokens, float* scratch) {
    const int64_t width = padded(p.width);
    float* rows = scratch;                       // [kRows, kChannels]
    float* matrix = rows + kRows * kChannels;    // panels [width / kWidth, kChannels, kWidth]
    float* result = matrix + kChannels * width;  // [kRows, width]
    const T* x = static_cast<const T*>(p.from);
    const T* m = static_cast<const T*>(p.matrix) + tokens.kv_head * p.width * p.head_stride;
    std::fill_n(result, tokens.count * width, 0.0f);
    for (int64_t first = 0; first < p.channels; first += kChannels) {
      const int64_t depth = std::min(kChannels, p.channels - first);
      for (int64_t i = 0; i < tokens.count; ++i)
        get<Isa>(x + tokens.index[i] * p.channels + first, depth, rows + i * kChannels);
      pack(m + first * p.channel_stride, p.channel_stride, depth, p.head_stride, p.width, matrix);
      for (int64_t d = 0; d < width; d += kWidth)
        Product::template multiply<Product::Into::kAdd>(tokens.count, rows, kChannels, 1, matrix + d * depth, kWidth,
                                                        depth, result + d, width);
    }
    T* to = static_cast<T*>(p.to) + tokens.kv_head * p.width;
    for (int64_t i = 0; i < tokens.count; ++i)
      put(result + i * width, p.width, 1.0f, to + tokens.index[i] * p.heads * p.width);
  }

  static void sum_heads(const Projection& p, const Rows* by_head, int64_t first_token, int64_t count,
                        int64_t first_channel, int64_t channels, float* scratch) {
    const int64_t D = p.width, wide = padded(channels);
    float* sums = scratch;                      // [kRows, wide]
    float* matrix = sums + kRows * kChannels;   // panels [wide / kWidth, D, kWidth]
    float* rows = matrix + padded(D) * kChannels;  // [kRows, D]
    const T* heads = static_cast<const T*>(p.from);
    const T* m = static_cast<const T*>(p.matrix) + first_channel * p.channel_stride;
    int32_t index[kRows];
    std::fill_n(sums, count * wide, 0.0f);
    for (int64_t h = 0; h < p.heads; ++h) {
      const Rows& active = by_head[h];
      const int32_t* end = active.index + active.count;
      const int32_t* at = std::lower_bound(active.index, end, static_cast<int32_t>(first_token));
      int64_t used = 0;
      for (; at < end && *at < first_token + count; ++at, ++used) {
        index[used] = *at - static_cast<int32_t>(first_token);
        get<Isa>(heads + (*at * p.heads + h) * D, D, rows + used * D);
      }
      if (used == 0) continue;
      pack(m + h * D * p.head_stride, p.head_stride, D, p.channel_stride, channels, matrix);
      for (int64_t c = 0; c < wide; c += kWidth)
        Product::template multiply<Product::Into::kAdd>(used, rows, D, 1, matrix + c * D, kWidth, D, sums + c, wide,
                                                        nullptr, index);
    }
    T* to = static_cast<T*>(p.to) + first_token * p.channels + first_channel;
    for (int64_t i = 0; i < count; ++i) put(sums + i * wide, channels, 1.0f, to + i * p.channels);
  }

  static void outer(const Projection& p, const T* x, const Rows& tokens, int64_t first_channel, int64_t channels,
                    float* scratch) {
    const int64_t D = p.width, wide = padded(channels);
    float* channel_rows = scratch;                       // panels [wide / kWidth, kRows, kWidth]
    float* sums = channel_rows + kRows * kChannels;      // [D, wide]
    float* head_rows = sums + padded(D) * kChannels;     // [kRows, D]
    const T* heads = static_cast<const T*>(p.from);
    std::fill_n(sums, D * wide, 0.0f);
    std::fill_n(channel_rows, kRows * wide, 0.0f);
    for (int64_t first = 0; first < tokens.count; first += kRows) {
      const int64_t count = std::min(kRows, tokens.count - first);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t t = tokens.index[first + i];
        const T* row = x + t * p.channels + first_channel;
        for (int64_t c = 0; c < channels; c += kWidth)
          get<Isa>(row + c, std::min(kWidth, channels - c), channel_rows + c * kRows + i * kWidth);
        get<Isa>(heads + (t * p.heads + tokens.kv_head) * D, D, head_rows + i * D);
      }
      for (int64_t c = 0; c < wide; c += kWidth)
        Product::template multiply<Product::Into::kAdd>(D, head_rows, 1, D, channel_rows + c * kRows, kWidth, count,
                                                        sums + c, wide);
    }
    T* to = static_cast<T*>(p.to) + tokens.kv_head * D * p.channels + first_channel;
    for (int64_t d = 0; d < D; ++d) put(sums + d * wide, channels, 1.0f, to + d * p.channels);
  }

 private:
  // from [rows, columns], each with its stride, to panels [wide / kWidth, rows, kWidth], zeros beyond `columns`. In a
  // panel the rows lie side by side; a power of two apart they would fall into the same few places of the cache.
  static void pack(const T* from, int64_t row_stride, int64_t rows, int64_t column_stride, int64_t columns,
                   float* to) {
    for (int64_t c = 0; c < columns; c += kWidth, to += rows * kWidth) {
      const int64_t width = std::min(kWidth, columns - c);
      const T* panel = from + c * column_stride;
      if (width < kWidth) std::fill_n(to, rows * kWidth, 0.0f);
      if (column_stride == 1) {
        for (int64_t r = 0; r < rows; ++r) get<Isa>(panel + r * row_stride, width, to + r * kWidth);
        continue;
      }
      constexpr int64_t kLine = 64 / sizeof(T);  // a transposition, by the numbers of one cache line
      for (int64_t r = 0; r < rows; r += kLine) {
        const int64_t r_end = std::min(rows, r + kLine);
        for (int64_t j = 0; j < width; ++j)
          for (int64_t i = r; i < r_end; ++i)
            to[i * kWidth + j] = static_cast<float>(panel[i * row_stride + j * column_stride]);
      }
    }
  }
};

}  // namespace moh
