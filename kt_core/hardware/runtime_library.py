"""Host functions through a C function of a vendor's runtime, found in what torch has loaded.

CUDA's ``cudaLaunchHostFunc``, ROCm's ``hipLaunchHostFunc`` and Ascend's ``aclrtLaunchHostFunc``
have one shape, ``int (stream, void (*function)(void*), void* argument)``, so one class serves all:
a backend names the symbol and where it may lie. Nothing of the vendor's is needed to build kt, and
no library is loaded: a second copy of a runtime would know nothing of torch's streams.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from kt_core.errors import DeviceError
from kt_core.interfaces.host_functions import HostFunctions

if TYPE_CHECKING:
    import torch

_LAUNCH_TYPE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)


class RuntimeHostFunctions(HostFunctions):
    """Calls host functions through a symbol of a library that this process has loaded already."""

    def __init__(
        self,
        symbol: str,
        libraries: Sequence[str],
        *,
        describe: Callable[[int], str] | None = None,
    ) -> None:
        """Find the symbol: among the process's global ones, then in the libraries.

        Args:
            symbol: Name of an ``int (stream, void (*)(void*), void*)`` that returns 0 on success.
            libraries: File names or paths, newest first; those that nobody has loaded are skipped.
            describe: Turns an error code into words; None to give the number alone.

        Raises:
            DeviceError: The symbol is nowhere.
        """
        self.symbol = symbol
        self._describe = describe
        # The library must outlive the pointer into it; the handle is never closed.
        self._library, address = _find(symbol, libraries)
        self._launch = _LAUNCH_TYPE(address)

    def launch(self, stream: torch.Stream, function: int, argument: int) -> None:
        """See ``HostFunctions.launch``."""
        handle = stream.native_handle  # type: ignore[attr-defined]  # torch 2.13 does not list it
        code = self._launch(handle, function, argument)
        if code != 0:
            words = f" ({self._describe(code)})" if self._describe is not None else ""
            msg = (
                f"{self.symbol} refused a host function on {stream.device}: code {code}{words}; "
                f"the device may be lost, or a graph's capture invalid: end the process and look "
                f"at the log of the driver"
            )
            raise DeviceError(msg)


def _find(symbol: str, libraries: Sequence[str]) -> tuple[ctypes.CDLL, int]:
    """Return the library that has the symbol, and its address."""
    loaded = [ctypes.CDLL(None)]
    for name in libraries:
        try:
            loaded.append(ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_NOW))
        except OSError:  # nobody has loaded it, which is no failure as long as another has it
            continue
    for library in loaded:
        try:
            function = getattr(library, symbol)
        except AttributeError:
            continue
        address = ctypes.cast(function, ctypes.c_void_p).value
        if address is not None:
            return library, address
    searched = ", ".join(("this process", *libraries))
    msg = (
        f"{symbol} is in none of the libraries that are loaded (looked in: {searched}); import "
        "the build of torch for this device first, and check with `kt doctor` that it finds it"
    )
    raise DeviceError(msg)
