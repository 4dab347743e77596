// The operator `moh::cpu_layer`: projections and attention of a layer whose gates are known, in one call.
//
// Without gradients nothing between the projections has to be a tensor that others can read: entries of inactive pairs are
// never written, biases are where the sums start, and the active tokens of every head are listed once for both
// projections. No result depends on the number of threads.
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include "operators/operators.h"

namespace moh {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

void check_bias(const char* name, const OptionalTensor& bias, const at::Tensor& weight, const at::Tensor& x) {
  TORCH_CHECK_VALUE(!bias.has_value() || (bias->sizes() == at::IntArrayRef({weight.size(0)}) &&
                                          bias->scalar_type() == x.scalar_type()),
                    name, " must be [", weight.size(0), "] of x's dtype ", x.scalar_type(), ", got ", bias->sizes(),
                    " of ", bias->scalar_type());
}

at::Tensor layer(const at::Tensor& x, const at::Tensor& gates_, at::TensorList weights,
                 const c10::List<OptionalTensor>& biases, const at::Tensor& o_weight, const OptionalTensor& o_bias,
                 bool is_causal, std::optional<double> scale, bool sparse) {
  at::AutoDispatchBelowADInplaceOrView below;  // The operators called below need not look for gradients.
  TORCH_CHECK_VALUE(x.dim() == 3 && gates_.dim() == 3 && gates_.size(0) == x.size(0) && gates_.size(1) == x.size(1) &&
                        gates_.scalar_type() == x.scalar_type(),
                    "x must be [B, N, C] and gates [B, N, H] of its dtype, got ", x.sizes(), " and ", gates_.sizes());
  TORCH_CHECK_VALUE((weights.size() == 1 || weights.size() == 3) && biases.size() == weights.size(),
                    "there must be one weight and bias, of queries, keys and values, or three of each");
  const int64_t B = x.size(0), N = x.size(1), H = gates_.size(2);
  const bool fused = weights.size() == 1;
  const int64_t rows = fused ? weights[0].size(0) / 3 : weights[0].size(0);  // H * D
  TORCH_CHECK_VALUE(H > 0 && rows % H == 0 && rows > 0 && o_weight.dim() == 2 && o_weight.size(1) == rows &&
                        (!fused || weights[0].size(0) == 3 * rows),
                    "the queries' weight must have H * D rows, and W_O as many columns, got ", weights[0].sizes(),
                    " and ", o_weight.sizes());
  const int64_t D = rows / H;
  for (size_t i = 0; i < weights.size(); ++i) check_bias("a projection's bias", biases.get(i), weights[i], x);
  check_bias("o_bias", o_bias, o_weight, x);
  const auto part = [](const OptionalTensor& bias, int64_t first, int64_t count) {
    return bias.has_value() ? OptionalTensor(bias->narrow(0, first, count)) : OptionalTensor();
  };
  const auto by_heads = [&](const at::Tensor& projected) {  // [B, N, heads * D] -> [B, heads, N, D]
    return projected.unflatten(-1, {projected.size(-1) / D, D}).transpose(1, 2);
  };
  const OptionalTensor first_bias = biases.get(0);
  const at::Tensor gates = gates_.contiguous();
  at::Tensor q, k, v;
  if (fused && !sparse) {
    const at::Tensor qkv = at::linear(x, weights[0], first_bias).view({B, N, 3, H, D});
    q = qkv.select(2, 0).transpose(1, 2), k = qkv.select(2, 1).transpose(1, 2), v = qkv.select(2, 2).transpose(1, 2);
  } else if (fused) {
    const at::Tensor kv =
        at::linear(x, weights[0].narrow(0, rows, 2 * rows), part(first_bias, rows, 2 * rows)).view({B, N, 2, H, D});
    k = kv.select(2, 0).transpose(1, 2), v = kv.select(2, 1).transpose(1, 2);
  } else {
    k = by_heads(at::linear(x, weights[1], biases.get(1))), v = by_heads(at::linear(x, weights[2], biases.get(2)));
    if (!sparse) q = by_heads(at::linear(x, weights[0], first_bias));
  }
  std::optional<ActiveRows> active;
  if (sparse) {
    const at::Tensor flat = gates.view({B * N, H}), from = x.contiguous().view({B * N, x.size(2)});
    active.emplace(active_tokens(flat));
    const at::Tensor queries = at::empty({B, N, H, D}, x.options());
    const at::Tensor bias = first_bias.has_value() ? part(first_bias, 0, rows)->contiguous() : at::Tensor();
    Projection p = check_projection(from, weights[0].narrow(0, 0, rows), flat);
    TORCH_CHECK_VALUE(p.channels == x.size(2), "the queries' weight must have C = ", x.size(2), " columns, got ",
                      p.channels);
    p.from = from.const_data_ptr(), p.to = queries.mutable_data_ptr();
    p.bias = bias.defined() ? bias.const_data_ptr() : nullptr;
    expand_rows(p, *active, x);
    q = queries.transpose(1, 2);
  }
  const at::Tensor heads = at::empty({B, N, H, v.size(3)}, x.options());
  attend_rows(q, k, v, gates, std::nullopt, is_causal, scale, heads, !sparse);
  if (!sparse) return at::linear(heads.flatten(2), o_weight, o_bias);
  q = k = v = at::Tensor();
  const at::Tensor to = at::empty({B, N, o_weight.size(0)}, x.options());
  const at::Tensor from = heads.view({B * N, H, D});
  const at::Tensor bias = o_bias.has_value() ? o_bias->contiguous() : at::Tensor();
  Projection p = check_projection(from, o_weight.t(), gates.view({B * N, H}));
  p.from = from.const_data_ptr(), p.to = to.mutable_data_ptr();
  p.bias = bias.defined() ? bias.const_data_ptr() : nullptr;
  sum_head_rows(p, *active, x);
  return to;
}

}  // namespace
}  // namespace moh

TORCH_LIBRARY_FRAGMENT(moh, m) {
  m.def(
      "cpu_layer(Tensor x, Tensor gates, Tensor[] weights, Tensor?[] biases, Tensor o_weight, Tensor? o_bias, "
      "bool is_causal, float? scale, bool sparse) -> Tensor");
}

TORCH_LIBRARY_IMPL(moh, CPU, m) { m.impl("cpu_layer", moh::layer); }

// It has no gradient, and the dispatcher spends no time on finding that out.
TORCH_LIBRARY_IMPL(moh, Autograd, m) { m.impl("cpu_layer", torch::CppFunction::makeFallthrough()); }
