#include "generator.hpp"

#include <mutex>

#include "current.hpp"
#include "settings.hpp"

namespace kt_sim {

SimGenerator::SimGenerator(int device, uint64_t seed) : at::CPUGeneratorImpl(seed) {
  device_ = c10::Device(kDeviceType, static_cast<c10::DeviceIndex>(device));
  key_set_ = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
}

at::Generator SimGenerator::next() {
  std::lock_guard<std::mutex> lock(mutex_);
  return at::make_generator<at::CPUGeneratorImpl>(random64());
}

SimGenerator* SimGenerator::clone_impl() const {
  auto* copy = new SimGenerator(device_.index());
  copy->set_engine(const_cast<SimGenerator*>(this)->engine());
  return copy;
}

at::Generator new_generator(int device) { return at::make_generator<SimGenerator>(device); }

const at::Generator& default_generator(int device) {
  static auto* all = [] {
    auto* made = new std::vector<at::Generator>;
    for (int index = 0; index < fix_settings().devices; ++index) {
      made->push_back(new_generator(index));
    }
    return made;
  }();
  return all->at(static_cast<size_t>(device));
}

}  // namespace kt_sim
