// What is simulated: how many devices, how much memory, how fast. Set from Python before the first
// use.
#pragma once

#include <cstddef>

namespace kt_sim {

struct Settings {
  int devices = 1;
  size_t memory_bytes = 0;         // of one device
  double link_bytes_per_s = 0;     // host to device, device to host, device to device
  double link_latency_s = 0;       // of one transfer
  double memory_bytes_per_s = 0;   // device memory
  double float32_flops_per_s = 0;  // a multiply-add is two
  double float16_flops_per_s = 0;  // float16 and bfloat16
};

// Returns a copy: rates may change while streams read them.
Settings settings();

// Numbers of devices and bytes of memory are taken up with the first use of a device; later only
// the rates may differ. Throws std::invalid_argument otherwise, and for numbers that are not
// positive.
void configure(const Settings& wanted);

// From here on devices and memory stay what they are; returns them.
Settings fix_settings();

}  // namespace kt_sim
