// A tensor as a stream task sees it: where its bytes lie and how. It owns nothing: as on a GPU,
// memory that is freed while work on it waits may be used by what is put into the same stream
// afterwards.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/DimVector.h>

namespace kt_sim {

struct Span {
  explicit Span(const at::Tensor& tensor);

  // A CPU tensor over the bytes: for use inside a task only.
  at::Tensor on_host() const;
  size_t bytes() const { return static_cast<size_t>(numel) * element_bytes; }

  void* data;  // on the host
  c10::DimVector sizes, strides;
  c10::ScalarType dtype;
  int64_t numel;
  size_t element_bytes;
  bool is_conjugate, is_negative;  // complex numbers: conjugated when they are read
};

}  // namespace kt_sim
