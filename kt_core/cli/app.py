"""A Typer application whose help speaks to people: no ``<bool>`` beside ``--json``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.models import CommandFunctionType


def _without_python_types(parameters: list[Any]) -> list[Any]:
    """Blank the types that Typer writes beside flags (``<bool>``) and arguments (``<str>``)."""
    for parameter in parameters:
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""
        elif parameter.param_type_name == "argument" and parameter.metavar:
            parameter.display_type_rich = lambda ctx: None
    return parameters


class _Command(TyperCommand):
    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters, ``--help`` included."""
        return _without_python_types(super().get_params(ctx))


class _Group(TyperGroup):
    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters, ``--help`` and those of completion included."""
        return _without_python_types(super().get_params(ctx))


class App(typer.Typer):
    """Plug-ins add commands to it with ``@app.command()``, and they look like ours."""

    def __init__(self, **options: Any) -> None:
        """Take what ``typer.Typer`` takes."""
        super().__init__(cls=_Group, **options)

    def command(
        self, name: str | None = None, *, cls: type[TyperCommand] | None = _Command, **options: Any
    ) -> Callable[[CommandFunctionType], CommandFunctionType]:
        """Return the decorator ``typer.Typer.command`` does."""
        return super().command(name, cls=cls, **options)
