#include "moe/forward_job.hpp"

#include <algorithm>
#include <cstring>

#include "moe/buffers.hpp"

namespace kt {
namespace {

// Half of a common L2 cache.
constexpr size_t kOutBytesPerChunk = 512 << 10;

// What a pair of panels costs: with few tokens, reading it.
size_t UnitCost(size_t tokens) { return std::max<size_t>(tokens, 6); }

}  // namespace

ForwardJob::ForwardJob(ExpertLayer& layer, const ForwardArgs& args)
    : layer_(layer),
      args_(args),
      scratch_pool_(layer.scratch_),
      scratch_(scratch_pool_->Take()),
      num_parts_(layer.parts_.size()) {
  GroupPairs();
  SizeScratch();
  CutIntoChunks();
}

ForwardJob::~ForwardJob() { scratch_pool_->Give(std::move(scratch_)); }

// Counting sort of the pairs by expert; within an expert, tokens stay in order.
void ForwardJob::GroupPairs() {
  const size_t experts = layer_.spec_.num_experts, pairs = args_.tokens * args_.top_k;
  std::vector<size_t>& start = scratch_->start;
  start.assign(experts + 1, 0);
  scratch_->active.clear();
  for (size_t i = 0; i < pairs; ++i)
    if (args_.expert_ids[i] >= 0) ++start[static_cast<size_t>(args_.expert_ids[i]) + 1];
  for (size_t e = 0; e < experts; ++e) {
    if (start[e + 1] > 0) scratch_->active.push_back({e, start[e], start[e + 1], 0});
    start[e + 1] += start[e];
  }
  scratch_->tokens.resize(start[experts]);
  scratch_->weights.resize(start[experts]);
  for (size_t i = 0; i < pairs; ++i) {
    if (args_.expert_ids[i] < 0) continue;
    const size_t at = start[static_cast<size_t>(args_.expert_ids[i])]++;
    scratch_->tokens[at] = static_cast<int32_t>(i / args_.top_k);
    scratch_->weights[at] = args_.weights[i];
  }
}

void ForwardJob::SizeScratch() {
  const ExpertLayout& e = layer_.layout_;
  const size_t pairs = scratch_->tokens.size();
  hidden_rows_ = MakeActivationRows(args_.precision, e.up, kHiddenGroup);
  inter_rows_ = MakeActivationRows(args_.precision, e.down, kInterGroup);
  inter_stride_ = e.up.panels * kPanel;
  GrowTo(scratch_->hidden, args_.tokens * hidden_rows_.row_bytes + kRowBytes);
  GrowTo(scratch_->inter_rows, pairs * inter_rows_.row_bytes + kRowBytes);
  GrowTo(scratch_->inter, pairs * inter_stride_);
  GrowTo(scratch_->out, args_.tokens * e.down.panels * kPanel);
  hidden_rows_.data = AlignedStart(scratch_->hidden);
  inter_rows_.data = AlignedStart(scratch_->inter_rows);
}

// Contiguous chunks, so that a thread reads one long stream of weights; several per thread, so that
// nobody waits long for the last one.
void ForwardJob::CutIntoChunks() {
  const std::vector<LayerPart>& parts = layer_.parts_;
  const size_t threads = layer_.pool_->threads();
  unit_cost_ = 0;
  for (Scratch::ActiveExpert& active : scratch_->active) {
    active.cost = unit_cost_;
    unit_cost_ += UnitCost(active.count);
  }
  // Of the largest part, where there are several.
  size_t gate_up_units = 0, down_units = 0;
  for (const LayerPart& part : parts) {
    gate_up_units = std::max(gate_up_units, GateUpUnits(part));
    down_units = std::max(down_units, PanelPairs(part.layout.down.panels));
  }
  units_[0] = args_.tokens;
  units_[1] = scratch_->active.size() * gate_up_units;
  units_[2] = scratch_->tokens.size();
  units_[3] = args_.tokens ? down_units : 0;
  for (size_t i = 0; i < 4; ++i) {
    const size_t sharing = IsByPart(i) ? (threads + parts.size() - 1) / parts.size() : threads;
    const size_t wanted = threads == 1 ? 1 : sharing * (i == 1 ? 8 : 4);
    per_chunk_[i] = std::max<size_t>(1, (units_[i] + wanted - 1) / wanted);
  }
  // All experts add to the same panels of the output: they should stay in the L2 cache meanwhile.
  const size_t pair_bytes = 2 * args_.tokens * kPanel * sizeof(float);
  per_chunk_[3] = std::min(
      per_chunk_[3], std::max<size_t>(1, kOutBytesPerChunk / std::max<size_t>(1, pair_bytes)));
  for (size_t i = 0; i < 4; ++i) chunks_[i] = (units_[i] + per_chunk_[i] - 1) / per_chunk_[i];
}

size_t ForwardJob::GateUpUnits(const LayerPart& part) {
  return part.layout.has_gate ? part.layout.up.panels : PanelPairs(part.layout.up.panels);
}

// Where the chunk of a part begins among its units (active expert, pair of panels): chunks cost
// about the same, however unevenly tokens are spread over experts.
size_t ForwardJob::GateUpUnit(const LayerPart& part, size_t chunk) const {
  const size_t units = GateUpUnits(part);
  const auto& active = scratch_->active;
  if (chunk == chunks_[1]) return active.size() * units;
  const size_t cost = unit_cost_ * units * chunk / chunks_[1];
  const auto after = std::upper_bound(active.begin(), active.end(), cost / units,
                                      [](size_t c, const auto& a) { return c < a.cost; });
  const auto at = after - 1;
  return static_cast<size_t>(at - active.begin()) * units +
         (cost - at->cost * units) / UnitCost(at->count);
}

size_t ForwardJob::Chunks(size_t phase) const {
  return IsByPart(phase) ? num_parts_ * chunks_[phase] : chunks_[phase];
}

size_t ForwardJob::FirstChunk(size_t phase, size_t node) const {
  return IsByPart(phase) ? std::min(node, num_parts_) * chunks_[phase]
                         : Job::FirstChunk(phase, node);
}

void ForwardJob::Run(size_t phase, size_t chunk) noexcept {
  const LayerPart& part = layer_.parts_[chunk / chunks_[phase]];  // the only one, or it is by part
  chunk %= chunks_[phase];
  if (phase == 1) return GateUp(part, GateUpUnit(part, chunk), GateUpUnit(part, chunk + 1));
  const size_t first = chunk * per_chunk_[phase];
  const size_t last = std::min(first + per_chunk_[phase], units_[phase]);
  switch (phase) {
    case 0: return PrepareHidden(first, last);
    case 2: return PrepareInter(first, last);
    default: return Down(part, 2 * first, std::min(2 * last, part.layout.down.panels));
  }
}

void ForwardJob::PrepareHidden(size_t first, size_t last) noexcept {
  const size_t hidden = layer_.spec_.hidden_size;
  layer_.kernels_.prepare(
      {args_.hidden, args_.type, hidden, first, last, &layer_.layout_.up, hidden_rows_});
}

// A chunk may span several experts.
void ForwardJob::GateUp(const LayerPart& part, size_t first, size_t last) noexcept {
  const ExpertLayout& e = part.layout;
  const size_t panels_per_unit = e.has_gate ? 1 : 2, units = GateUpUnits(part);
  uint8_t* unpacked = ThreadScratch(layer_.kernels_.scratch_bytes(args_.precision, e.up));
  while (first < last) {
    const Scratch::ActiveExpert& active = scratch_->active[first / units];
    const size_t unit = first % units;
    const size_t end = std::min(units, unit + (last - first));
    Wanted next{};
    if (first + (end - unit) < last)
      next = {part.At(scratch_->active[first / units + 1].expert), 2 * e.up.panel_bytes};
    layer_.kernels_.gate_up(
        {part.At(active.expert),
         &e,
         hidden_rows_,
         scratch_->tokens.data() + active.first,
         active.count,
         layer_.spec_.activation,
         scratch_->inter.data() + active.first * inter_stride_ + part.first_up * kPanel,
         nullptr,
         inter_stride_,
         unit * panels_per_unit,
         std::min(end * panels_per_unit, e.up.panels),
         unpacked,
         {next, {}}});
    first += end - unit;
  }
}

void ForwardJob::PrepareInter(size_t first, size_t last) noexcept {
  layer_.kernels_.prepare({scratch_->inter.data(), DType::kFloat32, inter_stride_, first, last,
                           &layer_.layout_.down, inter_rows_});
}

// Every thread owns some pairs of output panels and adds all experts to them, in ascending order:
// no races, and the same sums whatever the number of threads.
void ForwardJob::Down(const LayerPart& part, size_t first_panel, size_t last_panel) noexcept {
  if (first_panel >= last_panel) return;  // the part is smaller than the largest one
  const ExpertLayout& e = part.layout;
  uint8_t* unpacked = ThreadScratch(layer_.kernels_.scratch_bytes(args_.precision, e.down));
  float* out = scratch_->out.data() + part.first_down * args_.tokens * kPanel;
  std::memset(out + first_panel * args_.tokens * kPanel, 0,
              (last_panel - first_panel) * args_.tokens * kPanel * sizeof(float));
  for (size_t a = 0; a < scratch_->active.size(); ++a) {
    const Scratch::ActiveExpert& active = scratch_->active[a];
    ActivationRows rows = inter_rows_;
    rows.data += active.first * rows.row_bytes;
    // An expert has few panels here: its first ones, and its rows, are a good part of it all.
    Wanted panels{}, next_rows{};
    if (a + 1 < scratch_->active.size()) {
      const Scratch::ActiveExpert& next = scratch_->active[a + 1];
      panels = {part.At(next.expert) + e.DownPanel(first_panel), 2 * e.down.panel_bytes};
      next_rows = {inter_rows_.data + next.first * rows.row_bytes, next.count * rows.row_bytes};
    }
    layer_.kernels_.down({part.At(active.expert),
                          &e,
                          rows,
                          scratch_->tokens.data() + active.first,
                          scratch_->weights.data() + active.first,
                          active.count,
                          out,
                          args_.tokens,
                          first_panel,
                          last_panel,
                          unpacked,
                          {panels, next_rows}});
  }
  StoreOut(part.first_down + first_panel, part.first_down + last_panel);
}

// From [panels, tokens, 16] to [tokens, hidden].
void ForwardJob::StoreOut(size_t first_panel, size_t last_panel) noexcept {
  StorePanels({scratch_->out.data() + first_panel * args_.tokens * kPanel, args_.tokens, 0,
               args_.tokens, first_panel, last_panel, args_.out, args_.type,
               layer_.spec_.hidden_size});
}

}  // namespace kt
