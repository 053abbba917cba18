#include "arguments.hpp"

#include <ATen/ops/empty.h>

#include "current.hpp"
#include "generator.hpp"

namespace kt_sim {
namespace {

at::Generator next_of(const at::Generator& generator) {
  return static_cast<SimGenerator*>(generator.unsafeGetGeneratorImpl())->next();
}

}  // namespace

Argument::Argument(const c10::IValue& value) {
  // Device tensors leave a placeholder: a task keeps no memory alive. Numbers of the host's are
  // copied, since the caller may change them; those that torch made itself nobody else has.
  value_ = map_tensors(value, [&](const at::Tensor& tensor) -> at::Tensor {
    if (tensor.is_cpu()) {
      return tensor.unsafeGetTensorImpl()->is_wrapped_number() ? tensor : tensor.clone();
    }
    spans_.emplace_back(tensor);
    return at::empty({0}, at::TensorOptions().dtype(tensor.dtype()).device(at::kMeta));
  });
}

Argument::Argument(const at::Generator& generator, bool draws_in_task)
    : value_(draws_in_task ? generator : next_of(generator)), draws_(draws_in_task) {}

c10::IValue Argument::on_host() const {
  if (draws_) return next_of(value_.toGenerator());
  if (spans_.empty()) return value_;
  auto span = spans_.begin();
  return map_tensors(value_, [&](const at::Tensor& tensor) {
    return tensor.is_meta() ? (span++)->on_host() : tensor;
  });
}

}  // namespace kt_sim
