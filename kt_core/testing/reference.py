"""The slow truth: a layer of experts in float64 on the dequantised weights, and its error bounds.

Kernels quantise activations, so the reference does the same first, in the same float32 arithmetic
(``rounded``); what is left is the order and the precision of sums. Bounds follow N. Higham,
*Accuracy and Stability of Numerical Algorithms*, 2nd ed., section 3.1: a float32 dot product of
length n errs by at most ``n * u / (1 - n * u) * sum |terms|``, ``u = 2**-24``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from kt_core.interfaces import (
    ExpertGradients,
    ExpertWeights,
    LoraWeights,
    QuantizedTensor,
    WeightFormat,
)
from kt_core.moe.activations import activate
from kt_core.types import ActivationPrecision, MoeSpec

UNIT_ROUNDOFF = 2.0**-24
BF16_ROUNDOFF = 2.0**-8
F16_ROUNDOFF = 2.0**-11
F16_SMALLEST_HALF_STEP = 2.0**-25  # float16 has subnormals where results are small
# Inputs that share a scale of the int8 activations: of the hidden states, and of what stands
# between up and down. See ActivationPrecision.INT8.
HIDDEN_GROUP, INTERMEDIATE_GROUP = 64, 32


@dataclass
class Layer:
    """Dequantised experts in float64 with what the kernels know about them.

    An expert is its tensors by name. Where weights are ``scale * code - minimum``, ``up_terms`` and
    so on stand beside them: at least ``|scale * code| + |minimum|``, which may be summed apart.
    """

    spec: MoeSpec
    experts: Mapping[int, dict[str, torch.Tensor]]


def random_weights(spec: MoeSpec, generator: torch.Generator, std: float = 0.1) -> ExpertWeights:
    """One expert with weights of the size trained ones have; rows of different magnitude."""

    def matrix(rows: int, cols: int) -> torch.Tensor:
        spread = torch.rand(rows, 1, generator=generator) + 0.5
        return torch.randn(rows, cols, generator=generator) * spread * std

    def bias(size: int) -> torch.Tensor | None:
        return torch.randn(size, generator=generator) * 0.1 if spec.has_bias else None

    inner, hidden, gated = spec.intermediate_size, spec.hidden_size, spec.activation.is_gated
    return ExpertWeights(
        gate=matrix(inner, hidden) if gated else None,
        up=matrix(inner, hidden),
        down=matrix(hidden, inner),
        gate_bias=bias(inner) if gated else None,
        up_bias=bias(inner),
        down_bias=bias(hidden),
    )


def layer(
    spec: MoeSpec, weight_format: WeightFormat, experts: Mapping[int, ExpertWeights]
) -> Layer:
    """Quantise and dequantise every expert."""

    def stored(name: str, tensor: torch.Tensor | QuantizedTensor | None) -> dict[str, torch.Tensor]:
        if tensor is None:
            return {}
        if isinstance(tensor, torch.Tensor):
            tensor = weight_format.quantize(tensor)
        found = {name: weight_format.dequantize(tensor).double()}
        if tensor.minimums is not None:
            inputs = tensor.codes.shape[1]
            size = tensor.weight_format.group_size or inputs
            minimums = tensor.minimums.double().repeat_interleave(size, dim=1)[:, :inputs]
            found[f"{name}_terms"] = found[name].abs() + 2 * minimums.abs()
        return found

    parts: dict[int, dict[str, torch.Tensor]] = {}
    for index, weights in experts.items():
        parts[index] = {}
        for name in ("gate", "up", "down"):
            parts[index] |= stored(name, getattr(weights, name))
        for name in ("gate_bias", "up_bias", "down_bias"):
            bias = getattr(weights, name)
            if bias is not None:
                parts[index][name] = bias.float().double()
    return Layer(spec, parts)


def forward(
    layer: Layer,
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    precision: ActivationPrecision,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output ``[tokens, hidden]`` in float64, and the largest error allowed in each."""
    out = torch.zeros(hidden.shape, dtype=torch.float64)
    allowed = torch.zeros_like(out)
    magnitude = torch.zeros_like(out)
    for index, expert in layer.experts.items():
        token, k = torch.where(expert_ids == index)
        if not len(token):
            continue
        value, error = _expert(layer, expert, hidden[token], precision)
        scale = weights[token, k, None].float().double()
        out.index_add_(0, token, value * scale)
        allowed.index_add_(0, token, error * scale.abs())
        magnitude.index_add_(0, token, (value * scale).abs())
    # The weighted sum over experts: one multiply-add each.
    allowed += (expert_ids.shape[1] + 1) * UNIT_ROUNDOFF * magnitude
    return out, allowed + stored_error(out.abs() + allowed, hidden.dtype)


def exact(
    layer: Layer,
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    lora: LoraWeights | None = None,
) -> torch.Tensor:
    """Return the output ``[tokens, hidden]`` in float64 with nothing rounded on the way.

    What the formula says, for those who compare float64 with float64; ``forward`` is for kernels.
    Differentiable in hidden states, routing weights and LoRA matrices.
    """

    def project(index: int, name: str, x: torch.Tensor) -> torch.Tensor:
        expert = layer.experts[index]
        value = torch.nn.functional.linear(x, expert[name], expert.get(f"{name}_bias"))
        a = None if lora is None else getattr(lora, f"{name}_a")
        if lora is None or a is None:
            return value
        b = getattr(lora, f"{name}_b")
        low: torch.Tensor = x @ a[index].double().T @ b[index].double().T
        return value + lora.scale * low

    out = torch.zeros(hidden.shape, dtype=torch.float64)
    for index in layer.experts:
        token, k = torch.where(expert_ids == index)
        x = hidden[token].double()
        up = project(index, "up", x)
        gate = project(index, "gate", x) if layer.spec.activation.is_gated else up
        value = project(index, "down", activate(layer.spec.activation, gate, up))
        out = out.index_add(0, token, value * weights[token, k, None].double())
    return out


def backward(  # noqa: PLR0917 - the interface's arguments
    layer: Layer,
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    grad_out: torch.Tensor,
    lora: LoraWeights | None = None,
) -> ExpertGradients:
    """Return torch's own gradients of ``exact``, in float64 and rounded once."""
    matrices = {} if lora is None else lora_matrices(lora)
    inputs = [t.detach().clone().requires_grad_() for t in (hidden, weights, *matrices.values())]
    traced = None if lora is None else _with_matrices(lora, inputs[2:])
    with torch.enable_grad():
        out = exact(layer, inputs[0], expert_ids, inputs[1], traced)
        # Without a pair there is nothing to differentiate; 0 times everything gives zeros.
        out = out + 0.0 * sum(t.double().sum() for t in inputs)
        found = torch.autograd.grad(out, inputs, grad_out.double())
    grads = None if lora is None else _with_matrices(lora, found[2:])
    return ExpertGradients(hidden=found[0], weights=found[1], lora=grads)


def lora_matrices(lora: LoraWeights) -> dict[str, torch.Tensor]:
    """Return the matrices that are there, by name."""
    values = {field.name: getattr(lora, field.name) for field in fields(lora)}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def _with_matrices(lora: LoraWeights, matrices: Sequence[torch.Tensor]) -> LoraWeights:
    named: dict[str, Any] = dict(zip(lora_matrices(lora), matrices, strict=True))
    return replace(lora, **named)


def stored_error(magnitude: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | float:
    """What rounding a result to the type of the hidden states may cost."""
    if dtype is torch.bfloat16:
        return BF16_ROUNDOFF * magnitude
    if dtype is torch.float16:
        return F16_ROUNDOFF * magnitude + F16_SMALLEST_HALF_STEP
    return 0.0


def _expert(
    layer: Layer, expert: dict[str, torch.Tensor], x: torch.Tensor, precision: ActivationPrecision
) -> tuple[torch.Tensor, torch.Tensor]:
    activation = layer.spec.activation
    exact = x.float()
    no_error = torch.zeros_like(exact, dtype=torch.float64)
    given, _ = rounded(exact, no_error, HIDDEN_GROUP, precision)
    up, up_error = project(given, 0.0, expert, "up")
    gate, gate_error = up, up_error
    if activation.is_gated:
        gate, gate_error = project(given, 0.0, expert, "gate")
    inner = activate(activation, gate, up)
    # Over the box of possible inputs the activation is extreme at a corner, or within rounding of
    # it: the box is some 1e-6 wide and the functions are smooth or piecewise linear.
    error = torch.zeros_like(inner)
    for g in (gate - gate_error, gate + gate_error):
        for u in (up - up_error, up + up_error):
            error = torch.maximum(error, (activate(activation, g, u) - inner).abs())
    # Evaluating it: exp, tanh and erf to 2 ulp, a division, up to five products.
    other = up.abs() + 1 if activation.is_gated else 1.0
    squared = gate.abs() * (gate.abs() + 1)
    error = error + 16 * UNIT_ROUNDOFF * (inner.abs() + squared.sqrt() * gate.abs().sqrt() * other)
    rounded_inner, inner_error = rounded(inner.float(), error, INTERMEDIATE_GROUP, precision)
    return project(rounded_inner, inner_error, expert, "down")


def project(
    x: torch.Tensor, x_error: torch.Tensor | float, expert: Mapping[str, torch.Tensor], name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """One projection of an expert of a ``Layer``, and the largest error allowed in it."""
    return linear(
        x, x_error, expert[name], expert.get(f"{name}_bias"), terms=expert.get(f"{name}_terms")
    )


def linear(
    x: torch.Tensor,
    x_error: torch.Tensor | float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    terms: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x @ weight.T + bias`` and the largest error allowed in it; ``terms``: see ``Layer``."""
    terms = weight.abs() if terms is None else terms
    value = x @ weight.T
    # Per term: the weight's own rounding (code * scale), the product, the sum; then the bias.
    rounding = 2 * (weight.shape[1] + 8) * UNIT_ROUNDOFF
    error = rounding * (x.abs() @ terms.T)
    if isinstance(x_error, torch.Tensor):
        error = error + x_error @ weight.abs().T + rounding * (x_error @ terms.T)
    if bias is not None:
        value = value + bias
        error = error + UNIT_ROUNDOFF * value.abs()
    return value, error + 1e-30


def rounded(
    x: torch.Tensor, error: torch.Tensor, group_size: int, precision: ActivationPrecision
) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations as the kernel multiplies them, and their error given the error of ``x``.

    An error far smaller than a rounding step changes the rounded number only next to a tie.
    """
    match precision:
        case ActivationPrecision.FLOAT32:
            return x.double(), error + UNIT_ROUNDOFF * x.double().abs() * (error > 0)
        case ActivationPrecision.BF16:
            near = x.bfloat16().double()
            low = (x.double() - 2 * error).float().bfloat16().double()
            high = (x.double() + 2 * error).float().bfloat16().double()
            return near, torch.maximum((near - low).abs(), (high - near).abs())
        case ActivationPrecision.INT8:
            return _int8(x, error, group_size)
    raise AssertionError(precision)


def _int8(
    x: torch.Tensor, error: torch.Tensor, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    columns = x.shape[1]
    padding = (0, -columns % group_size)
    shape = (len(x), -(-columns // group_size), group_size)
    groups = torch.nn.functional.pad(x, padding).view(shape)
    errors = torch.nn.functional.pad(error, padding).view(shape)
    largest = groups.abs().amax(-1, keepdim=True)
    scale = largest / 127
    # Not `127 / largest`: torch computes that as a reciprocal and a product, the kernel divides.
    quotient = torch.full_like(largest, 127) / largest
    inverse = torch.where(largest >= 1e-35, quotient, torch.zeros_like(largest))
    exact_code = groups * inverse
    code = exact_code.clamp(-127, 127).round()
    # The peak's own error moves every code and the scale with it.
    peak_error = errors.amax(-1, keepdim=True)
    code_error = errors * inverse + exact_code.abs() * peak_error * inverse / 127
    code_error = torch.where(errors > 0, code_error + 4 * UNIT_ROUNDOFF * 127, code_error)
    flips = ((exact_code.double() - code.double()).abs() + code_error > 0.5) & (code_error > 0)
    value = code.double() * scale.double()
    total = flips * scale + code.abs() * peak_error / 127 + 2 * UNIT_ROUNDOFF * value.abs()
    total = torch.where(errors.amax(-1, keepdim=True) > 0, total, 2 * UNIT_ROUNDOFF * value.abs())
    return value.flatten(1)[:, :columns], total.double().flatten(1)[:, :columns]
