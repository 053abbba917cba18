"""Routed experts of one layer, spread over devices: split the pairs, submit, join."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from kt_core.errors import UnsupportedTrainingError
from kt_core.interfaces import ExpertKernel, LoraWeights
from kt_core.moe.differentiable import LORA_NAMES, moe_experts, number_of
from kt_core.types import MoeSpec


class HybridExperts(nn.Module):
    """Stands where a transformers experts module stood; holds no parameters.

    Every expert lives on exactly one kernel. A call is split by residency: each kernel gets the
    same tokens, with the pairs of the others' experts marked -1, and starts at once; the results
    are added in the order of the kernels, so that the sum does not depend on who is first.

    Which expert lives where is a table on the device of the hidden states, read and changed in
    order of its stream: experts may move while earlier calls are under way.

    Attributes:
        spec: Shape and activation of the experts.
        kernels: Who computes them; all take hidden states of ``device``.
        device: Where hidden states lie.
        counts: ``[num_experts]`` int64 on that device, to which the pairs of each call are added;
            None to count nothing.
        uses_host: Whether ``kernels[0]`` is called. Whoever clears it knows that all experts live
            elsewhere; it is set again as soon as one does not.
        changes: How often experts have changed homes.
        weight: Empty tensor that tells where the module lives; PEFT looks for it.
        lora: Low-rank additions to the projections, or None; whoever trains them owns them.
    """

    def __init__(
        self,
        spec: MoeSpec,
        kernels: Sequence[ExpertKernel],
        *,
        device: torch.device | None = None,
    ) -> None:
        """Take the kernels; experts that none of them holds yet belong to the first."""
        super().__init__()
        if not kernels:
            msg = "a layer needs at least one kernel"
            raise ValueError(msg)
        self.spec = spec
        self.kernels = tuple(kernels)
        self.device = device or torch.device("cpu")
        self.counts: torch.Tensor | None = None
        self.uses_host = True
        self.changes = 0
        self.weight = torch.empty(0, device=self.device)
        self.lora: LoraWeights | None = None
        self._home: torch.Tensor | None = None
        self._homes = [0] * spec.num_experts  # the same, for the host
        self._numbers = [number_of(kernel) for kernel in self.kernels]
        self.refresh_placement()

    def refresh_placement(self) -> None:
        """Ask the kernels again which experts they hold; call it after experts moved.

        Not while a move is under way, when two of them hold one: see ``move_home``.
        """
        if len(self.kernels) == 1:
            return
        home = torch.zeros(self.spec.num_experts, dtype=torch.int64, device="cpu")
        for index, kernel in enumerate(self.kernels):
            home[sorted(kernel.resident())] = index
        self._homes = home.tolist()
        self.uses_host |= 0 in self._homes
        self.changes += 1
        if self._home is None:
            self._home = home.to(self.device)
        else:
            self._home.copy_(home)

    def move_home(self, expert: int, kernel: int) -> None:
        """Let ``kernels[kernel]`` compute an expert, for calls that the stream has not begun."""
        if self._home is None:
            msg = f"all experts live on {type(self.kernels[0]).__name__}"
            raise ValueError(msg)
        self._home[expert].fill_(kernel)
        self._homes[expert] = kernel
        self.uses_host |= kernel == 0
        self.changes += 1

    def is_moved(self) -> list[bool]:
        """Of each expert, whether another kernel than the first computes it from now on."""
        return [home != 0 for home in self._homes]

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """Return ``sum_k weights[t, k] * expert[index[t, k]](hidden[t])``.

        Args:
            hidden_states: ``[tokens, hidden]``.
            top_k_index: ``[tokens, k]`` expert ids.
            top_k_weights: ``[tokens, k]`` routing weights.
        """
        if self.counts is not None:
            self._count(top_k_index.reshape(-1).to(torch.int64))
        if self._needs_gradient(hidden_states, top_k_weights):
            return self._differentiable(hidden_states, top_k_index, top_k_weights)
        tickets = [
            kernel.submit(hidden_states, self._ids_for(index, top_k_index), top_k_weights)
            for index, kernel in enumerate(self.kernels)
            if index > 0 or self.uses_host
        ]
        out = tickets[0].wait()
        for ticket in tickets[1:]:
            out = out + ticket.wait()
        return out

    def _count(self, chosen: torch.Tensor) -> None:
        """Add pairs to ``counts``; ids that no expert has, which models use for "none", to none."""
        assert self.counts is not None
        known = chosen.clamp(0, self.spec.num_experts - 1)
        self.counts.scatter_add_(0, known, (known == chosen).to(torch.int64))

    def _needs_gradient(self, hidden: torch.Tensor, weights: torch.Tensor) -> bool:
        """Whether autograd, the compiler or LoRA needs the operator rather than the kernels.

        In training mode always: gradient checkpointing runs its first pass without gradients, and
        that must compute the same numbers as the second.
        """
        if self.lora is not None or torch.compiler.is_compiling():
            return True
        if self.training and all(kernel.trains for kernel in self.kernels):
            return True
        return torch.is_grad_enabled() and (hidden.requires_grad or weights.requires_grad)

    def _differentiable(
        self, hidden: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        untrained = [kernel for kernel in self.kernels if not kernel.trains]
        if untrained:
            msg = (
                f"{type(untrained[0]).__name__} has no gradient for experts of "
                f"{untrained[0].weight_format.name!r}: use torch.no_grad(), or a device whose "
                f"capabilities say that it trains"
            )
            raise UnsupportedTrainingError(msg)
        ids = [self._ids_for(index, expert_ids) for index in range(len(self.kernels))]
        lora = self.lora
        matrices = (None,) * len(LORA_NAMES)
        if lora is not None:
            matrices = tuple(getattr(lora, name) for name in LORA_NAMES)
        scale = 1.0 if lora is None else lora.scale
        out: torch.Tensor = moe_experts(
            hidden, torch.stack(ids), weights, self._numbers, scale, *matrices
        )
        return out

    def forward_pairs(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor) -> torch.Tensor:
        """Return every expert's output by itself, ``[tokens, k, hidden]``, with weight 1.

        For blocks that do something to an expert's output before the weighted sum.
        """
        tokens, k = top_k_index.shape
        ones = torch.ones(tokens * k, 1, dtype=torch.float32, device=hidden_states.device)
        pairs = hidden_states.repeat_interleave(k, dim=0)
        out: torch.Tensor = self(pairs, top_k_index.reshape(-1, 1), ones)
        return out.view(tokens, k, self.spec.hidden_size)

    def _ids_for(self, index: int, expert_ids: torch.Tensor) -> torch.Tensor:
        """The ids with those of other kernels' experts replaced by -1.

        Ids that no layer has go to every kernel, which refuses them.
        """
        if self._home is None:
            return expert_ids
        ids = expert_ids.to(torch.int64)
        known = ids.clamp(0, self.spec.num_experts - 1)
        is_here = (self._home.to(ids.device)[known] == index) | (ids != known)
        return torch.where(is_here, ids, -1)

    def extra_repr(self) -> str:
        """Describe the layer for ``print(model)``."""
        homes = ", ".join(type(kernel).__name__ for kernel in self.kernels)
        return f"{self.spec.num_experts} experts of {self.kernels[0].weight_format.name} on {homes}"
