// What a decoder's layer and its head do to the one new token of each sequence besides attention: `moh::cpu_decode_norm`,
// `moh::cpu_decode_mlp` (residuals, norms and the MLP of a layer) and `moh::cpu_decode_linear`.
//
// Every matrix is read once, by all threads. There are no gradients, and no result depends on the number of threads.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <array>
#include <cmath>
#include <string>
#include <string_view>
#include <vector>

#include "operators/few_tokens_product.h"
#include "operators/operators.h"

namespace moh {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

int64_t width_of(const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() == 3 && x.size(1) == 1, "x must be [B, 1, C], got ", x.sizes());
  return x.size(2);
}

// The numbers of a contiguous tensor as float32.
std::vector<float> floats(const at::Tensor& x) {
  std::vector<float> to(x.numel());
  with_type(dtype_of(x), [&](auto t) {
    const auto* from = static_cast<const decltype(t)*>(x.const_data_ptr());
    std::copy_n(from, x.numel(), to.begin());
  });
  return to;
}

// An RMS norm, or a layer norm where it is `centred`: x / sqrt(mean(x^2) + eps) * (offset + weight) + bias.
class Norm {
 public:
  Norm(const at::Tensor& weight, const OptionalTensor& bias, double eps, double offset, bool centred,
       const at::Tensor& x)
      : weight_(numbers("weight", weight, x)), eps_(static_cast<float>(eps)), centred_(centred) {
    for (float& w : weight_) w += static_cast<float>(offset);
    if (bias.has_value()) bias_ = numbers("bias", *bias, x);
  }

  void apply(float* x) const {
    const int64_t C = static_cast<int64_t>(weight_.size());
    if (centred_) {
      const float mean = sum(C, [&](int64_t i) { return x[i]; }) / static_cast<float>(C);
      for (int64_t i = 0; i < C; ++i) x[i] -= mean;
    }
    const float squares = sum(C, [&](int64_t i) { return x[i] * x[i]; }) / static_cast<float>(C);
    const float factor = 1.0f / std::sqrt(squares + eps_);
    for (int64_t i = 0; i < C; ++i) x[i] = x[i] * factor * weight_[i] + (bias_.empty() ? 0.0f : bias_[i]);
  }

 private:
  static std::vector<float> numbers(const char* name, const at::Tensor& of, const at::Tensor& x) {
    TORCH_CHECK_VALUE(of.sizes() == at::IntArrayRef({x.size(2)}) && of.scalar_type() == x.scalar_type(), "the norm's ",
                      name, " must be [C = ", x.size(2), "] of x's dtype, got ", of.sizes());
    return floats(of.contiguous());
  }
  // Several sums, since one number after the other would wait for the addition before.
  template <class Term>
  static float sum(int64_t count, const Term& term) {
    constexpr int64_t kSums = 16;
    std::array<float, kSums> sums{};
    int64_t i = 0;
    for (; i + kSums <= count; i += kSums)
      for (int64_t j = 0; j < kSums; ++j) sums[j] += term(i + j);
    for (; i < count; ++i) sums[i % kSums] += term(i);
    float total = 0.0f;
    for (const float s : sums) total += s;
    return total;
  }

  std::vector<float> weight_, bias_;
  float eps_;
  bool centred_;
};

Activation activation_of(std::string_view name) {
  TORCH_CHECK_VALUE(name == "silu" || name == "gelu_tanh" || name == "gelu",
                    "activation must be 'silu', 'gelu_tanh' or 'gelu', got '", std::string(name), "'");
  return name == "silu" ? Activation::kSilu : name == "gelu" ? Activation::kExactGelu : Activation::kGelu;
}

at::Tensor decode_norm(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, double eps,
                       double offset, bool centred) {
  at::AutoDispatchBelowADInplaceOrView below;
  const int64_t C = width_of(x);
  const Norm norm(weight, bias, eps, offset, centred, x);
  std::vector<float> numbers = floats(x.contiguous());
  const at::Tensor out = at::empty(x.sizes(), x.options());
  for (int64_t t = 0; t < x.size(0); ++t) norm.apply(numbers.data() + t * C);
  with_type(dtype_of(x), [&](auto t) {
    std::copy(numbers.begin(), numbers.end(), out.mutable_data_ptr<decltype(t)>());
  });
  return out;
}

// y = x + scale added, then y + scale MLP(norm(y)). With `normalised`, the MLP reads this instead, beside the attention;
// without `norm_weight` as well, y itself. `added_norm` and `result_norm` are weights of norms of `added` and of the MLP's
// result, of the same epsilon and offset.
at::Tensor decode_mlp(const at::Tensor& x, const at::Tensor& added, double scale, const OptionalTensor& norm_weight,
                      const OptionalTensor& norm_bias, double eps, double offset, bool centred,
                      const OptionalTensor& gate_weight, const OptionalTensor& gate_bias, const at::Tensor& up_weight,
                      const OptionalTensor& up_bias, const at::Tensor& down_weight, const OptionalTensor& down_bias,
                      std::string_view activation, const OptionalTensor& gate_scale, const OptionalTensor& up_scale,
                      const OptionalTensor& down_scale, const OptionalTensor& normalised,
                      const OptionalTensor& added_norm, const OptionalTensor& result_norm) {
  at::AutoDispatchBelowADInplaceOrView below;
  const int64_t B = x.size(0), C = width_of(x);
  TORCH_CHECK_VALUE(added.sizes() == x.sizes() && added.scalar_type() == x.scalar_type(),
                    "added must have x's shape and dtype, got ", added.sizes());
  if (normalised.has_value()) {
    TORCH_CHECK_VALUE(!norm_weight.has_value(), "normalised must be None where a norm_weight is given");
    TORCH_CHECK_VALUE(normalised->sizes() == x.sizes() && normalised->scalar_type() == x.scalar_type(),
                      "normalised must have x's shape ", x.sizes(), " and dtype ", x.scalar_type(), ", got ",
                      normalised->sizes(), " and ", normalised->scalar_type());
  }
  const auto norm_of = [&](const OptionalTensor& weight, const OptionalTensor& bias) {
    return weight.has_value() ? std::make_optional<Norm>(*weight, bias, eps, offset, centred, x) : std::nullopt;
  };
  const std::optional<Norm> norm = norm_of(norm_weight, norm_bias);
  const std::optional<Norm> norm_of_added = norm_of(added_norm, std::nullopt);
  const std::optional<Norm> norm_of_result = norm_of(result_norm, std::nullopt);
  const Activation kind = activation_of(activation);
  const FewTokensProduct up("up", up_weight, up_bias, x, up_scale), down("down", down_weight, down_bias, x, down_scale);
  std::optional<FewTokensProduct> gate;
  if (gate_weight.has_value()) gate.emplace("gate", *gate_weight, gate_bias, x, gate_scale);
  const int64_t I = up.rows;
  TORCH_CHECK_VALUE(up.columns == C && down.columns == I && down.rows == C &&
                        (!gate || (gate->rows == I && gate->columns == C)),
                    "gate and up weights must be [I, C = ", C, "] and the down weight [C, I], got ",
                    gate ? gate->matrix.sizes() : up.matrix.sizes(), ", ", up.matrix.sizes(), " and ",
                    down.matrix.sizes());
  const at::Tensor out = at::empty(x.sizes(), x.options());
  const float factor = static_cast<float>(scale);

  with_type(up.dtype, [&](auto type) {
    using T = decltype(type);
    // The sum is rounded as it is in PyTorch: it is what the next layer adds to.
    std::vector<float> residual = floats(x.contiguous());
    std::vector<float> more = floats(added.contiguous());
    for (int64_t t = 0; norm_of_added && t < B; ++t) norm_of_added->apply(more.data() + t * C);
    for (int64_t i = 0; i < B * C; ++i)
      residual[i] = static_cast<float>(static_cast<T>(residual[i] + factor * more[i]));
    FewTokensInput input(up.dtype, B * C);
    std::vector<float> from = normalised.has_value() ? floats(normalised->contiguous()) : residual;
    for (int64_t t = 0; norm && t < B; ++t) norm->apply(from.data() + t * C);
    input.put(0, from.data(), B * C);

    constexpr int64_t kRows = 16;  // A vector of AVX-512 for the activation.
    FewTokensInput hidden(up.dtype, B * I);
    for_each_block((I + kRows - 1) / kRows, up.bytes() + (gate ? gate->bytes() : 0), [&](int64_t i) {
      const int64_t first = i * kRows, count = std::min(kRows, I - first);
      float gates[kRows], ups[kRows];
      for (int64_t t = 0; t < B; ++t) {
        up.sums(first, count, input, t, up.whole, ups);
        if (gate) gate->sums(first, count, input, t, gate->whole, gates);
        input.kernels.activate(kind, gate ? gates : ups, gate ? ups : nullptr, count, ups);
        hidden.put(t * I + first, ups, count);
      }
    });

    std::vector<float>& result = from;  // The input was copied.
    for_each_block((C + kRows - 1) / kRows, down.bytes(), [&](int64_t i) {
      const int64_t first = i * kRows, count = std::min(kRows, C - first);
      for (int64_t t = 0; t < B; ++t) down.sums(first, count, hidden, t, down.whole, result.data() + t * C + first);
    });
    for (int64_t t = 0; norm_of_result && t < B; ++t) norm_of_result->apply(result.data() + t * C);
    T* to = out.mutable_data_ptr<T>();
    for (int64_t i = 0; i < B * C; ++i) to[i] = static_cast<T>(residual[i] + factor * result[i]);
  });
  return out;
}

at::Tensor decode_linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                         const OptionalTensor& scale) {
  at::AutoDispatchBelowADInplaceOrView below;
  const int64_t C = width_of(x);
  const FewTokensProduct product("the output layer", weight, bias, x, scale);
  TORCH_CHECK_VALUE(product.columns == C, "weight must be [rows, C = ", C, "], got ", weight.sizes());
  const at::Tensor out = at::empty({x.size(0), 1, product.rows}, x.options());
  const FewTokensInput from(x);
  with_type(product.dtype, [&](auto type) {
    product.multiply(from, x.size(0), out.mutable_data_ptr<decltype(type)>());
  });
  return out;
}

}  // namespace
}  // namespace moh

TORCH_LIBRARY_FRAGMENT(moh, m) {
  m.def("cpu_decode_norm(Tensor x, Tensor weight, Tensor? bias, float eps, float offset, bool centred) -> Tensor");
  m.def(
      "cpu_decode_mlp(Tensor x, Tensor added, float scale, Tensor? norm_weight, Tensor? norm_bias, float eps, "
      "float offset, bool centred, Tensor? gate_weight, Tensor? gate_bias, Tensor up_weight, Tensor? up_bias, "
      "Tensor down_weight, Tensor? down_bias, str activation, "
      "Tensor? gate_scale=None, Tensor? up_scale=None, Tensor? down_scale=None, "
      "Tensor? normalised=None, Tensor? added_norm=None, Tensor? result_norm=None) -> Tensor");
  m.def("cpu_decode_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? scale=None) -> Tensor");
}

TORCH_LIBRARY_IMPL(moh, CPU, m) {
  m.impl("cpu_decode_norm", moh::decode_norm);
  m.impl("cpu_decode_mlp", moh::decode_mlp);
  m.impl("cpu_decode_linear", moh::decode_linear);
}

// They have no gradients, and the dispatcher spends no time on finding that out.
TORCH_LIBRARY_IMPL(moh, Autograd, m) {
  m.impl("cpu_decode_norm", torch::CppFunction::makeFallthrough());
  m.impl("cpu_decode_mlp", torch::CppFunction::makeFallthrough());
  m.impl("cpu_decode_linear", torch::CppFunction::makeFallthrough());
}
