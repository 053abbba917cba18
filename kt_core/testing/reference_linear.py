"""The slow truth of a dense layer, and a kernel that computes it.

As ``kt_core.testing.reference`` does it for experts: float64 on the dequantised weights, with the
kernel's own roundings of activations done first, and a bound on what float32 sums may err.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kt_core.interfaces import LinearKernel, QuantizedTensor, WeightFormat
from kt_core.interfaces.checks import check_linear, check_linear_finite, check_rows
from kt_core.packed import codec
from kt_core.testing import reference
from kt_core.testing.backward_reference import Bounded, exactly
from kt_core.testing.reference import INTERMEDIATE_GROUP, UNIT_ROUNDOFF
from kt_core.types import ActivationPrecision, Element, Format, LinearSpec


@dataclass(frozen=True, slots=True)
class Dense:
    """A dequantised layer in float64."""

    weight: torch.Tensor
    bias: torch.Tensor | None


def random_linear(
    spec: LinearSpec, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Make weights of the size trained ones have, rows of different magnitude, and a bias."""
    spread = torch.rand(spec.out_features, 1, generator=generator) + 0.5
    weight = torch.randn(spec.out_features, spec.in_features, generator=generator) * spread * 0.1
    bias = torch.randn(spec.out_features, generator=generator) * 0.1
    return weight, bias if spec.has_bias else None


def dense(
    weight_format: WeightFormat,
    weight: torch.Tensor | QuantizedTensor,
    bias: torch.Tensor | None = None,
) -> Dense:
    """Quantise and dequantise a layer."""
    if isinstance(weight, torch.Tensor):
        weight = weight_format.quantize(weight)
    value = weight_format.dequantize(weight).double()
    return Dense(value, None if bias is None else bias.float().double())


def forward(layer: Dense, x: torch.Tensor, precision: ActivationPrecision) -> Bounded:
    """Return ``x W^T + b``, ``[rows, out_features]``, and the largest error allowed in each.

    Args:
        layer: Dequantised weights.
        x: ``[rows, in_features]`` in the type the kernel is given.
        precision: One by name.
    """
    nothing = torch.zeros(x.shape, dtype=torch.float64)
    given, _ = reference.rounded(x.float(), nothing, INTERMEDIATE_GROUP, precision)
    value, error = reference.linear(given, 0.0, layer.weight, layer.bias)
    return _stored(value, error, x.dtype)


def grad_input(layer: Dense, grad_out: torch.Tensor, precision: ActivationPrecision) -> Bounded:
    """Return ``grad_out W``, ``[rows, in_features]``; arguments are those of ``forward``.

    Unless the precision is float32, gradients and dequantised weights are rounded to bfloat16.
    """
    if precision is ActivationPrecision.FLOAT32:
        # Code times scale, in float32.
        weight = Bounded(layer.weight, 2 * UNIT_ROUNDOFF * layer.weight.abs())
        found = exactly(grad_out.float()) @ weight
    else:
        found = exactly(grad_out.bfloat16()) @ exactly(layer.weight.float().bfloat16())
    return _stored(found.value, found.error, grad_out.dtype)


def _stored(value: torch.Tensor, error: torch.Tensor, dtype: torch.dtype) -> Bounded:
    return Bounded(value, error + reference.stored_error(value.abs() + error, dtype))


class ReferenceLinear(LinearKernel):
    """Keeps the dequantised weights; rounds where ``forward`` and ``grad_input`` do."""

    trains = True
    moves_packed = True

    def __init__(
        self,
        spec: LinearSpec,
        weight_format: WeightFormat,
        precision: ActivationPrecision = ActivationPrecision.AUTO,
    ) -> None:
        """Take the layer's shape, the format, and what becomes of the activations."""
        self.spec = spec
        self.weight_format = weight_format.descriptor
        self._format = weight_format
        self._precision = precision
        self._layer: Dense | None = None
        self._packed = torch.empty(0, dtype=torch.uint8)

    @property
    def size_bytes(self) -> int:
        """See ``LinearKernel.size_bytes``."""
        return linear_bytes(self.spec)

    @property
    def is_loaded(self) -> bool:
        """See ``LinearKernel.is_loaded``."""
        return self._layer is not None

    def load(
        self, weight: torch.Tensor | QuantizedTensor, bias: torch.Tensor | None = None
    ) -> None:
        """See ``LinearKernel.load``."""
        self._layer = None
        check_linear(self.spec, self.weight_format, weight, bias)
        check_linear_finite(weight, bias)
        if isinstance(weight, torch.Tensor):
            weight = self._format.quantize(weight)
        self._packed = codec.pack_linear(weight, bias, self.spec, self.weight_format)
        self._layer = dense(self._format, weight, bias)

    def packed(self) -> torch.Tensor:
        """See ``LinearKernel.packed``."""
        self._loaded()
        return self._packed

    def load_packed(self, packed: torch.Tensor) -> None:
        """See ``LinearKernel.load_packed``."""
        self.load(*codec.unpack_linear(packed, self.spec, self.weight_format))

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """See ``LinearKernel.apply``."""
        precision = named_precision(self._precision, self.weight_format, x.dtype)
        return self._apply(x, precision)

    def apply_training(self, x: torch.Tensor) -> torch.Tensor:
        """See ``LinearKernel.apply_training``."""
        return self._apply(x, self._training_precision(x.dtype))

    def grad_input(self, grad_out: torch.Tensor) -> torch.Tensor:
        """See ``LinearKernel.grad_input``."""
        check_rows("grad_out", grad_out, self.spec.out_features)
        rows = grad_out.reshape(-1, self.spec.out_features)
        found = grad_input(self._loaded(), rows, self._training_precision(grad_out.dtype))
        return found.value.to(grad_out.dtype).view(*grad_out.shape[:-1], self.spec.in_features)

    def _apply(self, x: torch.Tensor, precision: ActivationPrecision) -> torch.Tensor:
        check_rows("x", x, self.spec.in_features)
        found = forward(self._loaded(), x.reshape(-1, self.spec.in_features), precision)
        return found.value.to(x.dtype).view(*x.shape[:-1], self.spec.out_features)

    def _loaded(self) -> Dense:
        if self._layer is None:
            msg = "the layer has no weights: load them first"
            raise ValueError(msg)
        return self._layer

    def _training_precision(self, dtype: torch.dtype) -> ActivationPrecision:
        if self._precision is not ActivationPrecision.AUTO:
            return self._precision
        is_bf16 = dtype is torch.bfloat16
        return ActivationPrecision.BF16 if is_bf16 else ActivationPrecision.FLOAT32


def linear_bytes(spec: LinearSpec) -> int:
    """Bytes of one layer in float64."""
    return 8 * spec.out_features * (spec.in_features + (1 if spec.has_bias else 0))


def named_precision(
    precision: ActivationPrecision, weight_format: Format, dtype: torch.dtype
) -> ActivationPrecision:
    """Return the precision that ``AUTO`` stands for, or the one that was named."""
    if precision is not ActivationPrecision.AUTO:
        return precision
    if weight_format.element.is_integer:
        return ActivationPrecision.INT8
    is_exact = weight_format.element is Element.BF16 and dtype is not torch.bfloat16
    return ActivationPrecision.FLOAT32 if is_exact else ActivationPrecision.BF16
