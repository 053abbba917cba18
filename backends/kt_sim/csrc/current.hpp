// Which device and which of its streams the calling thread uses.
#pragma once

#include <c10/core/Stream.h>

#include "queue.hpp"

namespace kt_sim {

inline constexpr auto kDeviceType = c10::DeviceType::PrivateUse1;

int num_devices();
int current_device();
// Throws c10::Error for a device there is not.
void set_current_device(int device);

// Index of a device as torch gives it: -1 is the current one. Throws c10::Error if there is none.
int device_index(c10::DeviceIndex index);

// Stream 0 is the default one; the others come from a pool of 32 that is gone through in a circle,
// as CUDA's are (c10/cuda/CUDAStream.h).
int64_t next_pooled_stream(int device);
Queue& queue(int device, int64_t stream_id);
Queue& queue(const c10::Stream& stream);
int64_t current_stream_id(int device);
void set_current_stream_id(int device, int64_t id);
Queue& current_queue(int device);

// Waits for all streams of the device. Throws c10::Error while one is captured, or if it is lost.
void synchronize_device(int device);

}  // namespace kt_sim
