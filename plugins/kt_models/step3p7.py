"""Step-3.7: the usual fused experts, only that transformers does not decorate the class.

Read from transformers 5.23, models/step3p7/modeling_step3p7.py: ``Step3p7Experts`` has the
decorator's signature and layout; its ``_apply_gate`` clamps after silu, with a limit per layer.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from kt_core.interfaces import ExpertsSite, ModelAdapter
from kt_models.experts_module import experts_site


class Adapter(ModelAdapter):
    """For ``Step3p7Experts``."""

    model_types = ("step3p7",)

    def sites(self, model: nn.Module) -> Iterator[ExpertsSite]:
        """Yield the experts module of each MoE layer."""
        for name, module in model.named_modules():
            if type(module).__name__ == "Step3p7Experts":
                yield experts_site(name, module)
