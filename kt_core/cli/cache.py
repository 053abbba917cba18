"""``kt cache``: packed models that ``kt run --cache`` keeps."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import typer

from kt_core.cli.app import App
from kt_core.cli.output import JSON_HELP, print_json, show, table, write

EPILOG = """
Examples:

* `kt cache list`
* `kt cache clear` removes everything, `kt cache clear NAME` one model
"""


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = App(name="cache", help="Packed models that `kt run --cache` keeps.", epilog=EPILOG)
    group.command("list")(list_models)
    group.command("clear")(clear)
    app.add_typer(group)


def list_models(
    *, as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False
) -> None:
    """List what is in the cache, the last used first."""
    from kt_core.engine.packed_cache import cache_root, cached_models  # seconds: torch

    models = list(cached_models())
    if as_json:
        print_json([model.to_dict() for model in models])
        return
    if not models:
        write(f"{cache_root()} holds nothing: `kt run MODEL --format int4 --cache` fills it\n")
        return
    grid = table("name", "GB", "last used")
    for model in models:
        used = datetime.fromtimestamp(model.last_used_s, UTC).astimezone()
        when = f"{used:%Y-%m-%d %H:%M}" if model.is_finished else "unfinished"
        grid.add_row(model.name, f"{model.size_bytes / 1e9:.3f}", when)
    show(grid)


def clear(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME", help="As `kt cache list` shows it; without: all."),
    ] = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Remove packed models from the cache; the original models are not touched."""
    from kt_core.engine.packed_cache import remove_cached  # seconds: torch

    removed = remove_cached(names or [])
    if as_json:
        print_json([model.to_dict() for model in removed])
        return
    freed = sum(model.size_bytes for model in removed)
    write(f"removed {len(removed)} models, {freed / 1e9:.3f} GB\n")
