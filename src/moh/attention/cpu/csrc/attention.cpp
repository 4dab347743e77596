// The operators `moh::cpu_attention` and `moh::cpu_attention_backward`: which rows are active, who works on what.
//
// No result depends on the number of threads: a task's arithmetic is the same whoever runs it, and what several tasks
// add up is added in a fixed order.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "operators.h"

namespace moh {
namespace {

constexpr int64_t kBlocksPerTask = 16;  // blocks of rows that share a tile of keys while it is in the L1 cache: 128 KiB of L2
constexpr int64_t kBackwardBlocks = 4;  // the same in the backward pass, where a row takes five times the memory
constexpr int64_t kTasksPerThread = 4;  // fewer, and the last one to finish keeps the others waiting
constexpr int64_t kDecodeRows = 16;     // with more rows per key/value head, rows on the lanes are faster
constexpr int64_t kDecodeKeys = 512;    // keys of one decoding task: the split must not depend on the threads
constexpr int64_t kBackwardTasks = 8;   // parts that a backward pass is cut into where memory allows

at::Tensor last_contiguous(const at::Tensor& x) { return x.stride(-1) == 1 || x.size(-1) == 1 ? x : x.contiguous(); }

View view(const at::Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

// Keeps the tensors alive that a Problem points into.
struct Call {
  at::Tensor q, k, v, gates, mask;
  Problem problem;

  Call(const at::Tensor& q_, const at::Tensor& k_, const at::Tensor& v_, const at::Tensor& gates_,
       const std::optional<at::Tensor>& mask_, bool causal, std::optional<int64_t> window, std::optional<double> scale)
      : q(last_contiguous(q_)), k(last_contiguous(k_)), v(last_contiguous(v_)), gates(gates_.contiguous()) {
    TORCH_CHECK_VALUE(q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && gates.dim() == 3,
                      "q, k and v must have 4 dimensions and gates 3");
    Problem& p = problem;
    p.batches = q.size(0), p.heads = q.size(1), p.queries = q.size(2), p.width = q.size(3);
    p.kv_heads = k.size(1), p.keys = k.size(2), p.value_width = v.size(3);
    TORCH_CHECK_VALUE(p.kv_heads > 0 && p.heads % p.kv_heads == 0, "q must have a multiple of k's heads");
    p.group = p.heads / p.kv_heads;
    TORCH_CHECK_VALUE(k.sizes() == at::IntArrayRef({p.batches, p.kv_heads, p.keys, p.width}) &&
                          v.sizes() == at::IntArrayRef({p.batches, p.kv_heads, p.keys, p.value_width}) &&
                          gates.sizes() == at::IntArrayRef({p.batches, p.queries, p.heads}),
                      "q, k, v and gates must have matching shapes, got ", q.sizes(), ", ", k.sizes(), ", ", v.sizes(),
                      " and ", gates.sizes());
    TORCH_CHECK_VALUE(p.queries * p.group < INT32_MAX && p.keys < INT32_MAX, "sequences must be below 2^31 rows");
    const auto type = q.scalar_type();
    TORCH_CHECK_VALUE(k.scalar_type() == type && v.scalar_type() == type && gates.scalar_type() == type,
                      "q, k, v and gates must have one dtype");
    TORCH_CHECK_VALUE(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf,
                      "q must be float32, bfloat16 or float16, got ", type);
    p.dtype = dtype_of(q);
    p.scale = static_cast<float>(scale.value_or(1.0 / std::sqrt(static_cast<double>(p.width))));
    p.causal = causal;
    TORCH_CHECK_VALUE(!window.has_value() || (*window > 0 && causal), "window must be positive and needs is_causal");
    p.window = window.value_or(0);
    p.q = view(q), p.k = view(k), p.v = view(v);
    p.gates = gates.const_data_ptr();
    if (mask_.has_value()) {
      mask = mask_->expand({p.batches, p.heads, p.queries, p.keys});
      TORCH_CHECK_VALUE(mask.scalar_type() == at::kBool || mask.scalar_type() == type,
                        "attn_mask must be bool or of q's dtype");
      p.mask.kind = mask.scalar_type() == at::kBool ? MaskKind::kBool : MaskKind::kAdditive;
      p.mask.data = mask.const_data_ptr();
      p.mask.batch = mask.stride(0), p.mask.head = mask.stride(1);
      p.mask.query = mask.stride(2), p.mask.key = mask.stride(3);
    }
  }
};

// The active rows of every key/value head of every batch row, in token order.
class ActiveRows {
 public:
  explicit ActiveRows(const Problem& p) : problem_(p), capacity_(p.queries * p.group) {
    index_.resize(p.batches * p.kv_heads * capacity_);
    counts_.resize(p.batches * p.kv_heads);
    if (p.dtype == DType::kFloat)
      scan<float>();
    else if (p.dtype == DType::kHalf)
      scan<c10::Half>();
    else
      scan<c10::BFloat16>();
  }
  int64_t pairs() const { return static_cast<int64_t>(counts_.size()); }
  Rows rows(int64_t pair) const { return rows(pair, 0, counts_[pair]); }
  Rows rows(int64_t pair, int64_t first, int64_t count) const {
    return {pair / problem_.kv_heads, pair % problem_.kv_heads, index_.data() + pair * capacity_ + first, count};
  }
  int64_t count(int64_t pair) const { return counts_[pair]; }
  int64_t total() const { return std::accumulate(counts_.begin(), counts_.end(), int64_t{0}); }

 private:
  template <class T>
  void scan() {
    const Problem& p = problem_;
    const T* gates = static_cast<const T*>(p.gates);
    at::parallel_for(0, pairs(), 1 + 32768 / (capacity_ + 1), [&](int64_t begin, int64_t end) {
      for (int64_t pair = begin; pair < end; ++pair) {
        const T* gate = gates + pair / p.kv_heads * p.queries * p.heads + pair % p.kv_heads * p.group;
        int32_t* to = index_.data() + pair * capacity_;
        int64_t count = 0;
        for (int64_t t = 0; t < p.queries; ++t, gate += p.heads)
          for (int64_t g = 0; g < p.group; ++g) {
            to[count] = static_cast<int32_t>(t * p.group + g);
            count += static_cast<float>(gate[g]) != 0.0f;
          }
        counts_[pair] = count;
      }
    });
  }

  const Problem& problem_;
  int64_t capacity_;
  std::vector<int32_t> index_;
  std::vector<int64_t> counts_;
};

// Zeros the entries [B, Nq, H, width] of `x` (or [B, H, Nq, width], if `by_head`) whose gate is 0.
template <class T>
void zero_inactive_typed(const Problem& p, T* x, int64_t width, bool by_head) {
  const T* gates = static_cast<const T*>(p.gates);
  at::parallel_for(0, p.batches * p.queries, 1 + 65536 / (p.heads * width + 1), [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token)
      for (int64_t h = 0; h < p.heads; ++h) {
        if (static_cast<float>(gates[token * p.heads + h]) != 0.0f) continue;
        const int64_t b = token / p.queries, t = token % p.queries;
        const int64_t entry = by_head ? (b * p.heads + h) * p.queries + t : token * p.heads + h;
        std::memset(static_cast<void*>(x + entry * width), 0, sizeof(T) * width);
      }
  });
}

void zero_inactive(const Problem& p, const at::Tensor& x, int64_t width, bool by_head) {
  if (p.dtype == DType::kFloat)
    zero_inactive_typed(p, x.mutable_data_ptr<float>(), width, by_head);
  else if (p.dtype == DType::kHalf)
    zero_inactive_typed(p, x.mutable_data_ptr<c10::Half>(), width, by_head);
  else
    zero_inactive_typed(p, x.mutable_data_ptr<c10::BFloat16>(), width, by_head);
}

void forward_rows(const Call& call, const ActiveRows& active) {
  const Problem& p = call.problem;
  const Kernels& kernel = kernels();
  const int64_t wanted = kTasksPerThread * at::get_num_threads();
  int64_t size = kBlocksPerTask * kernel.lanes_per_block;
  while (size > kernel.lanes_per_block && active.total() < wanted * size) size /= 2;

  struct Task {
    Rows rows;
    int64_t cost;
  };
  std::vector<Task> tasks;
  for (int64_t pair = 0; pair < active.pairs(); ++pair)
    for (int64_t first = 0; first < active.count(pair); first += size) {
      const Rows rows = active.rows(pair, first, std::min(size, active.count(pair) - first));
      const int64_t last = rows.index[rows.count - 1] / p.group, start = rows.index[0] / p.group;
      tasks.push_back({rows, rows.count * (p.key_end(last) - p.key_begin(start))});
    }
  // The longest first: what is left over at the end is short.
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.cost > b.cost; });
  const at::Tensor scratch = scratch_for(tasks.size(), kernel.forward_scratch(p, size), call.q);
  for_each_task(tasks.size(), [&](int64_t i, int64_t thread) {
    kernel.forward(p, tasks[i].rows, scratch.mutable_data_ptr<float>() + thread * scratch.size(1));
  });
}

template <class T>
void merge(const Problem& p, const Rows& rows, const std::vector<Partial>& parts) {
  const T* gates = static_cast<const T*>(p.gates);
  for (int64_t r = 0; r < rows.count; ++r) {
    const int64_t t = rows.index[r] / p.group, h = rows.kv_head * p.group + rows.index[r] % p.group;
    float most = -INFINITY, total = 0;
    for (const Partial& part : parts) most = std::max(most, part.max[r]);
    std::vector<float> factor(parts.size());
    for (size_t i = 0; i < parts.size(); ++i) {
      factor[i] = parts[i].max[r] == -INFINITY ? 0.0f : std::exp2(parts[i].max[r] - most);
      total += factor[i] * parts[i].total[r];
    }
    const int64_t entry = (rows.batch * p.queries + t) * p.heads + h;
    const bool blind = total == 0.0f;
    const float weight = blind ? 0.0f : static_cast<float>(gates[entry]) / total;
    T* to = static_cast<T*>(p.out) + entry * p.value_width;
    for (int64_t d = 0; d < p.value_width; ++d) {
      float sum = 0;
      for (size_t i = 0; i < parts.size(); ++i) sum += factor[i] * parts[i].sum[r * p.value_width + d];
      to[d] = static_cast<T>(weight * sum);
    }
    p.lse[(rows.batch * p.heads + h) * p.queries + t] = blind ? INFINITY : most + std::log2(total);
  }
}

// Few rows, many keys: every active key/value head's cache is read once, cut into parts for the threads.
void decode_rows(const Call& call, const ActiveRows& active) {
  const Problem& p = call.problem;
  const Kernels& kernel = kernels();
  const int64_t splits = std::max<int64_t>(1, (p.keys + kDecodeKeys - 1) / kDecodeKeys);
  std::vector<int64_t> pairs;
  for (int64_t pair = 0; pair < active.pairs(); ++pair)
    if (active.count(pair) > 0) pairs.push_back(pair);
  const int64_t most = p.queries * p.group, partial_floats = most * (2 + p.value_width);
  const int64_t tasks = static_cast<int64_t>(pairs.size()) * splits;
  const at::Tensor partials = at::empty({tasks, partial_floats}, call.q.options().dtype(at::kFloat));
  const auto partial = [&](int64_t i) {
    float* at = partials.mutable_data_ptr<float>() + i * partial_floats;
    return Partial{at, at + most, at + 2 * most};
  };
  const at::Tensor scratch = scratch_for(tasks, kernel.decode_scratch(p, most), call.q);
  for_each_task(tasks, [&](int64_t i, int64_t thread) {
    const Rows rows = active.rows(pairs[i / splits]);
    const int64_t begin = i % splits * kDecodeKeys;
    kernel.decode(p, rows, begin, std::min(p.keys, begin + kDecodeKeys), partial(i),
                  scratch.mutable_data_ptr<float>() + thread * scratch.size(1));
  });
  std::vector<Partial> parts(splits);
  for (size_t i = 0; i < pairs.size(); ++i) {
    for (int64_t s = 0; s < splits; ++s) parts[s] = partial(i * splits + s);
    const Rows rows = active.rows(pairs[i]);
    if (p.dtype == DType::kFloat)
      merge<float>(p, rows, parts);
    else if (p.dtype == DType::kHalf)
      merge<c10::Half>(p, rows, parts);
    else
      merge<c10::BFloat16>(p, rows, parts);
  }
}

template <class T>
void write_rows_typed(const float* from, int64_t rows, int64_t width, int64_t stride, T* to) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t d = 0; d < width; ++d) to[r * width + d] = static_cast<T>(from[r * stride + d]);
}

// Rows with their stride to a contiguous tensor, `offset` numbers in. Plain loops: threads of ours run no tensor operators.
void write_rows(DType dtype, const float* from, int64_t rows, int64_t width, int64_t stride, const at::Tensor& to,
                int64_t offset) {
  if (dtype == DType::kFloat)
    write_rows_typed(from, rows, width, stride, to.mutable_data_ptr<float>() + offset);
  else if (dtype == DType::kHalf)
    write_rows_typed(from, rows, width, stride, to.mutable_data_ptr<c10::Half>() + offset);
  else
    write_rows_typed(from, rows, width, stride, to.mutable_data_ptr<c10::BFloat16>() + offset);
}

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

std::tuple<at::Tensor, at::Tensor> attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                             const at::Tensor& gates, const std::optional<at::Tensor>& mask,
                                             bool is_causal, std::optional<int64_t> window,
                                             std::optional<double> scale) {
  Call call(q, k, v, gates, mask, is_causal, window, scale);
  Problem& p = call.problem;
  const at::Tensor out = at::empty({p.batches, p.queries, p.heads, p.value_width}, q.options());
  const at::Tensor lse = at::full({p.batches, p.heads, p.queries}, INFINITY, q.options().dtype(at::kFloat));
  if (out.numel() == 0) return {out, lse};
  p.out = out.mutable_data_ptr();
  p.lse = lse.mutable_data_ptr<float>();
  zero_inactive(p, out, p.value_width, false);
  const ActiveRows active(p);
  if (active.total() == 0) return {out, lse};
  if (p.queries * p.group <= kDecodeRows)
    decode_rows(call, active);
  else
    forward_rows(call, active);
  return {out, lse};
}

Gradients attention_backward(const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const at::Tensor& gates, const std::optional<at::Tensor>& mask, const at::Tensor& out,
                             const at::Tensor& lse, bool is_causal, std::optional<int64_t> window,
                             std::optional<double> scale) {
  Call call(q, k, v, gates, mask, is_causal, window, scale);
  Problem& p = call.problem;
  const Kernels& kernel = kernels();
  const at::Tensor grad_out = grad.contiguous(), saved_out = out.contiguous(), saved_lse = lse.contiguous();
  const auto floats = q.options().dtype(at::kFloat);
  const at::Tensor grad_q = at::empty(q.sizes(), q.options());
  const at::Tensor grad_k = at::empty(k.sizes(), k.options());
  const at::Tensor grad_v = at::empty(v.sizes(), v.options());
  const at::Tensor grad_gates = at::zeros(gates.sizes(), gates.options());
  p.grad = grad_out.const_data_ptr();
  p.out = saved_out.mutable_data_ptr();
  p.lse = saved_lse.mutable_data_ptr<float>();
  p.grad_q = grad_q.mutable_data_ptr();
  p.grad_gates = grad_gates.mutable_data_ptr();
  if (grad_q.numel() > 0) zero_inactive(p, grad_q, p.width, true);
  const ActiveRows active(p);

  // Each (batch row, key/value head) is cut into parts with their own sums, added up in order: at most as many as query
  // heads in its group, so that in float32 this takes no more memory than keys and values repeated for them would.
  const int64_t pairs = active.pairs(), padded_k = kernel.padded_width(p.width);
  const int64_t padded_v = kernel.padded_width(p.value_width);
  const int64_t parts = pairs == 0 ? 1 : std::clamp<int64_t>((kBackwardTasks + pairs - 1) / pairs, 1, p.group);
  const int64_t size = kBackwardBlocks * kernel.lanes_per_block;
  const int64_t concurrent = std::min<int64_t>(pairs * parts, at::get_num_threads());
  const at::Tensor scratch = at::empty({concurrent, kernel.backward_scratch(p, size)}, floats);
  // A part's sums are converted as soon as they are complete, unless there are several to add up.
  const int64_t sums = parts == 1 ? concurrent : pairs * parts;
  const at::Tensor sum_k = at::empty({sums, p.keys, padded_k}, floats);
  const at::Tensor sum_v = at::empty({sums, p.keys, padded_v}, floats);
  const auto write = [&](int64_t pair, float* from_k, float* from_v) {
    const int64_t b = pair / p.kv_heads, h = pair % p.kv_heads;
    write_rows(p.dtype, from_k, p.keys, p.width, padded_k, grad_k, (b * p.kv_heads + h) * p.keys * p.width);
    write_rows(p.dtype, from_v, p.keys, p.value_width, padded_v, grad_v, (b * p.kv_heads + h) * p.keys * p.value_width);
  };
  std::vector<int64_t> order(pairs * parts);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return active.count(a / parts) > active.count(b / parts); });
  for_each_task(pairs * parts, [&](int64_t i, int64_t thread) {
    const int64_t task = order[i], pair = task / parts, part = task % parts;
    const int64_t slot = parts == 1 ? thread : task;
    float* to_k = sum_k.mutable_data_ptr<float>() + slot * p.keys * padded_k;
    float* to_v = sum_v.mutable_data_ptr<float>() + slot * p.keys * padded_v;
    std::fill_n(to_k, p.keys * padded_k, 0.0f);
    std::fill_n(to_v, p.keys * padded_v, 0.0f);
    // Blocks are dealt out in turn: with causal attention the late ones see more keys.
    for (int64_t first = part * size; first < active.count(pair); first += parts * size)
      kernel.backward(p, active.rows(pair, first, std::min(size, active.count(pair) - first)), to_k, to_v,
                      scratch.mutable_data_ptr<float>() + thread * scratch.size(1));
    if (parts == 1) write(pair, to_k, to_v);
  });
  if (parts > 1)
    for_each_task(pairs, [&](int64_t pair, int64_t) {
      float* to_k = sum_k.mutable_data_ptr<float>() + pair * parts * p.keys * padded_k;
      float* to_v = sum_v.mutable_data_ptr<float>() + pair * parts * p.keys * padded_v;
      for (int64_t part = 1; part < parts; ++part) {
        for (int64_t i = 0; i < p.keys * padded_k; ++i) to_k[i] += to_k[part * p.keys * padded_k + i];
        for (int64_t i = 0; i < p.keys * padded_v; ++i) to_v[i] += to_v[part * p.keys * padded_v + i];
      }
      write(pair, to_k, to_v);
    });
  return {grad_q, grad_k, grad_v, grad_gates};
}

constexpr const char* kForward = "moh::cpu_attention";
constexpr const char* kBackward = "moh::cpu_attention_backward";

class Autograd : public torch::autograd::Function<Autograd> {
 public:
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx, const at::Tensor& q,
                                                const at::Tensor& k, const at::Tensor& v, const at::Tensor& gates,
                                                const std::optional<at::Tensor>& mask, bool is_causal,
                                                std::optional<int64_t> window, std::optional<double> scale) {
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto op =
        c10::Dispatcher::singleton().findSchemaOrThrow(kForward, "").typed<decltype(attention)>();
    auto [out, lse] = op.call(q, k, v, gates, mask, is_causal, window, scale);
    ctx->save_for_backward({q, k, v, gates, mask.value_or(at::Tensor()), out, lse});
    ctx->saved_data["is_causal"] = is_causal;
    ctx->saved_data["window"] = window;
    ctx->saved_data["scale"] = scale;
    ctx->mark_non_differentiable({lse});
    return {out, lse};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    static const auto op =
        c10::Dispatcher::singleton().findSchemaOrThrow(kBackward, "").typed<decltype(attention_backward)>();
    const auto saved = ctx->get_saved_variables();
    const auto mask = saved[4].defined() ? std::optional<at::Tensor>(saved[4]) : std::nullopt;
    auto [grad_q, grad_k, grad_v, grad_gates] =
        op.call(grads[0], saved[0], saved[1], saved[2], saved[3], mask, saved[5], saved[6],
                ctx->saved_data["is_causal"].toBool(), ctx->saved_data["window"].toOptional<int64_t>(),
                ctx->saved_data["scale"].toOptional<double>());
    return {grad_q, grad_k, grad_v, grad_gates, at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

// The backward pass has no derivative of its own; asked for one, it says so.
class BackwardAutograd : public torch::autograd::Function<BackwardAutograd> {
 public:
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext*, const at::Tensor& grad,
                                                const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                const at::Tensor& gates, const std::optional<at::Tensor>& mask,
                                                const at::Tensor& out, const at::Tensor& lse, bool is_causal,
                                                std::optional<int64_t> window, std::optional<double> scale) {
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto op =
        c10::Dispatcher::singleton().findSchemaOrThrow(kBackward, "").typed<decltype(attention_backward)>();
    auto [grad_q, grad_k, grad_v, grad_gates] =
        op.call(grad, q, k, v, gates, mask, out, lse, is_causal, window, scale);
    return {grad_q, grad_k, grad_v, grad_gates};
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext*,
                                                 const torch::autograd::variable_list&) {
    TORCH_CHECK_NOT_IMPLEMENTED(false,
                                "the backend 'cpu' has no second derivative; use backend='reference' where you need one");
  }
};

Gradients attention_backward_autograd(const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k,
                                      const at::Tensor& v, const at::Tensor& gates,
                                      const std::optional<at::Tensor>& mask, const at::Tensor& out,
                                      const at::Tensor& lse, bool is_causal, std::optional<int64_t> window,
                                      std::optional<double> scale) {
  auto g = BackwardAutograd::apply(grad, q, k, v, gates, mask, out, lse, is_causal, window, scale);
  return {g[0], g[1], g[2], g[3]};
}

std::tuple<at::Tensor, at::Tensor> attention_autograd(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                      const at::Tensor& gates, const std::optional<at::Tensor>& mask,
                                                      bool is_causal, std::optional<int64_t> window,
                                                      std::optional<double> scale) {
  auto results = Autograd::apply(q, k, v, gates, mask, is_causal, window, scale);
  return {results[0], results[1]};
}

}  // namespace
}  // namespace moh

TORCH_LIBRARY_FRAGMENT(moh, m) {
  m.def(
      "cpu_attention(Tensor q, Tensor k, Tensor v, Tensor gates, Tensor? attn_mask, bool is_causal, int? window, "
      "float? scale) -> (Tensor, Tensor)");
  m.def(
      "cpu_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor gates, Tensor? attn_mask, Tensor out, "
      "Tensor lse, bool is_causal, int? window, float? scale) -> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(moh, CPU, m) {
  m.impl("cpu_attention", moh::attention);
  m.impl("cpu_attention_backward", moh::attention_backward);
}

TORCH_LIBRARY_IMPL(moh, Autograd, m) {
  m.impl("cpu_attention", moh::attention_autograd);
  m.impl("cpu_attention_backward", moh::attention_backward_autograd);
}
