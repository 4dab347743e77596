// Projections and attention of a layer whose gates are known: in one call, `moh::cpu_layer`, or in two with room for a cache
// between them, `moh::cpu_project` (also positions) and `moh::cpu_attend` (also masks).
//
// Without gradients nothing between the projections has to be a tensor that others can read: entries of inactive pairs are
// never written, biases are where the sums start, and one call lists the active tokens of every head once for both
// projections. No result depends on the number of threads.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include "operators/operators.h"
#include "operators/rotary.h"

namespace moh {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

constexpr int64_t kRotatedPerTask = 16384;  // A thread is woken for this many numbers, some 10 microseconds.

void check_bias(const char* name, const OptionalTensor& bias, const at::Tensor& weight, const at::Tensor& x) {
  TORCH_CHECK_VALUE(!bias.has_value() || (bias->sizes() == at::IntArrayRef({weight.size(0)}) &&
                                          bias->scalar_type() == x.scalar_type()),
                    name, " must be [", weight.size(0), "] of x's dtype ", x.scalar_type(), ", got ", bias->sizes(),
                    " of ", bias->scalar_type());
}

OptionalTensor part(const OptionalTensor& bias, int64_t first, int64_t count) {
  return bias.has_value() ? OptionalTensor(bias->narrow(0, first, count)) : OptionalTensor();
}

struct Projected {
  at::Tensor q, k, v;  // [B, H or Hkv, N, D]; with `active`, queries of inactive pairs were never written.
  std::optional<ActiveRows> active;
};

// One weight is that of queries, keys and values, which then have equally many heads.
Projected project_rows(const at::Tensor& x, const at::Tensor& gates, at::TensorList weights,
                       const c10::List<OptionalTensor>& biases, bool sparse) {
  TORCH_CHECK_VALUE(x.dim() == 3 && gates.dim() == 3 && gates.size(0) == x.size(0) && gates.size(1) == x.size(1) &&
                        gates.scalar_type() == x.scalar_type(),
                    "x must be [B, N, C] and gates [B, N, H] of its dtype, got ", x.sizes(), " and ", gates.sizes());
  TORCH_CHECK_VALUE((weights.size() == 1 || weights.size() == 3) && biases.size() == weights.size(),
                    "there must be one weight and bias, of queries, keys and values, or three of each");
  const int64_t B = x.size(0), N = x.size(1), H = gates.size(2);
  const bool fused = weights.size() == 1;
  const int64_t rows = fused ? weights[0].size(0) / 3 : weights[0].size(0);  // H * D
  TORCH_CHECK_VALUE(H > 0 && rows % H == 0 && rows > 0 && (!fused || weights[0].size(0) == 3 * rows),
                    "the queries' weight must have H * D rows, got ", weights[0].sizes());
  const int64_t D = rows / H;
  for (size_t i = 0; i < weights.size(); ++i) {
    TORCH_CHECK_VALUE(weights[i].size(0) % D == 0, "the projections' weights must have whole heads of width ", D,
                      ", got ", weights[i].sizes());
    check_bias("a projection's bias", biases.get(i), weights[i], x);
  }
  const auto by_heads = [&](const at::Tensor& projected) {  // [B, N, heads * D] -> [B, heads, N, D]
    return projected.unflatten(-1, {projected.size(-1) / D, D}).transpose(1, 2);
  };
  // What follows reads the memory of its result, whose strides PyTorch promises nobody.
  const auto linear = [&](const at::Tensor& weight, const OptionalTensor& bias) {
    return at::linear(x, weight, bias).contiguous();
  };
  const OptionalTensor first_bias = biases.get(0);
  Projected to;
  if (fused && !sparse) {
    const at::Tensor qkv = linear(weights[0], first_bias).view({B, N, 3, H, D});
    to.q = qkv.select(2, 0).transpose(1, 2), to.k = qkv.select(2, 1).transpose(1, 2);
    to.v = qkv.select(2, 2).transpose(1, 2);
  } else if (fused) {
    const at::Tensor kv =
        linear(weights[0].narrow(0, rows, 2 * rows), part(first_bias, rows, 2 * rows)).view({B, N, 2, H, D});
    to.k = kv.select(2, 0).transpose(1, 2), to.v = kv.select(2, 1).transpose(1, 2);
  } else {
    to.k = by_heads(linear(weights[1], biases.get(1)));
    to.v = by_heads(linear(weights[2], biases.get(2)));
    if (!sparse) to.q = by_heads(linear(weights[0], first_bias));
  }
  if (!sparse) return to;
  const at::Tensor flat = gates.view({B * N, H}), from = x.contiguous().view({B * N, x.size(2)});
  to.active.emplace(active_tokens(flat));
  const at::Tensor queries = at::empty({B, N, H, D}, x.options());
  const at::Tensor bias = first_bias.has_value() ? part(first_bias, 0, rows)->contiguous() : at::Tensor();
  Projection p = check_projection(from, weights[0].narrow(0, 0, rows), flat);
  TORCH_CHECK_VALUE(p.channels == x.size(2), "the queries' weight must have C = ", x.size(2), " columns, got ",
                    p.channels);
  p.from = from.const_data_ptr(), p.to = queries.mutable_data_ptr();
  p.bias = bias.defined() ? bias.const_data_ptr() : nullptr;
  expand_rows(p, *to.active, x);
  to.q = queries.transpose(1, 2);
  return to;
}

// Attention and W_O; `active` are the active tokens of every head for sums over active pairs alone, null for a dense product.
at::Tensor attend_and_project(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& gates,
                              const OptionalTensor& mask, const at::Tensor& o_weight, const OptionalTensor& o_bias,
                              bool is_causal, std::optional<double> scale, const ActiveRows* active) {
  const int64_t B = q.size(0), H = q.size(1), N = q.size(2), D = v.size(3);
  TORCH_CHECK_VALUE(o_weight.dim() == 2 && o_weight.size(1) == H * D, "W_O must have as many columns as H * D = ",
                    H * D, ", got ", o_weight.sizes());
  check_bias("o_bias", o_bias, o_weight, q);
  const at::Tensor heads = at::empty({B, N, H, D}, q.options());
  attend_rows(q, k, v, gates, mask, is_causal, scale, heads, active == nullptr);
  if (active == nullptr) return at::linear(heads.flatten(2), o_weight, o_bias);
  const at::Tensor to = at::empty({B, N, o_weight.size(0)}, q.options());
  const at::Tensor from = heads.view({B * N, H, D});
  const at::Tensor bias = o_bias.has_value() ? o_bias->contiguous() : at::Tensor();
  Projection p = check_projection(from, o_weight.t(), gates.view({B * N, H}));
  p.from = from.const_data_ptr(), p.to = to.mutable_data_ptr();
  p.bias = bias.defined() ? bias.const_data_ptr() : nullptr;
  sum_head_rows(p, *active, q);
  return to;
}

at::Tensor layer(const at::Tensor& x, const at::Tensor& gates_, at::TensorList weights,
                 const c10::List<OptionalTensor>& biases, const at::Tensor& o_weight, const OptionalTensor& o_bias,
                 bool is_causal, std::optional<double> scale, bool sparse) {
  at::AutoDispatchBelowADInplaceOrView below;  // The operators called below need not look for gradients.
  const at::Tensor gates = gates_.contiguous();
  const Projected from = project_rows(x, gates, weights, biases, sparse);
  return attend_and_project(from.q, from.k, from.v, gates, std::nullopt, o_weight, o_bias, is_causal, scale,
                            sparse ? &*from.active : nullptr);
}

using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

Three project(const at::Tensor& x, const at::Tensor& gates_, at::TensorList weights,
              const c10::List<OptionalTensor>& biases, const OptionalTensor& cos, const OptionalTensor& sin,
              bool sparse) {
  at::AutoDispatchBelowADInplaceOrView below;
  TORCH_CHECK_VALUE(weights.size() == 3, "there must be three weights, of queries, keys and values");
  TORCH_CHECK_VALUE(cos.has_value() == sin.has_value(), "either both cos and sin must be given, or none");
  const at::Tensor gates = gates_.contiguous();
  const Projected to = project_rows(x, gates, weights, biases, sparse);
  if (!cos.has_value() || x.numel() == 0) return {to.q, to.k, to.v};
  const int64_t N = x.size(1), H = to.q.size(1), kv_heads = to.k.size(1), D = to.q.size(3);
  const Angles angles(*cos, *sin, x.size(0), N, D, x);
  with_type(dtype_of(x), [&](auto type) {
    using T = decltype(type);
    const T* gate = static_cast<const T*>(gates.const_data_ptr());
    T *queries = to.q.mutable_data_ptr<T>(), *keys = to.k.mutable_data_ptr<T>();  // both are [B, N, heads, D]
    at::parallel_for(0, x.size(0) * N, 1 + kRotatedPerTask / ((H + kv_heads) * D), [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) {
        const auto rotate = [&](T* head) { angles.rotate(token / N, token % N, head); };
        for (int64_t h = 0; h < H; ++h)
          if (static_cast<float>(gate[token * H + h]) != 0.0f) rotate(queries + (token * H + h) * D);
        for (int64_t h = 0; h < kv_heads; ++h) rotate(keys + (token * kv_heads + h) * D);
      }
    });
  });
  return {to.q, to.k, to.v};
}

at::Tensor attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& gates_,
                  const OptionalTensor& mask, const at::Tensor& o_weight, const OptionalTensor& o_bias, bool is_causal,
                  std::optional<double> scale, bool sparse) {
  at::AutoDispatchBelowADInplaceOrView below;
  TORCH_CHECK_VALUE(q.dim() == 4 && v.dim() == 4 && gates_.sizes() == at::IntArrayRef({q.size(0), q.size(2), q.size(1)}),
                    "q and v must have 4 dimensions and gates must be [B, N, H] to match q, got ", q.sizes(), ", ",
                    v.sizes(), " and ", gates_.sizes());
  const at::Tensor gates = gates_.contiguous();
  std::optional<ActiveRows> active;
  if (sparse) active.emplace(active_tokens(gates.view({q.size(0) * q.size(2), q.size(1)})));
  return attend_and_project(q, k, v, gates, mask, o_weight, o_bias, is_causal, scale, sparse ? &*active : nullptr);
}

}  // namespace
}  // namespace moh

TORCH_LIBRARY_FRAGMENT(moh, m) {
  m.def(
      "cpu_layer(Tensor x, Tensor gates, Tensor[] weights, Tensor?[] biases, Tensor o_weight, Tensor? o_bias, "
      "bool is_causal, float? scale, bool sparse) -> Tensor");
  m.def(
      "cpu_project(Tensor x, Tensor gates, Tensor[] weights, Tensor?[] biases, Tensor? cos, Tensor? sin, bool sparse) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "cpu_attend(Tensor q, Tensor k, Tensor v, Tensor gates, Tensor? attn_mask, Tensor o_weight, Tensor? o_bias, "
      "bool is_causal, float? scale, bool sparse) -> Tensor");
}

TORCH_LIBRARY_IMPL(moh, CPU, m) {
  m.impl("cpu_layer", moh::layer);
  m.impl("cpu_project", moh::project);
  m.impl("cpu_attend", moh::attend);
}

// They have no gradient, and the dispatcher spends no time on finding that out.
TORCH_LIBRARY_IMPL(moh, Autograd, m) {
  m.impl("cpu_layer", torch::CppFunction::makeFallthrough());
  m.impl("cpu_project", torch::CppFunction::makeFallthrough());
  m.impl("cpu_attend", torch::CppFunction::makeFallthrough());
}
