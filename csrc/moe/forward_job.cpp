#include "moe/forward_job.hpp"

#include <algorithm>
#include <cstring>

#include "format/bfloat16.hpp"

namespace kt {
namespace {

// 64-byte aligned start within a vector that has 64 bytes to spare.
uint8_t* Aligned(std::vector<uint8_t>& buffer) {
  return reinterpret_cast<uint8_t*>(RoundUp(reinterpret_cast<uintptr_t>(buffer.data()), kRowBytes));
}

template <class T>
void Grow(std::vector<T>& buffer, size_t n) {
  if (buffer.size() < n) buffer.resize(n);
}

}  // namespace

ForwardJob::ForwardJob(ExpertLayer& layer, const ForwardArgs& args)
    : layer_(layer), args_(args), scratch_pool_(layer.scratch_), scratch_(scratch_pool_->Take()) {
  GroupPairs();
  SizeScratch();
  const ExpertLayout& e = layer_.layout_;
  units_[0] = args_.tokens;
  units_[1] = active_.size() * e.up.panels;
  units_[2] = tokens_.size();
  units_[3] = args_.tokens ? e.down.panels : 0;
  // Contiguous chunks, so that a thread reads one long stream of weights; a few per thread, so that
  // experts with many tokens do not make the others wait.
  const size_t wanted = layer_.pool_->threads() == 1 ? 1 : layer_.pool_->threads() * 4;
  for (size_t i = 0; i < 4; ++i)
    per_chunk_[i] = std::max<size_t>(1, (units_[i] + wanted - 1) / wanted);
}

ForwardJob::~ForwardJob() { scratch_pool_->Give(std::move(scratch_)); }

// Counting sort of the pairs by expert; within an expert, tokens stay in order.
void ForwardJob::GroupPairs() {
  const size_t experts = layer_.spec_.num_experts, pairs = args_.tokens * args_.top_k;
  std::vector<size_t> start(experts + 1, 0);
  for (size_t i = 0; i < pairs; ++i)
    if (args_.expert_ids[i] >= 0) ++start[static_cast<size_t>(args_.expert_ids[i]) + 1];
  for (size_t e = 0; e < experts; ++e) {
    if (start[e + 1] > 0) active_.push_back({e, start[e], start[e + 1]});
    start[e + 1] += start[e];
  }
  tokens_.resize(start[experts]);
  weights_.resize(start[experts]);
  for (size_t i = 0; i < pairs; ++i) {
    if (args_.expert_ids[i] < 0) continue;
    const size_t at = start[static_cast<size_t>(args_.expert_ids[i])]++;
    tokens_[at] = static_cast<int32_t>(i / args_.top_k);
    weights_[at] = args_.weights[i];
  }
}

void ForwardJob::SizeScratch() {
  const ExpertLayout& e = layer_.layout_;
  hidden_rows_ = MakeActivationRows(args_.precision, e.up);
  inter_rows_ = MakeActivationRows(args_.precision, e.down);
  inter_stride_ = e.up.panels * kPanel;
  out_stride_ = e.down.panels * kPanel;
  Grow(scratch_->hidden, args_.tokens * hidden_rows_.row_bytes + kRowBytes);
  Grow(scratch_->inter_rows, tokens_.size() * inter_rows_.row_bytes + kRowBytes);
  Grow(scratch_->inter, tokens_.size() * inter_stride_);
  Grow(scratch_->out, args_.tokens * out_stride_);
  hidden_rows_.data = Aligned(scratch_->hidden);
  inter_rows_.data = Aligned(scratch_->inter_rows);
}

size_t ForwardJob::Chunks(size_t phase) const {
  return (units_[phase] + per_chunk_[phase] - 1) / per_chunk_[phase];
}

void ForwardJob::Run(size_t phase, size_t chunk) noexcept {
  const size_t first = chunk * per_chunk_[phase];
  const size_t last = std::min(first + per_chunk_[phase], units_[phase]);
  switch (phase) {
    case 0: return PrepareHidden(first, last);
    case 1: return GateUp(first, last);
    case 2: return PrepareInter(first, last);
    default: return Down(first, last);
  }
}

void ForwardJob::PrepareHidden(size_t first, size_t last) noexcept {
  const size_t hidden = layer_.spec_.hidden_size;
  layer_.kernels_.prepare(
      {args_.hidden, args_.type, hidden, first, last, &layer_.layout_.up, hidden_rows_});
  std::memset(scratch_->out.data() + first * out_stride_, 0,
              (last - first) * out_stride_ * sizeof(float));
}

// Units are (active expert, panel), experts first: a chunk may span several experts.
void ForwardJob::GateUp(size_t first, size_t last) noexcept {
  const size_t panels = layer_.layout_.up.panels;
  while (first < last) {
    const ActiveExpert& active = active_[first / panels];
    const size_t panel = first % panels;
    const size_t end = std::min(panels, panel + (last - first));
    layer_.kernels_.gate_up({layer_.memory_.At(active.expert), &layer_.layout_, hidden_rows_,
                             tokens_.data() + active.first, active.count, layer_.spec_.activation,
                             scratch_->inter.data() + active.first * inter_stride_, inter_stride_,
                             panel, end});
    first += end - panel;
  }
}

void ForwardJob::PrepareInter(size_t first, size_t last) noexcept {
  layer_.kernels_.prepare({scratch_->inter.data(), DType::kFloat32, inter_stride_, first, last,
                           &layer_.layout_.down, inter_rows_});
}

// Every thread owns some output panels and adds all experts to them, in ascending order: no races,
// and the same sums whatever the number of threads.
void ForwardJob::Down(size_t first, size_t last) noexcept {
  for (const ActiveExpert& active : active_) {
    ActivationRows rows = inter_rows_;
    rows.data += active.first * rows.row_bytes;
    layer_.kernels_.down({layer_.memory_.At(active.expert), &layer_.layout_, rows,
                          tokens_.data() + active.first, weights_.data() + active.first,
                          active.count, scratch_->out.data(), out_stride_, first, last});
  }
  StoreOut(first, last);
}

void ForwardJob::StoreOut(size_t first_panel, size_t last_panel) noexcept {
  const size_t hidden = layer_.spec_.hidden_size;
  const size_t begin = first_panel * kPanel, end = std::min(last_panel * kPanel, hidden);
  for (size_t t = 0; t < args_.tokens; ++t) {
    const float* from = scratch_->out.data() + t * out_stride_;
    if (args_.type == DType::kFloat32) {
      std::memcpy(static_cast<float*>(args_.out) + t * hidden + begin, from + begin,
                  (end - begin) * sizeof(float));
    } else {
      uint16_t* to = static_cast<uint16_t*>(args_.out) + t * hidden;
      for (size_t h = begin; h < end; ++h) to[h] = ToBf16(from[h]);
    }
  }
}

}  // namespace kt
