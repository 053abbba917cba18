"""Experts on AMD GPUs: torch's ROCm build, kernels in Triton."""

from __future__ import annotations

from kt_core.hookspecs import Register, hookimpl
from kt_core.interfaces import Backend
from kt_rocm.backend import RocmBackend

__all__ = ["RocmBackend", "kt_register_backends"]


@hookimpl
def kt_register_backends(register: Register[Backend]) -> None:
    """Register the backend ``rocm``."""
    register(RocmBackend())
