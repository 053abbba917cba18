// What an operator's results will look like, without running it: asked of torch's meta device.
#pragma once

#include <c10/util/DimVector.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "calling.hpp"

namespace kt_sim {

struct Prediction {
  Values results;  // meta tensors
  // Arguments that are outputs, by number, with the shape they get if theirs is another.
  std::vector<std::pair<size_t, c10::DimVector>> resized;
};

// Thrown where only numbers in memory can tell, where torch knows no meta kernel, and where the
// arguments are wrong, which the operator itself explains better.
struct Unpredictable {
  std::string why;
};

// Remembers answers: many meta kernels are written in Python and take longer than the operator.
std::shared_ptr<const Prediction> predict(const c10::OperatorHandle& op, const Values& arguments);

}  // namespace kt_sim
