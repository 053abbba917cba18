#include "moe/backward_job.hpp"

#include <algorithm>

#include "format/bfloat16.hpp"
#include "moe/buffers.hpp"

namespace kt {

BackwardJob::BackwardJob(ExpertLayer& layer, const TrainingArgs& args) : TrainingJob(layer, args) {
  const size_t pairs = pairs_.tokens.size();
  grad_precision_ = GradPrecision(args.precision);
  SizeRows();
  GrowTo(buffers_.grad_inter, pairs * inter_stride_);
  std::fill_n(args.grad_weights, args.tokens * args.top_k, 0.0f);
  has_lora_ = gate_lora_.exists() || up_lora_.exists() || down_lora_.exists();
  for (size_t p = 0; p < 3; ++p) GrowTo(buffers_.grad_inner[p], pairs * loras_[p]->rank_stride());
  if (down_lora_.exists()) GrowTo(buffers_.inter, pairs * inter_stride_);
  if (has_lora_) Cut(4, pairs_.active.size() * 6);
  Cut(0, args.tokens);
  CutExperts(1);
  Cut(2, pairs_.blocks.size());
  CutOutput(3, false);
}

// Rows of one part come after those of the one before it: a part's weights have outputs of their
// own, padded on their own.
void BackwardJob::SizeRows() {
  size_t grad_out_bytes = 0, grad_inter_bytes = 0;
  for (const LayerPart& part : parts()) {
    const ExpertLayout& e = part.layout;
    const auto rows = [&](const MatrixLayout& m) {
      return MakeActivationRows(grad_precision_, TransposedLayout(m, 1), kHiddenGroup);
    };
    grad_out_rows_.push_back(rows(e.down));
    grad_inter_rows_.push_back(rows(e.up));
    grad_inter_rows_.back().row_bytes *= e.has_gate ? 2 : 1;
    grad_out_bytes += args_.tokens * grad_out_rows_.back().row_bytes;
    grad_inter_bytes += pairs_.tokens.size() * grad_inter_rows_.back().row_bytes;
  }
  GrowTo(buffers_.grad_out, grad_out_bytes + kRowBytes);
  GrowTo(buffers_.grad_inter_rows, grad_inter_bytes + kRowBytes);
  uint8_t *grad_out = AlignedStart(buffers_.grad_out),
          *grad_inter = AlignedStart(buffers_.grad_inter_rows);
  for (size_t n = 0; n < parts().size(); ++n) {
    grad_out_rows_[n].data = grad_out;
    grad_inter_rows_[n].data = grad_inter;
    grad_out += args_.tokens * grad_out_rows_[n].row_bytes;
    grad_inter += pairs_.tokens.size() * grad_inter_rows_[n].row_bytes;
  }
}

void BackwardJob::Run(size_t phase, size_t chunk) noexcept {
  const Range units = Units(phase, chunk);
  switch (phase) {
    case 0: PrepareHidden(units); return PrepareGradOut(units);
    case 1:
      return ForExpertPanels(
          PartOf(1, chunk), units, [&](const PairGroups::Active& active, Range panels) {
            const LayerPart& part = PartOf(1, chunk);
            RawGateUp(part, active, panels);
            RawGradInter(active, {part.first_up + panels.first, part.first_up + panels.last});
          });
    case 2:
      for (size_t i = units.first; i < units.last; ++i) ActivationGrads(pairs_.blocks[i]);
      return;
    case 3: return GradHidden(PanelsOf(layout().down, units));
    default:
      for (size_t i = units.first; i < units.last; ++i)
        GradLora(pairs_.active[i / 6], static_cast<Projection>(i / 2 % 3),
                 i % 2 == 0 ? Lora::Side::kA : Lora::Side::kB);
  }
}

void BackwardJob::PrepareGradOut(Range tokens) noexcept {
  const size_t value_bytes = args_.type == DType::kFloat32 ? 4 : 2;
  for (size_t n = 0; n < parts().size(); ++n) {
    const size_t first = parts()[n].first_down * kPanel;
    kernels().prepare({static_cast<const uint8_t*>(args_.grad_out) + first * value_bytes,
                       args_.type, layer_.spec().hidden_size, tokens.first, tokens.last,
                       &parts()[n].layout.down, grad_out_rows_[n]});
  }
}

// The sum over the hidden size runs over all parts, in their order.
void BackwardJob::RawGradInter(const PairGroups::Active& active, Range panels) noexcept {
  for (size_t n = 0; n < parts().size(); ++n) {
    const ExpertLayout& e = parts()[n].layout;
    uint8_t* scratch = ThreadScratch(TransposedScratchBytes(grad_precision_, e.down, 1));
    kernels().transposed({{parts()[n].At(active.expert) + e.DownPanel(0), nullptr},
                          e.down.panel_bytes,
                          &e.down,
                          grad_out_rows_[n],
                          pairs_.tokens.data() + active.first,
                          nullptr,
                          active.count,
                          Row(buffers_.grad_inter, active.first),
                          kPanel,
                          inter_stride_,
                          n > 0,
                          panels.first,
                          panels.last,
                          scratch});
  }
}

void BackwardJob::ActivationGrads(const PairGroups::Block& block) noexcept {
  const ExpertLayout& e = layout();
  const size_t expert = pairs_.active[block.active].expert;
  AddLoraToGateUp(block);
  AddLoraToGradInter(block);
  for (size_t i = block.first; i < block.first + block.count; ++i) {
    float grad_weight =
        kernels().activation_grad({layer_.spec().activation, inter_stride_, pairs_.weights[i],
                                   Row(buffers_.grad_inter, i), Row(gate(), i), Row(buffers_.up, i),
                                   down_lora_.exists() ? Row(buffers_.inter, i) : nullptr});
    if (e.has_bias) grad_weight += BiasGrad(expert, static_cast<size_t>(pairs_.tokens[i]));
    args_.grad_weights[pairs_.slots[i]] = grad_weight;
  }
  FinishLora(block);
  PrepareGradInter(block);
}

void BackwardJob::PrepareGradInter(const PairGroups::Block& block) noexcept {
  for (size_t n = 0; n < parts().size(); ++n) {
    const LayerPart& part = parts()[n];
    ActivationRows rows = grad_inter_rows_[n];
    const auto prepare = [&](const std::vector<float>& from) {
      kernels().prepare({from.data() + part.first_up * kPanel, DType::kFloat32, inter_stride_,
                         block.first, block.first + block.count, &part.layout.up, rows});
      rows.data += rows.row_bytes / 2;
    };
    if (part.layout.has_gate) prepare(buffers_.gate);
    prepare(buffers_.up);
  }
}

// Of what stands between up and down, before the activation's derivative.
void BackwardJob::AddLoraToGradInter(const PairGroups::Block& block) noexcept {
  if (!down_lora_.exists()) return;
  const size_t expert = pairs_.active[block.active].expert;
  const float* grad_out = Gather(args_.grad_out, block);
  down_lora_.ToRank(Lora::Side::kB, expert, grad_out, gathered_stride(), block.count,
                    GradInner(kDown, block.first));
  down_lora_.FromRank(Lora::Side::kA, expert, GradInner(kDown, block.first), block.count, 0,
                      inter_stride_, Row(buffers_.grad_inter, block.first), inter_stride_);
}

// What the gradients of A and B need, once the gradients of gate and up are there.
void BackwardJob::FinishLora(const PairGroups::Block& block) noexcept {
  const size_t expert = pairs_.active[block.active].expert;
  const auto to_rank = [&](Projection p, Lora::Side side, std::vector<float>& rows, float* narrow) {
    loras_[p]->ToRank(side, expert, Row(rows, block.first), inter_stride_, block.count, narrow);
  };
  if (gate_lora_.exists())
    to_rank(kGate, Lora::Side::kB, buffers_.gate, GradInner(kGate, block.first));
  if (up_lora_.exists()) to_rank(kUp, Lora::Side::kB, buffers_.up, GradInner(kUp, block.first));
  if (!down_lora_.exists()) return;
  to_rank(kDown, Lora::Side::kA, buffers_.inter, Inner(kDown, block.first));
  WeighRank(block, buffers_.inner[kDown]);
  WeighRank(block, buffers_.grad_inner[kDown]);
}

// One matrix of one expert, its rows in ascending order.
void BackwardJob::GradLora(const PairGroups::Active& active, Projection p,
                           Lora::Side side) noexcept {
  const Lora& lora = *loras_[p];
  if (!lora.exists()) return;
  const bool is_a = side == Lora::Side::kA;
  lora.BeginGrad(side);
  for (const PairGroups::Block& block : pairs_.blocks) {
    if (&pairs_.active[block.active] != &active) continue;
    const float* wide = nullptr;
    size_t stride = inter_stride_;
    if (is_a == (p == kDown)) {
      wide = Row(is_a ? buffers_.inter : p == kGate ? buffers_.gate : buffers_.up, block.first);
    } else {
      wide = Gather(is_a ? args_.hidden : args_.grad_out, block);
      stride = gathered_stride();
    }
    lora.AddGrad(side, is_a ? GradInner(p, block.first) : Inner(p, block.first), wide, stride,
                 block.count);
  }
  lora.StoreGrad(side, active.expert);
}

float BackwardJob::BiasGrad(size_t expert, size_t token) const noexcept {
  float sum = 0;
  for (const LayerPart& part : parts()) {
    const ExpertLayout& e = part.layout;
    const float* bias = reinterpret_cast<const float*>(part.At(expert) + e.DownBias());
    const size_t first = token * layer_.spec().hidden_size + part.first_down * kPanel;
    for (size_t i = 0; i < e.down.rows; ++i) {
      const float grad = args_.type == DType::kFloat32
                             ? static_cast<const float*>(args_.grad_out)[first + i]
                             : Bf16ToFloat(static_cast<const uint16_t*>(args_.grad_out)[first + i]);
      sum += grad * bias[i];
    }
  }
  return sum;
}

// What the outputs of one part add.
void BackwardJob::AddGradHidden(size_t part, const PairGroups::Active& active,
                                Range panels) noexcept {
  const ExpertLayout& e = parts()[part].layout;
  uint8_t* scratch =
      ThreadScratch(TransposedScratchBytes(grad_precision_, e.up, e.has_gate ? 2 : 1));
  const uint8_t* up = parts()[part].At(active.expert) + e.UpPanel(0);
  const uint8_t* gate = parts()[part].At(active.expert) + e.GatePanel(0);
  ActivationRows rows = grad_inter_rows_[part];
  rows.data += active.first * rows.row_bytes;
  kernels().transposed({{e.has_gate ? gate : up, e.has_gate ? up : nullptr},
                        e.up_stride,
                        &e.up,
                        rows,
                        nullptr,
                        pairs_.tokens.data() + active.first,
                        active.count,
                        buffers_.out.data(),
                        args_.tokens * kPanel,
                        kPanel,
                        true,
                        panels.first,
                        panels.last,
                        scratch});
}

// As in the forward pass, every thread owns some panels and adds all experts to them, in ascending
// order: no races, and the same sums whatever the number of threads.
void BackwardJob::GradHidden(Range panels) noexcept {
  ClearOut(panels);
  for (const PairGroups::Active& active : pairs_.active) {
    for (size_t n = 0; n < parts().size(); ++n) AddGradHidden(n, active, panels);
    for (const Projection p : {kGate, kUp})
      if (loras_[p]->exists())
        AddLoraToOut(*loras_[p], Lora::Side::kA, active, GradInner(p, active.first), panels);
  }
  StoreOut(panels, args_.grad_hidden);
}

}  // namespace kt
