"""``kt models``: families that run, and models that are here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from kt_core.cli.output import JSON_HELP, print_json, registry_of, show, table
from kt_core.paths import cache_dir
from kt_core.plugins import Registry

EPILOG = """
Examples:

* `kt models`
* `kt models --json | jq '.families[] | select(.status != "matches")'`
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=EPILOG)(models)


def models(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """List the known families, models that have a name, and those that are on this machine.

    A family "matches" where its logits and tokens are those of transformers. Others may run too.
    """
    registry = registry_of(context)
    report = {
        "families": _families(registry),
        "named": _named(registry),
        "local": _local(cache_dir() / "models"),
    }
    if as_json:
        print_json(report)
    else:
        _show(report)


def _show(report: dict[str, Any]) -> None:
    rows = table("family", "status")
    for family in report["families"]:
        rows.add_row(family["model_type"], family["status"])
    show(rows)
    show("")
    rows = table("model", "what it is")
    for model in report["named"]:
        rows.add_row(model["name"], model["description"])
    for model in report["local"]:
        rows.add_row(model["path"], f"{model['model_type']}, {model['size_bytes'] / 1e9:.2f} GB")
    show(rows)


def _families(registry: Registry) -> list[dict[str, str]]:
    adapters = [*registry.generic_adapters, *registry.adapters]
    families: dict[str, str] = {}
    for adapter in adapters:
        families.update(adapter.proven_families())
    return [{"model_type": name, "status": families[name]} for name in sorted(families)]


def _named(registry: Registry) -> list[dict[str, str]]:
    return [{"name": source.name, "description": source.description} for source in registry.sources]


def _local(folder: Path) -> list[dict[str, Any]]:
    """Models that kt has made: every folder with a config.json."""
    found = []
    for file in sorted(folder.glob("*/config.json")):
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
            size = sum(part.stat().st_size for part in file.parent.iterdir() if part.is_file())
        except (OSError, ValueError):
            continue  # half of a model, or one that is being removed: not there yet, or no more
        model_type = config.get("model_type") if isinstance(config, dict) else None
        found.append({"path": str(file.parent), "model_type": model_type, "size_bytes": size})
    return found
