#include "moe/training_job.hpp"

#include <algorithm>
#include <cstring>

#include "moe/buffers.hpp"

namespace kt {
namespace {

// Half of a common L2 cache.
constexpr size_t kOutBytesPerChunk = 512 << 10;
constexpr size_t kChunksPerThread = 8;

}  // namespace

TrainingJob::TrainingJob(ExpertLayer& layer, const TrainingArgs& args)
    : layer_(layer),
      args_(args),
      scratch_pool_(layer.scratch_),
      scratch_(scratch_pool_->Take()),
      buffers_(scratch_->training),
      pairs_(buffers_.pairs),
      gate_lora_(layer.kernels_, args.lora.gate, args.lora.scale, layer.spec_.hidden_size,
                 layer.spec_.intermediate_size),
      up_lora_(layer.kernels_, args.lora.up, args.lora.scale, layer.spec_.hidden_size,
               layer.spec_.intermediate_size),
      down_lora_(layer.kernels_, args.lora.down, args.lora.scale, layer.spec_.intermediate_size,
                 layer.spec_.hidden_size) {
  const ExpertLayout& e = layout();
  pairs_.Group(args.expert_ids, args.weights, args.tokens, args.top_k, layer.spec_.num_experts);
  inter_stride_ = e.up.panels * kPanel;
  panel_pairs_ = 0;
  for (const LayerPart& part : parts())
    panel_pairs_ = std::max(panel_pairs_, PanelPairs(part.layout.up.panels));
  hidden_rows_ = MakeActivationRows(args.precision, e.up, kHiddenGroup);
  GrowTo(buffers_.hidden, args.tokens * hidden_rows_.row_bytes + kRowBytes);
  hidden_rows_.data = AlignedStart(buffers_.hidden);
  const size_t values = pairs_.tokens.size() * inter_stride_;
  GrowTo(buffers_.up, values);
  if (e.has_gate) GrowTo(buffers_.gate, values);
  GrowTo(buffers_.out, args.tokens * e.down.panels * kPanel);
  for (size_t p = 0; p < 3; ++p)
    GrowTo(buffers_.inner[p], pairs_.tokens.size() * loras_[p]->rank_stride());
}

TrainingJob::~TrainingJob() { scratch_pool_->Give(std::move(scratch_)); }

void TrainingJob::Cut(size_t phase, size_t units, size_t parts, size_t most_per_chunk) {
  const size_t threads = layer_.pool_->threads(), sharing = (threads + parts - 1) / parts;
  const size_t wanted = threads == 1 ? 1 : sharing * kChunksPerThread;
  const size_t even = std::max<size_t>(1, (units + wanted - 1) / wanted);
  const size_t per_chunk = std::min(even, std::max<size_t>(1, most_per_chunk));
  phases_[phase] = {units, per_chunk, (units + per_chunk - 1) / per_chunk, parts};
}

void TrainingJob::CutExperts(size_t phase) {
  Cut(phase, pairs_.active.size() * panel_pairs_, parts().size());
}

void TrainingJob::CutOutput(size_t phase, bool is_by_part) {
  const size_t pair_bytes = 2 * args_.tokens * kPanel * sizeof(float);
  size_t pairs = is_by_part ? 0 : PanelPairs(layout().down.panels);
  if (is_by_part)
    for (const LayerPart& part : parts())
      pairs = std::max(pairs, PanelPairs(part.layout.down.panels));
  Cut(phase, args_.tokens ? pairs : 0, is_by_part ? parts().size() : 1,
      kOutBytesPerChunk / std::max<size_t>(1, pair_bytes));
}

TrainingJob::Range TrainingJob::Units(size_t phase, size_t chunk) const {
  const Phase& p = phases_[phase];
  chunk %= p.chunks;
  return {chunk * p.per_chunk, std::min((chunk + 1) * p.per_chunk, p.units)};
}

void TrainingJob::PrepareHidden(Range tokens) noexcept {
  kernels().prepare({args_.hidden, args_.type, layer_.spec().hidden_size, tokens.first, tokens.last,
                     &layout().up, hidden_rows_});
}

void TrainingJob::RawGateUp(const LayerPart& part, const PairGroups::Active& active,
                            Range panels) noexcept {
  uint8_t* unpacked = ThreadScratch(kernels().scratch_bytes(args_.precision, part.layout.up));
  const size_t first = part.first_up * kPanel;
  kernels().gate_up({part.At(active.expert),
                     &part.layout,
                     hidden_rows_,
                     pairs_.tokens.data() + active.first,
                     active.count,
                     layer_.spec().activation,
                     Row(buffers_.up, active.first) + first,
                     Row(gate(), active.first) + first,
                     inter_stride_,
                     panels.first,
                     panels.last,
                     unpacked,
                     {}});
}

void TrainingJob::AddLoraToGateUp(const PairGroups::Block& block) noexcept {
  if (!gate_lora_.exists() && !up_lora_.exists()) return;
  const size_t expert = pairs_.active[block.active].expert;
  const float* x = Gather(args_.hidden, block);
  const auto add = [&](Projection p, std::vector<float>& rows) {
    const Lora& lora = *loras_[p];
    if (!lora.exists()) return;
    lora.ToRank(Lora::Side::kA, expert, x, gathered_stride(), block.count, Inner(p, block.first));
    lora.FromRank(Lora::Side::kB, expert, Inner(p, block.first), block.count, 0, inter_stride_,
                  Row(rows, block.first), inter_stride_);
  };
  add(kGate, buffers_.gate);
  add(kUp, buffers_.up);
}

void TrainingJob::AddLoraToOut(const Lora& lora, Lora::Side side, const PairGroups::Active& active,
                               const float* narrow, Range panels) noexcept {
  thread_local std::vector<float> added;
  const size_t n = (panels.last - panels.first) * kPanel;
  added.assign(active.count * n, 0.0f);
  lora.FromRank(side, active.expert, narrow, active.count, panels.first * kPanel, n, added.data(),
                n);
  for (size_t i = 0; i < active.count; ++i) {
    const size_t token = static_cast<size_t>(pairs_.tokens[active.first + i]);
    for (size_t p = panels.first; p < panels.last; ++p) {
      const float* from = added.data() + i * n + (p - panels.first) * kPanel;
      float* to = buffers_.out.data() + (p * args_.tokens + token) * kPanel;
      for (size_t lane = 0; lane < kPanel; ++lane) to[lane] += from[lane];
    }
  }
}

void TrainingJob::WeighRank(const PairGroups::Block& block, std::vector<float>& rows) noexcept {
  const size_t stride = down_lora_.rank_stride();
  for (size_t i = block.first; i < block.first + block.count; ++i)
    for (size_t j = 0; j < stride; ++j) rows[i * stride + j] *= pairs_.weights[i];
}

const float* TrainingJob::Gather(const void* source, const PairGroups::Block& block) noexcept {
  thread_local std::vector<float> rows;
  GrowTo(rows, PairGroups::kBlockRows * gathered_stride());
  GatherRows(source, args_.type, layer_.spec().hidden_size, pairs_.tokens.data() + block.first,
             block.count, rows.data(), gathered_stride());
  return rows.data();
}

void TrainingJob::ClearOut(Range panels) noexcept {
  const size_t panel = args_.tokens * kPanel;
  std::memset(buffers_.out.data() + panels.first * panel, 0,
              (panels.last - panels.first) * panel * sizeof(float));
}

void TrainingJob::StoreOut(Range panels, void* target) noexcept {
  StorePanels({buffers_.out.data() + panels.first * args_.tokens * kPanel, args_.tokens, 0,
               args_.tokens, panels.first, panels.last, target, args_.type,
               layer_.spec().hidden_size});
}

}  // namespace kt
