// A linear layer on a few tokens: its matrix is read once for all of them, without the heads that none of them uses.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "operators/operators.h"

namespace moh {

// The numbers of a tensor as contiguous float32, copied only where they are not.
class AsFloats {
 public:
  explicit AsFloats(const at::Tensor& x) : tensor_(x.contiguous()) {
    with_type(dtype_of(x), [&](auto t) {
      using T = decltype(t);
      const T* from = static_cast<const T*>(tensor_.const_data_ptr());
      if constexpr (std::is_same_v<T, float>) {
        data_ = from;
      } else {
        copy_.assign(from, from + x.numel());
        data_ = copy_.data();
      }
    });
  }
  const float* data() const { return data_; }

 private:
  at::Tensor tensor_;
  std::vector<float> copy_;
  const float* data_ = nullptr;
};

struct FewTokensProduct {
  // All tokens use this many rows of the matrix while these are in the L1 cache.
  static constexpr int64_t kRows = 8;
  // One thread reads this much of the matrix before another has woken up.
  static constexpr int64_t kBytesPerThread = 256 * 1024;

  at::Tensor matrix, bias;
  DType dtype;
  int64_t rows, columns;

  FewTokensProduct(const char* name, const at::Tensor& weight, const std::optional<at::Tensor>& bias_,
                   const at::Tensor& x)
      : matrix(weight.dim() == 2 && weight.stride(1) == 1 ? weight : weight.contiguous()), dtype(dtype_of(x)) {
    TORCH_CHECK_VALUE(matrix.dim() == 2 && matrix.scalar_type() == x.scalar_type(), name,
                      "'s weight must have 2 dimensions and x's dtype ", x.scalar_type(), ", got ",
                      matrix.scalar_type(), " of shape ", matrix.sizes());
    rows = matrix.size(0), columns = matrix.size(1);
    if (!bias_.has_value()) return;
    bias = bias_->contiguous();
    TORCH_CHECK_VALUE(bias.sizes() == at::IntArrayRef({rows}) && bias.scalar_type() == x.scalar_type(), name,
                      "'s bias must be [", rows, "] of x's dtype, got ", bias.sizes());
  }

  // to [T, rows] = x [T, columns] times the transposed matrix, plus the bias; 0 for heads not `active` [T, heads].
  template <class T>
  void multiply(const AsFloats& x, int64_t tokens, T* to, const char* active = nullptr, int64_t heads = 1) const {
    const std::vector<Segment> whole{{0, columns}};
    const int64_t width = rows / heads, blocks = (width + kRows - 1) / kRows;
    for_each_block(heads * blocks, [&](int64_t i) {
      const int64_t h = i / blocks, d = i % blocks * kRows, count = std::min(kRows, width - d);
      for (int64_t t = 0; t < tokens; ++t) {
        T* at = to + t * rows + h * width + d;
        if (active == nullptr || active[t * heads + h])
          dot(h * width + d, count, x.data() + t * columns, whole, at);
        else
          std::fill_n(at, count, static_cast<T>(0.0f));
      }
    });
  }

  // The same, but `active` [T, heads] selects columns, equally many for each head.
  template <class T>
  void multiply_columns(const AsFloats& x, int64_t tokens, T* to, const char* active, int64_t heads) const {
    const int64_t width = columns / heads;
    std::vector<std::vector<Segment>> segments(tokens);  // Neighbouring active heads share a segment.
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t h = 0; h < heads; ++h) {
        if (!active[t * heads + h]) continue;
        if (h > 0 && active[t * heads + h - 1])
          segments[t].back().count += width;
        else
          segments[t].push_back({h * width, width});
      }
    for_each_block((rows + kRows - 1) / kRows, [&](int64_t i) {
      const int64_t first = i * kRows;
      for (int64_t t = 0; t < tokens; ++t)
        dot(first, std::min(kRows, rows - first), x.data() + t * columns, segments[t], to + t * rows + first);
    });
  }

 private:
  template <class T>
  void dot(int64_t first, int64_t count, const float* x, const std::vector<Segment>& segments, T* to) const {
    float sums[kRows];
    const T* m = static_cast<const T*>(matrix.const_data_ptr()) + first * matrix.stride(0);
    kernels().dot_rows(dtype, m, matrix.stride(0), count, x, segments.data(), static_cast<int64_t>(segments.size()),
                       sums);
    const T* b = bias.defined() ? static_cast<const T*>(bias.const_data_ptr()) + first : nullptr;
    for (int64_t i = 0; i < count; ++i)
      to[i] = static_cast<T>(b == nullptr ? sums[i] : sums[i] + static_cast<float>(b[i]));
  }

  // Runs task(i) for i < count, on one thread per kBytesPerThread of the matrix at most.
  template <class Task>
  void for_each_block(int64_t count, const Task& task) const {
    const int64_t threads = std::max<int64_t>(1, rows * columns * matrix.element_size() / kBytesPerThread);
    at::parallel_for(0, count, (count + threads - 1) / threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) task(i);
    });
  }
};

}  // namespace moh
