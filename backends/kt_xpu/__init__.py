"""Experts on Intel GPUs: torch's XPU build, kernels in Triton or torch's own operators."""

from __future__ import annotations

from kt_core.hookspecs import Register, hookimpl
from kt_core.interfaces import Backend
from kt_xpu.backend import XpuBackend

__all__ = ["XpuBackend", "kt_register_backends"]


@hookimpl
def kt_register_backends(register: Register[Backend]) -> None:
    """Register the backend ``xpu``."""
    register(XpuBackend())
