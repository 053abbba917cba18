"""The generic adapter: reads everything off the experts modules that transformers decorates.

``transformers.integrations.moe.use_experts_implementation`` leaves on every instance how its
weights lie: ``is_transposed``, ``is_concatenated``, ``has_bias``, ``has_gate``,
``has_post_expert_norm``. The activation is found by asking the module for some values: see
``kt_models.probe``. So a new model that transformers supports needs no adapter.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib.resources import files

from torch import nn

from kt_core.interfaces import ExpertsSite, ModelAdapter
from kt_models.experts_module import experts_site

_FLAGS = ("is_transposed", "is_concatenated", "has_bias", "has_gate", "has_post_expert_norm")


class Adapter(ModelAdapter):
    """For every family whose experts modules are decorated."""

    def proven_families(self) -> Mapping[str, str]:
        """Return the table that `nox -s families` last wrote, by transformers' model folder."""
        text = files("kt_models").joinpath("families.json").read_text(encoding="utf-8")
        table: dict[str, str] = json.loads(text)["families"]
        return table

    def sites(self, model: nn.Module) -> Iterator[ExpertsSite]:
        """Yield every module that carries the decorator's flags."""
        for name, module in model.named_modules():
            if all(hasattr(module, flag) for flag in _FLAGS):
                yield experts_site(
                    name,
                    module,
                    is_transposed=module.is_transposed,
                    is_concatenated=module.is_concatenated,
                    has_bias=module.has_bias,
                    has_gate=module.has_gate,
                    has_post_expert_norm=module.has_post_expert_norm,
                )
