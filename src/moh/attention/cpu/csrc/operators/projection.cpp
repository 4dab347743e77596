// The operators `moh::cpu_expand`, `moh::cpu_sum_heads` and `moh::cpu_outer`: projections of active pairs alone.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <vector>

#include "operators/operators.h"

namespace moh {
namespace {

constexpr int64_t kTasksPerThread = 2;  // With fewer, threads wait for the last one to finish.
constexpr int64_t kLeastChannels = 64;  // Each part of the channels reads all active rows again.

}  // namespace

Projection check_projection(const at::Tensor& rows, const at::Tensor& matrix, const at::Tensor& gates) {
  TORCH_CHECK_VALUE(gates.dim() == 2 && matrix.dim() == 2, "gates must be [T, H] and the matrix [H * D, C]");
  TORCH_CHECK_VALUE(gates.size(1) > 0 && matrix.size(0) % gates.size(1) == 0,
                    "the matrix must have a multiple of ", gates.size(1), " rows, got ", matrix.size(0));
  TORCH_CHECK_VALUE(rows.scalar_type() == matrix.scalar_type(), "tensors must have one dtype");
  TORCH_CHECK_VALUE(rows.size(0) == gates.size(0), "x, heads and gates must have the same number of tokens");
  TORCH_CHECK_VALUE(gates.size(0) < INT32_MAX, "there must be less than 2^31 tokens");
  Projection p;
  p.dtype = dtype_of(rows);
  p.tokens = gates.size(0), p.heads = gates.size(1);
  p.width = matrix.size(0) / p.heads, p.channels = matrix.size(1);
  p.matrix = matrix.const_data_ptr();
  p.head_stride = matrix.stride(0), p.channel_stride = matrix.stride(1);
  return p;
}

ActiveRows active_tokens(const at::Tensor& gates) {
  return ActiveRows(gates.contiguous().unsqueeze(0), std::max<int64_t>(gates.size(1), 1));
}

void expand_rows(const Projection& whole, const ActiveRows& active, const at::Tensor& like) {
  const Kernels& kernel = kernels();
  // With few heads the two halves of each are tasks of their own, or some threads would have nothing to do: in memory H
  // heads of width D are 2 H heads of half that width. Every number of the result is the same sum.
  const int64_t threads = threads_for(whole.heads * 2);
  const bool halves = threads > 1 && whole.heads < kTasksPerThread * threads && whole.tokens <= kProjectionRows &&
                      whole.width > 0 && whole.width % (2 * kernel.lanes_per_block) == 0;
  Projection p = whole;
  if (halves) p.heads *= 2, p.width /= 2;
  std::vector<Rows> tasks;
  for (int64_t h = 0; h < p.heads; ++h) {
    const int64_t from = halves ? h / 2 : h, count = active.count(from);
    const int64_t step = rows_per_part(count, kProjectionRows, 1);
    for (int64_t first = 0; first < count; first += step) {
      tasks.push_back(active.rows(from, first, std::min(step, count - first)));
      tasks.back().kv_head = h;
    }
  }
  std::stable_sort(tasks.begin(), tasks.end(), [](const Rows& a, const Rows& b) { return a.count > b.count; });
  const Scratch scratch(threads_for(tasks.size()), kernel.projection_scratch(p), like);
  for_each_task(tasks.size(), [&](int64_t i, int64_t thread) { kernel.expand(p, tasks[i], scratch.of(thread)); });
}

void sum_head_rows(const Projection& p, const ActiveRows& active, const at::Tensor& like) {
  const Kernels& kernel = kernels();
  const int64_t step = rows_per_part(p.tokens, kProjectionRows, 1), down = (p.tokens + step - 1) / step;
  // Few tokens are shared among threads by channels, whose sums do not depend on one another.
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t parts = threads > 1 ? (kTasksPerThread * threads + down - 1) / std::max<int64_t>(down, 1) : 1;
  const int64_t most = std::clamp(p.channels / parts, kLeastChannels, kProjectionChannels);
  const int64_t channels = std::min(kProjectionChannels, rows_per_part(p.channels, most, kernel.lanes_per_block));
  const int64_t across = (p.channels + channels - 1) / channels;
  const Scratch scratch(threads_for(across * down), kernel.projection_scratch(p), like);
  std::vector<Rows> by_head;
  for (int64_t h = 0; h < p.heads; ++h) by_head.push_back(active.rows(h));
  for_each_task(across * down, [&](int64_t i, int64_t thread) {
    const int64_t token = i / across * step, channel = i % across * channels;
    kernel.sum_heads(p, by_head.data(), token, std::min(step, p.tokens - token), channel,
                     std::min(channels, p.channels - channel), scratch.of(thread));
  });
}

namespace {

at::Tensor expand(const at::Tensor& x, const at::Tensor& matrix, const at::Tensor& gates) {
  Projection p = check_projection(x, matrix, gates);
  TORCH_CHECK_VALUE(x.dim() == 2 && x.size(1) == p.channels, "x must be [T, C = ", p.channels, "], got ", x.sizes());
  const at::Tensor from = x.contiguous();
  const at::Tensor to = at::zeros({p.tokens, p.heads, p.width}, x.options());
  p.from = from.const_data_ptr(), p.to = to.mutable_data_ptr();
  expand_rows(p, active_tokens(gates), x);
  return to;
}

at::Tensor sum_heads(const at::Tensor& heads, const at::Tensor& matrix, const at::Tensor& gates) {
  Projection p = check_projection(heads, matrix, gates);
  TORCH_CHECK_VALUE(heads.sizes() == at::IntArrayRef({p.tokens, p.heads, p.width}),
                    "heads must be [T, H, D] to match gates and matrix, got ", heads.sizes());
  const at::Tensor from = heads.contiguous();
  const at::Tensor to = at::empty({p.tokens, p.channels}, heads.options());
  p.from = from.const_data_ptr(), p.to = to.mutable_data_ptr();
  sum_head_rows(p, active_tokens(gates), heads);
  return to;
}

at::Tensor outer(const at::Tensor& heads, const at::Tensor& x, const at::Tensor& gates) {
  TORCH_CHECK_VALUE(heads.dim() == 3 && x.dim() == 2 && heads.scalar_type() == x.scalar_type() &&
                        heads.size(0) == x.size(0) && gates.sizes() == heads.sizes().slice(0, 2),
                    "heads must be [T, H, D], x [T, C] and gates [T, H], got ", heads.sizes(), ", ", x.sizes(), " and ",
                    gates.sizes());
  const at::Tensor from = heads.contiguous(), rows = x.contiguous();
  Projection p;
  p.dtype = dtype_of(x);
  p.tokens = heads.size(0), p.heads = heads.size(1), p.width = heads.size(2), p.channels = x.size(1);
  const at::Tensor to = at::empty({p.heads * p.width, p.channels}, x.options());
  p.from = from.const_data_ptr(), p.to = to.mutable_data_ptr();
  const ActiveRows active = active_tokens(gates);
  const Kernels& kernel = kernels();
  const int64_t across = (p.channels + kProjectionChannels - 1) / kProjectionChannels;
  const Scratch scratch(threads_for(across * p.heads), kernel.projection_scratch(p), x);
  for_each_task(across * p.heads, [&](int64_t i, int64_t thread) {
    const int64_t channel = i % across * kProjectionChannels;
    kernel.outer(p, rows.const_data_ptr(), active.rows(i / across), channel,
                 std::min(kProjectionChannels, p.channels - channel), scratch.of(thread));
  });
  return to;
}

}  // namespace
}  // namespace moh

TORCH_LIBRARY_FRAGMENT(moh, m) {
  m.def("cpu_expand(Tensor x, Tensor matrix, Tensor gates) -> Tensor");
  m.def("cpu_sum_heads(Tensor heads, Tensor matrix, Tensor gates) -> Tensor");
  m.def("cpu_outer(Tensor heads, Tensor x, Tensor gates) -> Tensor");
}

TORCH_LIBRARY_IMPL(moh, CPU, m) {
  m.impl("cpu_expand", moh::expand);
  m.impl("cpu_sum_heads", moh::sum_heads);
  m.impl("cpu_outer", moh::outer);
}
