"""An adapter that is imported when it is first asked something.

torch and transformers take two seconds to import; ``kt --help`` and shell completion register
adapters without ever using one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any

from kt_core.interfaces import ExpertsSite, ModelAdapter

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig


class DeferredAdapter(ModelAdapter):
    """Stands for ``kt_models.<module>.Adapter``."""

    def __init__(self, module: str, *model_types: str) -> None:
        """Take the module's name, and the model types its adapter is for."""
        self.model_types = model_types
        self._module = module

    @cached_property
    def _adapter(self) -> ModelAdapter:
        adapter: ModelAdapter = import_module(f"kt_models.{self._module}").Adapter()
        assert adapter.model_types == self.model_types
        return adapter

    def config(self, config_dict: Mapping[str, Any]) -> PreTrainedConfig | None:
        """Ask the adapter."""
        return self._adapter.config(config_dict)

    def proven_families(self) -> Mapping[str, str]:
        """Ask the adapter."""
        return self._adapter.proven_families()

    def sites(self, model: nn.Module) -> Iterator[ExpertsSite]:
        """Ask the adapter."""
        return self._adapter.sites(model)
