// The table of kernels of one instruction set: the three passes for each data type.
#pragma once

#include "backward.h"
#include "decode.h"
#include "forward.h"

namespace moh {

template <class Function>
auto with_type(DType dtype, Function function) {
  switch (dtype) {
    case DType::kBFloat16: return function(c10::BFloat16());
    case DType::kHalf: return function(c10::Half());
    default: return function(0.0f);
  }
}

template <class Isa>
Kernels kernels(const char* name) {
  Kernels k;
  k.name = name;
  k.lanes_per_block = Tile<Isa>::kWidth;
  k.key_tile = Isa::kKeyTile;
  k.forward_scratch = [](const Problem& p, int64_t rows) {
    return with_type(p.dtype, [&](auto t) { return Forward<Isa, decltype(t)>::scratch(p, rows); });
  };
  k.forward = [](const Problem& p, const Rows& rows, float* scratch) {
    with_type(p.dtype, [&](auto t) { Forward<Isa, decltype(t)>::run(p, rows, scratch); });
  };
  k.backward_scratch = [](const Problem& p, int64_t rows) {
    return with_type(p.dtype, [&](auto t) { return Backward<Isa, decltype(t)>::scratch(p, rows); });
  };
  k.padded_width = [](int64_t width) { return Backward<Isa, float>::padded(width); };
  k.backward = [](const Problem& p, const Rows& rows, float* grad_k, float* grad_v, float* scratch) {
    with_type(p.dtype, [&](auto t) { Backward<Isa, decltype(t)>::run(p, rows, grad_k, grad_v, scratch); });
  };
  k.decode_scratch = [](const Problem& p, int64_t rows) {
    return with_type(p.dtype, [&](auto t) { return Decode<Isa, decltype(t)>::scratch(p, rows); });
  };
  k.decode = [](const Problem& p, const Rows& rows, int64_t begin, int64_t end, const Partial& to, float* scratch) {
    with_type(p.dtype, [&](auto t) { Decode<Isa, decltype(t)>::run(p, rows, begin, end, to, scratch); });
  };
  return k;
}

}  // namespace moh
