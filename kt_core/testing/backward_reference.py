"""Gradients of a layer of experts in float64, and how far a kernel may be from them.

The kernel's own roundings are done here too, where they are known: activations and gradients as
they meet weights, and weights as bfloat16. What is left is the order and precision of float32 sums,
bounded as in ``kt_core.testing.reference``, whose helpers this uses, and carried through.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from kt_core.interfaces import LoraWeights
from kt_core.moe.activations import activate
from kt_core.testing import reference
from kt_core.testing.reference import HIDDEN_GROUP, UNIT_ROUNDOFF, Layer
from kt_core.types import Activation, ActivationPrecision


@dataclass(frozen=True, slots=True)
class Bounded:
    """A value and the largest error allowed in each of its elements."""

    value: torch.Tensor
    error: torch.Tensor

    def __add__(self, other: Bounded) -> Bounded:
        total = self.value + other.value
        error = self.error + other.error
        return Bounded(total, error + 2 * UNIT_ROUNDOFF * (total.abs() + error))

    def __mul__(self, factor: torch.Tensor | float) -> Bounded:
        """Times a number that is known, rounded once."""
        factor = torch.as_tensor(factor, dtype=torch.float64)
        value = self.value * factor
        error = self.error * factor.abs()
        return Bounded(value, error + 2 * UNIT_ROUNDOFF * (value.abs() + error))

    def __matmul__(self, other: Bounded) -> Bounded:
        """A float32 product of matrices, in any order of the sum."""
        terms = self.value.abs() @ other.value.abs()
        error = self.error @ (other.value.abs() + other.error) + self.value.abs() @ other.error
        length = self.value.shape[1] + 8
        rounding = 2 * length * UNIT_ROUNDOFF * (terms + error)
        return Bounded(self.value @ other.value, error + rounding + 1e-30)

    @property
    def T(self) -> Bounded:
        """Transposed."""
        return Bounded(self.value.T, self.error.T)


def exactly(tensor: torch.Tensor) -> Bounded:
    """Return a value without an error."""
    value = tensor.double()
    return Bounded(value, torch.zeros_like(value))


def forward(  # noqa: PLR0917 - the interface's arguments
    layer: Layer,
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    precision: ActivationPrecision,
    lora: LoraWeights | None = None,
) -> Bounded:
    """Return the output with LoRA, ``[tokens, hidden]``; arguments are those of ``backward``."""
    total = exactly(torch.zeros(hidden.shape))
    for index in layer.experts:
        token, k = torch.where(expert_ids == index)
        if len(token):
            out = _Expert(layer, index, precision, lora).forward(hidden[token])
            _add(total, out * weights[token, k, None].float().double(), token)
    return _stored(total, hidden.dtype)


def backward(  # noqa: PLR0917 - the interface's arguments
    layer: Layer,
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    grad_out: torch.Tensor,
    precision: ActivationPrecision,
    lora: LoraWeights | None = None,
) -> dict[str, Bounded]:
    """Return the gradients of ``hidden``, ``weights`` and the LoRA matrices, by name.

    Args:
        layer: Dequantised experts.
        hidden: ``[tokens, hidden]``.
        expert_ids: ``[tokens, k]``.
        weights: ``[tokens, k]`` float32.
        grad_out: ``[tokens, hidden]``.
        precision: Of the activations: one by name.
        lora: Low-rank additions.
    """
    found = {"hidden": exactly(torch.zeros(hidden.shape))}
    found["weights"] = exactly(torch.zeros(weights.shape))
    if lora is not None:
        for name, matrix in reference.lora_matrices(lora).items():
            found[name] = exactly(torch.zeros(matrix.shape))
    for index in layer.experts:
        token, k = torch.where(expert_ids == index)
        if not len(token):
            continue
        one = _Expert(layer, index, precision, lora)
        grads = one.backward(hidden[token], grad_out[token], weights[token, k].float())
        _add(found["hidden"], grads.pop("hidden"), token)
        for name in ("value", "error"):
            getattr(found["weights"], name)[token, k] = getattr(grads["weights"], name)
        grads.pop("weights")
        for matrix_name, grad in grads.items():
            found[matrix_name].value[index] = grad.value
            found[matrix_name].error[index] = grad.error
    types = {"hidden": hidden.dtype, "weights": weights.dtype}
    if lora is not None:
        types |= {name: matrix.dtype for name, matrix in reference.lora_matrices(lora).items()}
    return {name: _stored(grad, types[name]) for name, grad in found.items()}


def _add(total: Bounded, part: Bounded, token: torch.Tensor) -> None:
    """The sum over experts: each part is rounded with every later one, 16 of them at the most."""
    total.value.index_add_(0, token, part.value)
    total.error.index_add_(0, token, part.error + 16 * UNIT_ROUNDOFF * part.value.abs())


def _stored(grad: Bounded, dtype: torch.dtype) -> Bounded:
    error = grad.error + reference.stored_error(grad.value.abs() + grad.error, dtype)
    return Bounded(grad.value, error)


class _Expert:
    """One expert and the pairs that go to it."""

    def __init__(
        self, layer: Layer, index: int, precision: ActivationPrecision, lora: LoraWeights | None
    ) -> None:
        self._activation = layer.spec.activation
        self._tensors: Mapping[str, torch.Tensor] = layer.experts[index]
        self._precision = precision
        self._is_exact = precision is ActivationPrecision.FLOAT32
        self._lora: dict[str, Bounded] = {}
        self._scale = 1.0
        if lora is not None:
            matrices = reference.lora_matrices(lora)
            self._lora = {name: exactly(matrix[index]) for name, matrix in matrices.items()}
            self._scale = float(torch.tensor(lora.scale))

    def forward(self, x: torch.Tensor) -> Bounded:
        """Return a row for each pair, before the routing weight."""
        names = ("gate", "up") if self._activation.is_gated else ("up",)
        value, _ = _activation(self._activation, {name: self._project(name, x) for name in names})
        group = reference.INTERMEDIATE_GROUP
        rounded, error = reference.rounded(value.value.float(), value.error, group, self._precision)
        out = Bounded(*reference.project(rounded, error, self._tensors, "down"))
        if "down_a" in self._lora:
            reduced = value @ self._lora["down_a"].T
            out = out + reduced @ self._lora["down_b"].T * self._scale
        return out

    def backward(
        self, x: torch.Tensor, grad_out: torch.Tensor, weights: torch.Tensor
    ) -> dict[str, Bounded]:
        """Return the gradients by name; of hidden states and weights, a row for each pair."""
        names = ("gate", "up") if self._activation.is_gated else ("up",)
        inputs, grads_of_rank, found = {}, {}, {}
        for name in names:
            inputs[name] = self._project(name, x)
        # What the gradient of the output makes of what stands between.
        grad = exactly(grad_out.float())
        inner = self._rounded(grad) @ self._matrix("down")
        if "down_a" in self._lora:
            grads_of_rank["down"] = grad @ self._lora["down_b"]
            inner = inner + grads_of_rank["down"] @ self._lora["down_a"] * self._scale
        value, slopes = _activation(self._activation, inputs)
        found["weights"] = self._grad_weights(inner, value, grad)
        weighted = inner * weights.double()[:, None]
        grads = {name: _times(weighted, slope) for name, slope in slopes.items()}
        total = None
        for name in names:
            part = self._rounded(grads[name]) @ self._matrix(name)
            total = part if total is None else total + part
        assert total is not None
        for name in names:
            if f"{name}_a" in self._lora:
                rank = grads[name] @ self._lora[f"{name}_b"]
                total = total + rank @ self._lora[f"{name}_a"] * self._scale
                found[f"{name}_a"] = rank.T @ exactly(x.float()) * self._scale
                reduced = exactly(x.float()) @ self._lora[f"{name}_a"].T
                found[f"{name}_b"] = grads[name].T @ reduced * self._scale
        if "down" in grads_of_rank:
            scales = weights.double()[:, None]
            rank = grads_of_rank["down"] * scales
            found["down_a"] = rank.T @ value * self._scale
            reduced = value @ self._lora["down_a"].T * scales
            found["down_b"] = grad.T @ reduced * self._scale
        found["hidden"] = total
        return found

    def _project(self, name: str, x: torch.Tensor) -> Bounded:
        nothing = torch.zeros(x.shape, dtype=torch.float64)
        rounded, _ = reference.rounded(x.float(), nothing, HIDDEN_GROUP, self._precision)
        out = Bounded(*reference.project(rounded, 0.0, self._tensors, name))
        if f"{name}_a" in self._lora:
            reduced = exactly(x.float()) @ self._lora[f"{name}_a"].T
            out = out + reduced @ self._lora[f"{name}_b"].T * self._scale
        return out

    def _matrix(self, name: str) -> Bounded:
        """Weights as a transposed product has them."""
        weight = self._tensors[name]
        terms = self._tensors.get(f"{name}_terms")
        slack = 2 * UNIT_ROUNDOFF * (weight.abs() if terms is None else terms)
        if self._is_exact:
            return Bounded(weight, slack)
        # A product is rounded alike everywhere; a difference of two may be fused.
        slack = torch.zeros_like(weight) if terms is None else slack
        kind = ActivationPrecision.BF16
        return Bounded(*reference.rounded(weight.float(), slack, HIDDEN_GROUP, kind))

    def _rounded(self, grad: Bounded) -> Bounded:
        """Gradients as they meet weights."""
        kind = ActivationPrecision.FLOAT32 if self._is_exact else ActivationPrecision.BF16
        value, error = reference.rounded(grad.value.float(), grad.error, HIDDEN_GROUP, kind)
        return Bounded(value, error)

    def _grad_weights(self, inner: Bounded, value: Bounded, grad: Bounded) -> Bounded:
        products = _times(inner, value)
        terms, length = products.value.abs().sum(1), inner.value.shape[1]
        total, error = products.value.sum(1), products.error.sum(1)
        if "down_bias" in self._tensors:
            of_bias = grad.value * self._tensors["down_bias"]
            total = total + of_bias.sum(1)
            terms, length = terms + of_bias.abs().sum(1), length + of_bias.shape[1]
        return Bounded(total, error + 2 * (length + 8) * UNIT_ROUNDOFF * terms + 1e-30)


def _times(left: Bounded, right: Bounded) -> Bounded:
    value = left.value * right.value
    error = left.error * (right.value.abs() + right.error) + left.value.abs() * right.error
    return Bounded(value, error + 4 * UNIT_ROUNDOFF * (value.abs() + error))


def _activation(
    activation: Activation, inputs: Mapping[str, Bounded]
) -> tuple[Bounded, dict[str, Bounded]]:
    """The activation and its derivatives.

    As in ``reference``, they are extreme at a corner of the box of possible inputs, or within
    rounding of it. A bound on the input that lies within the box is passed or not: the corners have
    both slopes.
    """

    def evaluate(at: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in at.items()}
        up = leaves["up"]
        out = activate(activation, leaves.get("gate", up), up)
        slopes = torch.autograd.grad(out.sum(), list(leaves.values()))
        return {"": out.detach(), **dict(zip(leaves, slopes, strict=True))}

    middle = {name: bounded.value for name, bounded in inputs.items()}
    found = evaluate(middle)
    error = {name: torch.zeros_like(value) for name, value in found.items()}
    for gate_side in (-1, 1):
        for up_side in (-1, 1):
            side = {"gate": gate_side, "up": up_side}
            corner = {name: b.value + side[name] * b.error for name, b in inputs.items()}
            for name, value in evaluate(corner).items():
                error[name] = torch.maximum(error[name], (value - found[name]).abs())
    # Evaluating them: fewer than 32 roundings, of terms no larger than this.
    size = (1 + middle.get("gate", middle["up"]).abs()).square() * (1 + middle["up"].abs())
    bounded = {n: Bounded(v, error[n] + 32 * UNIT_ROUNDOFF * size) for n, v in found.items()}
    return bounded.pop(""), bounded
