"""Model adapters: the generic one, and the few families it cannot read.

One file per family, named after its ``model_type``; its class is called ``Adapter``.
"""

from __future__ import annotations

from kt_core.hookspecs import Register, hookimpl
from kt_core.interfaces import ModelAdapter
from kt_models.deferred import DeferredAdapter

__all__ = ["kt_register_model_adapters"]


@hookimpl
def kt_register_model_adapters(register: Register[ModelAdapter]) -> None:
    """Register them all."""
    register(DeferredAdapter("generic"))
    register(DeferredAdapter("kimi_k2", "kimi_k2"))
    register(DeferredAdapter("llama4", "llama4", "llama4_text"))
    register(DeferredAdapter("longcat_flash", "longcat_flash"))
    register(DeferredAdapter("step3p7", "step3p7"))
