// The arguments of one call as plain numbers, for the operators and the kernels. Kernels know no tensors.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>

namespace moh {

constexpr int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

enum class DType { kFloat, kBFloat16, kHalf };

// Calls function(T()) with the C++ type of `dtype`.
template <class Function>
auto with_type(DType dtype, Function function) {
  switch (dtype) {
    case DType::kBFloat16: return function(c10::BFloat16());
    case DType::kHalf: return function(c10::Half());
    default: return function(0.0f);
  }
}

enum class MaskKind { kNone, kBool, kAdditive };

// A tensor of 4 dimensions [batch, head, token, width] whose last dimension is contiguous; strides count elements.
struct View {
  const void* data = nullptr;
  int64_t batch = 0, head = 0, token = 0;
};

// A mask broadcast to [batch, head, query, key]; strides are 0 where it repeats. Additive masks have the inputs' dtype.
struct Mask {
  MaskKind kind = MaskKind::kNone;
  const void* data = nullptr;
  int64_t batch = 0, head = 0, query = 0, key = 0;
};

// One call of attention.
struct Problem {
  DType dtype = DType::kFloat;
  int64_t batches = 0, heads = 0, kv_heads = 0, group = 0;  // group = query heads per key/value head
  int64_t queries = 0, keys = 0, width = 0, value_width = 0;
  float scale = 0;  // of the scores
  bool causal = false;
  int64_t window = 0;  // A query sees at most this many keys, up to its own; 0 stands for all.
  View q, k, v;
  Mask mask;
  const void* gates = nullptr;  // [B, Nq, H] contiguous
  void* out = nullptr;          // [B, Nq, H, Dv] contiguous
  // Both [B, H, Nq], null if they are not needed: each row's largest score in units of log2, +inf where a query sees no
  // key (so that backward its weights are 0), and the softmax's denominator relative to it, 0 there. Their logarithm in
  // one number, the log-sum-exp, would lose the second beside scores of some 10^7, and beside the lowest numbers that
  // masks use.
  float *most = nullptr, *totals = nullptr;

  // Backward only.
  const void* grad = nullptr;  // [B, Nq, H, Dv] contiguous
  void* grad_q = nullptr;      // [B, H, Nq, D] contiguous
  void* grad_gates = nullptr;  // [B, Nq, H] contiguous

  // Without regard to masks, query `token` sees the keys [key_begin, key_end).
  int64_t key_end(int64_t token) const { return causal && token + 1 < keys ? token + 1 : keys; }
  int64_t key_begin(int64_t token) const { return window > 0 && token + 1 > window ? token + 1 - window : 0; }
};

// Active rows of one key/value head in one batch row, a bundle or a part of it. A row is the number
// token * group + (query head within the group); rows rise. In a projection each head is a group by itself, so its rows
// are its tokens.
struct Rows {
  int64_t batch = 0, kv_head = 0;
  const int32_t* index = nullptr;
  int64_t count = 0;
};

// The partial softmax of some rows over a range of keys; decoding merges those of all ranges.
struct Partial {
  float* max = nullptr;    // [rows], in units of log2
  float* total = nullptr;  // [rows]
  float* sum = nullptr;    // [rows, Dv]
};

// The matrices of one product per head over its active tokens. x [T, C] and heads [T, H, D] are contiguous.
struct Projection {
  DType dtype = DType::kFloat;
  int64_t tokens = 0, heads = 0, width = 0, channels = 0;  // T, H, D, C
  const void* from = nullptr;                              // x or heads
  const void* matrix = nullptr;                            // [H * D, C] with these strides
  int64_t head_stride = 0, channel_stride = 0;
  const void* bias = nullptr;  // of the result, [H * D] or [C]; null for none
  void* to = nullptr;
};

// A tensor [batch, token, head, width] of floats whose last dimension is contiguous; strides count elements.
struct TokenView {
  const float* data = nullptr;
  int64_t batch = 0, token = 0, head = 0;
};

// One call of aggregated attention (aggregated.h) with sizes B, N, H, D, P pooled keys and W places of the window.
struct Aggregate {
  int64_t batches = 0, tokens = 0, heads = 0, width = 0, pooled = 0, places = 0;
  int64_t side = 0, rows = 0, columns = 0;  // The side is the window's; rows and columns are the image's.
  TokenView q, k, v, pooled_k, pooled_v;
  const float* gates = nullptr;          // [B, N, H]; this and everything below is contiguous.
  const float* embedding = nullptr;      // [H, D]
  const float* temperature = nullptr;    // [H]
  const float* length = nullptr;         // [N]
  const float* token_weights = nullptr;  // [H, D, W]
  const float* token_bias = nullptr;     // [H, W]
  const float* local_bias = nullptr;     // [H, W]
  const float* pooled_bias = nullptr;    // [H, N, P]
  float* out = nullptr;                  // [B, N, H, D]

  // Backward only: `grad` has the shape of `out`, the others that of what they are the gradient of.
  const float* grad = nullptr;
  float *grad_q = nullptr, *grad_k = nullptr, *grad_v = nullptr, *grad_pooled_k = nullptr, *grad_pooled_v = nullptr;
  float* grad_gates = nullptr;
};

// Where one task of the backward pass sums the gradients of its head's parameters.
struct AggregateSums {
  float *embedding, *temperature, *tokens, *token_bias, *local_bias, *pooled_bias;
};

constexpr float kSmallestNorm = 1e-12f;  // Queries are divided by at least this, as in torch.nn.functional.normalize.
constexpr int64_t kMaxPlaces = 49;       // The largest window has 7 x 7 places.

// Neighbouring columns of a matrix.
struct Segment {
  int64_t first = 0, count = 0;
};

// This many blocks of rows share a tile of keys in the L1 cache. With 32 lanes and heads of width 64, their sums take
// 128 KiB of the L2 cache. In the backward pass a row takes three times the memory.
constexpr int64_t kForwardBlocks = 16;
constexpr int64_t kBackwardBlocks = 4;
// Keys or values are copied, tile by tile, where rows lie a multiple of pages apart or reach over kFarBytes or more,
// and at least kBlocksPerCopy blocks share the copy, which takes some 10 % of one block's time.
constexpr int64_t kBlocksPerCopy = 4;
constexpr int64_t kPageBytes = 4096;
constexpr int64_t kFarBytes = 4 << 20;
// A task takes this many tokens, and this many channels at a time: together they fill half of a 512 KiB L2 cache.
constexpr int64_t kProjectionRows = 256;
constexpr int64_t kProjectionChannels = 256;

// What an MLP applies between its layers: SiLU, GELU by its formula with tanh, or GELU itself.
enum class Activation { kSilu, kGelu, kExactGelu };

// The kernels of one instruction set.
struct Kernels {
  const char* name;
  int64_t lanes_per_block;  // This many rows share one pass over the keys.

  int64_t (*forward_scratch)(const Problem&, int64_t rows);  // floats
  void (*forward)(const Problem&, const Rows&, float* scratch);

  int64_t (*backward_scratch)(const Problem&, int64_t rows);  // floats
  int64_t (*padded_width)(int64_t width);                     // This is the width of grad_k's and grad_v's rows.
  // Adds to grad_k [Nk, padded D] and grad_v [Nk, padded Dv], and writes the rows' grad_q and grad_gates.
  void (*backward)(const Problem&, const Rows&, float* grad_k, float* grad_v, float* scratch);

  int64_t (*decode_scratch)(const Problem&, int64_t rows);  // floats
  void (*decode)(const Problem&, const Rows&, int64_t key_begin, int64_t key_end, const Partial&, float* scratch);

  // Products over the active rows alone (projection.h), all three with `projection_scratch` floats.
  int64_t (*projection_scratch)(const Projection&);  // floats
  void (*expand)(const Projection&, const Rows&, float* scratch);
  void (*sum_heads)(const Projection&, const Rows* by_head, int64_t first_token, int64_t tokens,
                    int64_t first_channel, int64_t channels, float* scratch);
  void (*outer)(const Projection&, const void* x, const Rows&, int64_t first_channel, int64_t channels,
                float* scratch);

  // Floats for a forward task of these rows, or for a backward task where they are null.
  int64_t (*aggregate_scratch)(const Aggregate&, const Rows*);
  void (*aggregate)(const Aggregate&, const Rows&, float* scratch);
  void (*aggregate_backward)(const Aggregate&, const Rows&, const AggregateSums&, float* scratch);

  // to[r] = row r of a matrix times x, over the columns of some segments (few_tokens.h). x is float32, or bfloat16 where
  // the matrix is and the kernels `dot_bfloat16`.
  bool dot_bfloat16;
  void (*dot_rows)(DType, const void* matrix, int64_t stride, int64_t rows, const void* x, const Segment*,
                   int64_t segments, float* to);
  // The same for a matrix of 8-bit integers and any x as above; `rounded` says that it is bfloat16.
  void (*dot_integer_rows)(const int8_t* matrix, int64_t stride, int64_t rows, const void* x, bool rounded,
                           const Segment*, int64_t segments, float* to);
  // to[i] = activation(x[i]), times factor[i] unless it is null.
  void (*activate)(Activation, const float* x, const float* factor, int64_t count, float* to);

  // A router's scores of some tokens (routing.h), from matrices packed as `score_outputs(outputs)` columns in panels of
  // that many times `channels` floats; scratch has `score_tokens` times `channels`.
  int64_t (*score_outputs)(int64_t outputs);
  int64_t score_tokens;
  void (*pack_scores)(DType, const void* matrix, int64_t stride, int64_t rows, int64_t channels, int64_t first,
                      float* to);
  void (*scores)(DType, const void* x, int64_t tokens, int64_t channels, const float* panels, int64_t outputs,
                 float* to, float* scratch);
};

const Kernels& portable_kernels();
#ifdef MOH_AVX2
const Kernels& avx2_kernels();
#endif
#ifdef MOH_AVX512
const Kernels& avx512_kernels();
#endif
#ifdef MOH_AVX512_BF16
const Kernels& avx512_bf16_kernels();
#endif
#ifdef MOH_AMX
// Whether Linux grants the tiles and they multiply right. Call it only on a processor that has AMX.
bool amx_works();
const Kernels& amx_kernels();
#endif
#ifdef MOH_AMX_IMITATED
const Kernels& amx_imitated_kernels();
#endif

}  // namespace moh
