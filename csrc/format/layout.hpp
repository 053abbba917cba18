#pragma once
#include <stddef.h>
#include <stdint.h>

// These headers are included by the objects of every instruction set: nothing in them may become a
// symbol of its own, or the linker could keep the AVX-512 copy for all (tools/check_symbols.py).
#define KT_INLINE [[gnu::always_inline]] inline

// Where the bytes of one packed expert lie. One layout for every ISA, AVX2 to AMX, so that packed
// weights can be moved, mapped and shared without being packed again.
//
// A matrix [rows = outputs, cols = inputs] is cut into panels of 16 outputs. A panel is contiguous,
// a run of blocks; a block is as many groups of inputs (1, 2 or 4) as fill whole 64-byte rows with
// their scales and offsets, fewer in the last block:
//
//   scales   [groups of a block][16]  float32, float16, bfloat16, e8m0 or e5m3; absent for bf16
//   offsets  [groups of a block][16]  zero points, uint8, or minimums, typed as scales; or absent
//   weights  [inputs of its groups * bits / 32][64 bytes]
//
// Scales stand beside the weights they belong to, so that a panel is read as one stream: a second
// stream of scales costs a third of the memory's bandwidth (docs/decisions/0003).
//
// Where scales are e5m3 the panel begins with 16 float32, a scale for each output, which multiplies
// those of its groups. An e5m3 is an e4m3 scale with a wider exponent, of bias 10, in place of the
// sign: it has no subnormals, which would need a branch. Its 0 stands for a group of zeros, and so
// does that of e8m0, 2^-127.
//
// One 64-byte row of weights holds, for each of the 16 outputs in turn, 4 bytes of consecutive
// inputs: 2 bfloat16, 4 int8 or fp8, 8 int4 or fp4; in which order, csrc/format/ says. Inputs
// are padded to a multiple of 64 and of the group size, outputs to a multiple of 16, with zeros.
// With a minimum, or a zero point of 16, no code need stand for 0: inputs then are padded with the
// nearest one, and the activations it meets are 0.
//
// An expert is contiguous: gate panel 0, up panel 0, gate panel 1, up panel 1, ... (up panels alone
// where there is no gate), the down panels, then float32 biases of gate, up and down.
namespace kt {

constexpr size_t kPanel = 16;
constexpr size_t kRowBytes = 64;
constexpr size_t kColumnPad = 64;

enum class Element : uint8_t { kBf16, kFp8, kInt8, kInt4, kFp4 };
enum class ScaleType : uint8_t { kNone, kFloat32, kBf16, kFloat16, kE8m0, kE4m3 };
// weight = scale * code, or scale * (code - zero point), or scale * code - minimum
enum class Offset : uint8_t { kNone, kZeroPoint, kMinimum };

[[gnu::always_inline]] constexpr size_t RoundUp(size_t n, size_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

struct MatrixLayout {
  Element element;
  ScaleType scale;
  Offset offset;
  size_t group;  // inputs per scale; 0: one scale per output
  size_t rows, cols;
  // Derived by MakeLayout. Without groups, or without scales, all inputs are one group.
  size_t padded_cols, panels, group_cols, groups;
  size_t front_bytes;   // scales of outputs
  size_t block_groups;  // groups of a block
  size_t scale_bytes;   // of 16 scales
  size_t offset_bytes;  // of 16 zero points or minimums
  size_t header_bytes;  // scales and offsets of a block
  size_t group_bytes;   // weights of a group
  size_t panel_bytes;

  KT_INLINE size_t Block(size_t group) const {
    return front_bytes + group / block_groups * (header_bytes + block_groups * group_bytes);
  }
  // Offsets from a panel's first byte.
  KT_INLINE size_t Scales(size_t group) const {
    return Block(group) + group % block_groups * scale_bytes;
  }
  KT_INLINE size_t Offsets(size_t group) const {
    return Block(group) + block_groups * scale_bytes + group % block_groups * offset_bytes;
  }
  KT_INLINE size_t Weights(size_t group) const {
    return Block(group) + header_bytes + group % block_groups * group_bytes;
  }
};

KT_INLINE size_t ElementBits(Element element) {
  switch (element) {
    case Element::kBf16: return 16;
    case Element::kFp8:
    case Element::kInt8: return 8;
    case Element::kInt4:
    case Element::kFp4: return 4;
  }
  __builtin_unreachable();
}

KT_INLINE size_t ScaleBytes(ScaleType scale) {
  switch (scale) {
    case ScaleType::kNone: return 0;
    case ScaleType::kFloat32: return 4;
    case ScaleType::kBf16:
    case ScaleType::kFloat16: return 2;
    case ScaleType::kE8m0:
    case ScaleType::kE4m3: return 1;
  }
  __builtin_unreachable();
}

KT_INLINE MatrixLayout MakeLayout(Element element, ScaleType scale, Offset offset, size_t group,
                                  size_t rows, size_t cols) {
  MatrixLayout m{};
  m.element = element;
  m.scale = scale;
  m.offset = offset;
  m.group = group;
  m.rows = rows;
  m.cols = cols;
  m.padded_cols = RoundUp(cols, group > kColumnPad ? group : kColumnPad);
  m.panels = RoundUp(rows, kPanel) / kPanel;
  m.group_cols = group ? group : m.padded_cols;
  m.groups = m.padded_cols / m.group_cols;
  m.front_bytes = scale == ScaleType::kE4m3 ? kPanel * sizeof(float) : 0;
  m.scale_bytes = kPanel * ScaleBytes(scale);
  if (offset == Offset::kZeroPoint) m.offset_bytes = kPanel;
  if (offset == Offset::kMinimum) m.offset_bytes = m.scale_bytes;
  const size_t group_header = m.scale_bytes + m.offset_bytes;
  m.block_groups = 1;
  if (group)
    while (m.block_groups * group_header % kRowBytes != 0) m.block_groups *= 2;
  m.header_bytes = RoundUp(m.block_groups * group_header, kRowBytes);
  m.group_bytes = m.group_cols * kPanel * ElementBits(element) / 8;
  const size_t blocks = (m.groups + m.block_groups - 1) / m.block_groups;
  m.panel_bytes = m.front_bytes + blocks * m.header_bytes + m.groups * m.group_bytes;
  return m;
}

struct ExpertLayout {
  bool has_gate, has_bias;
  MatrixLayout up;    // of the gate too: [intermediate, hidden]
  MatrixLayout down;  // [hidden, intermediate]
  // Derived by MakeExpertLayout, in bytes from the expert's first.
  size_t up_stride, down_offset, bias_offset, bytes;

  KT_INLINE size_t UpPanel(size_t p) const {
    return p * up_stride + (has_gate ? up.panel_bytes : 0);
  }
  KT_INLINE size_t GatePanel(size_t p) const { return p * up_stride; }
  KT_INLINE size_t DownPanel(size_t p) const { return down_offset + p * down.panel_bytes; }
  KT_INLINE size_t GateBias() const { return bias_offset; }
  KT_INLINE size_t UpBias() const { return bias_offset + (has_gate ? up.panels * kPanel * 4 : 0); }
  KT_INLINE size_t DownBias() const { return UpBias() + up.panels * kPanel * 4; }
};

KT_INLINE ExpertLayout MakeExpertLayout(bool has_gate, bool has_bias, MatrixLayout up,
                                        MatrixLayout down) {
  ExpertLayout e{has_gate, has_bias, up, down, 0, 0, 0, 0};
  e.up_stride = up.panel_bytes * (has_gate ? 2 : 1);
  e.down_offset = up.panels * e.up_stride;
  e.bias_offset = e.down_offset + down.panels * down.panel_bytes;
  e.bytes = e.bias_offset;
  if (has_bias) e.bytes = RoundUp(e.DownBias() + down.panels * kPanel * 4, kRowBytes);
  return e;
}

}  // namespace kt
