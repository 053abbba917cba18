"""Cut every feed-forward layer of a dense model into a shared expert and routed experts.

A SwiGLU layer is a sum over neurons, ``down[:, i] * silu(gate[i] x) * up[i] x``, so any partition
of the neurons is a partition of the output. Neurons that are active everywhere become the shared
expert; the others are grouped with those that are active on the same tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kt_core.interfaces import no_progress
from kt_demo.partition import balanced_clusters
from kt_demo.router import fit_router

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from kt_core.interfaces import Progress
    from kt_demo.recipe import MoeShape


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSplit:
    """Which neuron of one dense layer goes where.

    Attributes:
        shared: [shared neurons] neurons of the shared expert, ascending.
        experts: [experts, expert neurons] neurons of each routed expert, ascending.
        router: [experts, hidden] float32 weights of the router.
    """

    shared: torch.Tensor
    experts: torch.Tensor
    router: torch.Tensor


@torch.no_grad()
def split_model(
    model: LlamaForCausalLM,
    token_rows: torch.Tensor,
    shape: MoeShape,
    *,
    seed: int,
    progress: Progress = no_progress,
) -> list[LayerSplit]:
    """Split every layer by what it does on ``token_rows`` [rows, tokens].

    One forward pass: a layer is split while the pass is inside it, so only one layer's activations
    are ever held.
    """
    layers: Any = model.model.layers
    splitters = []
    handles = []
    for index, layer in enumerate(layers):
        splitter = _LayerSplitter(layer.mlp.down_proj.weight, shape, seed)
        splitters.append(splitter)

        def see_activation(
            _: Any, args: tuple[torch.Tensor], splitter: _LayerSplitter = splitter, n: int = index
        ) -> None:
            splitter.see_activation(args[0])
            progress("sorting neurons into experts", (n + 1) / len(layers))

        handles.append(layer.mlp.register_forward_pre_hook(splitter.see_hidden))
        handles.append(layer.mlp.down_proj.register_forward_pre_hook(see_activation))
    progress("sorting neurons into experts", 0.0)
    try:
        model.model(input_ids=token_rows, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [splitter.split for splitter in splitters]


def split_layer(
    hidden: torch.Tensor,
    activation: torch.Tensor,
    down: torch.Tensor,
    shape: MoeShape,
    *,
    seed: int,
) -> LayerSplit:
    """Split one layer.

    Args:
        hidden: [tokens, hidden] inputs of the layer.
        activation: [tokens, neurons] ``silu(gate x) * up x``.
        down: [hidden, neurons] weight of the down projection.
        shape: sizes of the parts.
        seed: where clustering starts.
    """
    num_shared = shape.shared_neurons(down.shape[1])
    added = activation.abs().T.contiguous() * down.norm(dim=0)[:, None]  # [neurons, tokens]
    order = added.mean(dim=1).argsort(descending=True, stable=True)
    shared, routed = order[:num_shared].sort().values, order[num_shared:].sort().values
    clusters = balanced_clusters(added[routed], shape.num_experts, seed=seed)
    experts = routed[clusters]
    mass = added[experts].norm(dim=1).T
    return LayerSplit(shared=shared, experts=experts, router=fit_router(hidden, mass))


class _LayerSplitter:
    """Splits one layer as soon as a forward pass has shown its input and its activation."""

    split: LayerSplit

    def __init__(self, down: torch.Tensor, shape: MoeShape, seed: int) -> None:
        self._down = down
        self._shape = shape
        self._seed = seed
        self._hidden: torch.Tensor | None = None

    def see_hidden(self, _: Any, args: tuple[torch.Tensor]) -> None:
        self._hidden = args[0].flatten(0, -2)

    def see_activation(self, activation: torch.Tensor) -> None:
        assert self._hidden is not None, "the down projection runs after the layer's own hook"
        self.split = split_layer(
            self._hidden, activation.flatten(0, -2), self._down, self._shape, seed=self._seed
        )
        self._hidden = None
