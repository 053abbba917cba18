// What Python calls: see kt_sim/native.py.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <ATen/ops/from_blob.h>
#include <memory>

#include "arena.hpp"
#include "current.hpp"
#include "failure.hpp"
#include "generator.hpp"
#include "graph.hpp"
#include "hooks.hpp"
#include "settings.hpp"
#include "span.hpp"

namespace kt_sim {
namespace {

namespace py = pybind11;

// A Python function that a stream's thread calls; it is let go with Python's lock held.
std::shared_ptr<py::function> kept(py::function function) {
  return {new py::function(std::move(function)), [](py::function* it) {
            const py::gil_scoped_acquire lock;
            delete it;
          }};
}

void launch(py::function function, const std::vector<at::Tensor>& tensors,
            const std::string& name) {
  TORCH_CHECK(!tensors.empty(), "a kernel needs a tensor, which says where it runs");
  std::vector<Span> spans;
  const int device = tensors.front().device().index();
  for (const at::Tensor& tensor : tensors) {
    TORCH_CHECK(tensor.device().type() == kDeviceType && tensor.device().index() == device,
                "all tensors of kernel ", name, " must be on one simulated device");
    spans.emplace_back(tensor);
  }
  current_queue(device).push({[function = kept(std::move(function)), spans] {
                                const py::gil_scoped_acquire lock;
                                py::list views;
                                for (const Span& span : spans) views.append(span.on_host());
                                const auto [bytes, flops, is_16_bit] =
                                    (*function)(*views).cast<std::tuple<double, double, bool>>();
                                return kernel_cost(bytes, flops, is_16_bit);
                              },
                              false, "kernel " + name});
}

// For kernels alone: the bytes behind a device address that one of their tensors holds.
at::Tensor bytes_at(uintptr_t address, int64_t bytes) {
  void* start = reinterpret_cast<void*>(address);  // NOLINT: an address is what tables hold
  TORCH_CHECK(arena().owns(start), "address ", address, " is no memory of a simulated device");
  return at::from_blob(arena().host_address(start), {bytes}, at::TensorOptions().dtype(at::kByte));
}

void start(int devices, size_t memory_bytes, double link_bytes_per_s, double link_latency_s,
           double memory_bytes_per_s, double float32_flops_per_s, double float16_flops_per_s) {
  configure({devices, memory_bytes, link_bytes_per_s, link_latency_s, memory_bytes_per_s,
             float32_flops_per_s, float16_flops_per_s});
}

py::dict current() {
  const Settings now = settings();
  py::dict found;
  found["devices"] = now.devices;
  found["memory_bytes"] = now.memory_bytes;
  found["link_bytes_per_s"] = now.link_bytes_per_s;
  found["link_latency_s"] = now.link_latency_s;
  found["memory_bytes_per_s"] = now.memory_bytes_per_s;
  found["float32_flops_per_s"] = now.float32_flops_per_s;
  found["float16_flops_per_s"] = now.float16_flops_per_s;
  return found;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  using py::arg;
  module.def("configure", &start, py::kw_only(), arg("devices"), arg("memory_bytes"),
             arg("link_bytes_per_s"), arg("link_latency_s"), arg("memory_bytes_per_s"),
             arg("float32_flops_per_s"), arg("float16_flops_per_s"));
  module.def("settings", &current);
  module.def("register_device", [] {
    register_hooks();
    register_graphs();
  });
  module.def("device_count", &num_devices);
  module.def("current_device", &current_device);
  module.def("set_device", &set_current_device, arg("device"));
  module.def("synchronize", &synchronize_device, arg("device"));
  module.def(
      "default_generator", [](int device) { return default_generator(device_index(device)); },
      arg("device"));
  module.def("launch", &launch, arg("function"), arg("tensors"), arg("name"));
  module.def("bytes_at", &bytes_at, arg("address"), arg("bytes"));
  module.def("lose", &lose, arg("device"), arg("reason"));
  module.def("revive", &revive, arg("device"));
  module.def(
      "fail_allocations", [](int device, int times) { inject(device, Fault::kAllocation, times); },
      arg("device"), arg("times"));
  module.def(
      "refuse_host_functions",
      [](int device, int times) { inject(device, Fault::kHostFunction, times); }, arg("device"),
      arg("times"));
}

}  // namespace kt_sim
