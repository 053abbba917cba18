# --8<-- [start:adapter]
"""The invented family ``outside_moe``: the Qwen3-MoE architecture under names of its own.

Source, were it real: the model card, and the two files its facts were read from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from kt_core.errors import UnsupportedModelError
from kt_core.interfaces import ExpertsSite, ExpertWeights, ModelAdapter
from kt_core.types import SILU, MoeSpec

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig

_KEYS = {"n_experts": "num_local_experts", "expert_size": "moe_intermediate_size"}


class OutsideMoeAdapter(ModelAdapter):
    """States facts; holds no tensors and calls no kernel."""

    model_types = ("outside_moe",)

    # --8<-- [start:config]
    def config(self, config_dict: Mapping[str, Any]) -> PreTrainedConfig:
        """Return a config of the class that transformers has for this architecture."""
        from transformers import Qwen3MoeConfig  # takes seconds: not when kt starts

        facts = {name: value for name, value in config_dict.items() if name not in _KEYS}
        facts |= {name: config_dict[key] for key, name in _KEYS.items()}
        return Qwen3MoeConfig.from_dict(
            {**facts, "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}
        )

    # --8<-- [end:config]

    # --8<-- [start:sites]
    def sites(self, model: nn.Module) -> Iterator[ExpertsSite]:
        """Yield the experts of each layer. The model is on the meta device: shapes, no numbers."""
        config: Any = model.config
        for name, module in model.named_modules():
            if type(module).__name__ != "Qwen3MoeExperts":
                continue
            if config.hidden_act != "silu":
                msg = f"outside_moe with {config.hidden_act!r} experts: only silu is known"
                raise UnsupportedModelError(msg)
            experts, hidden, inner = module.get_parameter("down_proj").shape
            yield ExpertsSite(
                module_name=name,
                parameter_prefix=name,
                spec=MoeSpec(
                    num_experts=experts,
                    hidden_size=hidden,
                    intermediate_size=inner,
                    activation=SILU,
                ),
                parameters=("gate_up_proj", "down_proj"),
                expert_weights=_expert_weights,
                build=lambda module, experts: experts,
            )

    # --8<-- [end:sites]


# --8<-- [start:weights]
def _expert_weights(rows: Mapping[str, torch.Tensor]) -> ExpertWeights:
    """Views, not copies: gate rows come first, then up rows."""
    gate, up = rows["gate_up_proj"].chunk(2, dim=0)
    return ExpertWeights(gate=gate, up=up, down=rows["down_proj"])


# --8<-- [end:weights]
# --8<-- [end:adapter]
