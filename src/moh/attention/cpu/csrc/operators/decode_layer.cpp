// The operator `moh::cpu_decode_layer`: a whole attention layer on the one new token of each sequence.
//
// Projections, router, rotary embedding, key/value cache and attention are one call: for one token, calling a dozen
// operators takes as long as the arithmetic. Matrices are read once, without the rows and columns of heads that no
// token uses. There are no gradients, and no result depends on the number of threads.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "operators/choice.h"
#include "operators/few_tokens_product.h"
#include "operators/operators.h"
#include "operators/rotary.h"

namespace moh {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// Gates [T, H] of the linear router, by scores x W' + b: 1 for the shared heads and for those that are chosen, 0 for the rest.
template <class T>
void hard_gates(const FewTokensProduct& router, const FewTokensInput& x, int64_t tokens, const Choice& choice, T* gates) {
  const int64_t heads = router.rows;
  std::vector<T> scores(tokens * heads);
  if (choice.needs_scores()) router.multiply<T>(x, tokens, scores.data());
  std::vector<float> routed(choice.num_routed());
  Chooser choose(choice);
  for (int64_t t = 0; t < tokens; ++t, gates += heads) {
    for (int64_t i = 0; i < choice.num_routed(); ++i)
      routed[i] = static_cast<float>(scores[t * heads + choice.routed[i]]);
    const char* active = choose(routed.data());
    for (const int64_t h : choice.shared) gates[h] = static_cast<T>(1.0f);
    for (int64_t i = 0; i < choice.num_routed(); ++i)
      gates[choice.routed[i]] = static_cast<T>(active[i] ? 1.0f : 0.0f);
  }
}

at::Tensor decode_layer(const at::Tensor& x, const OptionalTensor& gates_, const OptionalTensor& router_weight,
                        const OptionalTensor& router_bias, at::IntArrayRef shared, int64_t active,
                        const at::Tensor& q_weight, const OptionalTensor& q_bias, const at::Tensor& k_weight,
                        const OptionalTensor& k_bias, const at::Tensor& v_weight, const OptionalTensor& v_bias,
                        const at::Tensor& o_weight, const OptionalTensor& o_bias, const at::Tensor& cos,
                        const at::Tensor& sin, const at::Tensor& keys, const at::Tensor& values, int64_t length,
                        const OptionalTensor& mask, double scale, int64_t parts, int64_t together,
                        std::optional<double> threshold, const OptionalTensor& q_scale, const OptionalTensor& k_scale,
                        const OptionalTensor& v_scale, const OptionalTensor& o_scale) {
  at::AutoDispatchBelowADInplaceOrView below;  // The operators called below need not look for gradients.
  TORCH_CHECK_VALUE(x.dim() == 3 && x.size(1) == 1, "x must be [B, 1, C], got ", x.sizes());
  TORCH_CHECK_VALUE(keys.dim() == 4 && values.sizes() == keys.sizes() && keys.size(0) == x.size(0) &&
                        keys.scalar_type() == x.scalar_type() && values.scalar_type() == x.scalar_type() &&
                        keys.stride(3) == 1 && values.stride(3) == 1,
                    "keys and values must be [B, Hkv, capacity, D] of x's dtype, got ", keys.sizes(), " and ",
                    values.sizes());
  TORCH_CHECK_VALUE(length >= 0 && length < keys.size(2), "length must be below the caches' ", keys.size(2), ", got ",
                    length);
  const int64_t B = x.size(0), kv_heads = keys.size(1), D = keys.size(3);
  const FewTokensProduct q_proj("q", q_weight, q_bias, x, q_scale), k_proj("k", k_weight, k_bias, x, k_scale);
  const FewTokensProduct v_proj("v", v_weight, v_bias, x, v_scale), o_proj("o", o_weight, o_bias, x, o_scale);
  TORCH_CHECK_VALUE(D > 0 && q_proj.rows % D == 0 && k_proj.rows == kv_heads * D && v_proj.rows == kv_heads * D &&
                        o_proj.columns == q_proj.rows && q_proj.columns == x.size(2) &&
                        k_proj.columns == x.size(2) && v_proj.columns == x.size(2),
                    "q, k, v and o weights must match x and the cache, got ", q_weight.sizes(), ", ", k_weight.sizes(),
                    ", ", v_weight.sizes(), " and ", o_weight.sizes());
  const int64_t H = q_proj.rows / D;
  TORCH_CHECK_VALUE(gates_.has_value() != router_weight.has_value(), "either gates or a router must be given");
  const Angles angles(cos, sin, B, 1, D, x);
  const FewTokensInput from(x);
  const at::Tensor q = at::empty({B, H, 1, D}, x.options());
  at::Tensor gates = gates_.has_value() ? gates_->contiguous() : at::empty({B, 1, H}, x.options());
  TORCH_CHECK_VALUE(gates.sizes() == at::IntArrayRef({B, 1, H}) && gates.scalar_type() == x.scalar_type(),
                    "gates must be [B, 1, H = ", H, "] of x's dtype, got ", gates.sizes());
  std::vector<char> flags(B * H);

  with_type(q_proj.dtype, [&](auto type) {
    using T = decltype(type);
    if (router_weight.has_value()) {
      const FewTokensProduct router("router", *router_weight, router_bias, x);
      TORCH_CHECK_VALUE(router.rows == H && router.columns == x.size(2), "router's weight must be [H, C], got ",
                        router_weight->sizes());
      const Choice choice(H, shared, active, parts, together, threshold);
      hard_gates<T>(router, from, B, choice, gates.mutable_data_ptr<T>());
    }
    const T* gate = static_cast<const T*>(gates.const_data_ptr());
    for (int64_t i = 0; i < B * H; ++i) flags[i] = static_cast<float>(gate[i]) != 0.0f;

    T* queries = q.mutable_data_ptr<T>();
    std::vector<T> new_keys(B * kv_heads * D), new_values(B * kv_heads * D);
    const int64_t q_blocks = q_proj.blocks(H), kv_blocks = k_proj.blocks(1);
    for_each_block(q_blocks + 2 * kv_blocks, q_proj.bytes() + 2 * k_proj.bytes(), [&](int64_t i) {
      if (i < q_blocks)
        q_proj.multiply_block(i, from, B, queries, flags.data(), H);
      else if (i < q_blocks + kv_blocks)
        k_proj.multiply_block(i - q_blocks, from, B, new_keys.data());
      else
        v_proj.multiply_block(i - q_blocks - kv_blocks, from, B, new_values.data());
    });
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t h = 0; h < H; ++h) angles.rotate(b, 0, queries + (b * H + h) * D);
      for (int64_t h = 0; h < kv_heads; ++h) {
        const auto place = [&](const at::Tensor& cache) {
          return cache.mutable_data_ptr<T>() + b * cache.stride(0) + h * cache.stride(1) + length * cache.stride(2);
        };
        const int64_t from_row = (b * kv_heads + h) * D;
        angles.rotate(b, 0, new_keys.data() + from_row);
        std::copy_n(new_keys.data() + from_row, D, place(keys));
        std::copy_n(new_values.data() + from_row, D, place(values));
      }
    }
  });
  for (const at::Tensor* cache : {&keys, &values})
    if (!cache->is_inference()) cache->unsafeGetTensorImpl()->bump_version();

  const at::Tensor heads = std::get<0>(attention(q, keys.narrow(2, 0, length + 1), values.narrow(2, 0, length + 1),
                                                 gates, mask, false, std::nullopt, scale, false));  // [B, 1, H, D]
  const at::Tensor out = at::empty({B, 1, o_proj.rows}, x.options());
  const FewTokensInput weighted(heads);
  with_type(o_proj.dtype, [&](auto type) {
    using T = decltype(type);
    o_proj.multiply_columns<T>(weighted, B, out.mutable_data_ptr<T>(), flags.data(), H);
  });
  return out;
}

}  // namespace
}  // namespace moh

TORCH_LIBRARY_FRAGMENT(moh, m) {
  m.def(
      "cpu_decode_layer(Tensor x, Tensor? gates, Tensor? router_weight, Tensor? router_bias, int[] shared, int active, "
      "Tensor q_weight, Tensor? q_bias, Tensor k_weight, Tensor? k_bias, Tensor v_weight, Tensor? v_bias, "
      "Tensor o_weight, Tensor? o_bias, Tensor cos, Tensor sin, Tensor(a!) keys, Tensor(b!) values, int length, "
      "Tensor? attn_mask, float scale, int parts=1, int together=1, float? threshold=None, "
      "Tensor? q_scale=None, Tensor? k_scale=None, Tensor? v_scale=None, Tensor? o_scale=None) -> Tensor");
}

TORCH_LIBRARY_IMPL(moh, CPU, m) { m.impl("cpu_decode_layer", moh::decode_layer); }

// It has no gradient, and the dispatcher spends no time on finding that out.
TORCH_LIBRARY_IMPL(moh, Autograd, m) { m.impl("cpu_decode_layer", torch::CppFunction::makeFallthrough()); }
