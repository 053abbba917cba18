"""Calls of host functions in the order of a device's stream: how the host's experts join in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class HostFunctions(ABC):
    """Puts calls of C functions into streams: ``cudaLaunchHostFunc`` and its like."""

    @abstractmethod
    def launch(self, stream: torch.Stream, function: int, argument: int) -> None:
        """Let a thread of the vendor's runtime call ``function(argument)`` in order of ``stream``.

        It is called once all earlier work of the stream is done, and later work waits until it
        returns. While the stream is captured nothing is called: each replay of the graph calls it.
        It calls nothing of the vendor's runtime and needs no GIL, or streams would stand still.

        Args:
            stream: A stream of the device.
            function: Address of a ``void function(void* argument)``, which must not raise.
            argument: Address that it gets; what lies there must outlive the call, and the graph.

        Raises:
            kt_core.errors.DeviceError: The runtime refused; the message has its code.
        """

    def close(self) -> None:  # noqa: B027 - most have nothing to close
        """Call nothing any more, once the device is done. By default there is nothing to close."""


class HostCallTimes(NamedTuple):
    """When what happened in one call, in nanoseconds of ``time.perf_counter_ns``."""

    started: int
    """The stream called ``start``."""
    finished: int
    """The output was there."""
    join_called: int
    """The stream called ``join``."""
    joined: int
    """``join`` returned."""


class HostCall(ABC):
    """A forward pass on the host that a stream starts and joins: see ``ExpertKernel.host_call``.

    Attributes:
        start: Address of the function that starts it and returns at once.
        join: Address of the function that returns when the output is there.
        argument: What both of them get.
    """

    start: int
    join: int
    argument: int

    @abstractmethod
    def raise_error(self) -> None:
        """Raise what went wrong since the last time, once the stream has come past ``join``.

        Raises:
            RuntimeError: The call failed, and its output was zeros; the message says why.
        """

    def record(self, is_on: bool) -> None:
        """Keep the times of calls from now on, or do not. By default nobody does."""
        del is_on

    def take_times(self) -> list[HostCallTimes]:
        """Return the times of the calls since the last time, once the stream has passed them."""
        return []
