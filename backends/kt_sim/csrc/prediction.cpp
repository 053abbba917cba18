#include "prediction.hpp"

#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <mutex>
#include <unordered_map>

#include "arguments.hpp"

namespace kt_sim {
namespace {

// A step of a model has some hundred different calls; numbers among the arguments make more.
constexpr size_t kMostRemembered = 8192;

// Everything about a call that its prediction can depend on, as bytes.
class Key {
 public:
  Key(const c10::OperatorHandle& op, const Values& arguments) {
    add(&op.schema());
    for (const c10::IValue& value : arguments) add_value(value);
  }
  // Whether there is nothing in the call that this does not know.
  bool is_whole() const { return is_whole_; }
  const std::string& bytes() const { return bytes_; }

 private:
  template <typename Plain>
  void add(const Plain& value) {
    bytes_.append(reinterpret_cast<const char*>(&value), sizeof(value));
  }

  void add_numbers(at::IntArrayRef numbers) {
    add(numbers.size());
    for (const int64_t number : numbers) add(number);
  }

  void add_tensor(const at::Tensor& tensor) {
    add(tensor.defined());
    if (!tensor.defined()) return;
    add(tensor.scalar_type());
    add(tensor.device().type());
    add(tensor.unsafeGetTensorImpl()->is_wrapped_number());
    add(tensor.is_conj());
    add(tensor.is_neg());
    add_numbers(tensor.sizes());
    add_numbers(tensor.strides());
  }

  void add_value(const c10::IValue& value) {
    bytes_ += value.tagKind();
    if (value.isNone()) return;
    if (value.isTensor()) {
      add_tensor(value.toTensor());
    } else if (value.isTensorList() || value.isOptionalTensorList()) {
      add(value.toListRef().size());
      for (const c10::IValue& member : value.toListRef()) {
        add_tensor(member.isTensor() ? member.toTensor() : at::Tensor());
      }
    } else if (value.isInt()) {
      add(value.toInt());
    } else if (value.isDouble()) {
      add(value.toDouble());
    } else if (value.isBool()) {
      add(value.toBool());
    } else if (value.isIntList()) {
      add_numbers(value.toIntVector());
    } else if (value.isBoolList()) {
      for (const bool flag : value.toBoolList()) add(flag);
      add(value.toBoolList().size());
    } else if (value.isDevice() || value.isGenerator()) {
      // Neither is seen on the meta device.
    } else if (value.isString()) {
      add(value.toStringRef().size());
      bytes_ += value.toStringRef();
    } else {
      is_whole_ = false;
    }
  }

  std::string bytes_;
  bool is_whole_ = true;
};

c10::IValue on_meta(const c10::Argument& argument, const c10::IValue& value) {
  if (is_generator(argument, value)) return {};
  if (value.isDevice()) return c10::Device(at::kMeta);
  return map_tensors(value, [](const at::Tensor& tensor) {
    return is_ours(tensor) ? like(tensor, at::kMeta) : tensor;
  });
}

std::shared_ptr<const Prediction> ask(const c10::OperatorHandle& op, const Values& arguments) {
  const auto& schema = op.schema();
  Values meta;
  for (size_t i = 0; i < arguments.size(); ++i) {
    meta.push_back(on_meta(schema.arguments()[i], arguments[i]));
  }
  auto made = std::make_shared<Prediction>();
  try {
    made->results = call(op, meta);
  } catch (const std::exception& error) {
    const std::string why = error.what();
    throw Unpredictable{why.substr(0, why.find('\n'))};
  }
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (!writes(schema.arguments()[i]) || !arguments[i].isTensor()) continue;
    if (!arguments[i].toTensor().defined()) continue;
    const auto wanted = meta[i].toTensor().sizes();
    if (arguments[i].toTensor().sizes() != wanted) made->resized.emplace_back(i, wanted);
  }
  return made;
}

}  // namespace

Values call(const c10::OperatorHandle& op, Values arguments) {
  const c10::NoGradGuard no_grad;
  const c10::impl::ExcludeDispatchKeyGuard no_autograd(c10::autograd_dispatch_keyset);
  op.callBoxed(&arguments);
  return arguments;
}

std::shared_ptr<const Prediction> predict(const c10::OperatorHandle& op, const Values& arguments) {
  static auto* mutex = new std::mutex;
  static auto* remembered = new std::unordered_map<std::string, std::shared_ptr<const Prediction>>;
  const Key key(op, arguments);
  if (!key.is_whole()) return ask(op, arguments);
  {
    std::lock_guard<std::mutex> lock(*mutex);
    const auto found = remembered->find(key.bytes());
    if (found != remembered->end()) return found->second;
  }
  auto made = ask(op, arguments);  // not under the lock: it may run Python
  std::lock_guard<std::mutex> lock(*mutex);
  if (remembered->size() >= kMostRemembered) remembered->clear();
  remembered->emplace(key.bytes(), made);
  return made;
}

}  // namespace kt_sim
