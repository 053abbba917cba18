"""The backend ``cuda``."""

from __future__ import annotations

import ctypes
import logging

from kt_core.errors import DeviceError
from kt_core.interfaces import HostFunctions
from kt_core.types import DeviceInfo
from kt_triton.backend import TritonBackend, hidden_by

_log = logging.getLogger(__name__)

DRIVER = "libcuda.so.1"
# bfloat16 on the matrix units: Ampere and later.
OLDEST_CAPABILITY = (8, 0)


class CudaBackend(TritonBackend):
    """NVIDIA GPUs from Ampere on."""

    name = "cuda"
    preference = 20
    device_type = "cuda"
    package = "'kt-core[cuda]'"

    def why_unavailable(self) -> str | None:
        """Return the first thing that is missing. Starts no context: NVML counts the devices."""
        import torch

        if torch.version.cuda is None:
            return (
                f"torch {torch.__version__} is not built for CUDA: install it from an index of "
                "https://download.pytorch.org/whl that begins with cu (docs/install.md)"
            )
        if not _loads(DRIVER):
            return (
                f"NVIDIA's driver is not installed ({DRIVER} cannot be loaded): install it, or "
                "start the container with its GPUs (docker run --gpus all)"
            )
        if torch.cuda.device_count() == 0:
            hidden = hidden_by("CUDA_VISIBLE_DEVICES")
            return f"the driver shows no GPU{hidden}: see what nvidia-smi says"
        return self.why_no_triton()

    def why_not(self, device: DeviceInfo) -> str | None:
        """See ``TorchBackend.why_not``."""
        import torch

        found = torch.cuda.get_device_capability(torch.device(device.torch_device))
        if found >= OLDEST_CAPABILITY:
            return None
        return (
            f"its compute capability is {found[0]}.{found[1]}, and these kernels need "
            f"{OLDEST_CAPABILITY[0]}.{OLDEST_CAPABILITY[1]} (Ampere) or later; choose another"
        )

    def host_functions(self, device: DeviceInfo) -> HostFunctions:
        """See ``TorchBackend.host_functions``: by a doorbell, or else as the runtime does it."""
        from kt_core.hardware.runtime_library import RuntimeHostFunctions

        try:
            return _doorbell(device)
        except DeviceError as error:
            _log.info("the host is called by CUDA's runtime, which is slower (%s)", error)
        return RuntimeHostFunctions("cudaLaunchHostFunc", ["libcudart.so.13", "libcudart.so.12"])


def _doorbell(device: DeviceInfo) -> HostFunctions:
    import torch

    from kt_core.accelerator.doorbell import DoorbellHostFunctions
    from kt_cuda.stream_memory import CudaStreamMemory

    return DoorbellHostFunctions(CudaStreamMemory(DRIVER), torch.device(device.torch_device))


def _loads(library: str) -> bool:
    """Whether a library is there. Loading the driver's starts nothing: cuInit would."""
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
