"""Which devices ``--device`` means: the host alone, or accelerators with the host behind them."""

from __future__ import annotations

from dataclasses import dataclass

from kt_core.errors import BackendUnavailableError, UnknownNameError
from kt_core.interfaces import Backend, ExpertDevice
from kt_core.plugins import Registry
from kt_core.types import Capabilities, DeviceInfo

_HOST = "cpu"  # torch's name for it


@dataclass(frozen=True, slots=True)
class DeviceChoice:
    """Devices that are not open yet.

    Attributes:
        host_backend: Computes cold experts, or all of them.
        host: Its device.
        backend: Of the accelerators; None where there are none.
        accelerators: The first one holds the dense part.
    """

    host_backend: Backend
    host: DeviceInfo
    backend: Backend | None = None
    accelerators: tuple[DeviceInfo, ...] = ()

    @property
    def dense(self) -> tuple[DeviceInfo, Capabilities]:
        """The device that the dense part lives on, and what it can do."""
        if self.backend is None:
            return self.host, self.host_backend.capabilities(self.host.name)
        first = self.accelerators[0]
        return first, self.backend.capabilities(first.name)

    def open_host(self, threads: int | None) -> ExpertDevice:
        """Start the host's threads."""
        return self.host_backend.open(self.host.name, threads=threads)

    def open_accelerators(self) -> list[ExpertDevice]:
        """Take the accelerators into use; all of them or none."""
        opened: list[ExpertDevice] = []
        try:
            for info in self.accelerators:
                assert self.backend is not None
                opened.append(self.backend.open(info.name))
        except BaseException:
            for device in opened:
                device.close()
            raise
        return opened


def choose_devices(name: str, registry: Registry) -> DeviceChoice:
    """Return what the user means.

    Args:
        name: ``auto``; a device such as ``cpu`` or ``cuda:0``; a backend such as ``cuda``, for its
            first device; or several devices of one, such as ``cuda:0,1``.
        registry: The plug-ins.

    Raises:
        UnknownNameError: There is no such device.
        BackendUnavailableError: Its backend cannot run here, or there is none for the host.
    """
    first, *others = name.split(",")
    kind = first.partition(":")[0]
    backend, info = registry.find_device(_first_of(first, registry))
    infos = [info]
    for other in others:
        found, info = registry.find_device(other if ":" in other else f"{kind}:{other}")
        if found is not backend or info in infos:
            msg = f"--device {name!r}: name each device of one backend once, such as cuda:0,1"
            raise UnknownNameError(msg)
        infos.append(info)
    if infos[0].torch_device == _HOST:
        if others:
            msg = f"--device {name!r}: several devices are for accelerators; the host is one"
            raise UnknownNameError(msg)
        return DeviceChoice(backend, infos[0])
    host_backend, host = _find_host(registry)
    return DeviceChoice(host_backend, host, backend, tuple(infos))


def _first_of(name: str, registry: Registry) -> str:
    """Return the first device of the backend called ``name``; other names as they are."""
    for backend in registry.backends:
        if backend.name == name and backend.why_unavailable() is None:
            devices = backend.devices()
            if devices and name not in {device.name for device in devices}:
                return devices[0].name
    return name


def _find_host(registry: Registry) -> tuple[Backend, DeviceInfo]:
    for backend in sorted(registry.backends, key=lambda b: -b.preference):
        if backend.preference < 0 or backend.why_unavailable() is not None:
            continue
        for device in backend.devices():
            if device.torch_device == _HOST:
                return backend, device
    msg = "no backend can compute experts on the host, as cold ones need: run `kt doctor`"
    raise BackendUnavailableError(msg)
