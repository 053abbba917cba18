"""Facts about a model family: where its experts are and what they compute."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kt_core.interfaces.expert_kernel import ExpertWeights
from kt_core.types import MoeSpec

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig

    from kt_core.moe.hybrid_experts import HybridExperts


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsSite:
    """One module of the model that computes routed experts, and what to put in its place.

    Attributes:
        module_name: Dotted path of the module that is replaced.
        parameter_prefix: Dotted path that its expert parameters have in the model; the same as
            ``module_name`` unless a whole block is replaced.
        spec: Shape and activation of the experts.
        parameters: Names, below ``parameter_prefix``, of the parameters that hold all experts in
            their first dimension.
        expert_weights: Turns ``{parameter name: tensor of one expert}`` (the first dimension
            already removed) into canonical weights; views, not copies.
        build: Makes the replacement from the module that computes the experts. It receives the
            replaced module itself (its parameters are on the meta device).
    """

    module_name: str
    parameter_prefix: str
    spec: MoeSpec
    parameters: tuple[str, ...]
    expert_weights: Callable[[Mapping[str, torch.Tensor]], ExpertWeights]
    build: Callable[[nn.Module, HybridExperts], nn.Module]


class ModelAdapter(ABC):  # noqa: B024 - everything has a default, nothing stands alone
    """Understands some model families.

    Attributes:
        model_types: ``model_type`` values of config.json it is for; empty for the generic
            adapter, which is asked about every model that no other adapter names.
    """

    model_types: tuple[str, ...] = ()

    def config(self, config_dict: Mapping[str, Any]) -> PreTrainedConfig | None:
        """Return the transformers config, or None where transformers itself knows the model type.

        Only for a ``model_type`` that transformers lacks but whose architecture it has.
        """
        del config_dict
        return None

    def proven_families(self) -> Mapping[str, str]:
        """Return families this adapter has been checked on, each with the result in a few words.

        For ``kt models``. By default the families it is for, with nothing said about them.
        """
        return dict.fromkeys(self.model_types, "has an adapter")

    def sites(self, model: nn.Module) -> Iterator[ExpertsSite]:
        """Yield every place with routed experts. The model is on the meta device.

        An adapter that yields none, as by default, leaves the question to the generic adapters.

        Raises:
            kt_core.errors.UnsupportedModelError: There are experts that cannot be described.
        """
        del model
        return iter(())
