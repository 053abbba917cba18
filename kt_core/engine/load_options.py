"""What ``kt_core.load`` was asked for, checked before anything is fetched or opened."""

from __future__ import annotations

import logging

from kt_core import hardware
from kt_core.engine.device_choice import DeviceChoice
from kt_core.errors import InvalidRequestError, UnsupportedDenseError, UnsupportedFormatError
from kt_core.plugins import Registry
from kt_core.types import ActivationPrecision, Format

_log = logging.getLogger(__name__)


def precision_of(precision: ActivationPrecision | str) -> ActivationPrecision:
    """Return what hidden states become.

    Raises:
        InvalidRequestError: Nobody knows that name.
    """
    try:
        return ActivationPrecision(precision)
    except ValueError as error:
        known = ", ".join(known.value for known in ActivationPrecision)
        msg = f"precision {precision!r} is unknown; there are: {known}"
        raise InvalidRequestError(msg) from error


def dense_format_of(name: str, registry: Registry, devices: DeviceChoice) -> Format | None:
    """Return what dense layers become, before anything is fetched or opened.

    Raises:
        UnknownNameError: There is no such format.
        UnsupportedDenseError: The device computes no dense layers.
        UnsupportedFormatError: The device does not compute them in this format.
    """
    if name == "none":
        return None
    descriptor = registry.formats.get(name).descriptor
    device, capabilities = devices.dense
    if not capabilities.computes_dense:
        msg = (
            f"device {device.name!r} computes no dense layers, only routed experts: leave them to "
            "torch (--dense-format none), or choose another device; `kt backends` lists them"
        )
        raise UnsupportedDenseError(msg)
    if not capabilities.computes(descriptor):
        msg = (
            f"device {device.name!r} computes no dense layers of format {name!r}; see `kt backends`"
        )
        raise UnsupportedFormatError(msg)
    return descriptor


def check_threads(threads: int | None) -> None:
    """Refuse a number of threads below 1, and warn of more than there are cores.

    Raises:
        InvalidRequestError: It is below 1.
    """
    if threads is None:
        return
    if threads < 1:
        msg = f"threads must be >= 1, got {threads}"
        raise InvalidRequestError(msg)
    cores = len(hardware.detect().cpu.physical_cores)
    if threads > cores:
        _log.warning(
            "%d threads were asked for, %d physical cores are usable: more threads than cores "
            "make decoding slower",
            threads,
            cores,
        )
