"""The backend ``npu``."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from kt_core.accelerator import TorchBackend
from kt_core.errors import UnsupportedFormatError
from kt_core.interfaces import HostFunctions
from kt_core.types import ActivationPrecision, Capabilities, DeviceInfo, Format, MoeSpec

if TYPE_CHECKING:
    import torch

    from kt_core.interfaces import ExpertKernel

DEVICES = Path("/dev")
FORMATS = frozenset(
    {"bf16", *(f"int4-g{size}{offset}" for size in (32, 64, 128) for offset in ("", "-asym"))}
)


class NpuBackend(TorchBackend):
    """Ascend 910B and later, through torch-npu."""

    name = "npu"
    preference = 15
    device_type = "npu"
    precisions = (ActivationPrecision.BF16,)

    def why_unavailable(self) -> str | None:
        """Return the first thing that is missing. Does not import torch-npu."""
        if importlib.util.find_spec("torch_npu") is None:
            return (
                "torch-npu is not installed: install CANN, then pip install 'kt-core[npu]' with "
                "the constraints of docs/install.md (without CANN it breaks torch)"
            )
        if not any(DEVICES.glob("davinci[0-9]*")):
            return (
                f"there is no NPU ({DEVICES}/davinci* is missing): install Ascend's driver, or "
                "start the container with its devices (ascend-docker-runtime)"
            )
        import torch

        if torch._C._get_privateuse1_backend_name() != self.device_type:
            return (
                "torch has not loaded torch-npu: unset TORCH_DEVICE_BACKEND_AUTOLOAD, and run "
                "CANN's set_env.sh first"
            )
        return None

    def what_it_computes(self) -> Capabilities:
        """What the grouped product takes without rounding a weight."""
        return Capabilities(formats=FORMATS)

    def expert_bytes(self, spec: MoeSpec, weight_format: Format) -> int:
        """See ``TorchBackend.expert_bytes``."""
        from kt_core.accelerator.converted_kernel import converted_bytes
        from kt_npu.kernel import GROUP_BYTES

        return converted_bytes(spec, weight_format, GROUP_BYTES)

    def kernel(
        self,
        device: torch.device,
        spec: MoeSpec,
        weight_format: Format,
        precision: ActivationPrecision,
    ) -> ExpertKernel:
        """See ``TorchBackend.kernel``.

        Raises:
            UnsupportedFormatError: A size is no multiple of the group.
        """
        from kt_core.accelerator.converted_kernel import why_not_whole
        from kt_npu.kernel import NpuExpertKernel

        if why := why_not_whole(spec, weight_format):
            raise UnsupportedFormatError(why)
        return NpuExpertKernel(device, spec, weight_format, precision)

    def host_functions(self, device: DeviceInfo) -> HostFunctions:
        """See ``TorchBackend.host_functions``."""
        del device
        from kt_core.hardware.runtime_library import RuntimeHostFunctions

        return RuntimeHostFunctions("aclrtLaunchHostFunc", ["libascendcl.so"])
