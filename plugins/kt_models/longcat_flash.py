"""LongCat-Flash: some of the experts a router can choose return their input.

Read from transformers 5.23, models/longcat_flash/modeling_longcat_flash.py: ids at or above
``num_routed_experts`` are identity experts; ``gate_up_proj`` has rows for them, unused.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from kt_core.interfaces import ExpertsSite, ModelAdapter
from kt_core.moe.hybrid_experts import HybridExperts
from kt_models.experts_module import experts_site


class IdentityAwareExperts(nn.Module):
    """Adds ``weight * hidden`` for the pairs of identity experts."""

    def __init__(self, module: nn.Module, experts: HybridExperts) -> None:
        """Take over from the transformers module; it has no other state."""
        super().__init__()
        del module
        self.experts = experts

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """Compute the pairs of real experts, then add the identity ones."""
        is_identity = top_k_index >= self.experts.spec.num_experts
        real = top_k_index.masked_fill(is_identity, -1)
        out: torch.Tensor = self.experts(hidden_states, real, top_k_weights)
        kept = (top_k_weights * is_identity).sum(dim=1, keepdim=True)
        return (out + hidden_states * kept).to(hidden_states.dtype)


class Adapter(ModelAdapter):
    """For ``LongcatFlashExperts``."""

    model_types = ("longcat_flash",)

    def sites(self, model: nn.Module) -> Iterator[ExpertsSite]:
        """Yield the experts module of each layer."""
        for name, module in model.named_modules():
            if type(module).__name__ == "LongcatFlashExperts":
                yield experts_site(name, module, build=IdentityAwareExperts)
