"""Experts that are packed already: what must fit before they are mapped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from kt_core.checkpoint import PackedDirectory, open_packed
from kt_core.engine.device_choice import DeviceChoice
from kt_core.engine.model_files import kind_of, read_config
from kt_core.errors import CheckpointError, UnsupportedDenseError, UnsupportedFormatError
from kt_core.interfaces import ExpertDevice, ExpertsSite
from kt_core.plugins import Registry
from kt_core.types import Capabilities, Format


def find_packed(path: Path, registry: Registry) -> PackedDirectory | None:
    """Return the packed model at a path; None for other models. Errors as ``open_packed``."""
    return None if kind_of(path, registry) else open_packed(path, read_config(path))


def check_packed_sites(
    packed: PackedDirectory, sites: Sequence[ExpertsSite], device: ExpertDevice
) -> None:
    """Check that the packed experts are those of the model, and that the device computes them.

    Raises:
        CheckpointError: They belong to another model.
        UnsupportedFormatError: The device does not compute their format.
    """
    layers = packed.config.layers
    for site in sites:
        layer = layers.get(site.parameter_prefix)
        if layer is None or not layer.describes(site.spec):
            found = "nothing for them" if layer is None else f"others: {layer}"
            msg = (
                f"the model in {packed.directory} has experts at {site.parameter_prefix}, of "
                f"{site.spec}, its packed files have {found}. config.json was changed; copy it "
                "again, or make it again with `kt quant`."
            )
            raise CheckpointError(msg)
        if not device.capabilities.computes(layer.weight_format):
            msg = (
                f"{packed.directory} holds experts of format {layer.weight_format.name!r}, which "
                f"device {device.info.name!r} does not compute: choose another device (`kt "
                "backends` lists them), or pack the original model in another format."
            )
            raise UnsupportedFormatError(msg)


def packed_formats(packed: PackedDirectory, sites: Iterable[ExpertsSite]) -> dict[str, Format]:
    """Return the format of each site, by the path of its parameters."""
    names = [site.parameter_prefix for site in sites]
    return {name: packed.config.layers[name].weight_format for name in names}


def check_asked_format(packed: PackedDirectory, name: str, registry: Registry) -> None:
    """Refuse a format other than that of the packed experts.

    Raises:
        UnsupportedFormatError: Another one is asked for.
    """
    found = {layer.weight_format.name for layer in packed.config.layers.values()}
    if name == "auto" or {registry.formats.get(name).descriptor.name} == found:
        return
    msg = (
        f"{packed.directory} is packed as {', '.join(sorted(found))}, not {name}: leave --format "
        f"out, or use the original model"
        + (f" ({packed.config.source})" if packed.config.source else "")
    )
    raise UnsupportedFormatError(msg)


def check_packed_dense(
    packed: PackedDirectory, asked_for: Format | None, devices: DeviceChoice
) -> None:
    """Check that dense layers that are packed can be used as they are.

    An accelerator that does not compute them gets them unpacked: see ``UnpackedDense``.

    Args:
        packed: The packed model.
        asked_for: What ``--dense-format`` says; None where it says nothing.
        devices: Where it shall run.

    Raises:
        UnsupportedDenseError: Nobody computes packed dense layers there.
        UnsupportedFormatError: Another format is asked for, or one is not computed.
    """
    formats = {layer.weight_format for layer in packed.config.dense.values()}
    device, capabilities = devices.dense
    if not formats or (devices.accelerators and not computes_all(capabilities, formats)):
        return
    names = ", ".join(sorted(weight_format.name for weight_format in formats))
    again = "make it again with `kt quant`, without --dense-format"
    if not capabilities.computes_dense:
        msg = (
            f"the dense layers in {packed.directory} are packed as {names}, and device "
            f"{device.name!r} computes no dense layers: run it on another device, or {again}"
        )
        raise UnsupportedDenseError(msg)
    if asked_for is not None and {asked_for} != formats:
        msg = (
            f"the dense layers in {packed.directory} are packed as {names}, not "
            f"{asked_for.name}: leave --dense-format out, or use the original model"
        )
        raise UnsupportedFormatError(msg)
    if not computes_all(capabilities, formats):
        msg = (
            f"device {device.name!r} computes no dense layers of {names}, as which those in "
            f"{packed.directory} are packed: run it on another device, or {again}"
        )
        raise UnsupportedFormatError(msg)


def computes_all(capabilities: Capabilities, formats: Iterable[Format]) -> bool:
    """Whether a device computes dense layers of all these formats."""
    return capabilities.computes_dense and all(capabilities.computes(f) for f in formats)
