#include "operator_cost.hpp"

#include <ATen/core/Tensor.h>

#include <string_view>
#include <unordered_map>

#include "arguments.hpp"

namespace kt_sim {
namespace {

// Products of matrices: which argument is the left one, whose last size is what is summed over.
const std::unordered_map<std::string_view, size_t> kProducts = {
    {"aten::mm", 0},    {"aten::bmm", 0},     {"aten::mv", 0},
    {"aten::dot", 0},   {"aten::addmm", 1},   {"aten::addmm_", 1},
    {"aten::addmv", 1}, {"aten::baddbmm", 1}, {"aten::_int_mm", 0}};

double multiply_adds(std::string_view name, const std::vector<c10::IValue>& arguments,
                     double outputs) {
  if (const auto found = kProducts.find(name); found != kProducts.end()) {
    const auto& left = arguments[found->second];
    if (left.isTensor()) return outputs * static_cast<double>(left.toTensor().size(-1));
  }
  const bool is_convolution = name == "aten::convolution_overrideable";
  if (is_convolution && arguments[1].toTensor().numel() > 0) {
    const at::Tensor& weight = arguments[1].toTensor();  // [out, in / groups, *kernel]
    return outputs * static_cast<double>(weight.numel() / weight.size(0));
  }
  return 0;
}

}  // namespace

Cost operator_cost(const c10::FunctionSchema& schema, const std::vector<c10::IValue>& arguments,
                   const std::vector<c10::IValue>& results) {
  double bytes = 0, outputs = 0;
  bool is_16_bit = false;
  const auto add = [&](const at::Tensor& tensor) {
    bytes += static_cast<double>(tensor.nbytes());
    is_16_bit |= tensor.scalar_type() == at::kHalf || tensor.scalar_type() == at::kBFloat16;
  };
  const auto is_argument = [&](const at::Tensor& tensor) {
    bool found = false;
    for (const auto& value : arguments) {
      for_each_tensor(value, [&](const at::Tensor& other) { found |= other.is_same(tensor); });
    }
    return found;
  };
  for (const auto& value : arguments) for_each_tensor(value, add);
  for (const auto& value : results) {
    for_each_tensor(value, [&](const at::Tensor& tensor) {
      if (!is_argument(tensor)) add(tensor);
      outputs += static_cast<double>(tensor.numel());
    });
  }
  return kernel_cost(bytes, 2 * multiply_adds(schema.name(), arguments, outputs), is_16_bit);
}

}  // namespace kt_sim
