// Python's way in: converts arguments, checks what C++ cannot recover from, releases the GIL.
// Tensors arrive as addresses, so that nothing here depends on torch's C++ interface. Longer than
// most files: one module, whose classes share what is at its top.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>

#include "dense/linear_layer.hpp"
#include "hardware/limits.hpp"
#include "isa/dispatch.hpp"
#include "moe/expert_layer.hpp"
#include "moe/forward_job.hpp"
#include "moe/stream_call.hpp"

namespace py = pybind11;

namespace {

using kt::DType;

template <class T>
T* Pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// A Python object that C++ keeps; let go of wherever that happens, with or without the GIL.
std::shared_ptr<void> Kept(py::object owner) {
  return {new py::object(std::move(owner)), [](void* object) {
            const py::gil_scoped_acquire acquire;
            delete static_cast<py::object*>(object);
          }};
}

// Owned by one engine: its threads, its scratch, its nodes, its ISA.
struct Device {
  const kt::Isa& isa;
  std::shared_ptr<kt::ThreadPool> pool;
  std::shared_ptr<kt::ScratchPool> scratch;
  std::shared_ptr<kt::NodeBinder> binder;
};

Device MakeDevice(const std::string& isa, const kt::Topology& topology, kt::BindPages bind) {
  return {kt::SelectIsa(isa), std::make_shared<kt::ThreadPool>(topology),
          std::make_shared<kt::ScratchPool>(),
          std::make_shared<kt::NodeBinder>(topology.nodes, std::move(bind))};
}

// (id, processors, bytes to bind) of each node; (place among the nodes, processors) of each thread.
using NodeFields = std::tuple<int, std::vector<int>, size_t>;
using ThreadFields = std::pair<size_t, std::vector<int>>;
// As kt::BindPages, over addresses.
using Bind = std::function<int(uintptr_t base, size_t bytes, int node, bool is_strict)>;

Device MakeDeviceOnNodes(const std::string& isa, const std::vector<NodeFields>& nodes,
                         const std::vector<ThreadFields>& threads, const Bind& bind) {
  kt::Topology topology;
  for (const auto& [id, cpus, bytes] : nodes) topology.nodes.push_back({id, cpus, bytes});
  for (const auto& [node, cpus] : threads) topology.threads.push_back({node, cpus});
  if (!bind) return MakeDevice(isa, topology, kt::BindPagesToNode);
  return MakeDevice(isa, topology, [bind](void* base, size_t bytes, int node, bool is_strict) {
    return bind(reinterpret_cast<uintptr_t>(base), bytes, node, is_strict);
  });
}

// What a person may wonder about: the system's words, or nothing.
std::string Refusal(int error) { return error == 0 ? std::string() : std::strerror(error); }

struct Ticket {
  std::shared_ptr<kt::ExpertLayer> layer;  // outlives the job
  std::shared_ptr<kt::Job> job;

  void Wait() {
    const py::gil_scoped_release release;
    layer->Wait(*job);
  }
  ~Ticket() {
    // The job reads and writes the caller's tensors: never let go of them while it may run.
    if (job) Wait();
  }
};

// A buffer over the bytes of one expert, which keeps its layer.
struct PackedBytes {
  std::shared_ptr<kt::ExpertLayer> layer;
  const uint8_t* bytes;
};

kt::SourceMatrix MatrixFrom(const py::object& source) {
  kt::SourceMatrix m{};
  if (source.is_none()) return m;
  const auto fields = source.cast<py::tuple>();
  m.data = Pointer<const void>(fields[0].cast<uintptr_t>());
  m.type = fields[1].cast<DType>();
  m.row_stride = fields[2].cast<ptrdiff_t>();
  m.col_stride = fields[3].cast<ptrdiff_t>();
  m.scales = Pointer<const float>(fields[4].cast<uintptr_t>());
  m.zero_points = Pointer<const uint8_t>(fields[5].cast<uintptr_t>());
  m.minimums = Pointer<const float>(fields[6].cast<uintptr_t>());
  m.output_scales = Pointer<const float>(fields[7].cast<uintptr_t>());
  return m;
}

// (a, b, type, rank, grad_a, grad_b), addresses; or None.
kt::LoraMatrices LoraFrom(const py::object& source) {
  kt::LoraMatrices m{};
  if (source.is_none()) return m;
  const auto fields = source.cast<py::tuple>();
  m.a = Pointer<const void>(fields[0].cast<uintptr_t>());
  m.b = Pointer<const void>(fields[1].cast<uintptr_t>());
  m.type = fields[2].cast<DType>();
  m.rank = fields[3].cast<size_t>();
  m.grad_a = Pointer<float>(fields[4].cast<uintptr_t>());
  m.grad_b = Pointer<float>(fields[5].cast<uintptr_t>());
  return m;
}

// (scale, gate, up, down), or None.
kt::LoraArgs LoraArgsFrom(const py::object& source) {
  if (source.is_none()) return {};
  const auto fields = source.cast<py::tuple>();
  return {fields[0].cast<float>(), LoraFrom(fields[1]), LoraFrom(fields[2]), LoraFrom(fields[3])};
}

void BindEnums(py::module_& m) {
  py::enum_<DType>(m, "DType")
      .value("float32", DType::kFloat32)
      .value("bfloat16", DType::kBf16)
      .value("float16", DType::kFloat16);
  py::enum_<kt::Precision>(m, "Precision")
      .value("float32", kt::Precision::kFloat32)
      .value("bf16", kt::Precision::kBf16)
      .value("int8", kt::Precision::kInt8);
  py::enum_<kt::Element>(m, "Element")
      .value("bf16", kt::Element::kBf16)
      .value("fp8", kt::Element::kFp8)
      .value("int8", kt::Element::kInt8)
      .value("int4", kt::Element::kInt4)
      .value("fp4", kt::Element::kFp4);
  py::enum_<kt::ScaleType>(m, "ScaleType")
      .value("none", kt::ScaleType::kNone)
      .value("float32", kt::ScaleType::kFloat32)
      .value("bf16", kt::ScaleType::kBf16)
      .value("float16", kt::ScaleType::kFloat16)
      .value("e8m0", kt::ScaleType::kE8m0)
      .value("e4m3", kt::ScaleType::kE4m3);
  py::enum_<kt::Offset>(m, "Offset")
      .value("none", kt::Offset::kNone)
      .value("zero_point", kt::Offset::kZeroPoint)
      .value("minimum", kt::Offset::kMinimum);
  py::enum_<kt::ActivationKind>(m, "ActivationKind")
      .value("silu", kt::ActivationKind::kSilu)
      .value("gelu", kt::ActivationKind::kGelu)
      .value("gelu_tanh", kt::ActivationKind::kGeluTanh)
      .value("relu", kt::ActivationKind::kRelu)
      .value("relu2", kt::ActivationKind::kRelu2)
      .value("swiglu_clamp", kt::ActivationKind::kSwigluClamp)
      .value("swiglu_clamp_after", kt::ActivationKind::kSwigluClampAfter)
      .value("swiglu_oai", kt::ActivationKind::kSwigluOai)
      .value("swiglu_softcap", kt::ActivationKind::kSwigluSoftcap);
}

void BindSpec(py::module_& m) {
  py::class_<kt::LayerSpec>(m, "LayerSpec")
      .def(py::init([](size_t experts, size_t hidden, size_t intermediate, kt::ActivationKind kind,
                       bool is_gated, float alpha, float limit, float up_limit, bool has_bias,
                       kt::Element element, kt::ScaleType scale, kt::Offset offset, size_t group) {
             return kt::LayerSpec{
                 experts,  hidden,  intermediate, {kind, is_gated, alpha, limit, up_limit},
                 has_bias, element, scale,        offset,
                 group};
           }),
           py::kw_only(), py::arg("num_experts"), py::arg("hidden_size"),
           py::arg("intermediate_size"), py::arg("activation"), py::arg("is_gated"),
           py::arg("alpha"), py::arg("limit"), py::arg("up_limit"), py::arg("has_bias"),
           py::arg("element"), py::arg("scale"), py::arg("offset"), py::arg("group"))
      .def_property_readonly("bytes_per_expert",
                             [](const kt::LayerSpec& s) { return kt::LayoutOf(s).bytes; });
}

void BindDevice(py::module_& m) {
  m.def("bind_pages", [](uintptr_t base, size_t bytes, int node, bool is_strict) {
    return kt::BindPagesToNode(Pointer<void>(base), bytes, node, is_strict);
  });
  m.def(
      "why_not_bound", [](int node) { return Refusal(kt::TryToBind(node)); },
      "Why memory cannot be bound to the node, in the system's words; '' if it can.");
  m.def(
      "nodes_of_pages",
      [](uintptr_t base, size_t bytes) {
        return kt::NodesOfPages(Pointer<const void>(base), bytes);
      },
      "The node of every page of a range, or a negative errno.");

  py::class_<Device>(m, "Device")
      .def(py::init([](const std::string& isa, size_t threads) {
             return MakeDevice(isa, kt::FlatTopology(threads), kt::BindPagesToNode);
           }),
           py::arg("isa"), py::arg("threads"))
      .def(py::init(&MakeDeviceOnNodes), py::arg("isa"), py::arg("nodes"), py::arg("threads"),
           py::arg("bind") = nullptr)
      .def_property_readonly("isa", [](const Device& d) { return std::string(d.isa.name); })
      .def_property_readonly("pin_refusal",
                             [](const Device& d) { return Refusal(d.pool->refusal()); })
      .def_property_readonly("bind_refusal",
                             [](const Device& d) { return Refusal(d.binder->refusal()); })
      .def(
          "usage",
          [](const Device& d) {
            const kt::ThreadPool::Usage usage = d.pool->usage();
            return std::pair(usage.busy.count(), usage.awaited.count());
          },
          "Nanoseconds: there was work; a stream waited for it.");
}

void BindLayer(py::module_& m) {
  py::class_<Ticket, std::shared_ptr<Ticket>>(m, "Ticket").def("wait", &Ticket::Wait);

  py::class_<PackedBytes>(m, "PackedBytes", py::buffer_protocol())
      .def_buffer([](const PackedBytes& packed) {
        return py::buffer_info(const_cast<uint8_t*>(packed.bytes),
                               static_cast<py::ssize_t>(packed.layer->layout().bytes));
      });

  py::class_<kt::ExpertLayer, std::shared_ptr<kt::ExpertLayer>>(m, "ExpertLayer")
      .def(py::init([](const Device& device, const kt::LayerSpec& spec) {
             return std::make_shared<kt::ExpertLayer>(spec, *device.isa.kernels, device.pool,
                                                      device.scratch, device.binder);
           }),
           py::arg("device"), py::arg("spec"))
      .def(
          "load",
          [](kt::ExpertLayer& layer, size_t expert, const py::object& gate, const py::object& up,
             const py::object& down, uintptr_t gate_bias, uintptr_t up_bias, uintptr_t down_bias) {
            const kt::ExpertSource source{MatrixFrom(gate),
                                          MatrixFrom(up),
                                          MatrixFrom(down),
                                          Pointer<const float>(gate_bias),
                                          Pointer<const float>(up_bias),
                                          Pointer<const float>(down_bias)};
            const char* bad = nullptr;
            {
              const py::gil_scoped_release release;
              bad = layer.Load(expert, source);
            }
            return bad ? std::string(bad) : std::string();
          },
          py::arg("expert"), py::kw_only(), py::arg("gate"), py::arg("up"), py::arg("down"),
          py::arg("gate_bias"), py::arg("up_bias"), py::arg("down_bias"),
          "Pack one expert; return the projection that is not finite, or ''.")
      .def("unload", &kt::ExpertLayer::Unload)
      .def("is_resident", &kt::ExpertLayer::IsResident)
      .def(
          "parts",
          [](const kt::ExpertLayer& layer, size_t expert) {
            std::vector<std::tuple<size_t, size_t, uintptr_t, size_t>> parts;
            for (const kt::LayerPart& part : layer.parts())
              parts.emplace_back(part.layout.up.rows, part.layout.down.rows,
                                 reinterpret_cast<uintptr_t>(part.At(expert)), part.layout.bytes);
            return parts;
          },
          "Of each node: outputs of gate and up, outputs of down, address and size.")
      .def(
          "load_packed",
          [](kt::ExpertLayer& layer, size_t expert, uintptr_t packed) {
            const py::gil_scoped_release release;
            layer.LoadPacked(expert, Pointer<const uint8_t>(packed));
          },
          py::arg("expert"), py::arg("packed"))
      .def(
          "map_packed",
          [](kt::ExpertLayer& layer, size_t expert, uintptr_t packed, py::object owner) {
            return layer.MapPacked(expert, Pointer<const uint8_t>(packed), Kept(std::move(owner)));
          },
          py::arg("expert"), py::arg("packed"), py::arg("owner"),
          "Use the bytes where they are, and keep their owner; False where there are nodes.")
      .def(
          "packed",
          [](const std::shared_ptr<kt::ExpertLayer>& layer,
             size_t expert) -> std::optional<PackedBytes> {
            const uint8_t* bytes = layer->Packed(expert);
            if (bytes == nullptr) return std::nullopt;
            return PackedBytes{layer, bytes};
          },
          py::arg("expert"), "The expert's bytes where they lie; None if not in one piece.")
      .def(
          "copy_packed",
          [](const kt::ExpertLayer& layer, size_t expert, uintptr_t target) {
            const py::gil_scoped_release release;
            layer.CopyPacked(expert, Pointer<uint8_t>(target));
          },
          py::arg("expert"), py::arg("target"))
      .def(
          "gather_packed",
          [](const kt::ExpertLayer& layer, const std::vector<int64_t>& experts, uintptr_t target) {
            const py::gil_scoped_release release;
            layer.GatherPacked(experts, Pointer<uint8_t>(target));
          },
          py::arg("experts"), py::arg("target"))
      .def(
          "submit",
          [](const std::shared_ptr<kt::ExpertLayer>& layer, uintptr_t hidden, DType type,
             kt::Precision precision, uintptr_t ids, uintptr_t weights, uintptr_t out,
             size_t tokens, size_t top_k) {
            auto ticket = std::make_shared<Ticket>();
            ticket->layer = layer;
            ticket->job = layer->Submit({Pointer<const void>(hidden), type, precision,
                                         Pointer<const int64_t>(ids), Pointer<const float>(weights),
                                         Pointer<void>(out), tokens, top_k});
            return ticket;
          },
          py::kw_only(), py::arg("hidden"), py::arg("type"), py::arg("precision"),
          py::arg("expert_ids"), py::arg("weights"), py::arg("out"), py::arg("tokens"),
          py::arg("top_k"))
      .def(
          "stream_call",
          [](const std::shared_ptr<kt::ExpertLayer>& layer, uintptr_t hidden, DType type,
             kt::Precision precision, uintptr_t ids, uintptr_t weights, uintptr_t out,
             size_t tokens, size_t top_k) {
            return std::make_unique<kt::StreamCall>(
                layer, kt::ForwardArgs{Pointer<const void>(hidden), type, precision,
                                       Pointer<const int64_t>(ids), Pointer<const float>(weights),
                                       Pointer<void>(out), tokens, top_k});
          },
          py::kw_only(), py::arg("hidden"), py::arg("type"), py::arg("precision"),
          py::arg("expert_ids"), py::arg("weights"), py::arg("out"), py::arg("tokens"),
          py::arg("top_k"), "As submit, but started and joined by a stream.")
      .def(
          "submit_lora",
          [](const std::shared_ptr<kt::ExpertLayer>& layer, uintptr_t hidden, DType type,
             kt::Precision precision, uintptr_t ids, uintptr_t weights, uintptr_t out,
             size_t tokens, size_t top_k, const py::object& lora) {
            auto ticket = std::make_shared<Ticket>();
            ticket->layer = layer;
            ticket->job = layer->SubmitLora(
                {Pointer<const void>(hidden), type, precision, Pointer<const int64_t>(ids),
                 Pointer<const float>(weights), tokens, top_k, LoraArgsFrom(lora),
                 Pointer<void>(out), nullptr, nullptr, nullptr});
            return ticket;
          },
          py::kw_only(), py::arg("hidden"), py::arg("type"), py::arg("precision"),
          py::arg("expert_ids"), py::arg("weights"), py::arg("out"), py::arg("tokens"),
          py::arg("top_k"), py::arg("lora"))
      .def(
          "submit_backward",
          [](const std::shared_ptr<kt::ExpertLayer>& layer, uintptr_t hidden, DType type,
             kt::Precision precision, uintptr_t ids, uintptr_t weights, size_t tokens, size_t top_k,
             const py::object& lora, uintptr_t grad_out, uintptr_t grad_hidden,
             uintptr_t grad_weights) {
            auto ticket = std::make_shared<Ticket>();
            ticket->layer = layer;
            ticket->job = layer->SubmitBackward(
                {Pointer<const void>(hidden), type, precision, Pointer<const int64_t>(ids),
                 Pointer<const float>(weights), tokens, top_k, LoraArgsFrom(lora), nullptr,
                 Pointer<const void>(grad_out), Pointer<void>(grad_hidden),
                 Pointer<float>(grad_weights)});
            return ticket;
          },
          py::kw_only(), py::arg("hidden"), py::arg("type"), py::arg("precision"),
          py::arg("expert_ids"), py::arg("weights"), py::arg("tokens"), py::arg("top_k"),
          py::arg("lora"), py::arg("grad_out"), py::arg("grad_hidden"), py::arg("grad_weights"));
}

void BindStreamCall(py::module_& m) {
  py::class_<kt::StreamCall>(m, "StreamCall")
      .def_property_readonly(
          "address", [](kt::StreamCall& call) { return reinterpret_cast<uintptr_t>(&call); })
      .def("take_error", &kt::StreamCall::TakeError)
      .def("record", &kt::StreamCall::Record)
      .def("take_times", [](kt::StreamCall& call) {
        std::vector<std::tuple<int64_t, int64_t, int64_t, int64_t>> times;
        for (const auto& t : call.TakeTimes())
          times.emplace_back(t.started, t.finished, t.join_called, t.joined);
        return times;
      });
  // The functions that a stream calls with that address.
  m.attr("stream_call_start") = reinterpret_cast<uintptr_t>(&kt::StreamCall::Start);
  m.attr("stream_call_join") = reinterpret_cast<uintptr_t>(&kt::StreamCall::Join);
}

void BindLinear(py::module_& m) {
  py::class_<kt::LinearSpec>(m, "LinearSpec")
      .def(py::init([](size_t in_features, size_t out_features, bool has_bias, kt::Element element,
                       kt::ScaleType scale, kt::Offset offset, size_t group) {
             return kt::LinearSpec{in_features, out_features, has_bias, element,
                                   scale,       offset,       group};
           }),
           py::kw_only(), py::arg("in_features"), py::arg("out_features"), py::arg("has_bias"),
           py::arg("element"), py::arg("scale"), py::arg("offset"), py::arg("group"))
      .def_property_readonly("size_bytes",
                             [](const kt::LinearSpec& s) { return kt::LayoutOf(s).bytes; });

  // A decode step makes some hundred calls: arguments come by position, which takes half the time.
  const auto call = [](auto method) {
    return [method](const kt::LinearLayer& layer, uintptr_t source, DType type,
                    kt::Precision precision, size_t rows, size_t source_stride, uintptr_t target) {
      const py::gil_scoped_release release;
      (layer.*method)({Pointer<const void>(source), type, precision, rows, source_stride,
                       Pointer<void>(target)});
    };
  };
  py::class_<kt::LinearLayer>(m, "LinearLayer")
      .def(py::init([](const Device& device, const kt::LinearSpec& spec) {
             return std::make_unique<kt::LinearLayer>(spec, *device.isa.kernels, device.pool,
                                                      device.scratch);
           }),
           py::arg("device"), py::arg("spec"))
      .def(
          "load",
          [](kt::LinearLayer& layer, const py::object& weight, uintptr_t bias) {
            const kt::SourceMatrix source = MatrixFrom(weight);
            const py::gil_scoped_release release;
            return layer.Load(source, Pointer<const float>(bias));
          },
          py::arg("weight"), py::arg("bias"), "Pack; False if a number is not finite.")
      .def(
          "map_packed",
          [](kt::LinearLayer& layer, uintptr_t packed, py::object owner) {
            layer.MapPacked({Kept(std::move(owner)), Pointer<const uint8_t>(packed)});
          },
          py::arg("packed"), py::arg("owner"), "Use the bytes where they are; keep their owner.")
      .def_property_readonly("is_loaded", &kt::LinearLayer::is_loaded)
      .def("packed_bytes",
           [](const kt::LinearLayer& layer) {
             const auto bytes = layer.Bytes();
             return py::bytes(reinterpret_cast<const char*>(bytes.data()), bytes.size());
           })
      .def("apply", call(&kt::LinearLayer::Apply))
      .def("grad_input", call(&kt::LinearLayer::GradInput));
}

}  // namespace

PYBIND11_MODULE(_kernels, m) {
  BindEnums(m);
  BindSpec(m);
  m.def(
      "isas",
      [] {
        std::vector<std::pair<std::string, bool>> isas;
        for (const kt::Isa& isa : kt::AllIsas()) isas.emplace_back(isa.name, isa.is_supported());
        return isas;
      },
      "(name, whether this CPU can run it) of every instruction set in this build, best first.");
  m.def("select_isa",
        [](const std::string& name) { return std::string(kt::SelectIsa(name).name); });
  m.def(
      "activate",
      [](const std::string& isa, kt::ActivationKind kind, bool is_gated, float alpha, float limit,
         float up_limit, uintptr_t gate, uintptr_t up, uintptr_t out, size_t n) {
        if (n % kt::kPanel != 0) throw std::invalid_argument("n must be a multiple of 16");
        kt::SelectIsa(isa).kernels->activate({kind, is_gated, alpha, limit, up_limit},
                                             Pointer<const float>(gate), Pointer<const float>(up),
                                             Pointer<float>(out), n);
      },
      "One activation over n float32, for tests.");

  m.def(
      "measure_limits",
      [](const std::string& isa, size_t threads, size_t buffer_bytes) {
        const py::gil_scoped_release release;
        const kt::Limits found =
            kt::MeasureLimits(*kt::SelectIsa(isa).kernels, threads, buffer_bytes);
        return std::make_tuple(found.read_bytes_per_s, found.int8_ops_per_s, found.bf16_ops_per_s);
      },
      py::arg("isa"), py::arg("threads"), py::arg("buffer_bytes"),
      "Bytes read per second, int8 operations per second, bf16 operations per second.");

  BindDevice(m);
  BindLayer(m);
  BindStreamCall(m);
  BindLinear(m);
}
