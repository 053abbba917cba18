#include "dense/linear_layer.hpp"

#include <cstring>
#include <stdexcept>
#include <vector>

#include "dense/linear_job.hpp"

namespace kt {
namespace {

// Waking a sleeping worker takes some 20 us, in which one core reads this much: smaller calls are
// the caller's own.
constexpr size_t kSmallestSharedBytes = 512 << 10;

}  // namespace

LinearLayout LayoutOf(const LinearSpec& s) {
  LinearLayout layout{
      MakeLayout(s.element, s.scale, s.offset, s.group, s.out_features, s.in_features), s.has_bias,
      0, 0};
  layout.bias_offset = layout.weight.panels * layout.weight.panel_bytes;
  const size_t bias_bytes = s.has_bias ? layout.weight.panels * kPanel * sizeof(float) : 0;
  layout.bytes = RoundUp(layout.bias_offset + bias_bytes, kRowBytes);
  return layout;
}

LinearLayer::LinearLayer(const LinearSpec& spec, const Kernels& kernels,
                         std::shared_ptr<ThreadPool> pool, std::shared_ptr<ScratchPool> scratch)
    : layout_(LayoutOf(spec)),
      kernels_(kernels),
      pool_(std::move(pool)),
      scratch_(std::move(scratch)),
      memory_(1, layout_.bytes) {}

bool LinearLayer::Load(const SourceMatrix& weight, const float* bias) {
  const MatrixLayout& m = layout_.weight;
  mapped_.reset();
  std::vector<float> scratch(PackScratchBytes(m) / sizeof(float) + 1);
  is_loaded_ = kernels_.pack({weight, &m, memory_.At(0), m.panel_bytes, scratch.data()});
  if (!is_loaded_) {
    memory_.Release(0);
    return false;
  }
  if (layout_.has_bias) {
    float* target = reinterpret_cast<float*>(memory_.At(0) + layout_.bias_offset);
    std::memset(target, 0, m.panels * kPanel * sizeof(float));
    std::memcpy(target, bias, m.rows * sizeof(float));
  }
  return true;
}

void LinearLayer::MapPacked(std::shared_ptr<const uint8_t> packed) {
  if (reinterpret_cast<uintptr_t>(packed.get()) % kRowBytes != 0)
    throw std::invalid_argument("a packed layer must lie at a multiple of 64 bytes");
  memory_.Release(0);
  mapped_ = std::move(packed);
  is_loaded_ = true;
}

template <class Job>
void LinearLayer::Run(const LinearArgs& args) const {
  if (!is_loaded_) throw std::invalid_argument("the layer has no weights: load them first");
  if (args.rows == 0) return;
  if (pool_->threads() == 1 || args.rows * layout_.bias_offset < kSmallestSharedBytes) {
    Job job(*this, args);
    for (size_t phase = 0; phase < job.Phases(); ++phase)
      for (size_t chunk = 0; chunk < job.Chunks(phase); ++chunk) job.Run(phase, chunk);
    return;
  }
  const auto job = std::make_shared<Job>(*this, args);
  pool_->Submit(job);
  pool_->Wait(*job);
}

void LinearLayer::Apply(const LinearArgs& args) const { Run<LinearForwardJob>(args); }

void LinearLayer::GradInput(const LinearArgs& args) const { Run<LinearBackwardJob>(args); }

}  // namespace kt
