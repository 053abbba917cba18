// The one function for C: calls of host functions in the order of a stream, in the shape of
// cudaLaunchHostFunc, hipLaunchHostFunc and aclrtLaunchHostFunc.
#include <exception>

#include "failure.hpp"
#include "queue.hpp"

// `stream` is torch.Stream.native_handle. Returns 0, or 1: no stream, 2: the device is lost,
// 3: the refusal was injected. Recorded, not called, while a graph is captured from the stream.
extern "C" __attribute__((visibility("default"))) int kt_sim_launch_host_function(
    void* stream, void (*function)(void*), void* argument) {
  if (stream == nullptr || function == nullptr) return 1;
  auto& queue = *static_cast<kt_sim::Queue*>(stream);
  if (kt_sim::is_lost(queue.device())) return 2;
  if (kt_sim::takes_fault(queue.device(), kt_sim::Fault::kHostFunction)) return 3;
  try {
    queue.push({[=] {
                  function(argument);
                  return kt_sim::Cost{};
                },
                false, "a host function"});
  } catch (const std::exception&) {  // lost since the question above
    return 2;
  }
  return 0;
}
