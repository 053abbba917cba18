"""The backend ``slowpoke``: experts in plain torch on the CPU. Slow, and small enough to read.

What a vendor's package does differently stands in the kernel: see kt_outside.kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

from kt_core import hardware
from kt_core.errors import UnsupportedFormatError
from kt_core.interfaces import Backend, ExpertDevice, ExpertKernel
from kt_core.quant import BUILT_IN_FORMATS
from kt_core.types import ActivationPrecision, Capabilities, DeviceInfo, Format, MoeSpec
from kt_outside.formats import INT4_ROW

# --8<-- [start:backend]
FORMATS = (*BUILT_IN_FORMATS, INT4_ROW)


class SlowpokeBackend(Backend):
    """Says what there is; starts nothing before ``open``."""

    name = "slowpoke"
    preference = -10  # below the CPU's 0: nobody gets it who did not ask for it

    def why_unavailable(self) -> str | None:
        """Return None: it needs nothing that kt itself does not need."""
        return None

    def devices(self) -> Sequence[DeviceInfo]:
        """Return the one device. Names are ``slowpoke``, or ``slowpoke:0``, ``slowpoke:1`` ..."""
        return [
            DeviceInfo(
                name="slowpoke",
                description="plain torch, one expert after the other",
                torch_device="cpu",
                memory_bytes=hardware.detect().memory.total_bytes,
            )
        ]

    def capabilities(self, device: str) -> Capabilities:
        """Return the formats by name: those it was tested with."""
        return Capabilities(formats=frozenset(f.descriptor.name for f in FORMATS))

    def open(self, device: str, *, threads: int | None = None) -> ExpertDevice:
        """Take the device into use. There are no threads to start: torch has its own."""
        return SlowpokeDevice(self.devices()[0], self.capabilities(device))


# --8<-- [end:backend]


# --8<-- [start:device]
class SlowpokeDevice(ExpertDevice):
    """Belongs to one engine, and owns what was started for it: here, nothing."""

    threads = 1

    def __init__(self, info: DeviceInfo, capabilities: Capabilities) -> None:
        """Keep what the backend said."""
        self.info = info
        self.capabilities = capabilities

    def expert_bytes(self, spec: MoeSpec, weight_format: Format) -> int:
        """Return the bytes one expert will take; kt refuses models that would not fit."""
        from kt_outside.kernel import stored_bytes

        return stored_bytes(spec, weight_format)

    def expert_kernel(
        self,
        spec: MoeSpec,
        weight_format: Format,
        *,
        precision: ActivationPrecision = ActivationPrecision.AUTO,
    ) -> ExpertKernel:
        """Return a kernel for one layer, or say what cannot be computed."""
        from kt_outside.kernel import SlowpokeKernel

        if weight_format.name not in self.capabilities.formats:
            msg = f"slowpoke cannot compute format {weight_format.name!r}"
            raise UnsupportedFormatError(msg)
        if precision not in (ActivationPrecision.AUTO, ActivationPrecision.FLOAT32):
            msg = f"slowpoke has no {precision.value} activations, only float32"
            raise UnsupportedFormatError(msg)
        return SlowpokeKernel(spec, weight_format)

    def close(self) -> None:
        """Stop what was started; twice does no harm."""


# --8<-- [end:device]
