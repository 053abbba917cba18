#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "moe/expert_layer.hpp"

namespace kt {

struct LinearSpec {
  size_t in_features, out_features;
  bool has_bias;
  Element element;
  ScaleType scale;
  Offset offset;
  size_t group;  // 0: per output
};

// Where the bytes of one packed matrix lie: its panels, then a float32 bias for every output.
struct LinearLayout {
  MatrixLayout weight;  // [out_features, in_features]
  bool has_bias;
  size_t bias_offset, bytes;
};

LinearLayout LayoutOf(const LinearSpec& spec);

// One call over `rows` rows of activations, forwards or backwards.
struct LinearArgs {
  const void* source;  // float32 or bfloat16, `source_stride` elements from row to row
  DType type;          // of source and of target
  Precision precision;
  size_t rows, source_stride;
  void* target;  // contiguous, overwritten
};

// A dense layer y = x W^T + b over the kernels of the experts: a layer of one expert that has
// nothing but the down projection, which every row goes to with weight 1.
class LinearLayer {
 public:
  // Reserves address space; memory is taken by Load.
  LinearLayer(const LinearSpec& spec, const Kernels& kernels, std::shared_ptr<ThreadPool> pool,
              std::shared_ptr<ScratchPool> scratch);

  const LinearLayout& layout() const { return layout_; }
  const Kernels& kernels() const { return kernels_; }
  ThreadPool& pool() const { return *pool_; }
  const std::shared_ptr<ScratchPool>& scratch() const { return scratch_; }
  const uint8_t* data() const { return mapped_ ? mapped_.get() : memory_.At(0); }

  // Packs the matrix, in place of what was there. False, and nothing is loaded: a weight or a scale
  // is NaN or infinite. `bias` is null where there is none.
  bool Load(const SourceMatrix& weight, const float* bias);
  // Uses packed bytes where they are, at a multiple of 64; they must not change while `packed`
  // lives. Throws std::invalid_argument at another address.
  void MapPacked(std::shared_ptr<const uint8_t> packed);
  bool is_loaded() const { return is_loaded_; }
  // The packed bytes, for tests.
  std::span<const uint8_t> Bytes() const { return {data(), layout_.bytes}; }

  // target [rows, out_features] = source [rows, in_features] W^T + b. Both return when it is done,
  // may be called by several threads, and throw std::invalid_argument if nothing is loaded.
  void Apply(const LinearArgs& args) const;
  // target [rows, in_features] = source [rows, out_features] W; `precision` not int8.
  void GradInput(const LinearArgs& args) const;

 private:
  template <class Job>
  void Run(const LinearArgs& args) const;

  LinearLayout layout_;
  const Kernels& kernels_;
  std::shared_ptr<ThreadPool> pool_;
  std::shared_ptr<ScratchPool> scratch_;
  ExpertMemory memory_;
  std::shared_ptr<const uint8_t> mapped_;  // somebody else's bytes; null: those in `memory_`
  bool is_loaded_ = false;
};

}  // namespace kt
