"""A hardware backend: which devices it has, and how to compute experts on one of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from kt_core.errors import UnsupportedDenseError
from kt_core.interfaces.expert_kernel import ExpertKernel
from kt_core.interfaces.host_functions import HostFunctions
from kt_core.interfaces.linear_kernel import LinearKernel
from kt_core.types import (
    ActivationPrecision,
    Capabilities,
    DeviceInfo,
    Format,
    HostUsage,
    Limits,
    LinearSpec,
    MoeSpec,
)


class Backend(ABC):
    """One kind of hardware. Registered once, stateless: what it opens belongs to the opener.

    Attributes:
        name: Short lower-case word, unique among the registered backends.
        preference: ``--device auto`` takes the runnable backend with the highest; 0 is the CPU's,
            accelerators stand above it, toys and references below: these are never taken unasked.
    """

    name: str
    preference: int = 0

    @abstractmethod
    def why_unavailable(self) -> str | None:
        """Return None if this machine can run the backend, else the reason.

        Must not raise, allocate device memory or import a vendor library that starts a context:
        it is called by ``kt doctor`` and before every ``devices()``.
        """

    @abstractmethod
    def devices(self) -> Sequence[DeviceInfo]:
        """List the devices, best first. Called only where ``why_unavailable()`` is None."""

    @abstractmethod
    def capabilities(self, device: str) -> Capabilities:
        """Say what the device called ``device`` can do.

        Raises:
            kt_core.errors.BackendUnavailableError: This machine cannot run the backend as it is
                configured, for instance an instruction set was forced that the CPU lacks.
        """

    @abstractmethod
    def open(self, device: str, *, threads: int | None = None) -> ExpertDevice:
        """Take the device into use: start its threads or streams.

        Args:
            device: A name from ``devices()``.
            threads: Host threads that may compute; None for what the machine has to give.

        Raises:
            kt_core.errors.BackendUnavailableError: As for ``capabilities``.
        """


class ExpertDevice(ABC):
    """A device in use by one engine: owns threads, streams and the kernels made from it.

    A device whose ``info.torch_device`` is not the host computes behind it, in torch's current
    stream, as torch's own operators do.

    Attributes:
        info: Which device it is.
        capabilities: What it can do.
        threads: Host threads it computes with.
        host_functions: Calls host functions in order of a stream; None for a device without
            streams, or whose runtime cannot: the host then waits for the stream instead.
    """

    info: DeviceInfo
    capabilities: Capabilities
    threads: int
    host_functions: HostFunctions | None = None

    @abstractmethod
    def expert_bytes(self, spec: MoeSpec, weight_format: Format) -> int:
        """Bytes of device memory one packed expert takes, padding and biases included."""

    @abstractmethod
    def expert_kernel(
        self,
        spec: MoeSpec,
        weight_format: Format,
        *,
        precision: ActivationPrecision = ActivationPrecision.AUTO,
    ) -> ExpertKernel:
        """Reserve memory for the experts of one layer and return the kernel that computes them.

        Raises:
            kt_core.errors.UnsupportedFormatError: The device cannot compute this format, or not
                with this precision.
        """

    def linear_bytes(self, spec: LinearSpec, weight_format: Format) -> int:
        """Bytes of device memory one packed dense layer takes, padding and bias included.

        Raises:
            kt_core.errors.UnsupportedDenseError: The device computes no dense layers, as by
                default.
        """
        del spec, weight_format
        raise UnsupportedDenseError(self._why_not_dense())

    def linear_kernel(
        self,
        spec: LinearSpec,
        weight_format: Format,
        *,
        precision: ActivationPrecision = ActivationPrecision.AUTO,
    ) -> LinearKernel:
        """Reserve memory for one dense layer and return the kernel that computes it.

        For a device whose ``Capabilities.computes_dense`` is True; all formats and precisions that
        its experts have.

        Raises:
            kt_core.errors.UnsupportedDenseError: As for ``linear_bytes``.
            kt_core.errors.UnsupportedFormatError: As for ``expert_kernel``.
        """
        del spec, weight_format, precision
        raise UnsupportedDenseError(self._why_not_dense())

    def _why_not_dense(self) -> str:
        return (
            f"device {self.info.name!r} computes no dense layers, only routed experts: leave them "
            "to torch (--dense-format none), or choose another device; `kt backends` lists them"
        )

    def measure_limits(self) -> Limits | None:
        """Measure what no kernel of this device can exceed, with its threads: about a second.

        For ``kt bench``, while nothing else is computed. By default None: nobody knows.
        """
        return None

    def usage(self) -> HostUsage | None:
        """Return what its host threads have done so far.

        Asked for before and after each step, also where the device was closed while an answer was
        under way. None: nobody knows, as by default, or it is closed.
        """
        return None

    @abstractmethod
    def close(self) -> None:
        """Stop the threads and streams. Kernels made from this device must not be used after it.

        Closing twice does nothing.
        """

    def __enter__(self) -> Self:
        """Return self; leaving the block closes the device."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the device."""
        self.close()
