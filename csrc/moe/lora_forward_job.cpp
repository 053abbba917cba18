#include "moe/lora_forward_job.hpp"

#include "moe/buffers.hpp"

namespace kt {

LoraForwardJob::LoraForwardJob(ExpertLayer& layer, const TrainingArgs& args)
    : TrainingJob(layer, args) {
  const size_t pairs = pairs_.tokens.size();
  inter_rows_ = MakeActivationRows(args.precision, layout().down, kInterGroup);
  GrowTo(buffers_.inter, pairs * inter_stride_);
  GrowTo(buffers_.inter_rows, pairs * inter_rows_.row_bytes + kRowBytes);
  inter_rows_.data = AlignedStart(buffers_.inter_rows);
  Cut(0, args.tokens);
  CutExperts(1);
  Cut(2, pairs_.blocks.size());
  CutOutput(3, true);
}

void LoraForwardJob::Run(size_t phase, size_t chunk) noexcept {
  const Range units = Units(phase, chunk);
  switch (phase) {
    case 0: return PrepareHidden(units);
    case 1:
      return ForExpertPanels(PartOf(1, chunk), units,
                             [&](const PairGroups::Active& active, Range panels) {
                               RawGateUp(PartOf(1, chunk), active, panels);
                             });
    case 2:
      for (size_t i = units.first; i < units.last; ++i) Activate(pairs_.blocks[i]);
      return;
    default: return Down(PartOf(3, chunk), PanelsOf(PartOf(3, chunk).layout.down, units));
  }
}

void LoraForwardJob::Activate(const PairGroups::Block& block) noexcept {
  const size_t expert = pairs_.active[block.active].expert;
  AddLoraToGateUp(block);
  kernels().activate(layer_.spec().activation, Row(gate(), block.first),
                     Row(buffers_.up, block.first), Row(buffers_.inter, block.first),
                     block.count * inter_stride_);
  if (down_lora_.exists()) {
    down_lora_.ToRank(Lora::Side::kA, expert, Row(buffers_.inter, block.first), inter_stride_,
                      block.count, Inner(kDown, block.first));
    WeighRank(block, buffers_.inner[kDown]);
  }
  kernels().prepare({buffers_.inter.data(), DType::kFloat32, inter_stride_, block.first,
                     block.first + block.count, &layout().down, inter_rows_});
}

void LoraForwardJob::Down(const LayerPart& part, Range panels) noexcept {
  if (panels.first == panels.last) return;
  const ExpertLayout& e = part.layout;
  uint8_t* unpacked = ThreadScratch(kernels().scratch_bytes(args_.precision, e.down));
  float* out = buffers_.out.data() + part.first_down * args_.tokens * kPanel;
  const Range among_all{part.first_down + panels.first, part.first_down + panels.last};
  ClearOut(among_all);
  for (const PairGroups::Active& active : pairs_.active) {
    ActivationRows rows = inter_rows_;
    rows.data += active.first * rows.row_bytes;
    kernels().down({part.At(active.expert),
                    &e,
                    rows,
                    pairs_.tokens.data() + active.first,
                    pairs_.weights.data() + active.first,
                    active.count,
                    out,
                    args_.tokens,
                    panels.first,
                    panels.last,
                    unpacked,
                    {}});
    if (down_lora_.exists())
      AddLoraToOut(down_lora_, Lora::Side::kB, active, Inner(kDown, active.first), among_all);
  }
  StoreOut(among_all, args_.out);
}

}  // namespace kt
