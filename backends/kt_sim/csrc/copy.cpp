// Copies: over the link between host and device or two devices, or within one device's memory.
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_local_scalar_dense.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include "current.hpp"
#include "event.hpp"
#include "pinned_memory.hpp"
#include "resize.hpp"
#include "span.hpp"

namespace kt_sim {
namespace {

// How fast one thread of the host copies, roughly: when to begin.
constexpr double kHostBytesPerS = 5e9;

Task copy_task(const at::Tensor& from, const at::Tensor& to, Cost cost) {
  return {[from = Span(from), to = Span(to)] {
            const c10::NoGradGuard no_grad;
            to.on_host().copy_(from.on_host());
            return Cost{};
          },
          false, "a copy", cost, static_cast<double>(from.nbytes()) / kHostBytesPerS};
}

int index_of(const at::Tensor& tensor) { return tensor.device().index(); }

// Memory of a tensor that another stream uses must not be given away before that is done.
void record_use(const at::Tensor& tensor, Queue& user) {
  const c10::Device device(kDeviceType, static_cast<c10::DeviceIndex>(user.device()));
  c10::impl::VirtualGuardImpl(kDeviceType)
      .recordDataPtrOnStream(tensor.storage().data_ptr(),
                             c10::Stream(c10::Stream::UNSAFE, device, user.id()));
}

void copy_within(const at::Tensor& from, const at::Tensor& to) {
  const auto moved = static_cast<double>(from.nbytes()) + static_cast<double>(to.nbytes());
  current_queue(index_of(to)).push(copy_task(from, to, kernel_cost(moved, 0, false)));
}

// In the source's stream, which waits for the target's before and is waited for after.
void copy_between(const at::Tensor& from, const at::Tensor& to) {
  Queue& source = current_queue(index_of(from));
  Queue& target = current_queue(index_of(to));
  Event is_ready, is_done;
  is_ready.record(target);
  is_ready.block(source);
  source.push(copy_task(from, to, link_cost(Unit::kToHost, from.nbytes())));
  is_done.record(source);
  is_done.block(target);
  record_use(to, source);
}

void copy_over_link(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  const bool is_up = from.is_cpu();
  const at::Tensor& host = is_up ? from : to;
  Queue& queue = current_queue(index_of(is_up ? to : from));
  const void* start = host.storage().data();
  const bool may_overlap = non_blocking && (host.numel() == 0 || is_pinned(start));
  if (!may_overlap)
    queue.refuse_while_recording(
        "a copy that the host waits for (pageable memory, or non_blocking=False)");
  const Unit direction = is_up ? Unit::kToDevice : Unit::kToHost;
  queue.push(copy_task(from, to, link_cost(direction, host.nbytes())));
  if (!may_overlap) {
    queue.synchronize();
  } else if (host.numel() > 0) {
    const c10::Device device(kDeviceType, static_cast<c10::DeviceIndex>(queue.device()));
    const auto& data = host.storage().data_ptr();
    pinned_memory().record_event(data.get(), data.get_context(),
                                 c10::Stream(c10::Stream::UNSAFE, device, queue.id()));
  }
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  TORCH_CHECK((from.is_cpu() || from.device().type() == kDeviceType) &&
                  (to.is_cpu() || to.device().type() == kDeviceType),
              "a copy from ", from.device(), " to ", to.device(), " has to go through the host");
  if (to.numel() == 0) return to;
  if (from.is_cpu() || to.is_cpu()) {
    copy_over_link(from, to, non_blocking);
  } else if (index_of(from) == index_of(to)) {
    copy_within(from, to);
  } else {
    copy_between(from, to);
  }
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  resize(to, from.sizes());
  return copy_from(from, to, false);
}

at::Scalar read_scalar(const at::Tensor& tensor) {
  Queue& queue = current_queue(index_of(tensor));
  queue.refuse_while_recording("reading a number of the device on the host (.item(), bool())");
  at::Scalar value;
  queue.push({[from = Span(tensor), &value] {
                value = at::_local_scalar_dense(from.on_host());
                return link_cost(Unit::kToHost, from.bytes());
              },
              false, "reading a number"});
  queue.synchronize();
  return value;
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("_local_scalar_dense", read_scalar);
}

}  // namespace
}  // namespace kt_sim
