"""Experts on Ascend NPUs: torch-npu's grouped matrix products."""

from __future__ import annotations

from kt_core.hookspecs import Register, hookimpl
from kt_core.interfaces import Backend
from kt_npu.backend import NpuBackend

__all__ = ["NpuBackend", "kt_register_backends"]


@hookimpl
def kt_register_backends(register: Register[Backend]) -> None:
    """Register the backend ``npu``."""
    register(NpuBackend())
