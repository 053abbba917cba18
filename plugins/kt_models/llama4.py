"""Llama 4: scores multiply the experts' *input*, so the whole block is replaced.

Read from transformers 5.23, models/llama4/modeling_llama4.py: ``Llama4TextMoe`` gives every expert
every token, scaled by ``sigmoid(logit)`` where the expert was chosen and by 0 elsewhere. We compute
the chosen pairs alone. Weights are ``[experts, in, out]``, gate first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from kt_core.interfaces import ExpertsSite, ModelAdapter
from kt_core.moe.hybrid_experts import HybridExperts
from kt_models.experts_module import experts_site


class Llama4Block(nn.Module):
    """``Llama4TextMoe`` over HybridExperts; its other parts stay where transformers loads them."""

    def __init__(self, block: Any, experts: HybridExperts) -> None:
        """Take the router and the shared expert over."""
        super().__init__()
        self.top_k: int = block.top_k
        self.router: nn.Module = block.router
        self.shared_expert: nn.Module = block.shared_expert
        self.experts = experts

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the block's output ``[tokens, hidden]`` and the router's logits."""
        hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
        scores, logits = self.router(hidden)
        chosen = logits.topk(self.top_k, dim=1).indices
        scaled = hidden[:, None, :] * scores.gather(1, chosen)[..., None].to(hidden.dtype)
        ones = torch.ones(chosen.numel(), 1, device=hidden.device)
        routed: torch.Tensor = self.experts(scaled.flatten(0, 1), chosen.reshape(-1, 1), ones)
        routed = routed.view(*chosen.shape, hidden.shape[-1]).sum(dim=1)
        return self.shared_expert(hidden) + routed, logits


class Adapter(ModelAdapter):
    """For ``Llama4TextMoe``."""

    model_types = ("llama4", "llama4_text")

    def sites(self, model: nn.Module) -> Iterator[ExpertsSite]:
        """Yield the block of each MoE layer."""
        for name, module in model.named_modules():
            if type(module).__name__ == "Llama4TextMoe":
                inner = experts_site(f"{name}.experts", module.experts, is_transposed=True)
                yield replace(inner, module_name=name, build=Llama4Block)
