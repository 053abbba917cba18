// Random numbers of a device. An operator takes a seed from the device's generator when it is
// called and draws from that in its stream, so that results depend on the order of the calls alone.
#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/Generator.h>

#include <vector>

namespace kt_sim {

class SimGenerator final : public at::CPUGeneratorImpl {
 public:
  explicit SimGenerator(int device, uint64_t seed = c10::default_rng_seed_val);

  // A generator for one operator, for the CPU.
  at::Generator next();

 private:
  SimGenerator* clone_impl() const override;
};

const at::Generator& default_generator(int device);
at::Generator new_generator(int device);

}  // namespace kt_sim
