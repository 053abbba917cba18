"""Describe a fused experts module, ``gate_up_proj`` and ``down_proj``, from flags and shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from kt_core.interfaces import ExpertsSite, ExpertWeights
from kt_core.moe.hybrid_experts import HybridExperts
from kt_core.types import Activation, MoeSpec
from kt_models.probe import activation_of


class NormedExperts(nn.Module):
    """Experts whose outputs go through a norm of their own before the weighted sum."""

    def __init__(self, module: Any, experts: HybridExperts) -> None:
        """Keep the norm where transformers loads it: below the experts module."""
        super().__init__()
        self.post_expert_norm: nn.Module = module.post_expert_norm
        self.experts = experts

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """Compute as the decorated module does: norm each pair, then weigh and add."""
        pairs = self.experts.forward_pairs(hidden_states, top_k_index)
        outputs: torch.Tensor = self.post_expert_norm(pairs)
        return (outputs * top_k_weights[..., None]).sum(dim=1).to(hidden_states.dtype)


def experts_site(
    name: str,
    module: nn.Module,
    *,
    is_transposed: bool = False,
    is_concatenated: bool = True,
    has_bias: bool = False,
    has_gate: bool = True,
    has_post_expert_norm: bool = False,
    num_experts: int | None = None,
    build: Callable[[nn.Module, HybridExperts], nn.Module] | None = None,
) -> ExpertsSite:
    """Describe the module called ``name``; the flags are those of transformers' decorator.

    Args:
        name: Dotted path in the model.
        module: The experts module, on the meta device.
        is_transposed: Weights are ``[experts, in, out]``.
        is_concatenated: Gate rows come first, then up rows; else they alternate.
        has_bias: Every projection has a ``*_bias``.
        has_gate: There is a gate; else ``up_proj`` stands alone.
        has_post_expert_norm: Each expert's output is normed before the weighted sum.
        num_experts: Experts that compute; None for as many as ``down_proj`` has.
        build: Makes the replacement; None for HybridExperts itself.
    """
    first = "gate_up_proj" if has_gate else "up_proj"
    names = (first, "down_proj", *((f"{first}_bias", "down_proj_bias") if has_bias else ()))
    experts, *matrix = module.get_parameter("down_proj").shape
    inner, hidden = matrix if is_transposed else reversed(matrix)
    activation = activation_of(module, is_gated=has_gate, is_concatenated=is_concatenated)

    def split(fused: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if is_concatenated:
            gate, up = fused.chunk(2, dim=0)
            return gate, up
        return fused[0::2], fused[1::2]

    def expert_weights(rows: Mapping[str, torch.Tensor]) -> ExpertWeights:
        up, down = rows[first], rows["down_proj"]
        if is_transposed:
            up, down = up.T, down.T
        gate, gate_bias, up_bias = None, None, rows.get(f"{first}_bias")
        if has_gate:
            gate, up = split(up)
            if up_bias is not None:
                gate_bias, up_bias = split(up_bias)
        return ExpertWeights(
            gate=gate,
            up=up,
            down=down,
            gate_bias=gate_bias,
            up_bias=up_bias,
            down_bias=rows.get("down_proj_bias"),
        )

    if build is None:
        build = NormedExperts if has_post_expert_norm else _experts_alone
    return ExpertsSite(
        module_name=name,
        parameter_prefix=name,
        spec=moe_spec(num_experts or experts, hidden, inner, activation, has_bias=has_bias),
        parameters=names,
        expert_weights=expert_weights,
        build=build,
    )


def moe_spec(
    num_experts: int, hidden: int, inner: int, activation: Activation, *, has_bias: bool
) -> MoeSpec:
    """Return the spec, from sizes as torch gives them."""
    return MoeSpec(
        num_experts=int(num_experts),
        hidden_size=int(hidden),
        intermediate_size=int(inner),
        activation=activation,
        has_bias=has_bias,
    )


def _experts_alone(module: nn.Module, experts: HybridExperts) -> nn.Module:
    del module
    return experts
