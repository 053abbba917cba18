#include "dense/linear_job.hpp"

#include <algorithm>
#include <array>
#include <cstring>

#include "moe/buffers.hpp"

namespace kt {
namespace {

// A block of rows and what it becomes stay in the L2 cache while they meet a chunk of panels.
constexpr size_t kBlockBytes = 512 << 10;
constexpr size_t kOutBytes = 128 << 10;
constexpr size_t kFewestBlockRows = 64;  // fewer, and unpacking the weights again shows
constexpr size_t kMostBlockRows = 256;
constexpr size_t kChunksPerThread = 8;

// Inputs that share a scale of the int8 activations. A dense layer does not know what it is given:
// with what stands before a down projection, 32 errs a fifth less than 64, for no time that shows.
constexpr size_t kDenseGroup = kInterGroup;

// Every row goes to the one expert, in order and with weight 1.
constexpr auto kRowNumbers = [] {
  std::array<int32_t, kMostBlockRows> numbers{};
  for (size_t i = 0; i < kMostBlockRows; ++i) numbers[i] = static_cast<int32_t>(i);
  return numbers;
}();
constexpr auto kOnes = [] {
  std::array<float, kMostBlockRows> ones{};
  ones.fill(1.0f);
  return ones;
}();

size_t BlockRows(const ActivationRows& rows) {
  return std::clamp(kBlockBytes / rows.row_bytes, kFewestBlockRows, kMostBlockRows);
}

}  // namespace

LinearJob::LinearJob(const LinearLayer& layer, const LinearArgs& args, const ActivationRows& rows,
                     size_t width)
    : layer_(layer),
      args_(args),
      scratch_pool_(layer.scratch()),
      scratch_(scratch_pool_->Take()),
      rows_(rows),
      width_(width) {
  GrowTo(scratch_->hidden, args.rows * rows_.row_bytes + kRowBytes);
  rows_.data = AlignedStart(scratch_->hidden);
}

LinearJob::~LinearJob() { scratch_pool_->Give(std::move(scratch_)); }

void LinearJob::CutIntoChunks(size_t most_pairs) {
  const size_t threads = layer_.pool().threads();
  const size_t wanted = threads == 1 ? 1 : threads * kChunksPerThread;
  const auto cut = [&](size_t units, size_t most) {
    const size_t even = (units + wanted - 1) / wanted;
    const size_t per_chunk = std::max<size_t>(1, std::min(even, most));
    return Phase{units, per_chunk, (units + per_chunk - 1) / per_chunk};
  };
  phases_[0] = cut(args_.rows, args_.rows);
  phases_[1] = cut((panels() + 1) / 2, most_pairs);
}

void LinearJob::Run(size_t phase, size_t chunk) noexcept {
  const Phase& p = phases_[phase];
  const Range units{chunk * p.per_chunk, std::min((chunk + 1) * p.per_chunk, p.units)};
  if (phase == 1) return Multiply({2 * units.first, std::min(2 * units.last, panels())});
  layer_.kernels().prepare(
      {args_.source, args_.type, args_.source_stride, units.first, units.last, &weight(), rows_});
}

void LinearJob::Store(const float* from, size_t panel_rows, Range rows,
                      Range panels) const noexcept {
  StorePanels({from, panel_rows, rows.first, rows.last, panels.first, panels.last, args_.target,
               args_.type, width_});
}

LinearForwardJob::LinearForwardJob(const LinearLayer& layer, const LinearArgs& args)
    : LinearJob(layer, args, MakeActivationRows(args.precision, layer.layout().weight, kDenseGroup),
                layer.layout().weight.rows) {
  const size_t most_rows = BlockRows(rows_);
  blocks_ = (args.rows + most_rows - 1) / most_rows;
  const size_t block_rows = (args.rows + blocks_ - 1) / blocks_;
  CutIntoChunks(kOutBytes / (2 * block_rows * kPanel * sizeof(float)));
}

void LinearForwardJob::StartWithBias(Range panels, size_t rows, float* out) const noexcept {
  if (!layer_.layout().has_bias) {
    std::memset(out, 0, panels.size() * rows * kPanel * sizeof(float));
    return;
  }
  const uint8_t* bias = layer_.data() + layer_.layout().bias_offset;
  for (size_t p = panels.first; p < panels.last; ++p)
    for (size_t r = 0; r < rows; ++r, out += kPanel)
      std::memcpy(out, bias + p * kPanel * sizeof(float), kPanel * sizeof(float));
}

void LinearForwardJob::Multiply(Range panels) noexcept {
  // One expert that begins with these panels.
  const ExpertLayout expert{false, false, {}, weight(), 0, 0, 0, 0};
  const size_t block_rows = (args_.rows + blocks_ - 1) / blocks_;
  const size_t out_bytes = panels.size() * block_rows * kPanel * sizeof(float);
  uint8_t* scratch =
      ThreadScratch(out_bytes + layer_.kernels().scratch_bytes(args_.precision, weight()));
  float* out = reinterpret_cast<float*>(scratch);
  for (size_t block = 0; block < blocks_; ++block) {
    const Range rows{args_.rows * block / blocks_, args_.rows * (block + 1) / blocks_};
    ActivationRows activations = rows_;
    activations.data += rows.first * rows_.row_bytes;
    StartWithBias(panels, rows.size(), out);
    layer_.kernels().down({layer_.data() + panels.first * weight().panel_bytes,
                           &expert,
                           activations,
                           kRowNumbers.data(),
                           kOnes.data(),
                           rows.size(),
                           out,
                           rows.size(),
                           0,
                           panels.size(),
                           scratch + out_bytes,
                           {}});
    Store(out, rows.size(), rows, panels);
  }
}

LinearBackwardJob::LinearBackwardJob(const LinearLayer& layer, const LinearArgs& args)
    : LinearJob(layer, args,
                MakeActivationRows(GradPrecision(args.precision),
                                   TransposedLayout(layer.layout().weight, 1), kHiddenGroup),
                layer.layout().weight.cols) {
  GrowTo(scratch_->out, args.rows * panels() * kPanel);
  CutIntoChunks(panels());
}

void LinearBackwardJob::Multiply(Range panels) noexcept {
  float* out = scratch_->out.data();
  layer_.kernels().transposed(
      {{layer_.data(), nullptr},
       weight().panel_bytes,
       &weight(),
       rows_,
       nullptr,
       nullptr,
       args_.rows,
       out,
       args_.rows * kPanel,
       kPanel,
       false,
       panels.first,
       panels.last,
       ThreadScratch(TransposedScratchBytes(rows_.precision, weight(), 1))});
  Store(out + panels.first * args_.rows * kPanel, args_.rows, {0, args_.rows}, panels);
}

}  // namespace kt
