// kt_core._hardware: CPUID, AMX permission and doorbells for kt_core.hardware. Conversions only.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <memory>

#include "cpuid.hpp"
#include "doorbell.hpp"

namespace py = pybind11;

namespace {

using kt::hardware::Doorbell;
using kt::hardware::Leaf;
using kt::hardware::Registers;

using Words = std::array<uint32_t, 4>;  // eax, ebx, ecx, edx
using Brand = std::array<Words, 3>;

constexpr Words kZeros = {};

Leaf ToLeaf(const Words& words) { return {words[0], words[1], words[2], words[3]}; }

Words FromLeaf(const Leaf& leaf) { return {leaf.eax, leaf.ebx, leaf.ecx, leaf.edx}; }

Registers MakeRegisters(const Words& leaf0, const Words& leaf1, const Words& leaf7_0,
                        const Words& leaf7_1, const Words& extended0, const Brand& brand,
                        uint64_t xcr0) {
  return {ToLeaf(leaf0),
          ToLeaf(leaf1),
          ToLeaf(leaf7_0),
          ToLeaf(leaf7_1),
          ToLeaf(extended0),
          {ToLeaf(brand[0]), ToLeaf(brand[1]), ToLeaf(brand[2])},
          xcr0};
}

Brand FromBrand(const Registers& registers) {
  return {FromLeaf(registers.brand[0]), FromLeaf(registers.brand[1]), FromLeaf(registers.brand[2])};
}

template <Leaf Registers::* kLeaf>
Words Get(const Registers& registers) {
  return FromLeaf(registers.*kLeaf);
}

template <typename Pointer>
Pointer FromAddress(uintptr_t address) {
  return reinterpret_cast<Pointer>(address);
}

struct WithoutGil {
  void operator()(Doorbell* doorbell) const {
    const py::gil_scoped_release release;
    delete doorbell;
  }
};

std::unique_ptr<Doorbell, WithoutGil> MakeDoorbell(uintptr_t bells, size_t count) {
  return std::unique_ptr<Doorbell, WithoutGil>(
      new Doorbell(FromAddress<Doorbell::Bell*>(bells), count));
}

uint32_t Number(Doorbell& doorbell, uintptr_t function, uintptr_t argument) {
  return doorbell.Number(FromAddress<Doorbell::Function>(function), FromAddress<void*>(argument));
}

}  // namespace

PYBIND11_MODULE(_hardware, module) {
  module.doc() = "CPUID, AMX permission, doorbells; the contracts are in csrc/hardware/*.hpp.";

  py::class_<Registers>(module, "Registers", "Raw CPUID leaves [eax, ebx, ecx, edx] and XCR0.")
      .def(py::init(&MakeRegisters), py::kw_only(), py::arg("leaf0") = kZeros,
           py::arg("leaf1") = kZeros, py::arg("leaf7_0") = kZeros, py::arg("leaf7_1") = kZeros,
           py::arg("extended0") = kZeros, py::arg("brand") = Brand{}, py::arg("xcr0") = 0)
      .def_property_readonly("leaf0", &Get<&Registers::leaf0>)
      .def_property_readonly("leaf1", &Get<&Registers::leaf1>)
      .def_property_readonly("leaf7_0", &Get<&Registers::leaf7_0>)
      .def_property_readonly("leaf7_1", &Get<&Registers::leaf7_1>)
      .def_property_readonly("extended0", &Get<&Registers::extended0>)
      .def_property_readonly("brand", &FromBrand)
      .def_readonly("xcr0", &Registers::xcr0);

  module.def("read_registers", &kt::hardware::ReadRegisters);
  module.def("decode_features", &kt::hardware::DecodeFeatures, py::arg("registers"));
  module.def("known_features", &kt::hardware::KnownFeatures);
  module.def("vendor", &kt::hardware::Vendor, py::arg("registers"));
  module.def("brand", &kt::hardware::Brand, py::arg("registers"));
  module.def("request_amx_permission", &kt::hardware::RequestAmxPermission);
  module.def("amx_permitted", &kt::hardware::AmxPermitted);

  // Its thread may wait for the GIL, in a function of Python's: it is not joined while that is
  // held.
  py::class_<Doorbell, std::unique_ptr<Doorbell, WithoutGil>>(module, "Doorbell")
      .def(py::init(&MakeDoorbell), py::arg("bells"), py::arg("count"))
      .def("number", &Number, py::arg("function"), py::arg("argument"),
           py::call_guard<py::gil_scoped_release>());
  module.attr("BELL_BYTES") = sizeof(Doorbell::Bell);
}
