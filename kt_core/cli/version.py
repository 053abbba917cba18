"""``kt version``."""

from __future__ import annotations

import platform
from importlib.metadata import version as installed
from typing import Annotated

import typer

from kt_core import __version__
from kt_core.cli.output import JSON_HELP, print_json, show, table

EPILOG = """
Examples:

* `kt version`
* `kt version --json | jq -r .torch`
"""
_DEPENDENCIES = ("torch", "transformers", "safetensors", "huggingface-hub")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=EPILOG)(version)


def version(as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False) -> None:
    """Print the version of kt and of what it stands on."""
    if as_json:
        print_json(versions())
        return
    rows = table()
    for name, number in versions().items():
        rows.add_row(name, number)
    show(rows)


def versions() -> dict[str, str]:
    """Return the versions, without importing what has them."""
    own = {"kt": __version__, "python": platform.python_version()}
    return own | {name: installed(name) for name in _DEPENDENCIES}
