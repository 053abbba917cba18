"""What the compiled device offers to Python: csrc/module.cpp, for those who check types."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch


class NativeDevice(Protocol):
    """The extension module. There is at most one in a process: it is that process's hardware."""

    def configure(
        self,
        *,
        devices: int,
        memory_bytes: int,
        link_bytes_per_s: float,
        link_latency_s: float,
        memory_bytes_per_s: float,
        float32_flops_per_s: float,
        float16_flops_per_s: float,
    ) -> None:
        """Set what is simulated; devices and memory before the first use, rates at any time.

        Raises:
            ValueError: A number is out of range, or cannot change any more.
        """

    def settings(self) -> dict[str, float]:
        """Return the arguments of ``configure``."""

    def register_device(self) -> None:
        """Tell torch; once, after torch knows the name of the device type."""

    def device_count(self) -> int:
        """Return how many devices there are."""

    def current_device(self) -> int:
        """Return the index of the calling thread's device."""

    def set_device(self, device: int) -> None:
        """Change the calling thread's device."""

    def synchronize(self, device: int) -> None:
        """Wait for all streams of the device."""

    def default_generator(self, device: int) -> torch.Generator:
        """Return the generator of operators that are given none."""

    def launch(
        self,
        function: Callable[..., tuple[float, float, bool]],
        tensors: Sequence[torch.Tensor],
        name: str,
    ) -> None:
        """See ``kt_sim.device.launch``."""

    def bytes_at(self, address: int, bytes: int) -> torch.Tensor:
        """Return ``[bytes]`` uint8 over memory of a device; for kernels of ``launch`` alone."""

    def lose(self, device: int, reason: str) -> None:
        """Let the device fail from now on, as if it fell off the bus."""

    def revive(self, device: int) -> None:
        """Make a lost device usable again, and forget about faults."""

    def fail_allocations(self, device: int, times: int) -> None:
        """Let the next ``times`` allocations run out of memory."""

    def refuse_host_functions(self, device: int, times: int) -> None:
        """Let the next ``times`` launches of host functions return an error."""
