// What the operators share: the kernels in use, tasks on threads, scratch memory.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>

#include "problem.h"

namespace moh {

// The kernels of the most capable instruction set of this build, unless another was chosen.
const Kernels& kernels();

inline DType dtype_of(const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf,
                    "tensors must be float32, bfloat16 or float16, got ", x.scalar_type());
  return x.scalar_type() == at::kFloat ? DType::kFloat
         : x.scalar_type() == at::kHalf ? DType::kHalf
                                        : DType::kBFloat16;
}

// Runs task(i, thread) for i < count, the next free thread taking the next task.
template <class Task>
void for_each_task(int64_t count, const Task& task) {
  const int64_t threads = std::min<int64_t>(count, at::in_parallel_region() ? 1 : at::get_num_threads());
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread)
      for (int64_t i = next++; i < count; i = next++) task(i, thread);
  });
}

// Rows of `floats` numbers, one for each thread that `for_each_task` may use.
inline at::Tensor scratch_for(int64_t tasks, int64_t floats, const at::Tensor& like) {
  const int64_t threads = std::min<int64_t>(tasks, at::get_num_threads());
  return at::empty({threads, floats}, like.options().dtype(at::kFloat));
}

}  // namespace moh
