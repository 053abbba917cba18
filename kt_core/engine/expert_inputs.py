"""What one expert was given when the model read a text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from kt_core.interfaces import ExpertWeights
from kt_core.moe.activations import activate
from kt_core.types import MoeSpec


@dataclass(frozen=True, slots=True)
class ExpertInputs:
    """Hidden states that reached an expert, and how much each counts.

    Attributes:
        hidden: ``[tokens, hidden]`` float32.
        shares: ``[tokens]`` float32, above 0: 1 for a token of the expert's own.
    """

    hidden: torch.Tensor
    shares: torch.Tensor

    def moments(self, values: torch.Tensor) -> torch.Tensor:
        """``[in, in]``: second moments of what a projection is given, summed over the tokens.

        Every token counts as much as any other of its share: a few, such as the first of a text,
        have most of all squares.

        Args:
            values: ``[tokens, in]``.
        """
        sizes = values.square().mean(dim=1).clamp(min=1e-30)
        rows = values * (self.shares / sizes).sqrt()[:, None]
        return rows.T @ rows

    def between(self, weights: ExpertWeights, spec: MoeSpec) -> torch.Tensor:
        """``[tokens, intermediate]``: what the down projection is given.

        Args:
            weights: The expert, gate and up dense.
            spec: Its layer.
        """

        def product(matrix: Any, bias: torch.Tensor | None) -> torch.Tensor:
            added = None if bias is None else bias.float()
            return functional.linear(self.hidden, matrix.float(), added)

        up = product(weights.up, weights.up_bias)
        if weights.gate is None:
            return activate(spec.activation, up)
        return activate(spec.activation, product(weights.gate, weights.gate_bias), up)
