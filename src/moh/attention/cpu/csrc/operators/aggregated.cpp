// The operator `moh::cpu_aggregated_attention` and its backward pass, which cut the active rows into tasks.
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>

#include "operators/operators.h"

namespace moh {
namespace {

constexpr int64_t kForwardRows = 384;  // Up to this many rows of a task share the copies of their neighbours.
constexpr int64_t kBackwardParts = 8;  // With fewer heads, the batch is cut into parts with sums of their own.

TokenView token_view(const at::Tensor& x) { return {x.const_data_ptr<float>(), x.stride(0), x.stride(1), x.stride(2)}; }
at::Tensor last_contiguous(const at::Tensor& x) { return x.stride(-1) == 1 || x.size(-1) == 1 ? x : x.contiguous(); }

// Checks the arguments, and keeps the tensors alive that its Aggregate points into.
struct Call {
  at::Tensor q, k, v, pooled_k, pooled_v, gates, embedding, temperature, length, token_weights, token_bias, local_bias,
      pooled_bias;
  Aggregate problem;

  void check(const char* name, const at::Tensor& x, at::IntArrayRef shape) {
    TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat && x.sizes() == shape, name, " must be float32 of shape ", shape,
                      ", got ", x.scalar_type(), " of shape ", x.sizes());
  }

  Call(const at::Tensor& q_, const at::Tensor& k_, const at::Tensor& v_, const at::Tensor& pooled_k_,
       const at::Tensor& pooled_v_, const at::Tensor& gates_, const at::Tensor& embedding_,
       const at::Tensor& temperature_, const at::Tensor& length_, const at::Tensor& token_weights_,
       const at::Tensor& token_bias_, const at::Tensor& local_bias_, const at::Tensor& pooled_bias_, int64_t rows,
       int64_t columns)
      : q(last_contiguous(q_)), k(last_contiguous(k_)), v(last_contiguous(v_)), pooled_k(last_contiguous(pooled_k_)),
        pooled_v(last_contiguous(pooled_v_)), gates(gates_.contiguous()), embedding(embedding_.contiguous()),
        temperature(temperature_.contiguous()), length(length_.contiguous()),
        token_weights(token_weights_.contiguous()), token_bias(token_bias_.contiguous()),
        local_bias(local_bias_.contiguous()), pooled_bias(pooled_bias_.contiguous()) {
    TORCH_CHECK_VALUE(q.dim() == 4 && pooled_k.dim() == 4 && local_bias.dim() == 2,
                      "q and pooled_k must have 4 dimensions and local_bias 2");
    Aggregate& p = problem;
    const int64_t B = q.size(0), N = q.size(1), H = q.size(2), D = q.size(3), P = pooled_k.size(1);
    const int64_t W = local_bias.size(1), side = std::lround(std::sqrt(static_cast<double>(W)));
    TORCH_CHECK_VALUE(side * side == W && (W == 0 || side % 2 == 1) && W <= kMaxPlaces,
                      "local_bias must be [H, window^2] with an odd window of at most ",
                      std::lround(std::sqrt(static_cast<double>(kMaxPlaces))), ", got ", local_bias.sizes());
    TORCH_CHECK_VALUE(rows * columns == N && N < INT32_MAX, "q must have height * width = ", rows * columns,
                      " tokens, got ", N);
    check("q", q, {B, N, H, D});
    check("k", k, {B, W > 0 ? N : 0, H, D});
    check("v", v, {B, W > 0 ? N : 0, H, D});
    check("pooled_k", pooled_k, {B, P, H, D});
    check("pooled_v", pooled_v, {B, P, H, D});
    check("gates", gates, {B, N, H});
    check("embedding", embedding, {H, D});
    check("temperature", temperature, {H});
    check("length", length, {N});
    check("tokens", token_weights, {H, D, W});
    check("token_bias", token_bias, {H, W});
    check("local_bias", local_bias, {H, W});
    check("pooled_bias", pooled_bias, {H, N, P});
    p.batches = B, p.tokens = N, p.heads = H, p.width = D, p.pooled = P, p.places = W;
    p.side = side, p.rows = rows, p.columns = columns;
    p.q = token_view(q), p.k = token_view(k), p.v = token_view(v);
    p.pooled_k = token_view(pooled_k), p.pooled_v = token_view(pooled_v);
    p.gates = gates.const_data_ptr<float>();
    p.embedding = embedding.const_data_ptr<float>();
    p.temperature = temperature.const_data_ptr<float>();
    p.length = length.const_data_ptr<float>();
    p.token_weights = token_weights.const_data_ptr<float>();
    p.token_bias = token_bias.const_data_ptr<float>();
    p.local_bias = local_bias.const_data_ptr<float>();
    p.pooled_bias = pooled_bias.const_data_ptr<float>();
  }
};

at::Tensor aggregated(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& pooled_k,
                      const at::Tensor& pooled_v, const at::Tensor& gates, const at::Tensor& embedding,
                      const at::Tensor& temperature, const at::Tensor& length, const at::Tensor& tokens,
                      const at::Tensor& token_bias, const at::Tensor& local_bias, const at::Tensor& pooled_bias,
                      int64_t height, int64_t width) {
  Call call(q, k, v, pooled_k, pooled_v, gates, embedding, temperature, length, tokens, token_bias, local_bias,
            pooled_bias, height, width);
  Aggregate& p = call.problem;
  const at::Tensor out = at::zeros(q.sizes(), q.options());
  if (out.numel() == 0) return out;
  p.out = out.mutable_data_ptr<float>();
  const ActiveRows active(call.gates, p.heads);
  const Kernels& kernel = kernels();
  std::vector<Rows> tasks;
  int64_t scratch_size = 0;
  for (int64_t bundle = 0; bundle < active.bundles(); ++bundle)
    for (int64_t first = 0; first < active.count(bundle); first += kForwardRows) {
      tasks.push_back(active.rows(bundle, first, std::min(kForwardRows, active.count(bundle) - first)));
      scratch_size = std::max(scratch_size, kernel.aggregate_scratch(p, &tasks.back()));
    }
  std::stable_sort(tasks.begin(), tasks.end(), [](const Rows& a, const Rows& b) { return a.count > b.count; });
  const Scratch scratch(threads_for(tasks.size()), scratch_size, q);
  for_each_task(tasks.size(), [&](int64_t i, int64_t thread) { kernel.aggregate(p, tasks[i], scratch.of(thread)); });
  return out;
}

std::vector<at::Tensor> aggregated_backward(
    const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& pooled_k,
    const at::Tensor& pooled_v, const at::Tensor& gates, const at::Tensor& embedding, const at::Tensor& temperature,
    const at::Tensor& length, const at::Tensor& tokens, const at::Tensor& token_bias, const at::Tensor& local_bias,
    const at::Tensor& pooled_bias, int64_t height, int64_t width) {
  Call call(q, k, v, pooled_k, pooled_v, gates, embedding, temperature, length, tokens, token_bias, local_bias,
            pooled_bias, height, width);
  Aggregate& p = call.problem;
  const at::Tensor grad_out = grad.contiguous();
  const auto zeros = [&](const at::Tensor& x) { return at::zeros(x.sizes(), q.options()); };
  // Heads without an active row are never visited, so their gradients have to be zeros from the start.
  const at::Tensor grad_q = zeros(q), grad_k = zeros(k), grad_v = zeros(v), grad_pooled_k = zeros(pooled_k);
  const at::Tensor grad_pooled_v = zeros(pooled_v), grad_gates = zeros(gates);
  // The gradients of the parameters are sums over the batch. Each head is cut into parts of the batch with sums of
  // their own, which are then added up in order. There are few of them, since those of the pooled bias are large.
  const int64_t H = p.heads, parts = std::clamp<int64_t>((kBackwardParts + H - 1) / std::max<int64_t>(H, 1), 1,
                                                         std::max<int64_t>(p.batches, 1));
  const auto part_sums = [&](const at::Tensor& x) {
    std::vector<int64_t> shape = x.sizes().vec();
    shape.insert(shape.begin(), parts);
    return at::zeros(shape, q.options());
  };
  const at::Tensor sum_embedding = part_sums(embedding), sum_temperature = part_sums(temperature);
  const at::Tensor sum_tokens = part_sums(tokens), sum_token_bias = part_sums(token_bias);
  const at::Tensor sum_local_bias = part_sums(local_bias), sum_pooled_bias = part_sums(pooled_bias);
  if (grad_out.numel() > 0) {
    p.grad = grad_out.const_data_ptr<float>();
    p.grad_q = grad_q.mutable_data_ptr<float>();
    p.grad_k = grad_k.mutable_data_ptr<float>();
    p.grad_v = grad_v.mutable_data_ptr<float>();
    p.grad_pooled_k = grad_pooled_k.mutable_data_ptr<float>();
    p.grad_pooled_v = grad_pooled_v.mutable_data_ptr<float>();
    p.grad_gates = grad_gates.mutable_data_ptr<float>();
    const ActiveRows active(call.gates, H);
    const Kernels& kernel = kernels();
    const Scratch scratch(threads_for(parts * H), kernel.aggregate_scratch(p, nullptr), q);
    const auto slice = [&](const at::Tensor& x, int64_t i) {  // of a tensor [parts, H, ...]
      return x.mutable_data_ptr<float>() + i * (x.numel() / (parts * H));
    };
    for_each_task(parts * H, [&](int64_t i, int64_t thread) {
      const int64_t part = i / H, head = i % H;
      const AggregateSums to{slice(sum_embedding, i),  slice(sum_temperature, i), slice(sum_tokens, i),
                             slice(sum_token_bias, i), slice(sum_local_bias, i),  slice(sum_pooled_bias, i)};
      for (int64_t batch = part; batch < p.batches; batch += parts) {
        const int64_t bundle = batch * H + head;
        if (active.count(bundle) > 0) kernel.aggregate_backward(p, active.rows(bundle), to, scratch.of(thread));
      }
    });
  }
  const auto total = [&](const at::Tensor& x) { return parts == 1 ? x.squeeze(0) : x.sum(0); };
  return {grad_q,
          grad_k,
          grad_v,
          grad_pooled_k,
          grad_pooled_v,
          grad_gates,
          total(sum_embedding),
          total(sum_temperature),
          total(sum_tokens),
          total(sum_token_bias),
          total(sum_local_bias),
          total(sum_pooled_bias)};
}

}  // namespace
}  // namespace moh

TORCH_LIBRARY_FRAGMENT(moh, m) {
  m.def(
      "cpu_aggregated_attention(Tensor q, Tensor k, Tensor v, Tensor pooled_k, Tensor pooled_v, Tensor gates, "
      "Tensor embedding, Tensor temperature, Tensor length, Tensor tokens, Tensor token_bias, Tensor local_bias, "
      "Tensor pooled_bias, int height, int width) -> Tensor");
  m.def(
      "cpu_aggregated_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor pooled_k, Tensor pooled_v, "
      "Tensor gates, Tensor embedding, Tensor temperature, Tensor length, Tensor tokens, Tensor token_bias, "
      "Tensor local_bias, Tensor pooled_bias, int height, int width) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(moh, CPU, m) {
  m.impl("cpu_aggregated_attention", moh::aggregated);
  m.impl("cpu_aggregated_attention_backward", moh::aggregated_backward);
}
