"""Experts of one layer, packed in host memory and computed by csrc/."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict

import torch

from kt_core.interfaces import (
    ExpertGradients,
    ExpertKernel,
    ExpertWeights,
    HostCall,
    HostCallTimes,
    LoraWeights,
    QuantizedTensor,
    Ticket,
)
from kt_core.interfaces.checks import check_experts, check_grad_out, check_lora
from kt_core.packed import ExpertLayout
from kt_core.packed.codec import check_packed
from kt_core.types import ActivationPrecision, Format, MoeSpec
from kt_cpu import _kernels
from kt_cpu.sources import (
    DTYPES,
    Source,
    address,
    bias_source,
    check_on_cpu,
    compute_precision,
    matrix_source,
    stored,
    training_precision,
)

_PROJECTIONS = ("gate", "up", "down")
_ID_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def layer_spec(spec: MoeSpec, weight_format: Format) -> _kernels.LayerSpec:
    """Return what csrc/ must know about a layer."""
    activation = spec.activation
    return _kernels.LayerSpec(
        num_experts=spec.num_experts,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        activation=getattr(_kernels.ActivationKind, activation.kind.value),
        is_gated=activation.is_gated,
        alpha=activation.alpha,
        limit=activation.limit,
        up_limit=activation.up_limit,
        has_bias=spec.has_bias,
        **stored(weight_format),
    )


class _Pairs(NamedTuple):
    """Contiguous tensors of the types csrc/ reads."""

    hidden: torch.Tensor
    expert_ids: torch.Tensor
    weights: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.hidden, self.expert_ids, self.weights)

    def addresses(self) -> _Addresses:
        tokens, top_k = self.expert_ids.shape
        return {
            "hidden": self.hidden.data_ptr(),
            "type": DTYPES[self.hidden.dtype],
            "expert_ids": self.expert_ids.data_ptr(),
            "weights": self.weights.data_ptr(),
            "tokens": tokens,
            "top_k": top_k,
        }


class _Addresses(TypedDict):
    hidden: int
    type: _kernels.DType
    expert_ids: int
    weights: int
    tokens: int
    top_k: int


class _Lora:
    """LoRA matrices as csrc/ reads them, and room for their gradients."""

    def __init__(self, spec: MoeSpec, lora: LoraWeights, *, with_gradients: bool = False) -> None:
        check_lora(spec, lora)
        self._lora = lora
        self.tensors: dict[str, torch.Tensor] = {}
        for projection in _PROJECTIONS:
            a, b = getattr(lora, f"{projection}_a"), getattr(lora, f"{projection}_b")
            if a is None:
                continue
            dtype = torch.promote_types(a.dtype, b.dtype)
            for side, matrix in (("a", a), ("b", b)):
                check_on_cpu(f"{projection}_{side}", matrix)
                self.tensors[f"{projection}_{side}"] = matrix.detach().to(dtype).contiguous()
        self._grads: dict[str, torch.Tensor] = {}
        if with_gradients:
            self._grads = {
                name: torch.zeros(tensor.shape, dtype=torch.float32)
                for name, tensor in self.tensors.items()
            }

    def addresses(self) -> _kernels.Lora:
        gate, up, down = (self._addresses_of(projection) for projection in _PROJECTIONS)
        return self._lora.scale, gate, up, down

    def gradients(self) -> LoraWeights:
        found: dict[str, Any] = {
            name: grad.to(getattr(self._lora, name).dtype) for name, grad in self._grads.items()
        }
        return LoraWeights(scale=self._lora.scale, **found)

    def _addresses_of(self, projection: str) -> _kernels.LoraMatrices | None:
        a, b = (f"{projection}_{side}" for side in "ab")
        if a not in self.tensors:
            return None
        return (
            self.tensors[a].data_ptr(),
            self.tensors[b].data_ptr(),
            DTYPES[self.tensors[a].dtype],
            self.tensors[a].shape[1],
            address(self._grads.get(a)),
            address(self._grads.get(b)),
        )


class CpuTicket(Ticket):
    """A forward pass under way. Keeps the tensors it reads and writes alive."""

    def __init__(
        self,
        ticket: _kernels.Ticket,
        out: torch.Tensor,
        dtype: torch.dtype,
        keep: tuple[torch.Tensor, ...],
    ) -> None:
        """Take the tensors that must outlive the work; ``dtype`` is the type to return."""
        self._ticket = ticket
        self._out = out
        self._dtype = dtype
        self._keep = keep

    def wait(self) -> torch.Tensor:
        """Help with the work until it is done; return the output."""
        self._ticket.wait()
        return self._out.to(self._dtype)

    def __del__(self) -> None:
        """Never let go of the tensors while threads may read them."""
        self._ticket.wait()


class CpuHostCall(HostCall):
    """A forward pass that a stream starts and joins. Keeps the tensors it reads and writes."""

    start = _kernels.stream_call_start
    join = _kernels.stream_call_join

    def __init__(self, call: _kernels.StreamCall, keep: tuple[torch.Tensor, ...]) -> None:
        """Take the tensors that must outlive the call."""
        self._call = call
        self._keep = keep
        self.argument = call.address

    def raise_error(self) -> None:
        """See ``HostCall.raise_error``."""
        if why := self._call.take_error():
            msg = f"experts on the cpu failed: {why}"
            raise RuntimeError(msg)

    def record(self, is_on: bool) -> None:
        """See ``HostCall.record``."""
        self._call.record(is_on)

    def take_times(self) -> list[HostCallTimes]:
        """See ``HostCall.take_times``."""
        return [HostCallTimes(*times) for times in self._call.take_times()]


class CpuExpertKernel(ExpertKernel):
    """See ``ExpertKernel``; the precision ``auto`` follows the type of the hidden states."""

    trains = True
    moves_packed = True

    def __init__(
        self,
        device: _kernels.Device,
        spec: MoeSpec,
        weight_format: Format,
        precision: ActivationPrecision,
    ) -> None:
        """Reserve address space for all experts; memory is taken as they are loaded."""
        self.spec = spec
        self.weight_format = weight_format
        self._layer_spec = layer_spec(spec, weight_format)
        self._layer = _kernels.ExpertLayer(device, self._layer_spec)
        self._precision = precision

    @property
    def bytes_per_expert(self) -> int:
        """See ``ExpertKernel.bytes_per_expert``."""
        return self._layer_spec.bytes_per_expert

    def precision_for(self, hidden_type: torch.dtype) -> ActivationPrecision:
        """See ``ExpertKernel.precision_for``."""
        return ActivationPrecision(self._compute_precision(hidden_type).name)

    def load(self, expert: int, weights: ExpertWeights) -> None:
        """See ``ExpertKernel.load``. Releases the GIL while it packs."""
        self._check_expert(expert)
        hidden, inner = self.spec.hidden_size, self.spec.intermediate_size
        self._check_parts(weights)
        gate = None if weights.gate is None else self._source("gate", weights.gate, (inner, hidden))
        up = self._source("up", weights.up, (inner, hidden))
        down = self._source("down", weights.down, (hidden, inner))
        biases = [
            bias_source("gate_bias", weights.gate_bias, inner),
            bias_source("up_bias", weights.up_bias, inner),
            bias_source("down_bias", weights.down_bias, hidden),
        ]
        bad = self._layer.load(
            expert,
            gate=gate and gate.addresses,
            up=up.addresses,
            down=down.addresses,
            gate_bias=address(biases[0]),
            up_bias=address(biases[1]),
            down_bias=address(biases[2]),
        )
        del gate, up, down  # kept until here: csrc/ reads the tensors behind the addresses
        if bad:
            msg = f"the {bad} projection of expert {expert} holds a NaN or an infinity"
            raise ValueError(msg)

    def unload(self, expert: int) -> None:
        """See ``ExpertKernel.unload``."""
        self._check_expert(expert)
        self._layer.unload(expert)

    def resident(self) -> frozenset[int]:
        """See ``ExpertKernel.resident``."""
        experts = range(self.spec.num_experts)
        return frozenset(e for e in experts if self._layer.is_resident(e))

    def packed(self, expert: int) -> torch.Tensor:
        """See ``ExpertKernel.packed``. A view where there is one NUMA node."""
        self._check_expert(expert)
        if not self._layer.is_resident(expert):
            msg = f"expert {expert} is not resident"
            raise ValueError(msg)
        view = self._layer.packed(expert)
        if view is not None:
            return torch.frombuffer(view, dtype=torch.uint8)
        packed = torch.empty(self.bytes_per_expert, dtype=torch.uint8)
        self._layer.copy_packed(expert, packed.data_ptr())
        return packed

    def gather_packed(self, experts: Sequence[int], out: torch.Tensor) -> None:
        """See ``ExpertKernel.gather_packed``. All threads copy, and the GIL is released."""
        check_experts(self.spec, experts)
        check_on_cpu("out", out)
        check_packed(out, ExpertLayout.of(self.spec, self.weight_format), len(experts))
        self._layer.gather_packed(experts, out.data_ptr())

    def load_packed(self, expert: int, packed: torch.Tensor) -> None:
        """See ``ExpertKernel.load_packed``. Releases the GIL while it copies."""
        self._check_expert(expert)
        check_on_cpu("packed", packed)
        check_packed(packed, ExpertLayout.of(self.spec, self.weight_format))
        self._layer.load_packed(expert, packed.data_ptr())

    def map_packed(self, expert: int, packed: torch.Tensor) -> bool:
        """See ``ExpertKernel.map_packed``. A copy where experts are split over NUMA nodes."""
        self._check_expert(expert)
        check_on_cpu("packed", packed)
        check_packed(packed, ExpertLayout.of(self.spec, self.weight_format))
        if self._layer.map_packed(expert, packed.data_ptr(), packed):
            return True
        self._layer.load_packed(expert, packed.data_ptr())
        return False

    def submit(
        self, hidden: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor
    ) -> Ticket:
        """See ``ExpertKernel.submit``. float16 hidden states are computed as float32."""
        if torch.is_grad_enabled() and (hidden.requires_grad or weights.requires_grad):
            msg = (
                "submit computes no gradient: use torch.no_grad(), or submit_training and backward"
            )
            raise RuntimeError(msg)
        pairs = self._pairs(hidden, expert_ids, weights)
        out = torch.empty_like(pairs.hidden)
        ticket = self._layer.submit(
            **pairs.addresses(),
            precision=self._compute_precision(pairs.hidden.dtype),
            out=out.data_ptr(),
        )
        return CpuTicket(ticket, out, hidden.dtype, pairs.tensors)

    def host_call(
        self,
        hidden: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        out: torch.Tensor,
    ) -> HostCall:
        """See ``ExpertKernel.host_call``."""
        pairs = self._pairs(hidden, expert_ids, weights)
        given = (hidden, expert_ids, weights)
        copied = [a.data_ptr() != b.data_ptr() for a, b in zip(pairs.tensors, given, strict=True)]
        if any(copied) or out.dtype is not hidden.dtype or not out.is_contiguous():
            msg = (
                "a host call reads bfloat16 or float32 hidden states, int64 ids and float32 "
                "weights where they are, in one piece: convert them before"
            )
            raise ValueError(msg)
        call = self._layer.stream_call(
            **pairs.addresses(),
            precision=self._compute_precision(hidden.dtype),
            out=out.data_ptr(),
        )
        return CpuHostCall(call, (*given, out))

    def submit_training(
        self,
        hidden: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        lora: LoraWeights | None = None,
    ) -> Ticket:
        """See ``ExpertKernel.submit_training``. The precision ``auto`` is that of the activations.

        That is, float32 for float32 and float16 hidden states, bf16 for bfloat16.
        """
        pairs = self._pairs(hidden, expert_ids, weights)
        out = torch.empty_like(pairs.hidden)
        precision = self._training_precision(pairs.hidden.dtype)
        if lora is None:
            ticket = self._layer.submit(
                **pairs.addresses(), precision=precision, out=out.data_ptr()
            )
            return CpuTicket(ticket, out, hidden.dtype, pairs.tensors)
        matrices = _Lora(self.spec, lora)
        ticket = self._layer.submit_lora(
            **pairs.addresses(), precision=precision, out=out.data_ptr(), lora=matrices.addresses()
        )
        return CpuTicket(ticket, out, hidden.dtype, (*pairs.tensors, *matrices.tensors.values()))

    def backward(
        self,
        hidden: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        grad_out: torch.Tensor,
        lora: LoraWeights | None = None,
    ) -> ExpertGradients:
        """See ``ExpertKernel.backward``.

        Gradients that meet weights are rounded to bf16, and so are dequantised weights, unless the
        precision is float32; sums are in float32. Quantised activations (the precision int8) are
        differentiated as if they were not rounded.
        """
        pairs = self._pairs(hidden, expert_ids, weights)
        check_grad_out(hidden, grad_out)
        matrices = None if lora is None else _Lora(self.spec, lora, with_gradients=True)
        grad = grad_out.detach().to(pairs.hidden.dtype).contiguous()
        grad_hidden = torch.empty_like(pairs.hidden)
        grad_weights = torch.empty_like(pairs.weights)
        self._layer.submit_backward(
            **pairs.addresses(),
            precision=self._training_precision(pairs.hidden.dtype),
            lora=None if matrices is None else matrices.addresses(),
            grad_out=grad.data_ptr(),
            grad_hidden=grad_hidden.data_ptr(),
            grad_weights=grad_weights.data_ptr(),
        ).wait()
        return ExpertGradients(
            hidden=grad_hidden.to(hidden.dtype),
            weights=grad_weights.to(weights.dtype),
            lora=None if matrices is None else matrices.gradients(),
        )

    def _pairs(
        self, hidden: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor
    ) -> _Pairs:
        """Check the arguments and bring them into the form that csrc/ reads."""
        if hidden.dim() != 2 or hidden.shape[1] != self.spec.hidden_size:
            msg = f"hidden must be [tokens, {self.spec.hidden_size}], got {tuple(hidden.shape)}"
            raise ValueError(msg)
        if hidden.dtype not in DTYPES or hidden.device.type != "cpu":
            kind = f"{hidden.dtype} on {hidden.device}"
            msg = f"hidden must be float32, bfloat16 or float16 on the cpu, got {kind}"
            raise ValueError(msg)
        tokens = hidden.shape[0]
        if expert_ids.dim() != 2 or expert_ids.shape[0] != tokens or expert_ids.shape[1] < 1:
            msg = f"expert_ids must be [{tokens}, k >= 1], got {tuple(expert_ids.shape)}"
            raise ValueError(msg)
        if weights.shape != expert_ids.shape:
            msg = f"weights must be {tuple(expert_ids.shape)}, got {tuple(weights.shape)}"
            raise ValueError(msg)
        if expert_ids.dtype not in _ID_DTYPES or expert_ids.device.type != "cpu":
            kind = f"{expert_ids.dtype} on {expert_ids.device}"
            msg = f"expert_ids must be integers on the cpu, got {kind}"
            raise ValueError(msg)
        if not weights.dtype.is_floating_point or weights.device.type != "cpu":
            kind = f"{weights.dtype} on {weights.device}"
            msg = f"weights must be floating point on the cpu, got {kind}"
            raise ValueError(msg)
        wanted = torch.float32 if hidden.dtype is torch.float16 else hidden.dtype
        return _Pairs(
            hidden.detach().to(wanted).contiguous(),
            expert_ids.to(torch.int64).contiguous(),
            weights.detach().to(torch.float32).contiguous(),
        )

    def _training_precision(self, dtype: torch.dtype) -> _kernels.Precision:
        return training_precision(self._precision, self.weight_format, dtype)

    def _compute_precision(self, dtype: torch.dtype) -> _kernels.Precision:
        return compute_precision(self._precision, self.weight_format, dtype)

    def _check_expert(self, expert: int) -> None:
        if not 0 <= expert < self.spec.num_experts:
            msg = f"expert must be in 0..{self.spec.num_experts - 1}, got {expert}"
            raise ValueError(msg)

    def _check_parts(self, weights: ExpertWeights) -> None:
        gated, bias = self.spec.activation.is_gated, self.spec.has_bias
        wanted = {
            "gate": gated,
            "gate_bias": gated and bias,
            "up_bias": bias,
            "down_bias": bias,
        }
        for name, is_wanted in wanted.items():
            if (getattr(weights, name) is not None) != is_wanted:
                msg = f"{name} is {'missing' if is_wanted else 'not part of this layer'}"
                raise ValueError(msg)

    def _source(
        self, name: str, tensor: torch.Tensor | QuantizedTensor, shape: tuple[int, int]
    ) -> Source:
        return matrix_source(name, tensor, shape, self.weight_format)
