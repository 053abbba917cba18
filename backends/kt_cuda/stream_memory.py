"""Words in pinned memory that a stream writes and waits for: two functions of CUDA's driver.

https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__MEMOP.html
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

from kt_core.accelerator.doorbell import StreamMemory
from kt_core.errors import DeviceError

if TYPE_CHECKING:
    import torch

# Of the CUDA 11.7 form: the older one needs a setting of the kernel module.
_WRITE, _WAIT = "cuStreamWriteValue32_v2", "cuStreamWaitValue32_v2"
_WRITE_DEFAULT = 0  # CU_STREAM_WRITE_VALUE_DEFAULT: earlier writes are seen first
_WAIT_EQUAL = 1  # CU_STREAM_WAIT_VALUE_EQ


class CudaStreamMemory(StreamMemory):
    """See ``StreamMemory``; host memory that CUDA pinned has the same address on the device."""

    def __init__(self, driver: str) -> None:
        """Find the functions in the driver's library, which torch has loaded.

        Raises:
            DeviceError: There is no driver, or it is too old to have them.
        """
        try:
            library = ctypes.CDLL(driver)
        except OSError as error:
            msg = f"{driver} cannot be loaded: {error}"
            raise DeviceError(msg) from error
        self._write = _function(library, _WRITE)
        self._wait = _function(library, _WAIT)

    def write(self, stream: torch.Stream, address: int, value: int) -> None:
        """See ``StreamMemory.write``."""
        self._call(self._write, stream, address, value, _WRITE_DEFAULT)

    def wait(self, stream: torch.Stream, address: int, value: int) -> None:
        """See ``StreamMemory.wait``."""
        self._call(self._wait, stream, address, value, _WAIT_EQUAL)

    def _call(
        self, function: Any, stream: torch.Stream, address: int, value: int, flags: int
    ) -> None:
        code = function(stream.native_handle, address, value, flags)  # type: ignore[attr-defined]
        if code != 0:
            msg = (
                f"{function.__name__} refused on {stream.device}: code {code} of "
                f"CUresult; the device may be lost, or a graph's capture invalid"
            )
            raise DeviceError(msg)


def _function(library: ctypes.CDLL, name: str) -> Any:
    try:
        found = getattr(library, name)
    except AttributeError:
        msg = f"NVIDIA's driver has no {name}: it came with CUDA 11.7"
        raise DeviceError(msg) from None
    found.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint]
    found.restype = ctypes.c_int
    return found
