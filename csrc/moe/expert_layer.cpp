#include "moe/expert_layer.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "moe/backward_job.hpp"
#include "moe/forward_job.hpp"
#include "moe/gather_job.hpp"
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

ExpertLayer::ExpertLayer(const LayerSpec& spec, const Kernels& kernels,
                         std::shared_ptr<ThreadPool> pool, std::shared_ptr<ScratchPool> scratch,
                         std::shared_ptr<NodeBinder> binder)
    : spec_(spec),
      kernels_(kernels),
      layout_(LayoutOf(spec)),
      pool_(std::move(pool)),
      scratch_(std::move(scratch)),
      binder_(std::move(binder)),
      parts_(MakeLayerParts(layout_, spec.num_experts, pool_->threads_of_nodes(), *binder_)),
      resident_(spec.num_experts),
      owners_(spec.num_experts) {}

ExpertLayer::~ExpertLayer() {
  for (size_t n = 0; n < parts_.size(); ++n) binder_->Unbind(parts_[n].memory.bytes(), n);
}

const char* ExpertLayer::Load(size_t expert, const ExpertSource& source) {
  resident_[expert].store(false, std::memory_order_release);
  BringHome(expert);
  const size_t scratch_bytes =
      std::max(PackScratchBytes(layout_.up), PackScratchBytes(layout_.down));
  std::vector<float> scratch(scratch_bytes / sizeof(float) + 1);
  for (const LayerPart& part : parts_)
    if (const char* bad = Pack(part, expert, source, scratch.data())) {
      for (LayerPart& any : parts_) any.memory.Release(expert);
      return bad;
    }
  resident_[expert].store(true, std::memory_order_release);
  return nullptr;
}

const char* ExpertLayer::Pack(const LayerPart& part, size_t expert, const ExpertSource& source,
                              float* scratch) {
  const ExpertLayout& e = part.layout;
  uint8_t* base = part.memory.At(expert);
  const auto pack = [&](const SourceMatrix& whole, const MatrixLayout& layout, size_t first_panel,
                        size_t offset, size_t stride) {
    const SourceMatrix from = RowsFrom(whole, layout, first_panel * kPanel);
    return kernels_.pack({from, &layout, base + offset, stride, scratch});
  };
  if (e.has_gate && !pack(source.gate, e.up, part.first_up, e.GatePanel(0), e.up_stride))
    return "gate";
  if (!pack(source.up, e.up, part.first_up, e.UpPanel(0), e.up_stride)) return "up";
  if (!pack(source.down, e.down, part.first_down, e.DownPanel(0), e.down.panel_bytes))
    return "down";
  if (e.has_bias) {
    const auto copy = [&](const float* from, size_t first_panel, size_t offset,
                          const MatrixLayout& m) {
      std::memset(base + offset, 0, m.panels * kPanel * 4);
      std::memcpy(base + offset, from + first_panel * kPanel, m.rows * 4);
    };
    if (e.has_gate) copy(source.gate_bias, part.first_up, e.GateBias(), e.up);
    copy(source.up_bias, part.first_up, e.UpBias(), e.up);
    copy(source.down_bias, part.first_down, e.DownBias(), e.down);
  }
  return nullptr;
}

void ExpertLayer::Unload(size_t expert) {
  if (!resident_[expert].exchange(false)) return;
  const bool is_mapped = owners_[expert] != nullptr;
  BringHome(expert);
  if (is_mapped) return;
  for (LayerPart& part : parts_) part.memory.Release(expert);
}

void ExpertLayer::LoadPacked(size_t expert, const uint8_t* packed) {
  resident_[expert].store(false, std::memory_order_release);
  BringHome(expert);
  CutIntoParts(parts_, layout_, packed, expert);
  resident_[expert].store(true, std::memory_order_release);
}

bool ExpertLayer::MapPacked(size_t expert, const uint8_t* packed, std::shared_ptr<void> owner) {
  if (parts_.size() != 1) return false;
  if (reinterpret_cast<uintptr_t>(packed) % kRowBytes != 0)
    throw std::invalid_argument("packed experts must lie at a multiple of 64 bytes");
  Unload(expert);
  parts_.front().places[expert] = packed;
  owners_[expert] = std::move(owner);
  num_mapped_.fetch_add(1, std::memory_order_relaxed);
  resident_[expert].store(true, std::memory_order_release);
  return true;
}

void ExpertLayer::BringHome(size_t expert) {
  for (LayerPart& part : parts_) part.places[expert] = part.memory.At(expert);
  if (owners_[expert] == nullptr) return;
  owners_[expert].reset();
  num_mapped_.fetch_sub(1, std::memory_order_relaxed);
}

void ExpertLayer::ReadAhead(const int64_t* expert_ids, size_t pairs) const {
  std::vector<bool> is_seen(spec_.num_experts);
  for (size_t i = 0; i < pairs; ++i) {
    if (expert_ids[i] < 0 || owners_[static_cast<size_t>(expert_ids[i])] == nullptr) continue;
    const auto expert = static_cast<size_t>(expert_ids[i]);
    if (is_seen[expert]) continue;
    is_seen[expert] = true;
    ReadAheadIfAbsent(parts_.front().At(expert), layout_.bytes);
  }
}

const uint8_t* ExpertLayer::Packed(size_t expert) const {
  return parts_.size() == 1 ? parts_.front().At(expert) : nullptr;
}

void ExpertLayer::CopyPacked(size_t expert, uint8_t* target) const {
  JoinParts(parts_, layout_, expert, target);
}

void ExpertLayer::GatherPacked(const std::vector<int64_t>& experts, uint8_t* target) const {
  for (const int64_t expert : experts) CheckResident(static_cast<size_t>(expert));
  if (num_mapped_.load(std::memory_order_relaxed) != 0) ReadAhead(experts.data(), experts.size());
  const auto job = std::make_shared<GatherJob>(parts_, layout_, experts, target);
  pool_->Submit(job);
  pool_->Wait(*job);
}

void ExpertLayer::CheckResident(size_t expert) const {
  if (!IsResident(expert))
    throw std::invalid_argument("expert " + std::to_string(expert) + " is not resident");
}

void ExpertLayer::CheckIds(const int64_t* expert_ids, size_t tokens, size_t top_k) const {
  for (size_t i = 0; i < tokens * top_k; ++i) {
    const int64_t id = expert_ids[i];
    if (id == -1) continue;
    if (id < -1 || id >= static_cast<int64_t>(spec_.num_experts))
      throw std::invalid_argument("expert id " + std::to_string(id) + " of token " +
                                  std::to_string(i / top_k) + " is outside -1.." +
                                  std::to_string(spec_.num_experts - 1));
    CheckResident(static_cast<size_t>(id));
  }
}

std::shared_ptr<ForwardJob> ExpertLayer::SubmitForward(const ForwardArgs& args,
                                                       bool is_unattended) {
  CheckIds(args.expert_ids, args.tokens, args.top_k);
  if (num_mapped_.load(std::memory_order_relaxed) != 0)
    ReadAhead(args.expert_ids, args.tokens * args.top_k);
  auto job = std::make_shared<ForwardJob>(*this, args);
  if (is_unattended) pool_->SubmitUnattended(job);
  else pool_->Submit(job);
  return job;
}

std::shared_ptr<Job> ExpertLayer::SubmitLora(const TrainingArgs& args) {
  CheckIds(args.expert_ids, args.tokens, args.top_k);
  if (num_mapped_.load(std::memory_order_relaxed) != 0)
    ReadAhead(args.expert_ids, args.tokens * args.top_k);
  auto job = std::make_shared<LoraForwardJob>(*this, args);
  pool_->Submit(job);
  return job;
}

std::shared_ptr<Job> ExpertLayer::SubmitBackward(const TrainingArgs& args) {
  CheckIds(args.expert_ids, args.tokens, args.top_k);
  if (num_mapped_.load(std::memory_order_relaxed) != 0)
    ReadAhead(args.expert_ids, args.tokens * args.top_k);
  auto job = std::make_shared<BackwardJob>(*this, args);
  pool_->Submit(job);
  return job;
}

void ExpertLayer::Wait(Job& job) { pool_->Wait(job); }

}  // namespace kt
