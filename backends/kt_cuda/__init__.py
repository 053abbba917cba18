"""Experts on NVIDIA GPUs: torch's CUDA build, kernels in Triton."""

from __future__ import annotations

from kt_core.hookspecs import Register, hookimpl
from kt_core.interfaces import Backend
from kt_cuda.backend import CudaBackend

__all__ = ["CudaBackend", "kt_register_backends"]


@hookimpl
def kt_register_backends(register: Register[Backend]) -> None:
    """Register the backend ``cuda``."""
    register(CudaBackend())
