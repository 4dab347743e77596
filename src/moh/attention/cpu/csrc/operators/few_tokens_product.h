// A linear layer on a few tokens: its matrix is read once for all of them, without the heads that none of them uses.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "operators/operators.h"

namespace moh {

// A few tokens' numbers as the kernels multiply them: float32, or bfloat16 where they have dot products of it.
class FewTokensInput {
 public:
  const Kernels& kernels;  // They are looked up once, so that those which read the numbers agree on their type.

  // Those of a tensor, copied only where they have another type or are not contiguous.
  explicit FewTokensInput(const at::Tensor& x) : FewTokensInput(dtype_of(x)) {
    tensor_ = x.contiguous();
    with_type(dtype_of(x), [&](auto t) {
      using T = decltype(t);
      const T* from = static_cast<const T*>(tensor_.const_data_ptr());
      if constexpr (std::is_same_v<T, float>) floats_ = from;
      if constexpr (std::is_same_v<T, c10::BFloat16>) rounded_ = from;
      if (rounds_ ? rounded_ == nullptr : floats_ == nullptr) {
        float_copy_.assign(from, from + x.numel());
        floats_ = float_copy_.data();
      }
    });
  }
  // `count` numbers that are still to be put.
  FewTokensInput(DType dtype, int64_t count) : FewTokensInput(dtype) {
    if (rounds_) {
      rounded_copy_.resize(count);
      rounded_ = rounded_copy_.data();
    } else {
      float_copy_.resize(count);
      floats_ = float_copy_.data();
    }
  }
  FewTokensInput(const FewTokensInput&) = delete;

  void put(int64_t first, const float* from, int64_t count) {
    if (rounds_)
      std::copy_n(from, count, rounded_copy_.begin() + first);
    else
      std::copy_n(from, count, float_copy_.begin() + first);
  }
  bool rounded() const { return rounds_; }  // Whether the numbers are bfloat16.
  const void* from(int64_t first) const {
    return rounds_ ? static_cast<const void*>(rounded_ + first) : floats_ + first;
  }

 private:
  explicit FewTokensInput(DType dtype)
      : kernels(moh::kernels()), rounds_(dtype == DType::kBFloat16 && kernels.dot_bfloat16) {}

  bool rounds_;
  at::Tensor tensor_;
  std::vector<float> float_copy_;
  std::vector<c10::BFloat16> rounded_copy_;
  const float* floats_ = nullptr;
  const c10::BFloat16* rounded_ = nullptr;
};

// Runs task(i) for i < count, on one thread per kBytesPerThread of the `bytes` that all of them read, at most.
template <class Task>
void for_each_block(int64_t count, int64_t bytes, const Task& task) {
  constexpr int64_t kBytesPerThread = 256 * 1024;  // One thread reads this much before another has woken up.
  const int64_t threads = std::max<int64_t>(1, bytes / kBytesPerThread);
  at::parallel_for(0, count, (count + threads - 1) / threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(i);
  });
}

struct FewTokensProduct {
  // All tokens use this many rows of the matrix while these are in the L1 cache.
  static constexpr int64_t kRows = 8;

  at::Tensor matrix, bias, scale;  // A matrix of 8-bit integers has a scale for each row.
  DType dtype;                     // This is x's.
  int64_t rows, columns;
  std::vector<Segment> whole;  // all columns

  FewTokensProduct(const char* name, const at::Tensor& weight, const std::optional<at::Tensor>& bias_,
                   const at::Tensor& x, const std::optional<at::Tensor>& scale_ = std::nullopt)
      : matrix(weight.dim() == 2 && weight.stride(1) == 1 ? weight : weight.contiguous()), dtype(dtype_of(x)) {
    const at::ScalarType expected = scale_.has_value() ? at::kChar : x.scalar_type();
    TORCH_CHECK_VALUE(matrix.dim() == 2 && matrix.scalar_type() == expected, name,
                      "'s weight must have 2 dimensions and ",
                      scale_.has_value() ? "dtype int8 where a scale is given" : "x's dtype", ", got ",
                      matrix.scalar_type(), " of shape ", matrix.sizes());
    rows = matrix.size(0), columns = matrix.size(1);
    whole = {{0, columns}};
    if (scale_.has_value()) {
      scale = scale_->contiguous();
      TORCH_CHECK_VALUE(scale.numel() == rows && scale.scalar_type() == at::kFloat, name,
                        "'s scale must be float32 with one number for each of the weight's ", rows, " rows, got ",
                        scale.scalar_type(), " of shape ", scale.sizes());
    }
    if (!bias_.has_value()) return;
    bias = bias_->contiguous();
    TORCH_CHECK_VALUE(bias.sizes() == at::IntArrayRef({rows}) && bias.scalar_type() == x.scalar_type(), name,
                      "'s bias must be [", rows, "] of x's dtype, got ", bias.sizes());
  }
  int64_t bytes() const { return rows * columns * static_cast<int64_t>(matrix.element_size()); }

  // to [T, rows] = x [T, columns] times the transposed matrix, plus the bias; 0 for heads not `active` [T, heads].
  template <class T>
  void multiply(const FewTokensInput& x, int64_t tokens, T* to, const char* active = nullptr, int64_t heads = 1) const {
    for_each_block(blocks(heads), bytes(), [&](int64_t i) { multiply_block(i, x, tokens, to, active, heads); });
  }
  // The same in `blocks(heads)` parts, the i-th of them.
  template <class T>
  void multiply_block(int64_t i, const FewTokensInput& x, int64_t tokens, T* to, const char* active = nullptr,
                      int64_t heads = 1) const {
    const int64_t per_head = blocks(heads) / heads, width = rows / heads;
    const int64_t h = i / per_head, d = i % per_head * kRows, count = std::min(kRows, width - d);
    for (int64_t t = 0; t < tokens; ++t) {
      T* at = to + t * rows + h * width + d;
      if (active == nullptr || active[t * heads + h])
        dot(h * width + d, count, x, t, whole, at);
      else
        std::fill_n(at, count, static_cast<T>(0.0f));
    }
  }
  int64_t blocks(int64_t heads) const { return heads * ((rows / heads + kRows - 1) / kRows); }

  // The same, but `active` [T, heads] selects columns, equally many for each head.
  template <class T>
  void multiply_columns(const FewTokensInput& x, int64_t tokens, T* to, const char* active, int64_t heads) const {
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
    for_each_block(blocks(1), bytes(), [&](int64_t i) {
      const int64_t first = i * kRows;
      for (int64_t t = 0; t < tokens; ++t)
        dot(first, std::min(kRows, rows - first), x, t, segments[t], to + t * rows + first);
    });
  }

  // to[i] = row first + i times token t's numbers in some columns, plus the bias, for i < count.
  void sums(int64_t first, int64_t count, const FewTokensInput& x, int64_t t, const std::vector<Segment>& segments,
            float* to) const {
    const auto start = [&](const at::Tensor& of, int64_t i) {
      return static_cast<const char*>(of.const_data_ptr()) + i * static_cast<int64_t>(of.element_size());
    };
    const int64_t stride = matrix.stride(0), parts = static_cast<int64_t>(segments.size());
    if (scale.defined()) {
      x.kernels.dot_integer_rows(matrix.const_data_ptr<int8_t>() + first * stride, stride, count, x.from(t * columns),
                                 x.rounded(), segments.data(), parts, to);
      const float* factor = scale.const_data_ptr<float>() + first;
      for (int64_t i = 0; i < count; ++i) to[i] *= factor[i];
    } else {
      x.kernels.dot_rows(dtype, start(matrix, first * stride), stride, count, x.from(t * columns), segments.data(),
                         parts, to);
    }
    if (!bias.defined()) return;
    with_type(dtype, [&](auto type) {
      const auto* b = static_cast<const decltype(type)*>(bias.const_data_ptr()) + first;
      for (int64_t i = 0; i < count; ++i) to[i] += static_cast<float>(b[i]);
    });
  }

 private:
  template <class T>
  void dot(int64_t first, int64_t count, const FewTokensInput& x, int64_t t, const std::vector<Segment>& segments,
           T* to) const {
    float numbers[kRows];
    sums(first, count, x, t, segments, numbers);
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(numbers[i]);
  }
};

}  // namespace moh
