#pragma once
#include "dense/linear_layer.hpp"

namespace kt {

// One pass of a dense layer, in two phases: convert the rows, then multiply. A thread owns the
// output panels of its chunks: there is no race, and the result does not depend on their number.
class LinearJob : public Job {
 public:
  ~LinearJob() override;
  size_t Phases() const override { return 2; }
  size_t Chunks(size_t phase) const override { return phases_[phase].chunks; }
  void Run(size_t phase, size_t chunk) noexcept override;

 protected:
  struct Range {
    size_t first, last;
    size_t size() const { return last - first; }
  };

  // `width` outputs in a row of the target; `most_pairs` pairs of output panels in a chunk.
  LinearJob(const LinearLayer& layer, const LinearArgs& args, const ActivationRows& rows,
            size_t width);
  void CutIntoChunks(size_t most_pairs);
  // Computes these output panels for all rows and stores them.
  virtual void Multiply(Range panels) noexcept = 0;
  // From [panels, panel_rows, 16], its first row and panel those of the ranges, to the target.
  void Store(const float* from, size_t panel_rows, Range rows, Range panels) const noexcept;

  const MatrixLayout& weight() const { return layer_.layout().weight; }
  size_t panels() const { return (width_ + kPanel - 1) / kPanel; }

  const LinearLayer& layer_;
  const LinearArgs args_;
  // Of its own: a worker may be the last to let go of a job, after the layer is gone.
  std::shared_ptr<ScratchPool> scratch_pool_;
  std::unique_ptr<Scratch> scratch_;
  ActivationRows rows_;
  const size_t width_;

 private:
  struct Phase {
    size_t units, per_chunk, chunks;
  };
  Phase phases_[2];
};

class LinearForwardJob : public LinearJob {
 public:
  LinearForwardJob(const LinearLayer& layer, const LinearArgs& args);

 protected:
  void Multiply(Range panels) noexcept override;

 private:
  void StartWithBias(Range panels, size_t rows, float* out) const noexcept;

  size_t blocks_;  // of rows
};

// The gradient of the input: the matrix is read along its other dimension.
class LinearBackwardJob : public LinearJob {
 public:
  LinearBackwardJob(const LinearLayer& layer, const LinearArgs& args);

 protected:
  void Multiply(Range panels) noexcept override;
};

}  // namespace kt
