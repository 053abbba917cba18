// Arguments of an operator, kept until its task runs: tensors as spans, everything else as it is.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/ivalue.h>

#include <optional>
#include <utility>
#include <vector>

#include "span.hpp"

namespace kt_sim {

// Applies `change` to every tensor of a value: to itself, or to the members of a list. Undefined
// and absent tensors are left alone.
template <typename Change>
c10::IValue map_tensors(const c10::IValue& value, const Change& change) {
  const auto apply = [&](const at::Tensor& tensor) {
    return tensor.defined() ? change(tensor) : tensor;
  };
  if (value.isTensor()) return apply(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> changed;
    for (const at::Tensor& tensor : value.toTensorVector()) changed.push_back(apply(tensor));
    return changed;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> changed;
    for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector()) {
      std::optional<at::Tensor> next;
      if (tensor.has_value()) next = apply(*tensor);
      changed.push_back(std::move(next));
    }
    return changed;
  }
  return value;
}

template <typename Visit>
void for_each_tensor(const c10::IValue& value, const Visit& visit) {
  map_tensors(value, [&](const at::Tensor& tensor) {
    visit(tensor);
    return tensor;
  });
}

// One argument, kept.
class Argument {
 public:
  explicit Argument(const c10::IValue& value);
  // Random numbers: drawn from now, or, where a graph is captured, anew in every replay.
  Argument(const at::Generator& generator, bool draws_in_task);

  // The argument for the CPU: to be called in the task.
  c10::IValue on_host() const;

 private:
  c10::IValue value_;
  std::vector<Span> spans_;  // of the device's tensors in value_, in their order
  bool draws_ = false;
};

}  // namespace kt_sim
