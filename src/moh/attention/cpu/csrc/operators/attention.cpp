// The operators `moh::cpu_attention` and `moh::cpu_attention_backward`, which cut the active rows into tasks.
//
// No result depends on the number of threads: a task's arithmetic is the same on any thread, and sums over several
// tasks are taken in a fixed order.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "operators/operators.h"

namespace moh {
namespace {

constexpr int64_t kTasksPerThread = 4;  // With fewer, threads wait for the last one to finish.
constexpr int64_t kDecodeRows = 16;     // With more rows per key/value head, rows on the lanes are faster.
constexpr int64_t kDecodeKeys = 512;    // Keys of one decoding range, whatever the number of threads.
constexpr int64_t kBackwardTasks = 8;   // A backward pass has at least this many parts where memory allows.

at::Tensor last_contiguous(const at::Tensor& x) { return x.stride(-1) == 1 || x.size(-1) == 1 ? x : x.contiguous(); }

View view(const at::Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

// Checks the arguments, and keeps the tensors alive that its Problem points into.
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
    p.dtype = dtype_of(q);
    p.scale = static_cast<float>(scale.value_or(1.0 / std::sqrt(static_cast<double>(p.width))));
    p.causal = causal;
    TORCH_CHECK_VALUE(!window.has_value() || (*window > 0 && causal), "window must be positive and needs is_causal");
    p.window = window.value_or(0);
    p.q = view(q), p.k = view(k), p.v = view(v);
    p.gates = gates.const_data_ptr();
    if (mask_.has_value()) {
      const std::array<int64_t, 4> full{p.batches, p.heads, p.queries, p.keys};
      bool fits = mask_->dim() <= 4;
      for (int64_t i = 1; fits && i <= mask_->dim(); ++i)
        fits = mask_->size(-i) == 1 || mask_->size(-i) == full[4 - i];
      TORCH_CHECK_VALUE(fits, "attn_mask must be broadcastable to [B, H, Nq, Nk] = ", at::IntArrayRef(full), ", got ",
                        mask_->sizes());
      mask = mask_->expand(full);
      TORCH_CHECK_VALUE(mask.scalar_type() == at::kBool || mask.scalar_type() == type,
                        "attn_mask must be bool or of q's dtype");
      p.mask.kind = mask.scalar_type() == at::kBool ? MaskKind::kBool : MaskKind::kAdditive;
      p.mask.data = mask.const_data_ptr();
      p.mask.batch = mask.stride(0), p.mask.head = mask.stride(1);
      p.mask.query = mask.stride(2), p.mask.key = mask.stride(3);
    }
  }
};

// Sets the entries [B, Nq, H] of `x` (or [B, H, Nq], if `by_head`) whose gate is 0 to zero.
void zero_inactive(const Problem& p, const ActiveRows& active, const at::Tensor& x, bool by_head) {
  if (x.numel() == 0) return;
  const bool* flags = active.flags();
  const int64_t bytes = x.size(-1) * x.element_size();
  char* data = static_cast<char*>(x.mutable_data_ptr());
  at::parallel_for(0, p.batches * p.queries, 1 + 262144 / (p.heads * bytes + 1), [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token)
      for (int64_t h = 0; h < p.heads; ++h) {
        if (flags[token * p.heads + h]) continue;
        const int64_t b = token / p.queries, t = token % p.queries;
        const int64_t entry = by_head ? (b * p.heads + h) * p.queries + t : token * p.heads + h;
        std::memset(data + entry * bytes, 0, bytes);
      }
  });
}

void forward_rows(const Call& call, const ActiveRows& active) {
  const Problem& p = call.problem;
  const Kernels& kernel = kernels();
  const int64_t wanted = kTasksPerThread * at::get_num_threads();
  int64_t size = kForwardBlocks * kernel.lanes_per_block;
  while (size > kernel.lanes_per_block && active.total() < wanted * size) size /= 2;

  struct Task {
    Rows rows;
    int64_t cost;
  };
  std::vector<Task> tasks;
  for (int64_t bundle = 0; bundle < active.bundles(); ++bundle) {
    const int64_t step = rows_per_part(active.count(bundle), size, kernel.lanes_per_block);
    for (int64_t first = 0; first < active.count(bundle); first += step) {
      const Rows rows = active.rows(bundle, first, std::min(step, active.count(bundle) - first));
      const int64_t last = rows.index[rows.count - 1] / p.group, start = rows.index[0] / p.group;
      tasks.push_back({rows, rows.count * (p.key_end(last) - p.key_begin(start))});
    }
  }
  // The longest tasks come first, so that threads wait for a short one at the end.
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.cost > b.cost; });
  const Scratch scratch(threads_for(tasks.size()), kernel.forward_scratch(p, size), call.q);
  for_each_task(tasks.size(),
                [&](int64_t i, int64_t thread) { kernel.forward(p, tasks[i].rows, scratch.of(thread)); });
}

// Merges the partial softmax of a later range of the keys into `to`, by the rule of the online softmax:
//   m' = max(m_1, m_2),   l' = 2^(m_1 - m') l_1 + 2^(m_2 - m') l_2,   and o' likewise.
// A range without a visible key has m = -inf and counts nothing; 2^(-inf - -inf) would be NaN. The function is not
// inlined, because both callers have to get the same rounding.
[[gnu::noinline]] void merge(int64_t rows, int64_t width, const Partial& later, const Partial& to) {
  for (int64_t r = 0; r < rows; ++r) {
    const float most = std::max(to.max[r], later.max[r]);
    const auto factor = [&](float max) { return max == -INFINITY ? 0.0f : std::exp2(max - most); };
    const float kept = factor(to.max[r]), added = factor(later.max[r]);
    to.max[r] = most;
    to.total[r] = kept * to.total[r] + added * later.total[r];
    float* sum = to.sum + r * width;
    const float* more = later.sum + r * width;
    for (int64_t d = 0; d < width; ++d) sum[d] = kept * sum[d] + added * more[d];
  }
}

template <class T>
void write_out(const Problem& p, const Rows& rows, const Partial& all) {
  const T* gates = static_cast<const T*>(p.gates);
  for (int64_t r = 0; r < rows.count; ++r) {
    const int64_t t = rows.index[r] / p.group, h = rows.kv_head * p.group + rows.index[r] % p.group;
    const int64_t entry = (rows.batch * p.queries + t) * p.heads + h;
    const bool blind = all.total[r] == 0.0f;  // The row sees no key.
    const float weight = blind ? 0.0f : static_cast<float>(gates[entry]) / all.total[r];
    T* to = static_cast<T*>(p.out) + entry * p.value_width;
    for (int64_t d = 0; d < p.value_width; ++d) to[d] = static_cast<T>(weight * all.sum[r * p.value_width + d]);
    if (p.most == nullptr) continue;
    p.most[(rows.batch * p.heads + h) * p.queries + t] = blind ? INFINITY : all.max[r];
    p.totals[(rows.batch * p.heads + h) * p.queries + t] = all.total[r];
  }
}

// Few rows and many keys: the cache of every bundle with active rows is read once, in ranges whose results are merged
// in order. With many bundles a task takes all ranges of one, and needs memory for two partial sums alone; otherwise
// every range is a task.
void decode_rows(const Call& call, const ActiveRows& active) {
  const Problem& p = call.problem;
  const Kernels& kernel = kernels();
  const int64_t ranges = std::max<int64_t>(1, (p.keys + kDecodeKeys - 1) / kDecodeKeys);
  std::vector<int64_t> bundles;
  for (int64_t bundle = 0; bundle < active.bundles(); ++bundle)
    if (active.count(bundle) > 0) bundles.push_back(bundle);
  const int64_t heads = static_cast<int64_t>(bundles.size()), most = p.queries * p.group;
  const bool whole = ranges == 1 || heads >= kTasksPerThread * at::get_num_threads();
  const int64_t tasks = whole ? heads : heads * ranges, users = threads_for(tasks);
  const Scratch partials(whole ? 2 * users : tasks, most * (2 + p.value_width), call.q);
  const Scratch scratch(users, kernel.decode_scratch(p, most), call.q);
  const auto partial = [&](int64_t i) {
    float* at = partials.of(i);
    return Partial{at, at + most, at + 2 * most};
  };
  const auto decode = [&](const Rows& rows, int64_t range, const Partial& to, int64_t thread) {
    const int64_t begin = range * kDecodeKeys;
    kernel.decode(p, rows, begin, std::min(p.keys, begin + kDecodeKeys), to, scratch.of(thread));
  };
  const auto finish = [&](const Rows& rows, const Partial& all) {
    with_type(p.dtype, [&](auto t) { write_out<decltype(t)>(p, rows, all); });
  };
  if (whole) {
    for_each_task(tasks, [&](int64_t i, int64_t thread) {
      const Rows rows = active.rows(bundles[i]);
      const Partial all = partial(2 * thread), later = partial(2 * thread + 1);
      decode(rows, 0, all, thread);
      for (int64_t range = 1; range < ranges; ++range) {
        decode(rows, range, later, thread);
        merge(rows.count, p.value_width, later, all);
      }
      finish(rows, all);
    });
    return;
  }
  for_each_task(tasks, [&](int64_t i, int64_t thread) {
    decode(active.rows(bundles[i / ranges]), i % ranges, partial(i), thread);
  });
  for (int64_t i = 0; i < heads; ++i) {
    const Rows rows = active.rows(bundles[i]);
    const Partial all = partial(i * ranges);
    for (int64_t range = 1; range < ranges; ++range)
      merge(rows.count, p.value_width, partial(i * ranges + range), all);
    finish(rows, all);
  }
}

// Converts rows with a stride to a contiguous tensor, from row `first` on. These are plain loops, since tasks run no
// tensor operators.
void write_rows(DType dtype, const float* from, int64_t rows, int64_t stride, const at::Tensor& to, int64_t first) {
  with_type(dtype, [&](auto t) {
    const int64_t width = to.size(-1);
    auto* at = to.mutable_data_ptr<decltype(t)>() + first * width;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t d = 0; d < width; ++d) at[r * width + d] = static_cast<decltype(t)>(from[r * stride + d]);
  });
}

void add(const float* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

// Computes the active rows of a call whose output is `out`; the others become 0 if `zeroed`.
void attend(const Call& call, const at::Tensor& out, bool zeroed) {
  const Problem& p = call.problem;
  const ActiveRows active(call.gates, p.kv_heads);
  if (zeroed) zero_inactive(p, active, out, false);
  if (active.total() == 0) return;
  if (p.queries * p.group <= kDecodeRows)
    decode_rows(call, active);
  else
    forward_rows(call, active);
}

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

}  // namespace

std::tuple<at::Tensor, at::Tensor> attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                             const at::Tensor& gates, const std::optional<at::Tensor>& mask,
                                             bool is_causal, std::optional<int64_t> window,
                                             std::optional<double> scale, bool keep_softmax) {
  Call call(q, k, v, gates, mask, is_causal, window, scale);
  Problem& p = call.problem;
  const at::Tensor out = at::empty({p.batches, p.queries, p.heads, p.value_width}, q.options());
  // The largest scores, then the denominators; those of inactive heads are as where a query sees no key.
  const at::Tensor softmax =
      at::empty({2, keep_softmax ? p.batches : 0, p.heads, p.queries}, q.options().dtype(at::kFloat));
  const int64_t entries = softmax.numel() / 2;
  std::fill_n(softmax.mutable_data_ptr<float>(), entries, INFINITY);
  std::fill_n(softmax.mutable_data_ptr<float>() + entries, entries, 0.0f);
  if (out.numel() == 0) return {out, softmax};
  p.out = out.mutable_data_ptr();
  p.most = keep_softmax ? softmax.mutable_data_ptr<float>() : nullptr;
  p.totals = keep_softmax ? p.most + entries : nullptr;
  attend(call, out, true);
  return {out, softmax};
}

void attend_rows(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& gates,
                 const std::optional<at::Tensor>& mask, bool is_causal, std::optional<double> scale,
                 const at::Tensor& out, bool zeroed) {
  Call call(q, k, v, gates, mask, is_causal, std::nullopt, scale);
  call.problem.out = out.mutable_data_ptr();
  attend(call, out, zeroed);
}

namespace {

Gradients attention_backward(const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const at::Tensor& gates, const std::optional<at::Tensor>& mask, const at::Tensor& out,
                             const at::Tensor& softmax, bool is_causal, std::optional<int64_t> window,
                             std::optional<double> scale) {
  Call call(q, k, v, gates, mask, is_causal, window, scale);
  Problem& p = call.problem;
  TORCH_CHECK_VALUE(softmax.sizes() == at::IntArrayRef({2, p.batches, p.heads, p.queries}) &&
                        softmax.scalar_type() == at::kFloat,
                    "softmax must be that of a forward pass with keep_softmax=True, [2, B, H, Nq] in float32, got ",
                    softmax.sizes());
  TORCH_CHECK_VALUE(grad.sizes() == out.sizes() && out.scalar_type() == q.scalar_type() &&
                        grad.scalar_type() == q.scalar_type() &&
                        out.sizes() == at::IntArrayRef({p.batches, p.queries, p.heads, p.value_width}),
                    "grad and out must be [B, Nq, H, Dv] in q's dtype, got ", grad.sizes(), " and ", out.sizes());
  const ActiveRows active(call.gates, p.kv_heads);
  if (active.total() == 0)
    return {at::zeros(q.sizes(), q.options()), at::zeros(k.sizes(), k.options()), at::zeros(v.sizes(), v.options()),
            at::zeros(gates.sizes(), gates.options())};
  const Kernels& kernel = kernels();
  const at::Tensor grad_out = grad.contiguous(), saved_out = out.contiguous(), saved_softmax = softmax.contiguous();
  const at::Tensor grad_q = at::empty(q.sizes(), q.options());
  const at::Tensor grad_k = at::empty(k.sizes(), k.options());
  const at::Tensor grad_v = at::empty(v.sizes(), v.options());
  const at::Tensor grad_gates = at::zeros(gates.sizes(), gates.options());
  p.grad = grad_out.const_data_ptr();
  p.out = saved_out.mutable_data_ptr();
  p.most = saved_softmax.mutable_data_ptr<float>();
  p.totals = p.most + saved_softmax.numel() / 2;
  p.grad_q = grad_q.mutable_data_ptr();
  p.grad_gates = grad_gates.mutable_data_ptr();
  zero_inactive(p, active, grad_q, true);

  // Each bundle is cut into parts with sums of their own, which are then added up in order. There are at most as many
  // parts as query heads in the group, so that in float32 this takes no more memory than repeating keys and values for
  // them would.
  const int64_t bundles = active.bundles(), padded_k = kernel.padded_width(p.width);
  const int64_t padded_v = kernel.padded_width(p.value_width);
  const int64_t parts = bundles == 0 ? 1 : std::clamp<int64_t>((kBackwardTasks + bundles - 1) / bundles, 1, p.group);
  const int64_t size = kBackwardBlocks * kernel.lanes_per_block;
  const int64_t concurrent = threads_for(bundles * parts);
  const Scratch scratch(concurrent, kernel.backward_scratch(p, size), q);
  // Floats of a width that needs no padding are summed in the gradient itself. Other sums are converted as soon as they
  // are complete, which for several parts is after adding them up.
  const bool in_place =
      parts == 1 && p.dtype == DType::kFloat && padded_k == p.width && padded_v == p.value_width;
  const int64_t sums = in_place ? 0 : parts == 1 ? concurrent : bundles * parts;
  const Scratch sum_k(sums, p.keys * padded_k, q), sum_v(sums, p.keys * padded_v, q);
  const auto write = [&](int64_t bundle, int64_t slot) {
    write_rows(p.dtype, sum_k.of(slot), p.keys, padded_k, grad_k, bundle * p.keys);
    write_rows(p.dtype, sum_v.of(slot), p.keys, padded_v, grad_v, bundle * p.keys);
  };
  std::vector<int64_t> order(bundles * parts);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return active.count(a / parts) > active.count(b / parts); });
  for_each_task(bundles * parts, [&](int64_t i, int64_t thread) {
    const int64_t task = order[i], bundle = task / parts, part = task % parts;
    const int64_t slot = parts == 1 ? thread : task;
    const auto sum_of = [&](const Scratch& slots, const at::Tensor& to, int64_t padded) {
      return in_place ? to.mutable_data_ptr<float>() + bundle * p.keys * padded : slots.of(slot);
    };
    float *to_k = sum_of(sum_k, grad_k, padded_k), *to_v = sum_of(sum_v, grad_v, padded_v);
    std::fill_n(to_k, p.keys * padded_k, 0.0f);
    std::fill_n(to_v, p.keys * padded_v, 0.0f);
    // Parts take blocks in turn, since with causal attention later blocks see more keys.
    for (int64_t first = part * size; first < active.count(bundle); first += parts * size)
      kernel.backward(p, active.rows(bundle, first, std::min(size, active.count(bundle) - first)), to_k, to_v,
                      scratch.of(thread));
    if (parts == 1 && !in_place) write(bundle, slot);
  });
  if (parts > 1)
    for_each_task(bundles, [&](int64_t bundle, int64_t) {
      for (int64_t part = 1; part < parts; ++part) {
        add(sum_k.of(bundle * parts + part), p.keys * padded_k, sum_k.of(bundle * parts));
        add(sum_v.of(bundle * parts + part), p.keys * padded_v, sum_v.of(bundle * parts));
      }
      write(bundle, bundle * parts);
    });
  return {grad_q, grad_k, grad_v, grad_gates};
}

// The operators are called through the dispatcher, so that tracing sees them.
const auto& forward_operator() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("moh::cpu_attention", "").typed<decltype(attention)>();
  return op;
}

const auto& backward_operator() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("moh::cpu_attention_backward", "")
                             .typed<decltype(attention_backward)>();
  return op;
}

class Autograd : public torch::autograd::Function<Autograd> {
 public:
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx, const at::Tensor& q,
                                                const at::Tensor& k, const at::Tensor& v, const at::Tensor& gates,
                                                const std::optional<at::Tensor>& mask, bool is_causal,
                                                std::optional<int64_t> window, std::optional<double> scale) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [out, softmax] = forward_operator().call(q, k, v, gates, mask, is_causal, window, scale, true);
    ctx->save_for_backward({q, k, v, gates, mask.value_or(at::Tensor()), out, softmax});
    ctx->saved_data["is_causal"] = is_causal;
    ctx->saved_data["window"] = window;
    ctx->saved_data["scale"] = scale;
    ctx->mark_non_differentiable({softmax});
    return {out, softmax};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto mask = saved[4].defined() ? std::optional<at::Tensor>(saved[4]) : std::nullopt;
    auto [grad_q, grad_k, grad_v, grad_gates] =
        backward_operator().call(grads[0], saved[0], saved[1], saved[2], saved[3], mask, saved[5], saved[6],
                ctx->saved_data["is_causal"].toBool(), ctx->saved_data["window"].toOptional<int64_t>(),
                ctx->saved_data["scale"].toOptional<double>());
    return {grad_q, grad_k, grad_v, grad_gates, at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

// The backward pass has no derivative of its own; requesting one raises.
class BackwardAutograd : public torch::autograd::Function<BackwardAutograd> {
 public:
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext*, const at::Tensor& grad,
                                                const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                const at::Tensor& gates, const std::optional<at::Tensor>& mask,
                                                const at::Tensor& out, const at::Tensor& softmax, bool is_causal,
                                                std::optional<int64_t> window, std::optional<double> scale) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [grad_q, grad_k, grad_v, grad_gates] =
        backward_operator().call(grad, q, k, v, gates, mask, out, softmax, is_causal, window, scale);
    return {grad_q, grad_k, grad_v, grad_gates};
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext*,
                                                 const torch::autograd::variable_list&) {
    TORCH_CHECK_NOT_IMPLEMENTED(false,
                                "the backend 'cpu' has no second derivative; "
                                "use backend='reference' where you need one");
  }
};

Gradients attention_backward_autograd(const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k,
                                      const at::Tensor& v, const at::Tensor& gates,
                                      const std::optional<at::Tensor>& mask, const at::Tensor& out,
                                      const at::Tensor& softmax, bool is_causal, std::optional<int64_t> window,
                                      std::optional<double> scale) {
  auto g = BackwardAutograd::apply(grad, q, k, v, gates, mask, out, softmax, is_causal, window, scale);
  return {g[0], g[1], g[2], g[3]};
}

// Whether a gradient may follow, in backward or forward mode.
template <class... Tensors>
bool is_differentiated(const Tensors&... x) {
  return (at::GradMode::is_enabled() && (x.requires_grad() || ...)) || (x._fw_grad(/*level=*/0).defined() || ...);
}

std::tuple<at::Tensor, at::Tensor> attention_autograd(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                      const at::Tensor& gates, const std::optional<at::Tensor>& mask,
                                                      bool is_causal, std::optional<int64_t> window,
                                                      std::optional<double> scale, bool keep_softmax) {
  // In decoding, what `apply` sets up for a gradient would take noticeable time.
  if (!is_differentiated(q, k, v, gates)) {
    at::AutoDispatchBelowADInplaceOrView below;
    return forward_operator().call(q, k, v, gates, mask, is_causal, window, scale, keep_softmax);
  }
  auto results = Autograd::apply(q, k, v, gates, mask, is_causal, window, scale);
  return {results[0], results[1]};
}

}  // namespace
}  // namespace moh

TORCH_LIBRARY_FRAGMENT(moh, m) {
  m.def(
      "cpu_attention(Tensor q, Tensor k, Tensor v, Tensor gates, Tensor? attn_mask, bool is_causal, int? window, "
      "float? scale, bool keep_softmax=True) -> (Tensor, Tensor)");
  m.def(
      "cpu_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor gates, Tensor? attn_mask, Tensor out, "
      "Tensor softmax, bool is_causal, int? window, float? scale) -> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(moh, CPU, m) {
  m.impl("cpu_attention", moh::attention);
  m.impl("cpu_attention_backward", moh::attention_backward);
}

TORCH_LIBRARY_IMPL(moh, Autograd, m) {
  m.impl("cpu_attention", moh::attention_autograd);
  m.impl("cpu_attention_backward", moh::attention_backward_autograd);
}
