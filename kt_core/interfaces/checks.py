"""What every kernel checks before it computes, said once, so that all refuse in the same words.

For backends written in Python, and for the Python side of others. Each function raises
``ValueError``, as ``ExpertKernel`` promises, and returns nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from kt_core.interfaces.weight_format import QuantizedTensor, stored_parts
from kt_core.types import Format, LinearSpec, MoeSpec

if TYPE_CHECKING:
    import torch

    from kt_core.interfaces.expert_kernel import ExpertWeights, LoraWeights


def check_expert(spec: MoeSpec, expert: int) -> None:
    """Refuse an expert the layer does not have."""
    if not 0 <= expert < spec.num_experts:
        msg = f"expert must be in 0..{spec.num_experts - 1}, got {expert}"
        raise ValueError(msg)


def check_experts(spec: MoeSpec, experts: Sequence[int]) -> None:
    """Refuse experts the layer does not have, and such as are named twice."""
    for expert in experts:
        check_expert(spec, expert)
    if len(set(experts)) != len(experts):
        msg = f"each expert may be named once, got {list(experts)}"
        raise ValueError(msg)


def check_together(spec: MoeSpec, experts: Sequence[int], packed: torch.Tensor) -> int:
    """Refuse bytes that cannot be those of so many experts; return how many each has.

    Whether it is the right number: see ``kt_core.packed.codec.check_packed``.
    """
    import torch

    check_experts(spec, experts)
    count = len(experts)
    is_bytes = packed.dim() == 1 and packed.dtype is torch.uint8 and packed.is_contiguous()
    if not is_bytes or (packed.numel() % count if count else packed.numel()):
        msg = (
            f"the packed bytes of {count} experts are uint8 in one piece, as many of each, got "
            f"{packed.dtype} {list(packed.shape)}"
        )
        raise ValueError(msg)
    return packed.numel() // count if count else 0


def check_weights(spec: MoeSpec, weight_format: Format, weights: ExpertWeights) -> None:
    """Refuse parts that are missing, not asked for, or of a wrong shape, type or format.

    Does not look at the numbers: see ``check_finite``.
    """
    hidden, inner = spec.hidden_size, spec.intermediate_size
    gated, has_bias = spec.activation.is_gated, spec.has_bias
    matrices = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    biases = {"gate_bias": inner, "up_bias": inner, "down_bias": hidden}
    for name, shape in matrices.items():
        value = getattr(weights, name)
        _check_presence(name, value, is_wanted=gated or name != "gate")
        if isinstance(value, QuantizedTensor):
            _check_quantized(name, value, weight_format, shape)
        elif value is not None:
            _check_tensor(name, value, shape)
    for name, size in biases.items():
        value = getattr(weights, name)
        _check_presence(name, value, is_wanted=has_bias and (gated or name != "gate_bias"))
        if value is not None:
            _check_tensor(name, value, (size,))


def check_finite(weights: ExpertWeights) -> None:
    """Refuse a NaN or an infinity among the weights, scales and biases."""
    for name in ("gate", "up", "down", "gate_bias", "up_bias", "down_bias"):
        _check_finite(name, getattr(weights, name))


def check_linear(
    spec: LinearSpec,
    weight_format: Format,
    weight: torch.Tensor | QuantizedTensor,
    bias: torch.Tensor | None,
) -> None:
    """Refuse parts of a dense layer, as ``check_weights`` does those of an expert."""
    shape = (spec.out_features, spec.in_features)
    if isinstance(weight, QuantizedTensor):
        _check_quantized("weight", weight, weight_format, shape)
    else:
        _check_tensor("weight", weight, shape)
    _check_presence("bias", bias, is_wanted=spec.has_bias)
    if bias is not None:
        _check_tensor("bias", bias, (spec.out_features,))


def check_linear_finite(weight: torch.Tensor | QuantizedTensor, bias: torch.Tensor | None) -> None:
    """Refuse a NaN or an infinity, as ``check_finite`` does."""
    _check_finite("weight", weight)
    _check_finite("bias", bias)


def check_rows(name: str, rows: torch.Tensor, features: int) -> None:
    """Refuse activations of a dense layer that are not ``[..., features]`` of a type it takes."""
    import torch

    floats = (torch.float32, torch.bfloat16, torch.float16)
    if rows.shape[-1:] != (features,) or rows.dtype not in floats:
        msg = (
            f"{name} must be [..., {features}] of float32, bfloat16 or float16, "
            f"got {list(rows.shape)} of {rows.dtype}"
        )
        raise ValueError(msg)


def check_pairs(
    spec: MoeSpec, hidden: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor
) -> None:
    """Refuse arguments of ``submit`` whose shapes or types do not fit. Reads no tensor."""
    import torch

    floats = (torch.float32, torch.bfloat16, torch.float16)
    if hidden.dim() != 2 or hidden.shape[1] != spec.hidden_size:
        msg = f"hidden must be [tokens, {spec.hidden_size}], got {list(hidden.shape)}"
        raise ValueError(msg)
    if hidden.dtype not in floats:
        msg = f"hidden must be float32, bfloat16 or float16, got {hidden.dtype}"
        raise ValueError(msg)
    tokens = hidden.shape[0]
    if expert_ids.dim() != 2 or expert_ids.shape[0] != tokens or expert_ids.shape[1] < 1:
        msg = f"expert_ids must be [{tokens}, k >= 1], got {list(expert_ids.shape)}"
        raise ValueError(msg)
    if expert_ids.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        msg = f"expert_ids must be integers, got {expert_ids.dtype}"
        raise ValueError(msg)
    if weights.shape != expert_ids.shape or not weights.is_floating_point():
        msg = (
            f"weights must be floating point {list(expert_ids.shape)}, "
            f"got {weights.dtype} {list(weights.shape)}"
        )
        raise ValueError(msg)


def check_resident(spec: MoeSpec, resident: Collection[int], expert_ids: torch.Tensor) -> None:
    """Refuse ids outside ``-1..num_experts-1``, and experts that are not loaded.

    Reads ``expert_ids``: on an accelerator that waits for the device.
    """
    for expert in set(expert_ids.flatten().tolist()):
        if not -1 <= expert < spec.num_experts:
            msg = f"expert id {expert} is outside -1..{spec.num_experts - 1}"
            raise ValueError(msg)
        if expert >= 0 and expert not in resident:
            msg = f"expert {expert} is not resident"
            raise ValueError(msg)


def check_grad_out(hidden: torch.Tensor, grad_out: torch.Tensor) -> None:
    """Refuse a gradient that is not shaped and typed like the output."""
    if grad_out.shape != hidden.shape or grad_out.dtype != hidden.dtype:
        msg = (
            f"grad_out must be {list(hidden.shape)} of {hidden.dtype}, "
            f"got {list(grad_out.shape)} of {grad_out.dtype}"
        )
        raise ValueError(msg)


def check_lora(spec: MoeSpec, lora: LoraWeights) -> None:
    """Refuse LoRA matrices of a wrong shape or type, and halves of a pair."""
    import torch

    experts, hidden, inner = spec.num_experts, spec.hidden_size, spec.intermediate_size
    sizes = {"gate": (hidden, inner), "up": (hidden, inner), "down": (inner, hidden)}
    for name, (inputs, outputs) in sizes.items():
        a, b = getattr(lora, f"{name}_a"), getattr(lora, f"{name}_b")
        if (a is None) != (b is None):
            msg = f"LoRA of {name} needs both A and B, or neither"
            raise ValueError(msg)
        if a is None:
            continue
        if name == "gate" and not spec.activation.is_gated:
            msg = "LoRA of gate is not part of this layer: its experts have no gate"
            raise ValueError(msg)
        rank = a.shape[1] if a.dim() == 3 else 0
        wanted = {"a": (a, (experts, rank, inputs)), "b": (b, (experts, outputs, rank))}
        for side, (matrix, shape) in wanted.items():
            is_float = matrix.dtype in (torch.float32, torch.bfloat16)
            if rank < 1 or tuple(matrix.shape) != shape or not is_float:
                msg = (
                    f"{name}_{side} must be {list(shape)} of float32 or bfloat16 with rank >= 1, "
                    f"got {list(matrix.shape)} of {matrix.dtype}"
                )
                raise ValueError(msg)


def _check_presence(name: str, value: object, *, is_wanted: bool) -> None:
    if (value is not None) != is_wanted:
        msg = f"{name} is {'missing' if is_wanted else 'not part of this layer'}"
        raise ValueError(msg)


def _check_finite(name: str, value: torch.Tensor | QuantizedTensor | None) -> None:
    import torch

    parts: list[torch.Tensor | None]
    if isinstance(value, QuantizedTensor):
        parts = [value.codes] if value.scales is None else [value.scales, value.minimums]
    else:
        parts = [value]
    if not all(part is None or torch.isfinite(part).all() for part in parts):
        msg = f"{name} holds a NaN or an infinity"
        raise ValueError(msg)


def _check_tensor(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    import torch

    floats = (torch.float32, torch.bfloat16, torch.float16)
    if tuple(tensor.shape) != shape or tensor.dtype not in floats:
        msg = (
            f"{name} must be {list(shape)} of float32, bfloat16 or float16, "
            f"got {list(tensor.shape)} of {tensor.dtype}"
        )
        raise ValueError(msg)


def _check_quantized(
    name: str, tensor: QuantizedTensor, weight_format: Format, shape: tuple[int, int]
) -> None:
    if tensor.weight_format != weight_format:
        msg = f"{name} is {tensor.weight_format.name!r}, this layer {weight_format.name!r}"
        raise ValueError(msg)
    wanted = stored_parts(weight_format, *shape)
    for part, want in wanted.items():
        value = getattr(tensor, part)
        got = None if value is None else (tuple(value.shape), value.dtype)
        if got != want:
            msg = f"{part} of {name} must be {want}, got {got}"
            raise ValueError(msg)
