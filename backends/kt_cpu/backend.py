"""The backend ``cpu`` and its one device."""

from __future__ import annotations

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
    Limits,
    LinearSpec,
    MoeSpec,
)
from kt_cpu import _kernels

if TYPE_CHECKING:
    from kt_cpu.kernel import CpuExpertKernel
    from kt_cpu.linear import CpuLinearKernel

FORCE_ISA_VARIABLE = "KT_FORCE_ISA"

# What csrc/format/ knows, in every grouping and scale type.
_ELEMENTS = frozenset(Element)

# Reading is measured on a buffer that no cache holds a good part of.
_SMALLEST_BUFFER_BYTES = 512 << 20
_UNKNOWN_CACHE_BYTES = 64 << 20


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


class CpuBackend(Backend):
    """Every machine has it."""

    name = "cpu"

    def why_unavailable(self) -> str | None:
        """Return None, unless an instruction set is forced that cannot be had."""
        try:
            selected_isa()
        except BackendUnavailableError as error:
            return str(error)
        return None

    def devices(self) -> Sequence[DeviceInfo]:
        """Return the one device: all sockets together."""
        machine = hardware.detect(with_accelerators=False)
        return [
            DeviceInfo(
                name="cpu",
                description=machine.cpu.name,
                torch_device="cpu",
                memory_bytes=machine.memory.total_bytes,
            )
        ]

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

    def open(self, device: str, *, threads: int | None = None) -> ExpertDevice:
        """Start the threads: as many as the machine has physical cores, unless told."""
        return CpuDevice(
            self.devices()[0],
            self.capabilities(device),
            threads or hardware.detect(with_accelerators=False).cpu.usable_threads,
        )


class CpuDevice(ExpertDevice):
    """The CPU in use by one engine."""

    def __init__(self, info: DeviceInfo, capabilities: Capabilities, threads: int) -> None:
        """Start ``threads - 1`` threads; the caller of ``wait`` is the last one."""
        self.info = info
        self.capabilities = capabilities
        self.threads = threads
        self._device: _kernels.Device | None = _kernels.Device(
            capabilities.instruction_set or "", threads
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

        return CpuExpertKernel(device, spec, weight_format, precision)

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

    def close(self) -> None:
        """Let the threads go; they end when the last kernel of this device does."""
        self._device = None
