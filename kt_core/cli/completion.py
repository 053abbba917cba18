"""What a shell can complete besides options and files: names that plug-ins registered."""

from __future__ import annotations

import typer

from kt_core.cli.output import registry_of


def complete_model(context: typer.Context, incomplete: str) -> list[str]:
    """Return models that have a name; where none fits, shells complete files."""
    return _starting(incomplete, registry_of(context).sources.names())


def complete_plannable(context: typer.Context, incomplete: str) -> list[str]:
    """Return models that have a name or a config; where none fits, shells complete files."""
    registry = registry_of(context)
    return _starting(incomplete, (*registry.sources.names(), *registry.configs.names()))


def complete_format(context: typer.Context, incomplete: str) -> list[str]:
    """Return the weight formats."""
    return _starting(incomplete, ("auto", *registry_of(context).formats.names()))


def complete_policy(context: typer.Context, incomplete: str) -> list[str]:
    """Return the placement policies."""
    return _starting(incomplete, registry_of(context).policies.names())


def complete_dense_format(context: typer.Context, incomplete: str) -> list[str]:
    """Return the weight formats, and the word for none."""
    return _starting(incomplete, ("none", *registry_of(context).formats.names()))


def complete_device(context: typer.Context, incomplete: str) -> list[str]:
    """Return the devices of every backend that can run here."""
    backends = [b for b in registry_of(context).backends if b.why_unavailable() is None]
    devices = [device.name for backend in backends for device in backend.devices()]
    return _starting(incomplete, ("auto", *devices))


def _starting(incomplete: str, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
