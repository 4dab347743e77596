// The table of kernels of one instruction set, each for every data type.
#pragma once

#include "kernels/aggregated.h"
#include "kernels/backward.h"
#include "kernels/decode.h"
#include "kernels/few_tokens.h"
#include "kernels/forward.h"
#include "kernels/projection.h"
#include "kernels/routing.h"

namespace moh {

template <class Isa>
Kernels kernels(const char* name) {
  Kernels k;
  k.name = name;
  k.lanes_per_block = VectorProduct<Isa>::kWidth;
  k.forward_scratch = [](const Problem& p, int64_t rows) {
    return with_type(p.dtype, [&](auto t) { return Forward<Isa, decltype(t)>::scratch(p, rows); });
  };
  k.forward = [](const Problem& p, const Rows& rows, float* scratch) {
    with_type(p.dtype, [&](auto t) { Forward<Isa, decltype(t)>::run(p, rows, scratch); });
  };
  k.backward_scratch = [](const Problem& p, int64_t rows) {
    return with_type(p.dtype, [&](auto t) { return Backward<Isa, decltype(t)>::scratch(p, rows); });
  };
  k.padded_width = [](int64_t width) { return VectorProduct<Isa>::padded(width); };
  k.backward = [](const Problem& p, const Rows& rows, float* grad_k, float* grad_v, float* scratch) {
    with_type(p.dtype, [&](auto t) { Backward<Isa, decltype(t)>::run(p, rows, grad_k, grad_v, scratch); });
  };
  k.decode_scratch = [](const Problem& p, int64_t rows) {
    return with_type(p.dtype, [&](auto t) { return Decode<Isa, decltype(t)>::scratch(p, rows); });
  };
  k.decode = [](const Problem& p, const Rows& rows, int64_t begin, int64_t end, const Partial& to, float* scratch) {
    with_type(p.dtype, [&](auto t) { Decode<Isa, decltype(t)>::run(p, rows, begin, end, to, scratch); });
  };
  k.projection_scratch = [](const Projection& p) { return Project<Isa, float>::scratch(p); };
  k.expand = [](const Projection& p, const Rows& tokens, float* scratch) {
    with_type(p.dtype, [&](auto t) { Project<Isa, decltype(t)>::expand(p, tokens, scratch); });
  };
  k.sum_heads = [](const Projection& p, const Rows* by_head, int64_t first_token, int64_t tokens,
                   int64_t first_channel, int64_t channels, float* scratch) {
    with_type(p.dtype, [&](auto t) {
      Project<Isa, decltype(t)>::sum_heads(p, by_head, first_token, tokens, first_channel, channels, scratch);
    });
  };
  k.outer = [](const Projection& p, const void* x, const Rows& tokens, int64_t first_channel, int64_t channels,
               float* scratch) {
    with_type(p.dtype, [&](auto t) {
      Project<Isa, decltype(t)>::outer(p, static_cast<const decltype(t)*>(x), tokens, first_channel, channels, scratch);
    });
  };
  k.aggregate_scratch = [](const Aggregate& p, const Rows* rows) {
    using A = AggregatedAttention<Isa>;
    return rows == nullptr ? A::scratch(p, p.tokens, true)
                           : A::scratch(p, A::end_near(p, *rows) - A::first_near(p, *rows), false);
  };
  k.aggregate = AggregatedAttention<Isa>::forward;
  k.aggregate_backward = AggregatedAttention<Isa>::backward;
  k.dot_bfloat16 = false;
  k.dot_rows = [](DType dtype, const void* matrix, int64_t stride, int64_t rows, const void* x,
                  const Segment* segments, int64_t count, float* to) {
    with_type(dtype, [&](auto t) {
      FewTokens<Isa, decltype(t)>::dot_rows(static_cast<const decltype(t)*>(matrix), stride, rows,
                                            static_cast<const float*>(x), segments, count, to);
    });
  };
  k.dot_integer_rows = [](const int8_t* matrix, int64_t stride, int64_t rows, const void* x, bool rounded,
                          const Segment* segments, int64_t count, float* to) {
    if (rounded)
      FewTokens<Isa, int8_t, c10::BFloat16>::dot_rows(matrix, stride, rows, static_cast<const c10::BFloat16*>(x),
                                                      segments, count, to);
    else
      FewTokens<Isa, int8_t>::dot_rows(matrix, stride, rows, static_cast<const float*>(x), segments, count, to);
  };
  k.activate = Activations<Isa>::run;
  k.score_outputs = RouterScores<Isa>::padded;
  k.score_tokens = RouterScores<Isa>::kTokens;
  k.pack_scores = [](DType dtype, const void* matrix, int64_t stride, int64_t rows, int64_t channels, int64_t first,
                     float* to) {
    with_type(dtype, [&](auto t) {
      RouterScores<Isa>::pack(static_cast<const decltype(t)*>(matrix), stride, rows, channels, first, to);
    });
  };
  k.scores = [](DType dtype, const void* x, int64_t tokens, int64_t channels, const float* panels, int64_t outputs,
                float* to, float* scratch) {
    with_type(dtype, [&](auto t) {
      RouterScores<Isa>::run(static_cast<const decltype(t)*>(x), tokens, channels, panels, outputs, to, scratch);
    });
  };
  return k;
}

}  // namespace moh
