"""A simulated accelerator: a torch device ``sim`` with memory, streams and a link of its own.

For those who write code for accelerators where there is none, and for proving it in CI. It computes
on the host, and is as slow there as the host is; what it has of an accelerator is what goes wrong
with one. See docs/simulated-device.md.
"""

from __future__ import annotations

from kt_core.hookspecs import Register, hookimpl
from kt_core.interfaces import Backend
from kt_sim.backend import SimBackend
from kt_sim.settings import Settings

__all__ = ["Settings", "SimBackend", "kt_register_backends"]


@hookimpl
def kt_register_backends(register: Register[Backend]) -> None:
    """Register the backend ``sim``."""
    register(SimBackend())
