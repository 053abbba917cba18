"""``kt verify``: read a packed model and compare it with its checksums."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kt_core.cli.output import JSON_HELP, print_json, progress_bar, write

EPILOG = """
Examples:

* `kt verify ./qwen3-int4`
* `kt verify ./qwen3-int4 --json | jq .damaged`
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=EPILOG)(verify)


def verify(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A packed model: what `kt quant` made.")
    ],
    *,
    threads: Annotated[
        int, typer.Option("--threads", metavar="N", help="CPU threads.", min=1, max=1024)
    ] = 4,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Read a packed model whole and say what is damaged.

    Exits with 0 if nothing is, 1 if something is or the model cannot be opened.
    """
    with progress_bar("reading", with_rest=True) as progress:
        from kt_core.engine.quantize import open_finished  # seconds: torch

        packed, checkpoint = open_finished(directory)
        damaged = packed.verify(
            checkpoint, threads=threads, progress=lambda part: progress("reading", part)
        )
    if as_json:
        print_json({"directory": str(directory), "files": len(packed.files), "damaged": damaged})
    else:
        for problem in damaged:
            write(f"{problem}\n")
        if not damaged:
            write(f"{directory}: all {len(packed.files)} files are as they were written\n")
    if damaged:
        raise typer.Exit(1)
