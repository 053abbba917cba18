"""A backend that is right and slow: the float64 reference behind the interfaces, in plain torch.

To check other things with: that a contract suite passes what is right and catches what is broken on
purpose, that a model adapter finds the right weights, that a layer split over two devices adds up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch

from kt_core import hardware
from kt_core.errors import UnsupportedFormatError
from kt_core.interfaces import (
    Backend,
    ExpertDevice,
    ExpertGradients,
    ExpertKernel,
    ExpertWeights,
    LinearKernel,
    LoraWeights,
    Ticket,
    WeightFormat,
)
from kt_core.interfaces.checks import (
    check_expert,
    check_finite,
    check_grad_out,
    check_lora,
    check_pairs,
    check_resident,
    check_weights,
)
from kt_core.packed import codec
from kt_core.quant import BUILT_IN_FORMATS
from kt_core.testing import backward_reference, reference
from kt_core.testing.reference_linear import ReferenceLinear, linear_bytes, named_precision
from kt_core.types import (
    ActivationPrecision,
    Capabilities,
    DeviceInfo,
    Format,
    LinearSpec,
    MoeSpec,
)

_Result = TypeVar("_Result")


class FinishedTicket(Ticket):
    """For kernels that compute when they are asked to: the result is already there."""

    def __init__(self, result: torch.Tensor) -> None:
        """Take the result."""
        self._result = result

    def wait(self) -> torch.Tensor:
        """Return the result."""
        return self._result


class ReferenceKernel(ExpertKernel):
    """Keeps the dequantised weights and the packed ones; computes ``reference.forward``."""

    trains = True
    moves_packed = True

    def __init__(
        self,
        spec: MoeSpec,
        weight_format: WeightFormat,
        precision: ActivationPrecision = ActivationPrecision.AUTO,
    ) -> None:
        """Take the layer's shape, the format, and what becomes of the hidden states."""
        self.spec = spec
        self.weight_format = weight_format.descriptor
        self._format = weight_format
        self._precision = precision
        self._experts: dict[int, dict[str, torch.Tensor]] = {}
        self._packed: dict[int, torch.Tensor] = {}

    @property
    def bytes_per_expert(self) -> int:
        """See ``ExpertKernel.bytes_per_expert``."""
        return expert_bytes(self.spec)

    def load(self, expert: int, weights: ExpertWeights) -> None:
        """See ``ExpertKernel.load``."""
        check_expert(self.spec, expert)
        check_weights(self.spec, self.weight_format, weights)
        check_finite(weights)
        quantized = self._quantized(weights)
        self._packed[expert] = codec.pack(quantized, self.spec, self.weight_format)
        loaded = reference.layer(self.spec, self._format, {expert: quantized})
        self._experts[expert] = loaded.experts[expert]  # one step: other threads load others

    def packed(self, expert: int) -> torch.Tensor:
        """See ``ExpertKernel.packed``."""
        check_expert(self.spec, expert)
        if expert not in self._experts:
            msg = f"expert {expert} is not resident"
            raise ValueError(msg)
        return self._packed[expert]

    def load_packed(self, expert: int, packed: torch.Tensor) -> None:
        """See ``ExpertKernel.load_packed``."""
        check_expert(self.spec, expert)
        self.load(expert, codec.unpack(packed, self.spec, self.weight_format))

    def _quantized(self, weights: ExpertWeights) -> ExpertWeights:
        dense: dict[str, Any] = {
            name: self._format.quantize(matrix)
            for name in ("gate", "up", "down")
            if isinstance(matrix := getattr(weights, name), torch.Tensor)
        }
        return replace(weights, **dense)

    def unload(self, expert: int) -> None:
        """See ``ExpertKernel.unload``."""
        self._experts.pop(expert, None)
        self._packed.pop(expert, None)

    def resident(self) -> frozenset[int]:
        """See ``ExpertKernel.resident``."""
        return frozenset(self._experts)

    def submit(
        self, hidden: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor
    ) -> Ticket:
        """See ``ExpertKernel.submit``."""
        check_pairs(self.spec, hidden, expert_ids, weights)
        check_resident(self.spec, self._experts, expert_ids)
        precision = named_precision(self._precision, self.weight_format, hidden.dtype)
        out, _ = reference.forward(self._layer(), hidden, expert_ids, weights, precision)
        return FinishedTicket(out.to(hidden.dtype))

    def submit_training(
        self,
        hidden: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        lora: LoraWeights | None = None,
    ) -> Ticket:
        """See ``ExpertKernel.submit_training``; rounds where ``backward_reference`` does."""
        self._check_training(hidden, expert_ids, weights, lora)
        precision = self._training_precision(hidden.dtype)
        arguments = (self._layer(), hidden, expert_ids, weights, precision, lora)
        out = _with_autograd(lambda: backward_reference.forward(*arguments))
        return FinishedTicket(out.value.to(hidden.dtype))

    def backward(
        self,
        hidden: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        grad_out: torch.Tensor,
        lora: LoraWeights | None = None,
    ) -> ExpertGradients:
        """See ``ExpertKernel.backward``; rounds where ``backward_reference`` does."""
        self._check_training(hidden, expert_ids, weights, lora)
        check_grad_out(hidden, grad_out)
        precision = self._training_precision(hidden.dtype)
        arguments = (self._layer(), hidden, expert_ids, weights, grad_out, precision, lora)
        found = _with_autograd(lambda: backward_reference.backward(*arguments))
        grads = None
        if lora is not None:
            matrices = reference.lora_matrices(lora)
            named: dict[str, Any] = {n: found[n].value.to(m.dtype) for n, m in matrices.items()}
            grads = replace(lora, **named)
        return ExpertGradients(
            hidden=found["hidden"].value.to(hidden.dtype),
            weights=found["weights"].value.to(weights.dtype),
            lora=grads,
        )

    def _training_precision(self, dtype: torch.dtype) -> ActivationPrecision:
        if self._precision is not ActivationPrecision.AUTO:
            return self._precision
        is_bf16 = dtype is torch.bfloat16
        return ActivationPrecision.BF16 if is_bf16 else ActivationPrecision.FLOAT32

    def _check_training(
        self,
        hidden: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        lora: LoraWeights | None,
    ) -> None:
        check_pairs(self.spec, hidden, expert_ids, weights)
        check_resident(self.spec, self._experts, expert_ids)
        if lora is not None:
            check_lora(self.spec, lora)

    def _layer(self) -> reference.Layer:
        return reference.Layer(self.spec, self._experts)


class ExactKernel(ReferenceKernel):
    """Rounds nothing: float64 weights as they come, float64 hidden states, float64 results.

    Narrower than the interface (float64 alone), for comparing modules in float64.
    """

    moves_packed = False

    def __init__(self, spec: MoeSpec) -> None:
        """Take the layer's shape."""
        super().__init__(spec, BUILT_IN_FORMATS[0])

    def load(self, expert: int, weights: ExpertWeights) -> None:
        """Keep a copy of the weights."""
        check_expert(self.spec, expert)
        parts = {field.name: getattr(weights, field.name) for field in fields(weights)}
        self._experts[expert] = {
            name: part.double().clone()
            for name, part in parts.items()
            if isinstance(part, torch.Tensor)
        }

    def submit(
        self, hidden: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor
    ) -> Ticket:
        """Compute ``reference.exact``."""
        check_resident(self.spec, self._experts, expert_ids)
        return FinishedTicket(reference.exact(self._layer(), hidden, expert_ids, weights))

    def submit_training(
        self,
        hidden: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        lora: LoraWeights | None = None,
    ) -> Ticket:
        """Compute ``reference.exact``."""
        check_resident(self.spec, self._experts, expert_ids)
        with torch.no_grad():
            return FinishedTicket(reference.exact(self._layer(), hidden, expert_ids, weights, lora))

    def backward(
        self,
        hidden: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        grad_out: torch.Tensor,
        lora: LoraWeights | None = None,
    ) -> ExpertGradients:
        """Let torch differentiate ``reference.exact``."""
        arguments = (self._layer(), hidden, expert_ids, weights, grad_out, lora)
        return _with_autograd(lambda: reference.backward(*arguments))


class ReferenceBackend(Backend):
    """The device ``reference``: every format, every precision the format has."""

    name = "reference"
    preference = -100

    def __init__(self, formats: Sequence[WeightFormat] = BUILT_IN_FORMATS) -> None:
        """Take the formats it shall compute."""
        self._formats = {f.descriptor: f for f in formats}

    def why_unavailable(self) -> str | None:
        """Return None: torch is everywhere."""
        return None

    def devices(self) -> Sequence[DeviceInfo]:
        """Return the one device."""
        return [
            DeviceInfo(
                name=self.name,
                description="float64 in torch, on the CPU",
                torch_device="cpu",
                memory_bytes=hardware.detect().memory.total_bytes,
            )
        ]

    def capabilities(self, device: str) -> Capabilities:
        """See ``Backend.capabilities``."""
        del device
        names = frozenset(f.name for f in self._formats)
        return Capabilities(formats=names, trains=True, computes_dense=True)

    def open(self, device: str, *, threads: int | None = None) -> ExpertDevice:
        """See ``Backend.open``; there is one thread, the caller's."""
        del threads
        return ReferenceDevice(self.devices()[0], self.capabilities(device), self._formats)


class ReferenceDevice(ExpertDevice):
    """Owns nothing but its kernels."""

    threads = 1
    kernel_class: type[ReferenceKernel] = ReferenceKernel
    linear_class: type[ReferenceLinear] = ReferenceLinear

    def __init__(
        self, info: DeviceInfo, capabilities: Capabilities, formats: Mapping[Format, WeightFormat]
    ) -> None:
        """Take the formats by descriptor."""
        self.info = info
        self.capabilities = capabilities
        self._formats = formats

    def expert_bytes(self, spec: MoeSpec, weight_format: Format) -> int:
        """See ``ExpertDevice.expert_bytes``."""
        del weight_format
        return expert_bytes(spec)

    def expert_kernel(
        self,
        spec: MoeSpec,
        weight_format: Format,
        *,
        precision: ActivationPrecision = ActivationPrecision.AUTO,
    ) -> ExpertKernel:
        """See ``ExpertDevice.expert_kernel``."""
        return self.kernel_class(spec, self._known(weight_format, precision), precision)

    def linear_bytes(self, spec: LinearSpec, weight_format: Format) -> int:
        """See ``ExpertDevice.linear_bytes``."""
        del weight_format
        return linear_bytes(spec)

    def linear_kernel(
        self,
        spec: LinearSpec,
        weight_format: Format,
        *,
        precision: ActivationPrecision = ActivationPrecision.AUTO,
    ) -> LinearKernel:
        """See ``ExpertDevice.linear_kernel``."""
        return self.linear_class(spec, self._known(weight_format, precision), precision)

    def _known(self, weight_format: Format, precision: ActivationPrecision) -> WeightFormat:
        if weight_format not in self._formats:
            msg = f"the reference was not given format {weight_format.name!r}"
            raise UnsupportedFormatError(msg)
        if precision not in _precisions(weight_format):
            msg = f"format {weight_format.name!r} has no {precision.value} activations"
            raise UnsupportedFormatError(msg)
        return self._formats[weight_format]

    def close(self) -> None:
        """Do nothing: there is nothing to stop."""


def _with_autograd(compute: Callable[[], _Result]) -> _Result:
    """Compute where torch records what is done: within an operator it does not, on that thread."""
    with torch.enable_grad():
        if (torch.ones(1, requires_grad=True) * 1).requires_grad:
            return compute()
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(compute).result()


def expert_bytes(spec: MoeSpec) -> int:
    """Bytes of one expert in float64."""
    inner = spec.intermediate_size * (2 if spec.activation.is_gated else 1)
    biases = inner + spec.hidden_size if spec.has_bias else 0
    return 8 * (spec.weights_per_expert + biases)


def _precisions(weight_format: Format) -> frozenset[ActivationPrecision]:
    if weight_format.element.is_integer:
        return frozenset(ActivationPrecision)
    return frozenset(ActivationPrecision) - {ActivationPrecision.INT8}
