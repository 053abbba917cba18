"""``kt::packed_linear``: a packed dense layer as an operator that torch traces and differentiates.

Nothing is kept from the forward to the backward pass; the gradient of the input needs the weights
alone.
"""

from __future__ import annotations

from typing import Any

import torch

from kt_core.interfaces import LinearKernel
from kt_core.numbered import Numbered

_kernels: Numbered[LinearKernel] = Numbered("dense layers")
number_of = _kernels.number_of


@torch.library.custom_op("kt::packed_linear", mutates_args=())
def packed_linear(x: torch.Tensor, kernel: int) -> torch.Tensor:
    """Return ``x W^T + b``; differentiable in ``x``.

    Args:
        x: ``[..., in_features]``.
        kernel: A number from ``number_of``.
    """
    return _kernels.get(kernel).apply_training(x)


@packed_linear.register_fake
def _(x: torch.Tensor, kernel: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], _kernels.get(kernel).spec.out_features))


@torch.library.custom_op("kt::packed_linear_backward", mutates_args=())
def packed_linear_backward(grad_out: torch.Tensor, kernel: int) -> torch.Tensor:
    """Return the gradient ``[..., in_features]`` of ``x``."""
    return _kernels.get(kernel).grad_input(grad_out)


@packed_linear_backward.register_fake
def _(grad_out: torch.Tensor, kernel: int) -> torch.Tensor:
    return grad_out.new_empty((*grad_out.shape[:-1], _kernels.get(kernel).spec.in_features))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    del output
    _, ctx.kernel = inputs


def _backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor, None]:
    grad: torch.Tensor = torch.ops.kt.packed_linear_backward(grad_out, ctx.kernel)
    return grad, None


packed_linear.register_autograd(_backward, setup_context=_setup_context)
