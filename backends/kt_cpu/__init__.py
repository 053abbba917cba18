"""Experts on the CPU: packed weights, kernels for each instruction set, a pool of threads."""

from __future__ import annotations

from kt_core.hookspecs import Register, hookimpl
from kt_core.interfaces import Backend
from kt_cpu.backend import CpuBackend

__all__ = ["CpuBackend", "kt_register_backends"]


@hookimpl
def kt_register_backends(register: Register[Backend]) -> None:
    """Register the backend ``cpu``."""
    register(CpuBackend())
