"""The formulas of ``ActivationKind``, for any floating type: the reference of every kernel."""

from __future__ import annotations

import torch
from torch.nn import functional

from kt_core.types import Activation, ActivationKind


def activate(
    activation: Activation, gate: torch.Tensor, up: torch.Tensor | None = None
) -> torch.Tensor:
    """Return what the down projection gets.

    Args:
        activation: The formula and its parameters.
        gate: Output of the gate projection; of the up projection where there is no gate.
        up: Output of the up projection, of the same shape; None where there is no gate.
    """
    limit = activation.limit
    match activation.kind:
        case ActivationKind.SWIGLU_CLAMP:
            assert up is not None
            return functional.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)
        case ActivationKind.SWIGLU_CLAMP_AFTER:
            assert up is not None
            return functional.silu(gate).clamp(max=limit) * up.clamp(-limit, limit)
        case ActivationKind.SWIGLU_OAI:
            assert up is not None
            bounded = gate.clamp(max=limit)
            swish = bounded * torch.sigmoid(activation.alpha * bounded)
            return swish * (up.clamp(-limit, limit) + 1)
        case ActivationKind.SWIGLU_SOFTCAP:
            assert up is not None
            capped_up = torch.tanh(up / activation.up_limit) * activation.up_limit
            return torch.tanh(gate / limit) * limit * torch.sigmoid(gate) * capped_up
        case ActivationKind.SILU:
            result = functional.silu(gate)
        case ActivationKind.GELU:
            result = functional.gelu(gate)
        case ActivationKind.GELU_TANH:
            result = functional.gelu(gate, approximate="tanh")
        case ActivationKind.RELU:
            result = functional.relu(gate)
        case ActivationKind.RELU2:
            result = functional.relu(gate).square()
    return result * up if activation.is_gated and up is not None else result
