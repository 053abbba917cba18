"""The backend ``rocm``. Torch calls its devices ``cuda`` too; ``torch.version`` tells which."""

from __future__ import annotations

from pathlib import Path

from kt_core.interfaces import HostFunctions
from kt_core.types import DeviceInfo
from kt_triton.backend import TritonBackend, hidden_by

# Linux makes it when the driver, amdgpu, is loaded; whoever computes opens it.
DRIVER_FILE = Path("/dev/kfd")
# The matrix units with bfloat16: CDNA and RDNA from the third generation on.
FAMILIES = ("gfx942", "gfx950", "gfx11", "gfx12")


class RocmBackend(TritonBackend):
    """AMD GPUs with matrix units that multiply bfloat16."""

    name = "rocm"
    preference = 20
    device_type = "cuda"
    package = "triton, or torch's ROCm build, which brings its own"

    def why_unavailable(self) -> str | None:
        """Return the first thing that is missing. Starts no context."""
        import torch

        if torch.version.hip is None:
            return (
                f"torch {torch.__version__} is not built for ROCm: install it from an index of "
                "https://download.pytorch.org/whl that begins with rocm (docs/install.md)"
            )
        if why := _why_no_driver():
            return why
        if torch.cuda.device_count() == 0:
            hidden = hidden_by("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
            return f"the driver shows no GPU{hidden}: see what rocminfo says"
        return self.why_no_triton()

    def why_not(self, device: DeviceInfo) -> str | None:
        """See ``TorchBackend.why_not``."""
        import torch

        properties = torch.cuda.get_device_properties(torch.device(device.torch_device))
        architecture = properties.gcnArchName.partition(":")[0]
        if architecture.startswith(FAMILIES):
            return None
        return (
            f"it is a {architecture}, and these kernels are compiled for {', '.join(FAMILIES)}; "
            "choose another device"
        )

    def host_functions(self, device: DeviceInfo) -> HostFunctions:
        """See ``TorchBackend.host_functions``."""
        del device
        from kt_core.hardware.runtime_library import RuntimeHostFunctions

        libraries = ["libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so"]
        return RuntimeHostFunctions("hipLaunchHostFunc", libraries)


def _why_no_driver() -> str | None:
    if not DRIVER_FILE.exists():
        return (
            f"AMD's driver is not there ({DRIVER_FILE} is missing): load amdgpu, or start the "
            "container with --device /dev/kfd --device /dev/dri"
        )
    try:
        with DRIVER_FILE.open("rb+", buffering=0):
            return None
    except OSError as error:
        return (
            f"{DRIVER_FILE} cannot be opened ({error.strerror}): add your user to the groups "
            "render and video, and log in again"
        )
