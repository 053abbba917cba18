#pragma once
#include <stddef.h>
#include <stdint.h>

#include "format/layout.hpp"

// What each ISA provides: functions over plain structs. They allocate nothing, throw nothing
// and read no environment; shapes have been checked before they are called.
namespace kt {

enum class Precision : uint8_t { kFloat32, kBf16, kInt8 };
enum class DType : uint8_t { kFloat32, kBf16, kFloat16 };

enum class ActivationKind : uint8_t {
  kSilu,
  kGelu,
  kGeluTanh,
  kRelu,
  kRelu2,
  kSwigluClamp,
  kSwigluClampAfter,
  kSwigluOai,
  kSwigluSoftcap,
};

struct Activation {
  ActivationKind kind;
  bool is_gated;
  float alpha, limit, up_limit;
};

// Rows of activations in the form the dot products want. A row is `row_bytes` long:
//   values        padded_cols of float32, bfloat16 or int8; zero beyond the last input
//   scales        [padded_cols / group] float32                           (int8 only)
//   corrections   [padded_cols / step] int32: -offset * sum of the step's values, so that a dot
//                 product with weights that had `offset` added starts there    (int8 only)
//   minus sums    [padded_cols / sum_group] float32: -1 times the sum of what the values of a group
//                 stand for, which the group's minimum is multiplied with (weights with minimums
//                 only, and not for float32)
struct ActivationRows {
  Precision precision;
  size_t cols, padded_cols;
  size_t group;      // inputs per scale
  size_t step;       // inputs that share a scale here and in the weights
  size_t sum_group;  // inputs that share a minimum of the weights; 0: there are no sums
  size_t scale_offset, correction_offset, sum_offset, row_bytes;
  uint8_t* data;
};

// Inputs that share a scale of the dynamic int8 activations. With normally distributed weights and
// inputs, 64 and 32 add a relative error of 0.0123 to the output of an expert; 128 and 128 add
// 0.0160, 32 and 32 0.0117 for a tenth of the speed. What stands between up and down is a product,
// with heavier tails than the hidden states.
constexpr size_t kHiddenGroup = 64;
constexpr size_t kInterGroup = 32;

KT_INLINE ActivationRows MakeActivationRows(Precision precision, const MatrixLayout& weights,
                                            size_t group) {
  ActivationRows a{precision, weights.cols, weights.padded_cols, group, group, 0, 0, 0, 0,
                   0,         nullptr};
  if (weights.group && weights.group < group) a.step = weights.group;
  const size_t value_bytes = precision == Precision::kFloat32 ? 4
                             : precision == Precision::kBf16  ? 2
                                                              : 1;
  a.scale_offset = a.padded_cols * value_bytes;
  a.correction_offset = a.scale_offset + a.padded_cols / group * 4;
  a.sum_offset = precision == Precision::kInt8 ? a.correction_offset + a.padded_cols / a.step * 4
                                               : a.scale_offset;
  if (weights.offset == Offset::kMinimum && precision != Precision::kFloat32)
    a.sum_group = weights.group_cols;
  a.row_bytes = RoundUp(a.sum_offset + (a.sum_group ? weights.groups * 4 : 0), kRowBytes);
  return a;
}

// rows[r] = source[r] converted. A group with a NaN or an infinity gets a NaN scale, so that bad
// numbers stay visible in the output.
struct PrepareArgs {
  const void* source;  // float32 or bfloat16, `source_stride` elements from row to row
  DType source_type;
  size_t source_stride;
  size_t first_row, last_row;
  const MatrixLayout* weights;  // which format's zero the corrections are for
  ActivationRows rows;
};

// Bytes that whoever calls will want next; they are brought into the L2 cache meanwhile. 0: none.
struct Wanted {
  const uint8_t* at;
  size_t bytes;
};

// inter[i, n] = act(gate[n] . x[tokens[i]] + bias, up[n] . x[tokens[i]] + bias), for the 16 *
// panels outputs of panels first_panel..last_panel-1 of one expert.
struct GateUpArgs {
  const uint8_t* expert;
  const ExpertLayout* layout;
  ActivationRows hidden;
  const int32_t* tokens;  // [count] rows of `hidden`; null: 0, 1, ...
  size_t count;
  Activation activation;
  float* inter;  // [count, inter_stride]
  // Null: `inter` gets the activation. Else it gets the outputs of up as they are, and this, of the
  // same shape, those of gate.
  float* gate;
  size_t inter_stride;
  size_t first_panel, last_panel;
  uint8_t* scratch;  // Kernels::scratch_bytes(), aligned to 64
  Wanted next[2];    // besides the panels of this call
};

// out[h, tokens[i]] += weights[i] * (down[h] . inter[i] + bias), for those panels of one expert.
// Panels of `out` are written by one thread at a time: there is no race, and sums are in the order
// of the calls.
struct DownArgs {
  const uint8_t* expert;
  const ExpertLayout* layout;
  ActivationRows inter;  // row i belongs to tokens[i]
  const int32_t* tokens;
  const float* weights;
  size_t count;
  float* out;         // [panels, out_tokens, 16]
  size_t out_tokens;  // of the whole batch
  size_t first_panel, last_panel;
  uint8_t* scratch;  // Kernels::scratch_bytes(), aligned to 64
  Wanted next[2];    // besides the panels of this call
};

// The matrix that a transposed product multiplies with: inputs and outputs have changed places, and
// `matrices` of the same shape stand side by side, so that one sum runs over the outputs of all.
KT_INLINE MatrixLayout TransposedLayout(const MatrixLayout& m, size_t matrices) {
  MatrixLayout t = MakeLayout(Element::kBf16, ScaleType::kNone, Offset::kNone, 0, m.cols, m.rows);
  t.group_cols *= matrices;
  return t;
}

// out[to[i], c] (+)= sum over matrices and outputs n of weight[n, c] * rows[from[i], n], for the
// inputs c of panels first_panel..last_panel-1. Weights are dequantised, and rounded to bfloat16
// unless the rows are float32.
struct TransposedArgs {
  const uint8_t* matrices[2];  // first panels; the second null where there is one matrix
  size_t panel_stride;
  const MatrixLayout* layout;  // of both
  ActivationRows rows;         // float32 or bfloat16, `padded_cols` values for each matrix
  const int32_t* from;         // [count] rows of `rows`; null: row i
  const int32_t* to;           // [count] rows of `out`; null: row i
  size_t count;
  float* out;  // column c of row r: out + c / 16 * out_panel_stride + r * out_row_stride + c % 16
  size_t out_panel_stride, out_row_stride;
  bool adds;  // to what is in `out`
  size_t first_panel, last_panel;
  uint8_t* scratch;  // TransposedScratchBytes(), aligned to 64
};
// What the rows of a gradient are, where the pass before computed in this precision.
KT_INLINE Precision GradPrecision(Precision precision) {
  return precision == Precision::kFloat32 ? Precision::kFloat32 : Precision::kBf16;
}
KT_INLINE size_t TransposedScratchBytes(Precision rows, const MatrixLayout& m, size_t matrices) {
  return 2 * kPanel * TransposedLayout(m, matrices).group_cols *
         (rows == Precision::kFloat32 ? 4 : 2);
}

// The activation's derivative over one row. `n` is a multiple of 16.
struct ActivationGradArgs {
  Activation activation;
  size_t n;
  float weight;       // routing weight
  const float* grad;  // [n] gradient of what the activation gives, before the routing weight
  float* gate;        // [n] in: outputs of gate; out: weight times their gradient. `up` if ungated
  float* up;          // [n] the same for up
  float* inter;       // [n] what the activation gives; null: not wanted
};

// out[m, n] (+)= alpha * sum over k of x[m, k] * w[k, n], in float32.
struct GemmArgs {
  size_t m, n, k;  // n a multiple of 16
  float alpha;
  const float* x;
  size_t x_row, x_col;  // elements from row to row, and from column to column
  const float* w;
  size_t w_row;
  float* out;
  size_t out_row;
  bool adds;  // to what is in `out`
};

// One matrix to pack: dense (element [r, c] at data + r * row_stride + c * col_stride, in
// elements), or already quantised, with contiguous canonical codes, scales and offsets.
struct SourceMatrix {
  const void* data;
  DType type;
  ptrdiff_t row_stride, col_stride;
  const float* scales;         // null: dense, to be quantised
  const uint8_t* zero_points;  // with scales
  const float* minimums;       // with scales
  const float* output_scales;  // [rows], with scales that are e4m3
};

// Packs panels first..last-1 to target + panel * panel_stride. `scratch` holds PackScratchBytes().
struct PackArgs {
  SourceMatrix source;
  const MatrixLayout* layout;
  uint8_t* target;
  size_t panel_stride;
  void* scratch;
};
// Per panel: 16 rows of float32 and of codes.
KT_INLINE size_t PackScratchBytes(const MatrixLayout& m) {
  return kPanel * m.padded_cols * (4 + 2);
}

struct Kernels {
  void (*prepare)(const PrepareArgs&);
  void (*gate_up)(const GateUpArgs&);
  void (*down)(const DownArgs&);
  bool (*pack)(const PackArgs&);  // false: a weight or a scale is NaN or infinite
  void (*transposed)(const TransposedArgs&);
  float (*activation_grad)(const ActivationGradArgs&);  // returns sum of grad * activation
  void (*gemm)(const GemmArgs&);
  void (*activate)(const Activation&, const float* gate, const float* up, float* out, size_t n);
  // What gate_up and down want as scratch for matrices of this layout.
  size_t (*scratch_bytes)(Precision, const MatrixLayout&);
  // Products of this precision on registers alone, many times; returns how many operations that
  // were, a multiply-add being two. And `bytes` read as that many (1, 2, 4) streams at once;
  // returns how many bytes were. For hardware/limits.hpp.
  size_t (*peak)(Precision precision, size_t repetitions);
  size_t (*read)(const uint8_t* from, size_t bytes, size_t streams);
};

}  // namespace kt
