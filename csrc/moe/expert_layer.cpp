#include "moe/expert_layer.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#include "moe/backward_job.hpp"
#include "moe/forward_job.hpp"
#include "moe/lora_forward_job.hpp"

namespace kt {

ExpertLayout LayoutOf(const LayerSpec& s) {
  return MakeExpertLayout(
      s.activation.is_gated, s.has_bias,
      MakeLayout(s.element, s.scale, s.offset, s.group, s.intermediate_size, s.hidden_size),
      MakeLayout(s.element, s.scale, s.offset, s.group, s.hidden_size, s.intermediate_size));
}

std::unique_ptr<Scratch> ScratchPool::Take() {
  const std::lock_guard lock(mutex_);
  if (free_.empty()) return std::make_unique<Scratch>();
  std::unique_ptr<Scratch> scratch = std::move(free_.back());
  free_.pop_back();
  return scratch;
}

void ScratchPool::Give(std::unique_ptr<Scratch> scratch) {
  const std::lock_guard lock(mutex_);
  free_.push_back(std::move(scratch));
}

ExpertMemory::ExpertMemory(size_t experts, size_t bytes_per_expert)
    : experts_(experts), stride_(bytes_per_expert) {
  void* base = mmap(nullptr, experts * stride_, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) throw std::bad_alloc();
  base_ = static_cast<uint8_t*>(base);
  // Decoding walks the weights once per token: with 4 KiB pages a good part of the bandwidth goes
  // to the page tables. The advice may be refused, it only costs speed.
  madvise(base, experts * stride_, MADV_HUGEPAGE);
}

ExpertMemory::~ExpertMemory() { munmap(base_, experts_ * stride_); }

void ExpertMemory::Release(size_t expert) {
  // Whole pages only: the neighbours share the first and the last.
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t first = (reinterpret_cast<uintptr_t>(At(expert)) + page - 1) / page * page;
  const uintptr_t last = reinterpret_cast<uintptr_t>(At(expert) + stride_) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
}

ExpertLayer::ExpertLayer(const LayerSpec& spec, const Kernels& kernels,
                         std::shared_ptr<ThreadPool> pool, std::shared_ptr<ScratchPool> scratch)
    : spec_(spec),
      kernels_(kernels),
      layout_(LayoutOf(spec)),
      pool_(std::move(pool)),
      scratch_(std::move(scratch)),
      memory_(spec.num_experts, layout_.bytes),
      resident_(spec.num_experts) {}

const char* ExpertLayer::Load(size_t expert, const ExpertSource& source) {
  uint8_t* base = memory_.At(expert);
  resident_[expert].store(false, std::memory_order_release);
  const size_t scratch_bytes =
      std::max(PackScratchBytes(layout_.up), PackScratchBytes(layout_.down));
  std::vector<float> scratch(scratch_bytes / sizeof(float) + 1);
  const auto pack = [&](const SourceMatrix& from, const MatrixLayout& layout, size_t offset,
                        size_t stride) {
    return kernels_.pack({from, &layout, base + offset, stride, scratch.data()});
  };
  const auto refuse = [&](const char* projection) {
    memory_.Release(expert);
    return projection;
  };
  if (layout_.has_gate && !pack(source.gate, layout_.up, layout_.GatePanel(0), layout_.up_stride))
    return refuse("gate");
  if (!pack(source.up, layout_.up, layout_.UpPanel(0), layout_.up_stride)) return refuse("up");
  if (!pack(source.down, layout_.down, layout_.DownPanel(0), layout_.down.panel_bytes))
    return refuse("down");
  if (layout_.has_bias) {
    const auto copy = [&](const float* from, size_t offset, const MatrixLayout& m) {
      std::memset(base + offset, 0, m.panels * kPanel * 4);
      std::memcpy(base + offset, from, m.rows * 4);
    };
    if (layout_.has_gate) copy(source.gate_bias, layout_.GateBias(), layout_.up);
    copy(source.up_bias, layout_.UpBias(), layout_.up);
    copy(source.down_bias, layout_.DownBias(), layout_.down);
  }
  resident_[expert].store(true, std::memory_order_release);
  return nullptr;
}

void ExpertLayer::Unload(size_t expert) {
  if (resident_[expert].exchange(false)) memory_.Release(expert);
}

std::span<const uint8_t> ExpertLayer::Bytes(size_t expert) const {
  return {memory_.At(expert), layout_.bytes};
}

void ExpertLayer::CheckIds(const int64_t* expert_ids, size_t tokens, size_t top_k) const {
  for (size_t i = 0; i < tokens * top_k; ++i) {
    const int64_t id = expert_ids[i];
    if (id == -1) continue;
    if (id < -1 || id >= static_cast<int64_t>(spec_.num_experts))
      throw std::invalid_argument("expert id " + std::to_string(id) + " of token " +
                                  std::to_string(i / top_k) + " is outside -1.." +
                                  std::to_string(spec_.num_experts - 1));
    if (!IsResident(static_cast<size_t>(id)))
      throw std::invalid_argument("expert " + std::to_string(id) + " is not resident");
  }
}

std::shared_ptr<ForwardJob> ExpertLayer::Submit(const ForwardArgs& args) {
  CheckIds(args.expert_ids, args.tokens, args.top_k);
  auto job = std::make_shared<ForwardJob>(*this, args);
  pool_->Submit(job);
  return job;
}

std::shared_ptr<Job> ExpertLayer::SubmitLora(const TrainingArgs& args) {
  CheckIds(args.expert_ids, args.tokens, args.top_k);
  auto job = std::make_shared<LoraForwardJob>(*this, args);
  pool_->Submit(job);
  return job;
}

std::shared_ptr<Job> ExpertLayer::SubmitBackward(const TrainingArgs& args) {
  CheckIds(args.expert_ids, args.tokens, args.top_k);
  auto job = std::make_shared<BackwardJob>(*this, args);
  pool_->Submit(job);
  return job;
}

void ExpertLayer::Wait(Job& job) { pool_->Wait(job); }

}  // namespace kt
