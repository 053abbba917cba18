"""Devices for the tests of kernels: any instruction set, any number of threads, any nodes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from kt_core.interfaces import ExpertKernel, WeightFormat
from kt_core.types import ActivationPrecision, Capabilities, DeviceInfo, Element
from kt_cpu import _kernels
from kt_cpu.backend import CpuDevice
from kt_cpu.topology import Topology

ISAS = [name for name, is_supported in _kernels.isas() if is_supported]


def device_for(
    isa: str = "", threads: int = 2, *, topology: Topology | None = None, bind: Any = None
) -> CpuDevice:
    """The best instruction set unless told; with a topology, the threads are those it names."""
    info = DeviceInfo(name="cpu", description="test", torch_device="cpu", memory_bytes=1 << 34)
    capabilities = Capabilities(
        elements=frozenset(Element), instruction_set=_kernels.select_isa(isa), trains=True
    )
    threads = threads if topology is None else len(topology.threads)
    return CpuDevice(info, capabilities, threads, topology, bind=bind)


def open_when_asked(stack: ExitStack) -> Callable[[str], CpuDevice]:
    """A device for each instruction set, opened when it is first asked for."""
    devices: dict[str, CpuDevice] = {}

    def opened(isa: str) -> CpuDevice:
        if isa not in devices:
            devices[isa] = stack.enter_context(device_for(isa))
        return devices[isa]

    return opened


def precisions(weight_format: WeightFormat) -> list[ActivationPrecision]:
    is_integer = weight_format.descriptor.element.is_integer
    fast = [ActivationPrecision.INT8] if is_integer else []
    return [*fast, ActivationPrecision.BF16, ActivationPrecision.FLOAT32]


def packed_bytes(kernel: ExpertKernel, expert: int) -> bytes:
    """A copy of the packed expert."""
    return kernel.packed(expert).numpy().tobytes()
