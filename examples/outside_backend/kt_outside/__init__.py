# --8<-- [start:hooks]
"""A kt plug-in from outside: a backend, a model adapter and a weight format."""

from __future__ import annotations

from kt_core.hookspecs import Register, hookimpl
from kt_core.interfaces import Backend, ModelAdapter, WeightFormat
from kt_outside.backend import SlowpokeBackend
from kt_outside.formats import INT4_ROW
from kt_outside.outside_moe import OutsideMoeAdapter

__all__ = ["kt_register_backends", "kt_register_formats", "kt_register_model_adapters"]


@hookimpl
def kt_register_backends(register: Register[Backend]) -> None:
    """Register the backend, even where it cannot run: it says why itself."""
    register(SlowpokeBackend())


@hookimpl
def kt_register_formats(register: Register[WeightFormat]) -> None:
    """Register the format."""
    register(INT4_ROW)


@hookimpl
def kt_register_model_adapters(register: Register[ModelAdapter]) -> None:
    """Register the adapter."""
    register(OutsideMoeAdapter())


# --8<-- [end:hooks]
