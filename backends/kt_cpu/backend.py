"""The backend ``cpu`` and its one device."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kt_core import hardware
from kt_core.errors import BackendUnavailableError, UnsupportedFormatError
from kt_core.interfaces import Backend, ExpertDevice
from kt_core.types import (
    ActivationPrecision,
    Capabilities,
    DeviceInfo,
    Element,
    Format,
    HostUsage,
    Limits,
    LinearSpec,
    MoeSpec,
)
from kt_cpu import _kernels
from kt_cpu.topology import Topology, computing_nodes, flat_topology, plan_topology

if TYPE_CHECKING:
    from kt_cpu.kernel import CpuExpertKernel
    from kt_cpu.linear import CpuLinearKernel

_log = logging.getLogger(__name__)

FORCE_ISA_VARIABLE = "KT_FORCE_ISA"
NUMA_VARIABLE = "KT_NUMA"

# What csrc/format/ knows, in every grouping and scale type.
_ELEMENTS = frozenset(Element)

# Reading is measured on a buffer that no cache holds a good part of.
_SMALLEST_BUFFER_BYTES = 512 << 20
_UNKNOWN_CACHE_BYTES = 64 << 20

# Of what a node has to give. The rest is for what others allocate there meanwhile.
_BOUND_PART_OF_NODE = 0.9


def selected_isa() -> str:
    """Return the instruction set in use: ``KT_FORCE_ISA``, or the best this CPU has.

    Raises:
        BackendUnavailableError: The forced one is unknown to this build or absent here.
    """
    forced = os.environ.get(FORCE_ISA_VARIABLE, "")
    try:
        return _kernels.select_isa(forced)
    except (ValueError, RuntimeError) as error:
        msg = f"{FORCE_ISA_VARIABLE}={forced}: {error}"
        raise BackendUnavailableError(msg) from error


def numa_is_wanted() -> bool:
    """Return whether threads are pinned and memory is bound: yes, unless ``KT_NUMA=off``.

    Raises:
        BackendUnavailableError: The variable says something else.
    """
    wanted = os.environ.get(NUMA_VARIABLE, "")
    if wanted not in {"", "auto", "off"}:
        msg = f"{NUMA_VARIABLE}={wanted} is unknown; set it to auto or off, or not at all"
        raise BackendUnavailableError(msg)
    return wanted != "off"


class CpuBackend(Backend):
    """Every machine has it."""

    name = "cpu"

    def why_unavailable(self) -> str | None:
        """Return None, unless a variable asks for what cannot be had."""
        try:
            selected_isa()
            numa_is_wanted()
        except BackendUnavailableError as error:
            return str(error)
        return None

    def devices(self) -> Sequence[DeviceInfo]:
        """Return the one device: all sockets together."""
        return [_info(hardware.detect(with_accelerators=False))]

    def capabilities(self, device: str) -> Capabilities:
        """See ``Backend.capabilities``."""
        del device
        return Capabilities(
            elements=_ELEMENTS,
            instruction_set=selected_isa(),
            instruction_sets=tuple(name for name, is_here in _kernels.isas() if is_here),
            trains=True,
            computes_dense=True,
        )

    def open(
        self, device: str, *, threads: int | None = None, numa: bool | None = None
    ) -> ExpertDevice:
        """Start the threads: as many as the machine has physical cores, unless told.

        Args:
            device: ``cpu``.
            threads: See ``Backend.open``.
            numa: Whether to pin the threads and to split experts over the NUMA nodes; None to
                follow ``KT_NUMA``.
        """
        machine = hardware.detect(with_accelerators=False)
        count = threads or machine.cpu.usable_threads
        if numa_is_wanted() if numa is None else numa:
            topology = plan_topology(machine.cpu, count, _bindable_bytes)
        else:
            topology = flat_topology(count)
        return CpuDevice(_info(machine), self.capabilities(device), count, topology)


def _info(machine: hardware.Hardware) -> DeviceInfo:
    return DeviceInfo(
        name="cpu",
        description=machine.cpu.name,
        torch_device="cpu",
        memory_bytes=machine.memory.total_bytes,
        remarks=_numa_remarks(computing_nodes(machine.cpu)),
    )


def _bindable_bytes(node: int) -> int:
    return int(hardware.available_node_bytes(node) * _BOUND_PART_OF_NODE)


def _numa_remarks(nodes: Sequence[int]) -> tuple[str, ...]:
    """Say whether memory could not be bound to the nodes, and whether that is meant."""
    if len(nodes) == 1:
        return ()
    if not numa_is_wanted():
        return (f"{NUMA_VARIABLE}=off: experts lie anywhere on {len(nodes)} NUMA nodes",)
    why = _kernels.why_not_bound(nodes[0])
    return (_unbound(why),) if why else ()


def _unbound(why: str) -> str:
    return (
        f"memory cannot be bound to NUMA nodes ({why}), so experts are read across nodes, which "
        "is slower; allow the system call mbind (in a container: add the capability SYS_NICE)"
    )


class CpuDevice(ExpertDevice):
    """The CPU in use by one engine."""

    def __init__(
        self,
        info: DeviceInfo,
        capabilities: Capabilities,
        threads: int,
        topology: Topology | None = None,
        *,
        bind: _kernels.BindPages | None = None,
    ) -> None:
        """Start ``threads - 1`` threads; the caller of ``wait`` is the last one.

        Args:
            info: What the backend says.
            capabilities: What the backend says.
            threads: How many.
            topology: Where they run, and which memory is next to them; None for anywhere.
            bind: Asked to bind memory to a node, in place of the system: for tests.
        """
        self.info = info
        self.capabilities = capabilities
        self.threads = threads
        self._is_unbound = False
        topology = topology or flat_topology(threads)
        self._device: _kernels.Device | None = _kernels.Device(
            capabilities.instruction_set or "", topology.nodes, topology.threads, bind
        )
        if why := self._device.pin_refusal:
            _log.warning(
                "threads cannot be pinned to their cores (%s), so the system may move them, which "
                "is slower; set %s=off to leave them alone",
                why,
                NUMA_VARIABLE,
            )

    def expert_bytes(self, spec: MoeSpec, weight_format: Format) -> int:
        """See ``ExpertDevice.expert_bytes``."""
        from kt_cpu.kernel import layer_spec

        return layer_spec(spec, weight_format).bytes_per_expert

    def expert_kernel(
        self,
        spec: MoeSpec,
        weight_format: Format,
        *,
        precision: ActivationPrecision = ActivationPrecision.AUTO,
    ) -> CpuExpertKernel:
        """See ``ExpertDevice.expert_kernel``."""
        device = self._check(weight_format, precision)
        from kt_cpu.kernel import CpuExpertKernel

        kernel = CpuExpertKernel(device, spec, weight_format, precision)
        if device.bind_refusal and not self._is_unbound:
            self._is_unbound = True  # said once, not for every layer
            _log.warning("%s", _unbound(device.bind_refusal))
        return kernel

    def linear_bytes(self, spec: LinearSpec, weight_format: Format) -> int:
        """See ``ExpertDevice.linear_bytes``."""
        from kt_cpu.linear import linear_spec

        return linear_spec(spec, weight_format).size_bytes

    def linear_kernel(
        self,
        spec: LinearSpec,
        weight_format: Format,
        *,
        precision: ActivationPrecision = ActivationPrecision.AUTO,
    ) -> CpuLinearKernel:
        """See ``ExpertDevice.linear_kernel``."""
        device = self._check(weight_format, precision)
        from kt_cpu.linear import CpuLinearKernel

        return CpuLinearKernel(device, spec, weight_format, precision)

    def _check(self, weight_format: Format, precision: ActivationPrecision) -> _kernels.Device:
        """Return the open device if it computes this format with this precision."""
        if self._device is None:
            msg = "the device is closed"
            raise RuntimeError(msg)
        if not self.capabilities.computes(weight_format):
            msg = (
                f"the cpu backend cannot compute format {weight_format.name!r}: its weights are "
                f"{weight_format.element.value}, and this computes "
                f"{', '.join(sorted(self.capabilities.elements))}"
            )
            raise UnsupportedFormatError(msg)
        allowed = (
            (ActivationPrecision.INT8, ActivationPrecision.BF16, ActivationPrecision.FLOAT32)
            if weight_format.element.is_integer
            else (ActivationPrecision.BF16, ActivationPrecision.FLOAT32)
        )
        if precision not in (ActivationPrecision.AUTO, *allowed):
            msg = (
                f"format {weight_format.name!r} has no {precision.value} activations on the cpu; "
                f"choose {' or '.join(p.value for p in allowed)}, or auto"
            )
            raise UnsupportedFormatError(msg)
        return self._device

    def measure_limits(self) -> Limits:
        """See ``ExpertDevice.measure_limits``. The threads are others, of the same number."""
        cache_bytes = hardware.last_level_cache_bytes() or _UNKNOWN_CACHE_BYTES
        wanted = max(8 * cache_bytes, _SMALLEST_BUFFER_BYTES)
        read, int8, bf16 = _kernels.measure_limits(
            self.capabilities.instruction_set or "",
            self.threads,
            min(wanted, hardware.available_memory_bytes() // 4),
        )
        return Limits(read_bytes_per_s=read, int8_ops_per_s=int8, bf16_ops_per_s=bf16)

    def usage(self) -> HostUsage | None:
        """See ``ExpertDevice.usage``."""
        if self._device is None:
            return None
        busy, awaited = self._device.usage()
        return HostUsage(busy_s=busy / 1e9, awaited_s=awaited / 1e9)

    def close(self) -> None:
        """Let the threads go; they end when the last kernel of this device does."""
        self._device = None
