// The operator `moh::cpu_route`: a router's scores, its choice and the gates in one call, without gradients.
//
// The classes in moh/routing/routers.py are the definition; this has their formulas in their order, in float32 from scores
// that are rounded to the dtype of x. Of equal scores the first head wins. No result depends on the number of threads.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "operators/choice.h"
#include "operators/operators.h"

namespace moh {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// A thread is woken for this many multiplications, some 10 microseconds.
constexpr int64_t kMultiplicationsPerTask = int64_t{1} << 20;

// A router's rule, by which one token's scores become its gates.
struct Rule {
  Choice choice;
  bool hard;  // Gates are 1 and 0, and the routed scores are those of all heads.
  bool has_shared, has_routed, has_stage;  // which scores there are, in this order
  float smallest;                          // The sum of the active probabilities is at least this.
};

void softmax(const float* x, int64_t count, float* to) {
  float most = -INFINITY, total = 0.0f;
  for (int64_t i = 0; i < count; ++i) most = x[i] > most || std::isnan(x[i]) ? x[i] : most;
  for (int64_t i = 0; i < count; ++i) total += to[i] = std::exp(x[i] - most);
  for (int64_t i = 0; i < count; ++i) to[i] /= total;
}

// Memory for one token's work.
struct Work {
  std::vector<float> routed, probs, shared;
  Chooser choose;

  explicit Work(const Choice& choice)
      : routed(choice.num_routed()), probs(choice.num_routed()), shared(choice.num_shared()), choose(choice) {}
};

// One token's gates [H] and probabilities [h_r] by its scores.
template <class T>
void route(const Rule& rule, const float* scores, Work& work, T* gates, float* probs) {
  const Choice& choice = rule.choice;
  const int64_t shared = choice.num_shared(), routed = choice.num_routed();
  if (rule.hard) {
    for (int64_t i = 0; i < routed; ++i) work.routed[i] = scores[choice.routed[i]];
    if (probs != nullptr) softmax(work.routed.data(), routed, probs);
    const char* active = work.choose(work.routed.data());
    for (const int64_t h : choice.shared) gates[h] = static_cast<T>(1.0f);
    for (int64_t i = 0; i < routed; ++i) gates[choice.routed[i]] = static_cast<T>(active[i] ? 1.0f : 0.0f);
    return;
  }
  const float* stage_scores = scores + (rule.has_shared ? shared : 0) + (rule.has_routed ? routed : 0);
  float stage[2] = {0.5f, 0.5f};
  if (rule.has_stage) softmax(stage_scores, 2, stage);
  if (rule.has_shared)
    softmax(scores, shared, work.shared.data());
  else
    std::fill(work.shared.begin(), work.shared.end(), 1.0f);
  for (int64_t i = 0; i < shared; ++i)
    gates[choice.shared[i]] = static_cast<T>(stage[0] * 2.0f * work.shared[i] * static_cast<float>(shared));
  if (!rule.has_routed) {
    for (const int64_t h : choice.routed) gates[h] = static_cast<T>(0.0f);
    return;
  }
  softmax(scores + (rule.has_shared ? shared : 0), routed, work.probs.data());
  const char* active = work.choose(work.probs.data());
  float total = 0.0f;
  for (int64_t i = 0; i < routed; ++i) total += active[i] ? work.probs[i] : 0.0f;
  total = total < rule.smallest ? rule.smallest : total;
  for (int64_t i = 0; i < routed; ++i) {
    // Also an inactive head is divided: by a sum of NaN its gate is NaN, as in the definition.
    const float weight = static_cast<float>(choice.active) * (active[i] ? work.probs[i] : 0.0f) / total;
    gates[choice.routed[i]] = static_cast<T>(stage[1] * 2.0f * weight);
    probs[i] = work.probs[i];
  }
}

void check_weight(const char* name, const OptionalTensor& weight, int64_t rows, const at::Tensor& x) {
  if (!weight.has_value()) return;
  TORCH_CHECK_VALUE(weight->dim() == 2 && weight->size(0) == rows && weight->size(1) == x.size(-1) &&
                        weight->scalar_type() == x.scalar_type(),
                    name, " must be [", rows, ", C = ", x.size(-1), "] of x's dtype, got ", weight->sizes(), " of ",
                    weight->scalar_type());
}

std::tuple<at::Tensor, at::Tensor> route_all(const at::Tensor& x_, const OptionalTensor& shared_weight,
                                             const OptionalTensor& routed_weight, const OptionalTensor& stage_weight,
                                             const OptionalTensor& bias, at::IntArrayRef shared, int64_t heads,
                                             bool hard, int64_t active, int64_t parts, int64_t together,
                                             std::optional<double> threshold) {
  at::AutoDispatchBelowADInplaceOrView below;
  TORCH_CHECK_VALUE(x_.dim() == 3, "x must be [B, N, C], got ", x_.sizes());
  const at::Tensor x = x_.contiguous();
  Rule rule{Choice(heads, shared, active, parts, together, threshold), hard};
  const int64_t all = rule.choice.num_routed();
  TORCH_CHECK_VALUE(!hard || (routed_weight.has_value() && !shared_weight.has_value() && !stage_weight.has_value()),
                    "a hard router has one matrix");
  check_weight("shared_weight", shared_weight, rule.choice.num_shared(), x);
  check_weight("routed_weight", routed_weight, hard ? heads : all, x);
  check_weight("stage_weight", stage_weight, 2, x);
  rule.has_shared = shared_weight.has_value(), rule.has_routed = routed_weight.has_value();
  rule.has_stage = stage_weight.has_value();
  rule.smallest = x.scalar_type() == at::kHalf       ? 0x1p-10f
                  : x.scalar_type() == at::kBFloat16 ? 0x1p-7f
                                                     : std::numeric_limits<float>::epsilon();

  const Kernels& kernel = kernels();
  const DType dtype = dtype_of(x);
  const int64_t B = x.size(0), N = x.size(1), C = x.size(2), tokens = B * N;
  std::vector<at::Tensor> matrices;
  int64_t outputs = 0;
  for (const OptionalTensor* weight : {&shared_weight, &routed_weight, &stage_weight})
    if (weight->has_value()) {
      matrices.push_back((*weight)->stride(1) == 1 ? **weight : (*weight)->contiguous());
      outputs += (*weight)->size(0);
    }
  const at::Tensor offsets = bias.has_value() ? bias->to(at::kFloat).contiguous() : at::Tensor();
  TORCH_CHECK_VALUE(!bias.has_value() || offsets.sizes() == at::IntArrayRef({outputs}), "bias must be [", outputs,
                    "], got ", offsets.sizes());
  const at::Tensor gates = at::empty({B, N, heads}, x.options());
  // A layer that routes nothing has no probabilities; a soft one then has no matrix for them.
  const bool has_probs = rule.has_routed && (!hard || active > 0);
  const at::Tensor probs = at::empty({has_probs ? B : 0, N, all}, x.options().dtype(at::kFloat));
  if (tokens == 0) return {gates, probs};

  const int64_t wide = kernel.score_outputs(outputs), block = kernel.score_tokens;
  const at::Tensor panels = at::zeros({wide, C}, x.options().dtype(at::kFloat));
  int64_t first = 0;
  for (const at::Tensor& m : matrices) {
    kernel.pack_scores(dtype, m.const_data_ptr(), m.stride(0), m.size(0), C, first, panels.mutable_data_ptr<float>());
    first += m.size(0);
  }
  const int64_t per_token = wide + (dtype == DType::kFloat ? 0 : C);
  const int64_t blocks = (tokens + block - 1) / block;
  const int64_t per_task = std::max<int64_t>(1, kMultiplicationsPerTask / (block * C * wide + 1));
  const int64_t tasks = (blocks + per_task - 1) / per_task;
  const Scratch scratch(threads_for(tasks), block * per_token, x);
  const float* bias_data = bias.has_value() ? offsets.const_data_ptr<float>() : nullptr;
  const char* from = static_cast<const char*>(x.const_data_ptr());
  for_each_task(tasks, [&](int64_t task, int64_t thread) {
    Work work(rule.choice);
    float* scores = scratch.of(thread);
    for (int64_t i = task * per_task; i < std::min(blocks, (task + 1) * per_task); ++i) {
      const int64_t start = i * block, count = std::min(block, tokens - start);
      kernel.scores(dtype, from + start * C * static_cast<int64_t>(x.element_size()), count, C,
                    panels.const_data_ptr<float>(), outputs, scores, scores + block * wide);
      with_type(dtype, [&](auto t) {
        using T = decltype(t);
        for (int64_t n = 0; n < count; ++n) {
          float* of_token = scores + n * wide;
          for (int64_t o = 0; o < outputs; ++o)
            of_token[o] = static_cast<float>(static_cast<T>(of_token[o] + (bias_data == nullptr ? 0.0f : bias_data[o])));
          const int64_t token = start + n;
          route(rule, of_token, work, gates.mutable_data_ptr<T>() + token * heads,
                has_probs ? probs.mutable_data_ptr<float>() + token * all : nullptr);
        }
      });
    }
  });
  return {gates, probs};
}

}  // namespace
}  // namespace moh

TORCH_LIBRARY_FRAGMENT(moh, m) {
  m.def(
      "cpu_route(Tensor x, Tensor? shared_weight, Tensor? routed_weight, Tensor? stage_weight, Tensor? bias, "
      "int[] shared, int heads, bool hard, int active, int parts, int together, float? threshold) -> "
      "(Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(moh, CPU, m) { m.impl("cpu_route", moh::route_all); }

// It has no gradient, and the dispatcher spends no time on finding that out.
TORCH_LIBRARY_IMPL(moh, Autograd, m) { m.impl("cpu_route", torch::CppFunction::makeFallthrough()); }
