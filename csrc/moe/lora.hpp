#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "moe/kernels.hpp"

namespace kt {

// The low-rank addition to one projection, y = W x + scale * B (A x), for all experts.
struct LoraMatrices {
  const void* a;  // [experts, rank, inputs]; null: there is none
  const void* b;  // [experts, outputs, rank]
  DType type;     // of both, float32 or bfloat16
  size_t rank;
  float *grad_a, *grad_b;  // of the same shapes, zero; null in a forward pass
};

struct LoraArgs {
  float scale;
  LoraMatrices gate, up, down;
};

// The products of one projection's A and B, in float32. The two are mirror images of each other: A
// takes inputs to the rank and, transposed, gradients of the rank to inputs; B takes the rank to
// outputs and, transposed, gradients of outputs to the rank. `Side` says which one is meant, and
// its `wide` size is that of inputs or outputs.
class Lora {
 public:
  enum class Side : uint8_t { kA, kB };

  Lora(const Kernels& kernels, const LoraMatrices& matrices, float scale, size_t inputs,
       size_t outputs);

  bool exists() const { return matrices_.a != nullptr; }
  size_t rank_stride() const { return RoundUp(matrices_.rank, kPanel); }

  // narrow[i] = matrix of the side applied to wide[i]; rows of `narrow` are rank_stride() apart.
  void ToRank(Side side, size_t expert, const float* wide, size_t wide_stride, size_t rows,
              float* narrow) const;
  // wide[i] += scale * matrix of the side applied to narrow[i], in columns first..first+n-1; n and
  // `first` are multiples of 16, and columns beyond the last get nothing.
  void FromRank(Side side, size_t expert, const float* narrow, size_t rows, size_t first, size_t n,
                float* wide, size_t wide_stride) const;

  // The gradient of one matrix: scale * sum over i of narrow[i] times wide[i]. The rows come in
  // blocks, in order: Begin, then Add for each, then Store.
  void BeginGrad(Side side) const;
  void AddGrad(Side side, const float* narrow, const float* wide, size_t wide_stride,
               size_t rows) const;
  void StoreGrad(Side side, size_t expert) const;

 private:
  size_t WideSize(Side side) const { return side == Side::kA ? inputs_ : outputs_; }
  float Value(Side side, size_t expert, size_t rank, size_t wide) const;

  const Kernels& kernels_;
  LoraMatrices matrices_;
  float scale_;
  size_t inputs_, outputs_;
};

// rows[i] = source[indices[i]] in float32, `stride` apart; what pads a row is zero.
void GatherRows(const void* source, DType type, size_t cols, const int32_t* indices, size_t rows,
                float* target, size_t stride);

}  // namespace kt
