"""``kt backends``: what is registered to compute experts."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.markup import escape

from kt_core.cli.output import JSON_HELP, print_json, registry_of, show, table
from kt_core.interfaces import Backend
from kt_core.plugins import Registry

EPILOG = """
Examples:

* `kt backends`
* `kt backends --json | jq '.[].devices[].formats'`
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=EPILOG)(backends)


def backends(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """List the backends, their devices and the formats they compute."""
    described = describe_backends(registry_of(context))
    if as_json:
        print_json(described)
        return
    rows = table("backend", "device", "runs", "formats")
    for backend in described:
        for device in backend["devices"]:
            name = f"{device['name']}: {device['description']}"
            formats = ", ".join(device["formats"])
            rows.add_row(backend["name"], name, device["isa"] or "", formats)
        if not backend["available"]:
            reason = escape(backend["why_unavailable"])  # pip install 'kt-core[cuda]'
            rows.add_row(backend["name"], "none", "", f"cannot run: {reason}")
    show(rows)


def describe_backends(registry: Registry) -> list[dict[str, Any]]:
    """Return what each backend says about itself, as JSON will show it."""
    return [_describe(registry, backend) for backend in registry.backends]


def _describe(registry: Registry, backend: Backend) -> dict[str, Any]:
    reason = backend.why_unavailable()
    return {
        "name": backend.name,
        "plugin": registry.backends.owner(backend.name),
        "available": reason is None,
        "why_unavailable": reason,
        "devices": _devices(registry, backend) if reason is None else [],
    }


def _devices(registry: Registry, backend: Backend) -> list[dict[str, Any]]:
    described = []
    formats = [weight_format.descriptor for weight_format in registry.formats]
    for device in backend.devices():
        capabilities = backend.capabilities(device.name)
        described.append(
            {
                "name": device.name,
                "description": device.description,
                "memory_bytes": device.memory_bytes,
                "remarks": list(device.remarks),
                "formats": sorted(f.name for f in formats if capabilities.computes(f)),
                "isa": capabilities.instruction_set,
                "isas": list(capabilities.instruction_sets),
                "trains": capabilities.trains,
                "computes_dense": capabilities.computes_dense,
            }
        )
    return described
