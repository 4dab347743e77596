// What the operators share: the kernels in use, tasks on threads, scratch memory, the active rows.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "kernels/problem.h"

namespace moh {

// The kernels in use: those of the most capable instruction set of this build, unless another was chosen.
const Kernels& kernels();

inline DType dtype_of(const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf,
                    "tensors must be float32, bfloat16 or float16, got ", x.scalar_type());
  return x.scalar_type() == at::kFloat ? DType::kFloat
         : x.scalar_type() == at::kHalf ? DType::kHalf
                                        : DType::kBFloat16;
}

// How many threads work on this many tasks at once.
inline int64_t threads_for(int64_t tasks) {
  return std::min<int64_t>(tasks, at::in_parallel_region() ? 1 : at::get_num_threads());
}

// Runs task(i, thread) for i < count. A thread takes the next task as soon as it is free, since tasks differ in length.
template <class Task>
void for_each_task(int64_t count, const Task& task) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads_for(count), 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread)
      for (int64_t i = next++; i < count; i = next++) task(i, thread);
  });
}

// The rows of one part, where `count` rows are cut into the fewest parts of at most `most` rows. Parts are equal, in
// whole blocks of `block` rows: a small last part would read all keys, or the whole matrix, for a few rows.
inline int64_t rows_per_part(int64_t count, int64_t most, int64_t block) {
  const int64_t parts = std::max<int64_t>(1, (count + most - 1) / most), blocks = (count + block - 1) / block;
  return std::max<int64_t>(1, (blocks + parts - 1) / parts) * block;
}

// Memory for `count` users (threads or tasks), `floats` numbers each.
class Scratch {
 public:
  Scratch(int64_t count, int64_t floats, const at::Tensor& like)
      : memory_(at::empty({count, floats}, like.options().dtype(at::kFloat))) {}
  float* of(int64_t user) const { return memory_.mutable_data_ptr<float>() + user * memory_.size(1); }

 private:
  at::Tensor memory_;
};

// The active rows of every key/value head in every batch row, in token order. The rows of one (batch row, key/value
// head) are a bundle: they share keys and values.
class ActiveRows {
 public:
  // `gates` is [B, Nq, H], contiguous.
  ActiveRows(const at::Tensor& gates, int64_t kv_heads)
      : active_(at::empty(gates.sizes(), gates.options().dtype(at::kBool))), kv_heads_(kv_heads),
        group_(gates.size(2) / kv_heads), capacity_(gates.size(1) * group_), index_(gates.numel()),
        counts_(gates.size(0) * kv_heads) {
    with_type(dtype_of(gates), [&](auto t) {
      find(static_cast<const decltype(t)*>(gates.const_data_ptr()), gates.size(1), gates.size(2));
    });
  }
  const bool* flags() const { return active_.const_data_ptr<bool>(); }  // [B, Nq, H]
  int64_t bundles() const { return static_cast<int64_t>(counts_.size()); }
  Rows rows(int64_t bundle) const { return rows(bundle, 0, counts_[bundle]); }
  Rows rows(int64_t bundle, int64_t first, int64_t count) const {
    return {bundle / kv_heads_, bundle % kv_heads_, index_.data() + bundle * capacity_ + first, count};
  }
  int64_t count(int64_t bundle) const { return counts_[bundle]; }
  int64_t total() const { return std::accumulate(counts_.begin(), counts_.end(), int64_t{0}); }

 private:
  template <class T>
  void find(const T* gates, int64_t queries, int64_t heads) {
    bool* flags = active_.mutable_data_ptr<bool>();
    at::parallel_for(0, bundles(), 1 + 32768 / (capacity_ + 1), [&](int64_t begin, int64_t end) {
      for (int64_t bundle = begin; bundle < end; ++bundle) {
        const int64_t start = bundle / kv_heads_ * queries * heads + bundle % kv_heads_ * group_;
        const T* gate = gates + start;
        bool* flag = flags + start;
        int32_t* to = index_.data() + bundle * capacity_;
        int64_t count = 0;
        for (int64_t t = 0; t < queries; ++t, gate += heads, flag += heads)
          for (int64_t g = 0; g < group_; ++g) {  // No branch: the processor can't predict which heads are active.
            flag[g] = static_cast<float>(gate[g]) != 0.0f;
            to[count] = static_cast<int32_t>(t * group_ + g);
            count += flag[g];
          }
        counts_[bundle] = count;
      }
    });
  }

  at::Tensor active_;
  int64_t kv_heads_, group_, capacity_;
  std::vector<int32_t> index_;
  std::vector<int64_t> counts_;
};

// The operator `moh::cpu_attention` without gradients (attention.cpp): output and what the softmax leaves for a backward
// pass, `Problem::most` and `totals` in one tensor [2, B, H, Nq], which is empty without `keep_softmax`. Where a gradient
// may follow, the operator's autograd wrapper always keeps it.
std::tuple<at::Tensor, at::Tensor> attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                             const at::Tensor& gates, const std::optional<at::Tensor>& mask,
                                             bool is_causal, std::optional<int64_t> window,
                                             std::optional<double> scale, bool keep_softmax);

// The same for active rows that are known already: writes their entries of `out` [B, Nq, H, Dv], and zeros to the others
// if `zeroed`.
void attend_rows(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& gates,
                 const std::optional<at::Tensor>& mask, bool is_causal, std::optional<double> scale,
                 const at::Tensor& out, bool zeroed);

// The parts of the operators for projections (projection.cpp): sizes and strides of a product of rows [T, ...] with a
// matrix [H * D, C]; the active tokens of every head, where each head is a group by itself, so that bundle h is head h;
// and the products, with `p.from`, `p.to` and perhaps `p.bias` set. `expand_rows` writes active pairs alone.
Projection check_projection(const at::Tensor& rows, const at::Tensor& matrix, const at::Tensor& gates);
ActiveRows active_tokens(const at::Tensor& gates);
void expand_rows(const Projection& p, const ActiveRows& active, const at::Tensor& like);
void sum_head_rows(const Projection& p, const ActiveRows& active, const at::Tensor& like);

}  // namespace moh
