#pragma once
#include "moe/training_job.hpp"

namespace kt {

// One backward pass of one layer, from the packed weights the forward pass reads. For token x with
// expert e and routing weight w, and G the gradient of the token's output:
//
//   d = Wd^T G                  gradient of what stands between up and down, but for w
//   grad_w = d . act(g, u) + G . bias
//   grad_g, grad_u = w d act'(g, u)
//   grad_x += Wg^T grad_g + Wu^T grad_u
//
// With low-rank additions W + s B A, and a = A x, q = B^T (gradient of the projection's output):
//
//   g, u += s B a    d += s A^T q    grad_x += s A^T q    grad_A = s q x^T    grad_B = s grad a^T
//
// Phases: convert x and G; g, u and d; additions, derivative of the activation, converted; grad_x;
// gradients of A and B. All that LoRA adds is float32. Gradients
// are rounded to bfloat16 where they meet weights, once each, and summed in float32; nothing is
// rounded where the precision is float32.
class BackwardJob : public TrainingJob {
 public:
  BackwardJob(ExpertLayer& layer, const TrainingArgs& args);

  size_t Phases() const override { return has_lora_ ? 5 : 4; }
  void Run(size_t phase, size_t chunk) noexcept override;

 private:
  void SizeRows();
  void PrepareGradOut(Range tokens) noexcept;
  void RawGradInter(const PairGroups::Active& active, Range panels) noexcept;
  void PrepareGradInter(const PairGroups::Block& block) noexcept;
  void ActivationGrads(const PairGroups::Block& block) noexcept;
  float BiasGrad(size_t expert, size_t token) const noexcept;
  void AddLoraToGradInter(const PairGroups::Block& block) noexcept;
  void FinishLora(const PairGroups::Block& block) noexcept;
  void AddGradHidden(size_t part, const PairGroups::Active& active, Range panels) noexcept;
  void GradHidden(Range panels) noexcept;
  void GradLora(const PairGroups::Active& active, Projection p, Lora::Side side) noexcept;

  bool has_lora_;
  Precision grad_precision_;
  // Of each part of the layer, what meets its weights.
  std::vector<ActivationRows> grad_out_rows_;    // [tokens]
  std::vector<ActivationRows> grad_inter_rows_;  // [pairs], of gate and then of up
};

}  // namespace kt
