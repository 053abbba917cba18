// Calls of operators by their handle, with boxed arguments.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty_strided.h>

#include <vector>

#include "current.hpp"

namespace kt_sim {

using Values = std::vector<c10::IValue>;

inline bool is_ours(const at::Tensor& tensor) { return tensor.device().type() == kDeviceType; }

// A new tensor of the same shape, strides and type.
inline at::Tensor like(const at::Tensor& tensor, c10::Device device) {
  return at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(device));
}

inline bool is_generator(const c10::Argument& argument, const c10::IValue& value) {
  return value.isGenerator() || (value.isNone() && argument.name() == "generator");
}

inline bool writes(const c10::Argument& argument) {
  return argument.alias_info() != nullptr && argument.alias_info()->isWrite();
}

// Runs the operator on tensors that are not of this device type; records no gradients.
Values call(const c10::OperatorHandle& op, Values arguments);

}  // namespace kt_sim
