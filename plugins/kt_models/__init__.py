"""Model adapters: the generic one, and the few families it cannot read; configs of released models.

One file per family, named after its ``model_type``; its class is called ``Adapter``.
"""

from __future__ import annotations

from kt_core.hookspecs import Register, hookimpl
from kt_core.interfaces import ModelAdapter, NamedConfig
from kt_models.deferred import DeferredAdapter
from kt_models.released import released_configs

__all__ = ["kt_register_model_adapters", "kt_register_model_configs"]


@hookimpl
def kt_register_model_adapters(register: Register[ModelAdapter]) -> None:
    """Register them all."""
    register(DeferredAdapter("generic"))
    register(DeferredAdapter("kimi_k2", "kimi_k2"))
    register(DeferredAdapter("llama4", "llama4", "llama4_text"))
    register(DeferredAdapter("longcat_flash", "longcat_flash"))
    register(DeferredAdapter("step3p7", "step3p7"))


@hookimpl
def kt_register_model_configs(register: Register[NamedConfig]) -> None:
    """Register what `kt plan` knows by name."""
    for config in released_configs():
        register(config)
