// Memory of the devices. What the host sees of it is an address in a reservation that nobody may
// touch, so that reading or writing a device's memory from the host always faults, at any time and
// from any thread. The bytes themselves lie at a fixed distance, where only stream tasks look.
#pragma once

#include <cstddef>
#include <map>
#include <mutex>
#include <vector>

namespace kt_sim {

class Arena {
 public:
  // Reserves addresses for that many devices; takes up no memory. Throws c10::Error where the
  // system gives no addresses.
  Arena(int devices, size_t bytes_per_device);

  // Returns the device address of `bytes` bytes, or nullptr where no run of addresses is left.
  // What was never written reads as zero.
  void* take(int device, size_t bytes);
  // The pages go back to the system.
  void give_back(void* address);

  bool owns(const void* address) const;
  int device_of(const void* address) const;
  // Where the bytes behind a device address lie; any other address is returned as it is.
  void* host_address(const void* address) const;

 private:
  struct Slice {                      // of the reservation: one device's
    std::map<size_t, size_t> unused;  // offset to length, neighbours merged
    std::map<size_t, size_t> used;
  };

  char* forbidden_;  // what device addresses point into
  char* bytes_;
  size_t slice_bytes_;
  mutable std::mutex mutex_;
  std::vector<Slice> slices_;
};

// The process's one, made when first asked for. Never destroyed: streams may outlive main().
Arena& arena();

}  // namespace kt_sim
