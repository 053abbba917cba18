#include "moe/lora.hpp"

#include <algorithm>
#include <cstring>

#include "format/bfloat16.hpp"
#include "moe/buffers.hpp"

namespace kt {
namespace {

float Load(const void* data, DType type, size_t at) {
  return type == DType::kFloat32 ? static_cast<const float*>(data)[at]
                                 : Bf16ToFloat(static_cast<const uint16_t*>(data)[at]);
}

// This thread's own: one matrix in float32, and one gradient under way.
thread_local std::vector<float> matrix_buffer, grad_buffer;

}  // namespace

void GatherRows(const void* source, DType type, size_t cols, const int32_t* indices, size_t rows,
                float* target, size_t stride) {
  for (size_t i = 0; i < rows; ++i, target += stride) {
    const size_t at = static_cast<size_t>(indices[i]) * cols;
    for (size_t c = 0; c < cols; ++c) target[c] = Load(source, type, at + c);
    std::fill(target + cols, target + stride, 0.0f);
  }
}

Lora::Lora(const Kernels& kernels, const LoraMatrices& matrices, float scale, size_t inputs,
           size_t outputs)
    : kernels_(kernels), matrices_(matrices), scale_(scale), inputs_(inputs), outputs_(outputs) {}

float Lora::Value(Side side, size_t expert, size_t rank, size_t wide) const {
  return side == Side::kA
             ? Load(matrices_.a, matrices_.type, (expert * matrices_.rank + rank) * inputs_ + wide)
             : Load(matrices_.b, matrices_.type,
                    (expert * outputs_ + wide) * matrices_.rank + rank);
}

void Lora::ToRank(Side side, size_t expert, const float* wide, size_t wide_stride, size_t rows,
                  float* narrow) const {
  const size_t size = WideSize(side), stride = rank_stride();
  matrix_buffer.assign(size * stride, 0.0f);  // [wide, rank padded]
  for (size_t j = 0; j < matrices_.rank; ++j)
    for (size_t c = 0; c < size; ++c) matrix_buffer[c * stride + j] = Value(side, expert, j, c);
  kernels_.gemm({rows, stride, size, 1.0f, wide, wide_stride, 1, matrix_buffer.data(), stride,
                 narrow, stride, false});
}

void Lora::FromRank(Side side, size_t expert, const float* narrow, size_t rows, size_t first,
                    size_t n, float* wide, size_t wide_stride) const {
  const size_t last = std::min(first + n, WideSize(side));
  matrix_buffer.assign(matrices_.rank * n, 0.0f);  // [rank, columns]
  for (size_t j = 0; j < matrices_.rank; ++j)
    for (size_t c = first; c < last; ++c)
      matrix_buffer[j * n + c - first] = Value(side, expert, j, c);
  kernels_.gemm({rows, n, matrices_.rank, scale_, narrow, rank_stride(), 1, matrix_buffer.data(), n,
                 wide, wide_stride, true});
}

void Lora::BeginGrad(Side side) const {
  grad_buffer.assign(matrices_.rank * RoundUp(WideSize(side), kPanel), 0.0f);
}

void Lora::AddGrad(Side side, const float* narrow, const float* wide, size_t wide_stride,
                   size_t rows) const {
  const size_t columns = RoundUp(WideSize(side), kPanel);
  kernels_.gemm({matrices_.rank, columns, rows, scale_, narrow, 1, rank_stride(), wide, wide_stride,
                 grad_buffer.data(), columns, true});
}

void Lora::StoreGrad(Side side, size_t expert) const {
  const size_t size = WideSize(side), columns = RoundUp(size, kPanel), rank = matrices_.rank;
  for (size_t j = 0; j < rank; ++j)
    for (size_t c = 0; c < size; ++c) {
      const float value = grad_buffer[j * columns + c];
      if (side == Side::kA) matrices_.grad_a[(expert * rank + j) * size + c] = value;
      else matrices_.grad_b[(expert * size + c) * rank + j] = value;
    }
}

}  // namespace kt
