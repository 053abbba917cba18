#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "moe/kernels.hpp"
#include "moe/layer_parts.hpp"
#include "moe/lora.hpp"
#include "moe/pair_groups.hpp"
#include "runtime/numa_memory.hpp"
#include "runtime/thread_pool.hpp"

namespace kt {

struct LayerSpec {
  size_t num_experts, hidden_size, intermediate_size;
  Activation activation;
  bool has_bias;
  Element element;
  ScaleType scale;
  Offset offset;
  size_t group;  // 0: per output
};

ExpertLayout LayoutOf(const LayerSpec& spec);

// Sources of one expert; `gate.data` is null where there is no gate, biases where there are none.
struct ExpertSource {
  SourceMatrix gate, up, down;
  const float *gate_bias, *up_bias, *down_bias;
};

// Buffers of a training pass: see TrainingJob. Empty as long as nobody trains.
struct TrainingBuffers {
  PairGroups pairs;
  std::vector<uint8_t> hidden, inter_rows, grad_out, grad_inter_rows;
  std::vector<float> gate, up, inter, grad_inter, out;
  // Of the LoRA of gate, up and down: A applied to the inputs, and the gradient of that.
  std::vector<float> inner[3], grad_inner[3];
};

// Buffers of one call, kept from call to call so that a decode step allocates nothing.
struct Scratch {
  // The pairs of one expert: `count` of them from the first on, and rows of the intermediate
  // buffer.
  struct ActiveExpert {
    size_t expert, first, count;
    size_t cost;  // of one unit of every expert before it: see ForwardJob::GateUpUnit
  };

  std::vector<size_t> start;         // [experts + 1] first pair of each expert
  std::vector<ActiveExpert> active;  // ascending
  std::vector<int32_t> tokens;       // of each pair, experts in ascending order
  std::vector<float> weights;        // of each pair
  std::vector<uint8_t> hidden, inter_rows;
  std::vector<float> inter, out;
  TrainingBuffers training;
};

class ScratchPool {
 public:
  std::unique_ptr<Scratch> Take();
  void Give(std::unique_ptr<Scratch> scratch);

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Scratch>> free_;
};

// out[t] = sum_k weights[t, k] * expert[ids[t, k]](hidden[t]); id -1 adds nothing.
struct ForwardArgs {
  const void* hidden;         // [tokens, hidden] float32 or bfloat16, contiguous
  DType type;                 // of hidden and of out
  Precision precision;        // one that exists for the layer's weights
  const int64_t* expert_ids;  // [tokens, top_k]
  const float* weights;       // [tokens, top_k]
  void* out;                  // [tokens, hidden], overwritten
  size_t tokens, top_k;
};

// ForwardArgs with low-rank additions, and its backward pass for the gradient `grad_out` of `out`.
struct TrainingArgs {
  const void* hidden;  // [tokens, hidden] float32 or bfloat16, contiguous
  DType type;          // of hidden, grad_out and grad_hidden
  Precision precision;
  const int64_t* expert_ids;  // [tokens, top_k]
  const float* weights;       // [tokens, top_k]
  size_t tokens, top_k;
  LoraArgs lora;
  void* out;             // [tokens, hidden], overwritten; forward only, and from here on backward
  const void* grad_out;  // [tokens, hidden]
  void* grad_hidden;     // [tokens, hidden], overwritten
  float* grad_weights;   // [tokens, top_k], overwritten; 0 for id -1
};

class ForwardJob;

class ExpertLayer {
 public:
  ExpertLayer(const LayerSpec& spec, const Kernels& kernels, std::shared_ptr<ThreadPool> pool,
              std::shared_ptr<ScratchPool> scratch, std::shared_ptr<NodeBinder> binder);
  ~ExpertLayer();

  const ExpertLayout& layout() const { return layout_; }  // of a whole expert
  const std::vector<LayerPart>& parts() const { return parts_; }
  const LayerSpec& spec() const { return spec_; }

  // Packs one expert. Returns the name of the projection that holds a NaN or an infinity (the
  // expert is then not resident), or null. May be called from several threads for different
  // experts.
  const char* Load(size_t expert, const ExpertSource& source);
  void Unload(size_t expert);
  bool IsResident(size_t expert) const { return resident_[expert].load(std::memory_order_acquire); }

  // Packed bytes, layout().bytes of them, as format/layout.hpp draws them: the same on any number
  // of nodes. An expert is loaded with those of another layer.
  void LoadPacked(size_t expert, const uint8_t* packed);
  // As LoadPacked, but the bytes stay where they are, at a multiple of 64; `owner` is kept until
  // the expert is unloaded or loaded again. False, and nothing was done: nodes have parts of
  // experts.
  bool MapPacked(size_t expert, const uint8_t* packed, std::shared_ptr<void> owner);
  // Where they lie in one piece; null where nodes have parts of them.
  const uint8_t* Packed(size_t expert) const;
  void CopyPacked(size_t expert, uint8_t* target) const;
  // As CopyPacked of several experts, one after the other, by all threads of the pool. Throws
  // std::invalid_argument: an expert is not resident.
  void GatherPacked(const std::vector<int64_t>& experts, uint8_t* target) const;

  // Throws std::invalid_argument: an id is out of range, or an expert is not resident.
  std::shared_ptr<ForwardJob> Submit(const ForwardArgs& args) { return SubmitForward(args, false); }
  // As Submit, for a caller that does something else before it waits: see ThreadPool, whose
  // stand-in starts with ExpectUnattended.
  void ExpectUnattended() { pool_->StartStandIn(); }
  std::shared_ptr<ForwardJob> SubmitUnattended(const ForwardArgs& args) {
    return SubmitForward(args, true);
  }
  std::shared_ptr<Job> SubmitLora(const TrainingArgs& args);
  std::shared_ptr<Job> SubmitBackward(const TrainingArgs& args);
  void Wait(Job& job);

 private:
  friend class ForwardJob;
  friend class TrainingJob;
  std::shared_ptr<ForwardJob> SubmitForward(const ForwardArgs& args, bool is_unattended);
  void CheckIds(const int64_t* expert_ids, size_t tokens, size_t top_k) const;
  void CheckResident(size_t expert) const;
  // The expert lies in the layer's own memory from now on.
  void BringHome(size_t expert);
  // Asks the system to read what is not in memory of the mapped experts that are about to be used.
  void ReadAhead(const int64_t* expert_ids, size_t pairs) const;
  const char* Pack(const LayerPart& part, size_t expert, const ExpertSource& source,
                   float* scratch);

  LayerSpec spec_;
  const Kernels& kernels_;
  ExpertLayout layout_;
  std::shared_ptr<ThreadPool> pool_;
  std::shared_ptr<ScratchPool> scratch_;
  std::shared_ptr<NodeBinder> binder_;
  std::vector<LayerPart> parts_;  // one for each node that has one, in the order of the nodes
  std::vector<std::atomic<bool>> resident_;
  std::vector<std::shared_ptr<void>> owners_;  // of mapped experts; null for those at home
  std::atomic<size_t> num_mapped_{0};
};

}  // namespace kt
