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
  CutOutput(3);
}

void LoraForwardJob::Run(size_t phase, size_t chunk) noexcept {
  const Range units = Units(phase, chunk);
  switch (phase) {
    case 0: return PrepareHidden(units);
    case 1:
      return ForExpertPanels(units, [&](const PairGroups::Active& active, Range panels) {
        RawGateUp(active, panels);
      });
    case 2:
      for (size_t i = units.first; i < units.last; ++i) Activate(pairs_.blocks[i]);
      return;
    default: return Down(OutputPanels(units));
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

void LoraForwardJob::Down(Range panels) noexcept {
  const ExpertLayout& e = layout();
  uint8_t* unpacked = TrainingThreadScratch(kernels().scratch_bytes(args_.precision, e.down));
  ClearOut(panels);
  for (const PairGroups::Active& active : pairs_.active) {
    ActivationRows rows = inter_rows_;
    rows.data += active.first * rows.row_bytes;
    kernels().down({Weights(active.expert), &e, rows, pairs_.tokens.data() + active.first,
                    pairs_.weights.data() + active.first, active.count, buffers_.out.data(),
                    args_.tokens, panels.first, panels.last, unpacked});
    if (down_lora_.exists())
      AddLoraToOut(down_lora_, Lora::Side::kB, active, Inner(kDown, active.first), panels);
  }
  StoreOut(panels, args_.out);
}

}  // namespace kt
