"""The hooks a plug-in may implement, under the entry-point group ``kt``.

Hooks run once, at start-up; the hot path holds direct references. A plug-in is any module or
object with functions of these names, marked with ``kt_core.hookspecs.hookimpl``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import pluggy

from kt_core.interfaces import (
    Backend,
    CheckpointFormat,
    ModelAdapter,
    ModelFiles,
    ModelSource,
    NamedConfig,
    PlacementPolicy,
    WeightFormat,
)

if TYPE_CHECKING:
    import typer

Registered = TypeVar("Registered")
Register: TypeAlias = Callable[[Registered], None]

PROJECT = "kt"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def kt_register_backends(register: Register[Backend]) -> None:
    """Register hardware backends, with ``register(MyBackend())``.

    Register a backend even where it cannot run: it explains why itself, in ``why_unavailable``.
    """


@hookspec
def kt_register_formats(register: Register[WeightFormat]) -> None:
    """Register weight formats."""


@hookspec
def kt_register_checkpoint_formats(register: Register[CheckpointFormat]) -> None:
    """Register readers of quantised checkpoints."""


@hookspec
def kt_register_model_adapters(register: Register[ModelAdapter]) -> None:
    """Register model adapters: facts about families that the generic adapter cannot read."""


@hookspec
def kt_register_model_files(register: Register[ModelFiles]) -> None:
    """Register kinds of files that hold a whole model: weights, config and tokenizer."""


@hookspec
def kt_register_model_sources(register: Register[ModelSource]) -> None:
    """Register models that can be had by name."""


@hookspec
def kt_register_placement_policies(register: Register[PlacementPolicy]) -> None:
    """Register policies that choose which experts lie on the accelerator."""


@hookspec
def kt_register_model_configs(register: Register[NamedConfig]) -> None:
    """Register configs of released models, which ``kt plan`` can plan for by name."""


@hookspec
def kt_register_commands(app: typer.Typer) -> None:
    """Add commands to the ``kt`` command line, with ``@app.command()``."""
