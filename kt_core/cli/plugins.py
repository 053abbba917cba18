"""``kt plugins``: what is plugged in."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kt_core.cli.output import JSON_HELP, print_json, registry_of, show, table
from kt_core.plugins import BLOCK_VARIABLE, Registry, Table

EPILOG = f"""
Examples:

* `kt plugins`
* `{BLOCK_VARIABLE}=demo kt plugins` starts without one of them
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=EPILOG)(plugins)


def plugins(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """List the plug-ins and what each of them registered."""
    registry = registry_of(context)
    described = _describe(registry)
    if as_json:
        print_json({"plugins": described, "blocked": list(registry.blocked)})
        return
    rows = table("plug-in", "module", "registered")
    for plugin in described:
        registered = (f"{kind}: {', '.join(n)}" for kind, n in plugin["registered"].items() if n)
        rows.add_row(plugin["name"], plugin["module"], "; ".join(registered))
    for name in registry.blocked:
        rows.add_row(name, "", f"nothing: {BLOCK_VARIABLE} blocks it")
    show(rows)


def _describe(registry: Registry) -> list[dict[str, Any]]:
    tables: dict[str, Table[Any]] = {
        "backends": registry.backends,
        "formats": registry.formats,
        "checkpoints": registry.checkpoint_formats,
        "model files": registry.model_files,
        "model adapters": registry.adapters,
        "models": registry.sources,
        "placement policies": registry.policies,
        "model configs": registry.configs,
    }
    return [
        {
            "name": name,
            "module": module,
            "registered": {
                kind: [n for n in names.names() if names.owner(n) == name]
                for kind, names in tables.items()
            },
        }
        for name, module in registry.plugins.items()
    ]
