"""The backend ``sim`` and its devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kt_core.errors import BackendUnavailableError, UnsupportedFormatError
from kt_core.interfaces import Backend, ExpertDevice, HostFunctions
from kt_core.types import (
    ActivationPrecision,
    Capabilities,
    DeviceInfo,
    Element,
    Format,
    LinearSpec,
    MoeSpec,
)
from kt_sim import build
from kt_sim.settings import Settings, from_environment

if TYPE_CHECKING:
    import torch

    from kt_sim.kernel import SimExpertKernel
    from kt_sim.linear import SimLinearKernel

SYMBOL = "kt_sim_launch_host_function"

_CODES = {1: "there is no such stream", 2: "the device is lost", 3: "the refusal was injected"}
_DECODED_BYTES = 1 << 30
_PRECISIONS = (ActivationPrecision.BF16, ActivationPrecision.FLOAT32)


class SimBackend(Backend):
    """Devices that are not there, as many as ``KT_SIM`` says."""

    name = "sim"
    preference = -10

    def why_unavailable(self) -> str | None:
        """Return None once it is compiled, and nobody else has torch's place for a device type."""
        if why := build.why_not_built():
            return why
        from kt_sim.device import why_name_is_taken

        try:
            from_environment()
        except BackendUnavailableError as error:
            return str(error)
        return why_name_is_taken()

    def devices(self) -> Sequence[DeviceInfo]:
        """Return them all. Torch knows their names once one of them is opened."""
        from kt_sim.device import TYPE, current_settings

        settings = current_settings()
        return [
            DeviceInfo(
                name=f"{self.name}:{index}",
                description=_describe(settings),
                torch_device=f"{TYPE}:{index}",
                memory_bytes=settings.memory_bytes,
                remarks=("this device is simulated: the host computes for it",),
            )
            for index in range(settings.devices)
        ]

    def capabilities(self, device: str) -> Capabilities:
        """See ``Backend.capabilities``."""
        del device
        return Capabilities(elements=frozenset(Element), computes_dense=True)

    def open(self, device: str, *, threads: int | None = None) -> ExpertDevice:
        """Make ``sim`` this process's accelerator. The one thread is the stream's."""
        del threads
        from kt_sim.device import start

        info = next((info for info in self.devices() if info.name == device), None)
        if info is None:
            msg = f"there is no device {device!r}: KT_SIM sets how many there are"
            raise BackendUnavailableError(msg)
        start()
        return SimDevice(info, self.capabilities(device))


def _describe(settings: Settings) -> str:
    return (
        f"simulated accelerator, {settings.memory_gib:g} GiB at {settings.memory_gb_s:g} GB/s, "
        f"{settings.float16_tflops:g} TFLOP/s, link of {settings.link_gb_s:g} GB/s"
    )


class SimDevice(ExpertDevice):
    """A simulated device in use by one engine. Its memory is the process's, as a GPU's is."""

    threads = 1

    def __init__(self, info: DeviceInfo, capabilities: Capabilities) -> None:
        """Take what the backend says."""
        from kt_sim.decoded import DecodedExperts

        self.info = info
        self.capabilities = capabilities
        self.host_functions: HostFunctions | None = host_functions()
        self._decoded = DecodedExperts(_DECODED_BYTES)
        self._is_closed = False

    def expert_bytes(self, spec: MoeSpec, weight_format: Format) -> int:
        """See ``ExpertDevice.expert_bytes``."""
        from kt_core.packed import ExpertLayout

        return ExpertLayout.of(spec, weight_format).size_bytes

    def expert_kernel(
        self,
        spec: MoeSpec,
        weight_format: Format,
        *,
        precision: ActivationPrecision = ActivationPrecision.AUTO,
    ) -> SimExpertKernel:
        """See ``ExpertDevice.expert_kernel``. Memory is taken expert by expert, as they come."""
        where = self._check(weight_format, precision)
        from kt_sim.kernel import SimExpertKernel

        return SimExpertKernel(where, spec, weight_format, precision, self._decoded)

    def linear_bytes(self, spec: LinearSpec, weight_format: Format) -> int:
        """See ``ExpertDevice.linear_bytes``."""
        from kt_core.packed import LinearLayout

        return LinearLayout.of(spec, weight_format).size_bytes

    def linear_kernel(
        self,
        spec: LinearSpec,
        weight_format: Format,
        *,
        precision: ActivationPrecision = ActivationPrecision.AUTO,
    ) -> SimLinearKernel:
        """See ``ExpertDevice.linear_kernel``."""
        where = self._check(weight_format, precision)
        from kt_sim.linear import SimLinearKernel

        return SimLinearKernel(where, spec, weight_format, precision)

    def _check(self, weight_format: Format, precision: ActivationPrecision) -> torch.device:
        """Return the device if it is open and computes with this precision."""
        import torch

        if self._is_closed:
            msg = "the device is closed"
            raise RuntimeError(msg)
        if precision not in (ActivationPrecision.AUTO, *_PRECISIONS):
            msg = (
                f"format {weight_format.name!r} has no {precision.value} activations on a "
                f"simulated device; choose {' or '.join(_PRECISIONS)}, or auto"
            )
            raise UnsupportedFormatError(msg)
        return torch.device(self.info.torch_device)

    def close(self) -> None:
        """Make no more kernels. Streams and memory are the process's, and stay."""
        self._is_closed = True


def host_functions() -> HostFunctions:
    from kt_core.hardware.runtime_library import RuntimeHostFunctions

    return RuntimeHostFunctions(
        SYMBOL,
        [str(build.library_path())],
        describe=lambda code: _CODES.get(code, "an unknown error"),
    )
