"""``kt::moe_experts``: the experts of a layer as one operator that torch traces and differentiates.

Nothing is kept from the forward to the backward pass: gradient checkpointing may run the forward
pass twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kt_core.interfaces import ExpertKernel, LoraWeights
from kt_core.numbered import Numbered

LORA_NAMES = ("gate_a", "gate_b", "up_a", "up_b", "down_a", "down_b")

_kernels: Numbered[ExpertKernel] = Numbered("experts")
number_of = _kernels.number_of


def _lora(scale: float, matrices: Sequence[torch.Tensor | None]) -> LoraWeights | None:
    if all(matrix is None for matrix in matrices):
        return None
    return LoraWeights(scale=scale, **dict(zip(LORA_NAMES, matrices, strict=True)))


@torch.library.custom_op("kt::moe_experts", mutates_args=())
def moe_experts(  # noqa: PLR0917 - operators are called by position
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    kernels: Sequence[int],
    lora_scale: float = 1.0,
    gate_a: torch.Tensor | None = None,
    gate_b: torch.Tensor | None = None,
    up_a: torch.Tensor | None = None,
    up_b: torch.Tensor | None = None,
    down_a: torch.Tensor | None = None,
    down_b: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``sum_k weights[t, k] * expert[expert_ids[t, k]](hidden[t])`` over all kernels.

    Differentiable in the hidden states, the routing weights and the LoRA matrices.

    Args:
        hidden: ``[tokens, hidden]``.
        expert_ids: ``[kernels, tokens, k]``; -1 marks what is another kernel's.
        weights: ``[tokens, k]``.
        kernels: Numbers from ``number_of``. All start before any is waited for, and the results
            are added in this order.
        lora_scale: See ``LoraWeights``, as for the matrices.
        gate_a: Or None, as all of them.
        gate_b: See ``LoraWeights``.
        up_a: See ``LoraWeights``.
        up_b: See ``LoraWeights``.
        down_a: See ``LoraWeights``.
        down_b: See ``LoraWeights``.
    """
    lora = _lora(lora_scale, (gate_a, gate_b, up_a, up_b, down_a, down_b))
    tickets = [
        _kernels.get(number).submit_training(hidden, ids, weights, lora)
        for number, ids in zip(kernels, expert_ids, strict=True)
    ]
    out = tickets[0].wait()
    for ticket in tickets[1:]:
        out = out + ticket.wait()
    return out


@moe_experts.register_fake
def _(hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
    del rest
    return hidden.new_empty(hidden.shape)


@torch.library.custom_op("kt::moe_experts_backward", mutates_args=())
def moe_experts_backward(  # noqa: PLR0917 - as above
    grad_out: torch.Tensor,
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    kernels: Sequence[int],
    lora_scale: float = 1.0,
    gate_a: torch.Tensor | None = None,
    gate_b: torch.Tensor | None = None,
    up_a: torch.Tensor | None = None,
    up_b: torch.Tensor | None = None,
    down_a: torch.Tensor | None = None,
    down_b: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Return the gradients of hidden states, routing weights and the LoRA matrices that are there.

    The arguments are those of ``moe_experts`` and the gradient of its result.
    """
    lora = _lora(lora_scale, (gate_a, gate_b, up_a, up_b, down_a, down_b))
    total: list[torch.Tensor] = []
    for number, ids in zip(kernels, expert_ids, strict=True):
        found = _kernels.get(number).backward(hidden, ids, weights, grad_out, lora)
        grads = [found.hidden, found.weights]
        if found.lora is not None:
            matrices = (getattr(found.lora, name) for name in LORA_NAMES)
            grads += [matrix for matrix in matrices if matrix is not None]
        total = [a + b for a, b in zip(total, grads, strict=True)] if total else grads
    return total


@moe_experts_backward.register_fake
def _(  # noqa: PLR0917 - as above
    grad_out: torch.Tensor,
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    kernels: Sequence[int],
    lora_scale: float = 1.0,
    *lora: torch.Tensor | None,
) -> list[torch.Tensor]:
    del grad_out, expert_ids, kernels, lora_scale
    given = (hidden, weights, *(matrix for matrix in lora if matrix is not None))
    return [tensor.new_empty(tensor.shape) for tensor in given]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    del output
    hidden, expert_ids, weights, ctx.kernels, ctx.lora_scale, *lora = inputs
    ctx.save_for_backward(hidden, expert_ids, weights, *lora)


def _backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    hidden, expert_ids, weights, *lora = ctx.saved_tensors
    grads = iter(
        torch.ops.kt.moe_experts_backward(
            grad_out, hidden, expert_ids, weights, ctx.kernels, ctx.lora_scale, *lora
        )
    )
    grad_hidden, grad_weights = next(grads), next(grads)
    of_lora = (None if matrix is None else next(grads) for matrix in lora)
    return grad_hidden, None, grad_weights, None, None, *of_lora


moe_experts.register_autograd(_backward, setup_context=_setup_context)
