// What torch asks of every device type: current device and stream, events, waiting.
#include <c10/core/Allocator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include "current.hpp"
#include "event.hpp"

namespace kt_sim {
namespace {

Event* event_of(void* opaque) { return static_cast<Event*>(opaque); }

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kDeviceType; }

  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before = getDevice();
    setDevice(device);
    return before;
  }
  c10::Device getDevice() const override { return at(current_device()); }
  void setDevice(c10::Device device) const override {
    if (device.index() >= 0) set_current_device(device.index());
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.index() >= 0 && device.index() < num_devices()) set_current_device(device.index());
  }
  c10::DeviceIndex deviceCount() const noexcept override {
    return static_cast<c10::DeviceIndex>(num_devices());
  }
  c10::DeviceCapability getDeviceCapability(c10::Device) const override { return {}; }

  c10::Stream getStream(c10::Device device) const override {
    const int index = device_index(device.index());
    return stream(index, current_stream_id(index));
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return stream(device_index(device.index()), 0);
  }
  c10::Stream getNewStream(c10::Device device, int) const override {
    const int index = device_index(device.index());
    return stream(index, next_pooled_stream(index));
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    return getNewStream(device, 0);
  }
  c10::Stream exchangeStream(c10::Stream wanted) const override {
    const c10::Stream before = getStream(wanted.device());
    set_current_stream_id(device_index(wanted.device_index()), wanted.id());
    return before;
  }
  void* getStreamNativeHandle(const c10::Stream stream) const override { return &queue(stream); }
  bool queryStream(const c10::Stream& stream) const override { return queue(stream).is_idle(); }
  void synchronizeStream(const c10::Stream& stream) const override { queue(stream).synchronize(); }
  bool isStreamCapturing(const c10::Stream& stream) const override {
    return queue(stream).recording() != nullptr;
  }
  void synchronizeDevice(c10::DeviceIndex device) const override {
    synchronize_device(device_index(device));
  }

  void record(void** event, const c10::Stream& stream, c10::DeviceIndex,
              c10::EventFlag) const override {
    if (*event == nullptr) *event = new Event;
    event_of(*event)->record(queue(stream));
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (event != nullptr) event_of(event)->block(queue(stream));
  }
  bool queryEvent(void* event) const override {
    return event == nullptr || event_of(event)->query();
  }
  void synchronizeEvent(void* event) const override {
    if (event != nullptr) event_of(event)->synchronize();
  }
  void destroyEvent(void* event, c10::DeviceIndex) const noexcept override {
    delete event_of(event);
  }
  double elapsedTime(void* first, void* second, c10::DeviceIndex) const override {
    TORCH_CHECK(first != nullptr && second != nullptr, "both events must be recorded first");
    return event_of(first)->milliseconds_to(*event_of(second));
  }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& stream) const override {
    c10::getDeviceAllocator(kDeviceType)->recordStream(data, stream);
  }

 private:
  static c10::Device at(int device) { return {kDeviceType, static_cast<c10::DeviceIndex>(device)}; }
  static c10::Stream stream(int device, int64_t id) {
    return c10::Stream(c10::Stream::UNSAFE, at(device), id);
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

}  // namespace
}  // namespace kt_sim
