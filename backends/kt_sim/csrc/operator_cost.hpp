// What an operator costs on the device.
#pragma once

#include <ATen/core/function_schema.h>
#include <ATen/core/ivalue.h>

#include "timing.hpp"

namespace kt_sim {

// Every byte of arguments and results is moved once; products of matrices also take their
// multiply-adds. What it is made of inside is not looked at.
Cost operator_cost(const c10::FunctionSchema& schema, const std::vector<c10::IValue>& arguments,
                   const std::vector<c10::IValue>& results);

}  // namespace kt_sim
