"""A backend over devices that torch knows: torch says what they are, and orders their work."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kt_core.errors import BackendUnavailableError, DeviceError, UnsupportedFormatError
from kt_core.interfaces import Backend, ExpertDevice, ExpertKernel, HostFunctions, LinearKernel
from kt_core.types import (
    ActivationPrecision,
    Capabilities,
    DeviceInfo,
    Format,
    LinearSpec,
    MoeSpec,
)

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)


class TorchBackend(Backend):
    """Devices of one of torch's types.

    Attributes:
        device_type: Torch's word for it.
        precisions: What hidden states may be turned into, besides ``AUTO``.
    """

    preference = 10
    device_type: str
    precisions: tuple[ActivationPrecision, ...] = (
        ActivationPrecision.BF16,
        ActivationPrecision.FLOAT32,
    )

    @abstractmethod
    def what_it_computes(self) -> Capabilities:
        """Return what every device of this backend can do."""

    @abstractmethod
    def kernel(
        self,
        device: torch.device,
        spec: MoeSpec,
        weight_format: Format,
        precision: ActivationPrecision,
    ) -> ExpertKernel:
        """Make a kernel; format and precision have been checked."""

    def linear_kernel(
        self,
        device: torch.device,
        spec: LinearSpec,
        weight_format: Format,
        precision: ActivationPrecision,
    ) -> LinearKernel:
        """Make the kernel of a dense layer, where ``what_it_computes`` says that there are any.

        Format and precision have been checked; a layer takes the bytes of a packed one.
        """
        raise NotImplementedError

    def host_functions(self, device: DeviceInfo) -> HostFunctions | None:
        """Return what calls host functions in stream order; None where there is no such call.

        Args:
            device: Whose streams will call.

        Raises:
            DeviceError: It should have, and has not.
        """
        return None

    def why_not(self, device: DeviceInfo) -> str | None:
        """Return why a device that is there cannot be used, or None. May start its runtime."""
        del device
        return None

    def expert_bytes(self, spec: MoeSpec, weight_format: Format) -> int:
        """Bytes of one expert on a device: those of a packed one, unless it is kept otherwise."""
        from kt_core.packed import ExpertLayout

        return ExpertLayout.of(spec, weight_format).size_bytes

    def devices(self) -> Sequence[DeviceInfo]:
        """Return torch's devices under this backend's name. Starts the vendor's runtime."""
        from kt_core.hardware import detect_accelerators

        return [
            DeviceInfo(
                name=f"{self.name}:{found.device.partition(':')[2]}",
                description=found.name,
                torch_device=found.device,
                memory_bytes=found.memory_bytes,
            )
            for found in detect_accelerators()
            if found.device.partition(":")[0] == self.device_type
        ]

    def capabilities(self, device: str) -> Capabilities:
        """See ``Backend.capabilities``."""
        del device
        return self.what_it_computes()

    def open(self, device: str, *, threads: int | None = None) -> ExpertDevice:
        """See ``Backend.open``. The one host thread is the caller's."""
        del threads
        devices = self.devices()
        info = next((info for info in devices if info.name == device), None)
        if info is None:
            names = ", ".join(info.name for info in devices) or "none"
            msg = f"there is no device {device!r}: torch lists {names}; see `kt doctor`"
            raise BackendUnavailableError(msg)
        if why := self.why_not(info):
            msg = f"device {device!r} cannot be used: {why}"
            raise BackendUnavailableError(msg)
        return TorchExpertDevice(self, info)


class TorchExpertDevice(ExpertDevice):
    """A device in use by one engine. Streams and memory are torch's."""

    threads = 1

    def __init__(self, backend: TorchBackend, info: DeviceInfo) -> None:
        """Take a device of the backend."""
        self.info = info
        self.capabilities = backend.capabilities(info.name)
        self._backend = backend
        self._is_closed = False
        try:
            self.host_functions: HostFunctions | None = backend.host_functions(info)
        except DeviceError as error:
            _log.warning(
                "%s: experts on the host will be waited for, which is slower (%s)", info.name, error
            )

    def expert_bytes(self, spec: MoeSpec, weight_format: Format) -> int:
        """See ``ExpertDevice.expert_bytes``."""
        return self._backend.expert_bytes(spec, weight_format)

    def expert_kernel(
        self,
        spec: MoeSpec,
        weight_format: Format,
        *,
        precision: ActivationPrecision = ActivationPrecision.AUTO,
    ) -> ExpertKernel:
        """See ``ExpertDevice.expert_kernel``."""
        device = self._check(weight_format, precision)
        return self._backend.kernel(device, spec, weight_format, precision)

    def linear_bytes(self, spec: LinearSpec, weight_format: Format) -> int:
        """See ``ExpertDevice.linear_bytes``."""
        if not self.capabilities.computes_dense:
            return super().linear_bytes(spec, weight_format)
        from kt_core.packed import LinearLayout

        return LinearLayout.of(spec, weight_format).size_bytes

    def linear_kernel(
        self,
        spec: LinearSpec,
        weight_format: Format,
        *,
        precision: ActivationPrecision = ActivationPrecision.AUTO,
    ) -> LinearKernel:
        """See ``ExpertDevice.linear_kernel``."""
        if not self.capabilities.computes_dense:
            return super().linear_kernel(spec, weight_format, precision=precision)
        device = self._check(weight_format, precision)
        return self._backend.linear_kernel(device, spec, weight_format, precision)

    def _check(self, weight_format: Format, precision: ActivationPrecision) -> torch.device:
        """Return the device if it is open and computes this format with this precision."""
        import torch

        if self._is_closed:
            msg = "the device is closed"
            raise RuntimeError(msg)
        if not self.capabilities.computes(weight_format):
            known = sorted(self.capabilities.elements | self.capabilities.formats)
            msg = (
                f"{self.info.name} cannot compute format {weight_format.name!r}: its weights are "
                f"{', '.join(known)}; choose one of them, or leave these layers on the cpu"
            )
            raise UnsupportedFormatError(msg)
        allowed = self._backend.precisions
        if precision not in (ActivationPrecision.AUTO, *allowed):
            msg = (
                f"{self.info.name} has no {precision.value} activations; choose "
                f"{' or '.join(p.value for p in allowed)}, or auto"
            )
            raise UnsupportedFormatError(msg)
        return torch.device(self.info.torch_device)

    def close(self) -> None:
        """Make no more kernels, and call the host no more."""
        if not self._is_closed and self.host_functions is not None:
            self.host_functions.close()
        self._is_closed = True
