// Every operator that is not a copy or a view: torch's own for the CPU, run by the stream's thread
// over the bytes. What its results look like is asked of torch's meta device, so that the caller
// need not wait, and the operator can be captured. Where that depends on numbers in memory, the
// caller waits.
#include <c10/core/DeviceGuard.h>
#include <c10/core/GradMode.h>
#include <torch/library.h>

#include <algorithm>
#include <utility>

#include "arguments.hpp"
#include "calling.hpp"
#include "current.hpp"
#include "failure.hpp"
#include "generator.hpp"
#include "operator_cost.hpp"
#include "prediction.hpp"
#include "resize.hpp"

namespace kt_sim {
namespace {

using c10::IValue;

// Sees to it that everything is on one device, and says which.
class Placement {
 public:
  Placement(const c10::OperatorHandle& op, Values& arguments) : op_(op) {
    for (const IValue& value : arguments) {
      for_each_tensor(value, [&](const at::Tensor& tensor) {
        if (is_ours(tensor)) take(tensor.device().index());
      });
    }
    for (const IValue& value : arguments) {
      if (device_ < 0 && value.isDevice()) device_ = device_index(value.toDevice().index());
    }
    if (device_ < 0) device_ = current_device();
    for (IValue& value : arguments) {
      value = map_tensors(value, [&](const at::Tensor& tensor) { return bring(tensor); });
    }
  }
  int device() const { return device_; }

 private:
  void take(int device) {
    TORCH_CHECK(
        device_ < 0 || device_ == device,
        "Expected all tensors to be on the same device, but found at least two devices, sim:",
        device_, " and sim:", device, "! (in ", op_.schema().name(), ")");
    device_ = device;
  }

  at::Tensor bring(const at::Tensor& tensor) {
    if (is_ours(tensor) || (tensor.is_cpu() && tensor.dim() == 0)) return tensor;
    // As CUDA does: only indices may lie on the host, and are copied while it waits.
    const auto& name = op_.schema().name();
    const bool takes_host_indices = name.find("index") != std::string::npos && tensor.is_cpu() &&
                                    !at::isFloatingType(tensor.scalar_type());
    TORCH_CHECK(
        takes_host_indices,
        "Expected all tensors to be on the same device, but found at least two devices, sim:",
        device_, " and ", tensor.device(), "! (in ", name, ")");
    return tensor.to(c10::Device(kDeviceType, static_cast<c10::DeviceIndex>(device_)));
  }

  const c10::OperatorHandle& op_;
  int device_ = -1;
};

bool returns_tensors_alone(const c10::FunctionSchema& schema) {
  const auto is_tensor = [](const c10::Argument& result) {
    const auto kind = result.type()->kind();
    return kind == c10::TypeKind::TensorType ||
           (kind == c10::TypeKind::ListType &&
            result.type()->castRaw<c10::ListType>()->getElementType()->kind() ==
                c10::TypeKind::TensorType);
  };
  return std::all_of(schema.returns().begin(), schema.returns().end(), is_tensor);
}

// The argument that a result is, or -1 if it is a new tensor.
int returned_argument(const c10::FunctionSchema& schema, const c10::Argument& result) {
  if (result.alias_info() == nullptr) return -1;
  TORCH_CHECK_NOT_IMPLEMENTED(result.alias_info()->isWrite(), schema.name(),
                              " makes a view, which simulated devices do not know");
  for (size_t i = 0; i < schema.arguments().size(); ++i) {
    const auto* alias = schema.arguments()[i].alias_info();
    if (alias != nullptr && *alias == *result.alias_info()) return static_cast<int>(i);
  }
  TORCH_CHECK_NOT_IMPLEMENTED(false, schema.name(), " returns what it was not given");
}

// One call: what is asked, where, and the results as they become known.
class Call {
 public:
  Call(const c10::OperatorHandle& op, const c10::OperatorHandle& host_op, Values arguments)
      : host_op_(host_op),
        schema_(op.schema()),
        arguments_(std::move(arguments)),
        placement_(op, arguments_),
        where_(kDeviceType, static_cast<c10::DeviceIndex>(placement_.device())),
        queue_(current_queue(placement_.device())) {
    check_not_lost(placement_.device());
  }

  Values run() {
    const c10::DeviceGuard guard(where_);
    std::string why_not = "its result is no tensor";
    if (returns_tensors_alone(schema_)) {
      try {
        return run_later(*predict(host_op_, arguments_));
      } catch (const Unpredictable& reason) {
        why_not = reason.why;
      }
    }
    return run_now(why_not);
  }

 private:
  std::vector<Argument> kept_arguments() const {
    std::vector<Argument> kept;
    const bool is_captured = queue_.recording() != nullptr;
    for (size_t i = 0; i < arguments_.size(); ++i) {
      if (is_generator(schema_.arguments()[i], arguments_[i])) {
        kept.emplace_back(generator(i), is_captured);
      } else if (arguments_[i].isDevice()) {
        kept.emplace_back(IValue(c10::Device(at::kCPU)));
      } else {
        kept.emplace_back(arguments_[i]);
      }
    }
    return kept;
  }

  at::Generator generator(size_t i) const {
    if (arguments_[i].isNone()) return default_generator(placement_.device());
    const at::Generator given = arguments_[i].toGenerator();
    TORCH_CHECK(given.device().type() == kDeviceType,
                "Expected a 'sim' device type for generator "
                "but found '",
                given.device().type(), "'");
    return given;
  }

  static Values on_host(const std::vector<Argument>& kept) {
    Values values;
    for (const Argument& argument : kept) values.push_back(argument.on_host());
    return values;
  }

  Values run_later(const Prediction& predicted) {
    for (const auto& [i, sizes] : predicted.resized) resize(arguments_[i].toTensor(), sizes);
    Values results;
    std::vector<std::pair<size_t, Argument>> fresh;  // results by number, to be filled by the task
    for (size_t i = 0; i < predicted.results.size(); ++i) {
      const int argument = returned_argument(schema_, schema_.returns()[i]);
      if (argument >= 0) {
        results.push_back(arguments_[static_cast<size_t>(argument)]);
        continue;
      }
      results.push_back(map_tensors(
          predicted.results[i], [&](const at::Tensor& tensor) { return like(tensor, where_); }));
      fresh.emplace_back(i, Argument(results.back()));
    }
    const Cost cost = operator_cost(schema_, arguments_, results);
    queue_.push({[op = host_op_, kept = kept_arguments(), fresh = std::move(fresh), cost] {
                   const Values computed = call(op, on_host(kept));
                   for (const auto& [i, result] : fresh) fill(result.on_host(), computed[i]);
                   return cost;
                 },
                 false, "operator " + schema_.name()});
    return results;
  }

  static void fill(const IValue& result, const IValue& computed) {
    const c10::NoGradGuard no_grad;
    std::vector<at::Tensor> sources;
    for_each_tensor(computed, [&](const at::Tensor& tensor) { sources.push_back(tensor); });
    auto source = sources.begin();
    for_each_tensor(result, [&](const at::Tensor& tensor) {
      TORCH_CHECK(source != sources.end() && source->sizes() == tensor.sizes() &&
                      source->scalar_type() == tensor.scalar_type(),
                  "its result is not what torch's meta device said it would be");
      tensor.copy_(*source++);
    });
  }

  // The caller waits for the stream, computes, and the results are copied in the stream's order.
  Values run_now(const std::string& why) {
    const std::string what =
        "operator " + schema_.name() + " (the host must know its numbers first: " + why + ")";
    queue_.refuse_while_recording(what);
    for (const c10::Argument& result : schema_.returns()) returned_argument(schema_, result);
    const auto kept = kept_arguments();
    queue_.synchronize();
    const Values computed = call(host_op_, on_host(kept));
    Values results;
    for (size_t i = 0; i < computed.size(); ++i) {
      const int argument = returned_argument(schema_, schema_.returns()[i]);
      results.push_back(argument >= 0 ? arguments_[static_cast<size_t>(argument)]
                                      : map_tensors(computed[i], [&](const at::Tensor& tensor) {
                                          return to_device(tensor);
                                        }));
    }
    const Cost cost = operator_cost(schema_, arguments_, results);
    queue_.push({[cost] { return cost; }, false, "operator " + schema_.name()});
    return results;
  }

  at::Tensor to_device(const at::Tensor& computed) {
    at::Tensor made = like(computed, where_);
    queue_.push({[computed, made = Span(made)] {
                   const c10::NoGradGuard no_grad;
                   made.on_host().copy_(computed);
                   return Cost{};
                 },
                 false, "a result"});
    return made;
  }

  const c10::OperatorHandle host_op_;
  const c10::FunctionSchema& schema_;
  Values arguments_;
  Placement placement_;
  c10::Device where_;
  Queue& queue_;
};

// torch asks other devices for convolutions by another name than its own.
c10::OperatorHandle host_operator(const c10::OperatorHandle& op) {
  if (op.schema().name() != "aten::convolution_overrideable") return op;
  return c10::Dispatcher::singleton().findSchemaOrThrow("aten::convolution", "");
}

void run_operator(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const size_t count = op.schema().arguments().size();
  const auto given = torch::jit::last(stack, count);
  Call call(op, host_operator(op), Values(given.begin(), given.end()));
  Values results = call.run();
  torch::jit::drop(stack, count);
  for (IValue& result : results) torch::jit::push(stack, std::move(result));
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_operator>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("convolution_overrideable",
               torch::CppFunction::makeFromBoxedFunction<&run_operator>());
}

}  // namespace
}  // namespace kt_sim
