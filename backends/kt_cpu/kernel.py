"""Experts of one layer, packed in host memory and computed by csrc/."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias, TypedDict

import torch

from kt_core.interfaces import (
    ExpertGradients,
    ExpertKernel,
    ExpertWeights,
    LoraWeights,
    QuantizedTensor,
    Ticket,
    stored_parts,
)
from kt_core.interfaces.checks import check_grad_out, check_lora
from kt_core.types import (
    ELEMENT_BITS,
    ActivationPrecision,
    Element,
    Format,
    MoeSpec,
    ScaleType,
)
from kt_cpu import _kernels

_DTYPES = {
    torch.float32: _kernels.DType.float32,
    torch.bfloat16: _kernels.DType.bfloat16,
    torch.float16: _kernels.DType.float16,
}

_SCALE_TYPES = {
    ScaleType.BF16: torch.bfloat16,
    ScaleType.FLOAT16: torch.float16,
    ScaleType.E8M0: torch.float8_e8m0fnu,
    ScaleType.E4M3: torch.float8_e4m3fn,
}

_PROJECTIONS = ("gate", "up", "down")
_ID_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

# Address, type, strides of rows and columns in elements, addresses of scales, zero points, minimums
# and scales of outputs.
_Source: TypeAlias = tuple[int, _kernels.DType, int, int, int, int, int, int]


def layer_spec(spec: MoeSpec, weight_format: Format) -> _kernels.LayerSpec:
    """Return what csrc/ must know about a layer."""
    activation = spec.activation
    scale = weight_format.scale.value if weight_format.scale else "none"
    offset = _kernels.Offset.none
    if weight_format.has_zero_point:
        offset = _kernels.Offset.zero_point
    elif weight_format.has_minimum:
        offset = _kernels.Offset.minimum
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
        element=getattr(_kernels.Element, weight_format.element.value),
        scale=getattr(_kernels.ScaleType, scale),
        offset=offset,
        group=weight_format.group_size or 0,
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
            "type": _DTYPES[self.hidden.dtype],
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
                _check_on_cpu(f"{projection}_{side}", matrix)
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
            _DTYPES[self.tensors[a].dtype],
            self.tensors[a].shape[1],
            _address(self._grads.get(a)),
            _address(self._grads.get(b)),
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


class CpuExpertKernel(ExpertKernel):
    """See ``ExpertKernel``; the precision ``auto`` follows the type of the hidden states."""

    trains = True

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
            _bias("gate_bias", weights.gate_bias, inner),
            _bias("up_bias", weights.up_bias, inner),
            _bias("down_bias", weights.down_bias, hidden),
        ]
        bad = self._layer.load(
            expert,
            gate=gate and gate[0],
            up=up[0],
            down=down[0],
            gate_bias=_address(biases[0]),
            up_bias=_address(biases[1]),
            down_bias=_address(biases[2]),
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

    def packed_bytes(self, expert: int) -> bytes:
        """Return a copy of the packed expert, laid out as csrc/format/layout.hpp draws it."""
        self._check_expert(expert)
        return self._layer.packed_bytes(expert)

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
        if hidden.dtype not in _DTYPES or hidden.device.type != "cpu":
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
        """What a gradient is taken of: where it is our choice, activations are not quantised."""
        if self._precision is not ActivationPrecision.AUTO:
            return self._compute_precision(dtype)
        wide = dtype is torch.float32
        return _kernels.Precision.float32 if wide else _kernels.Precision.bf16

    def _compute_precision(self, dtype: torch.dtype) -> _kernels.Precision:
        if self._precision is ActivationPrecision.AUTO:
            if self.weight_format.element.is_integer:
                return _kernels.Precision.int8
            is_exact = self.weight_format.element is Element.BF16 and dtype is torch.float32
            return _kernels.Precision.float32 if is_exact else _kernels.Precision.bf16
        named: _kernels.Precision = getattr(_kernels.Precision, self._precision.value)
        return named

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
    ) -> tuple[_Source, tuple[torch.Tensor, ...]]:
        """Where csrc/ finds a matrix, and the tensors that must stay alive meanwhile."""
        if isinstance(tensor, QuantizedTensor):
            return self._quantized_source(name, tensor, shape)
        if tuple(tensor.shape) != shape:
            msg = f"{name} must be {list(shape)}, got {list(tensor.shape)}"
            raise ValueError(msg)
        if tensor.dtype not in _DTYPES:
            msg = f"{name} must be float32, bfloat16 or float16, got {tensor.dtype}"
            raise ValueError(msg)
        _check_on_cpu(name, tensor)
        rows, cols = tensor.stride()
        source = (tensor.data_ptr(), _DTYPES[tensor.dtype], rows, cols, 0, 0, 0, 0)
        return source, (tensor,)

    def _quantized_source(
        self, name: str, tensor: QuantizedTensor, shape: tuple[int, int]
    ) -> tuple[_Source, tuple[torch.Tensor, ...]]:
        if tensor.weight_format != self.weight_format:
            msg = f"{name} is {tensor.weight_format.name!r}, this layer {self.weight_format.name!r}"
            raise ValueError(msg)
        if tensor.scales is None:
            return self._source(name, tensor.codes, shape)
        addresses: dict[str, int] = {}
        kept = []
        for part, want in stored_parts(self.weight_format, *shape).items():
            value: torch.Tensor | None = getattr(tensor, part)
            got = None if value is None else (tuple(value.shape), value.dtype)
            if got != want:
                msg = f"{part} of {name} must be {_drawn(want)}, got {_drawn(got)}"
                raise ValueError(msg)
            if value is None:
                addresses[part] = 0
                continue
            _check_on_cpu(f"{part} of {name}", value)
            _check_range(f"{part} of {name}", part, value, self.weight_format)
            kept.append(value.contiguous())
            addresses[part] = kept[-1].data_ptr()
        source = (
            addresses["codes"], _kernels.DType.float32, 0, 0,
            addresses["scales"], addresses["zero_points"], addresses["minimums"],
            addresses["output_scales"],
        )  # fmt: skip
        return source, tuple(kept)


def _bias(name: str, bias: torch.Tensor | None, size: int) -> torch.Tensor | None:
    if bias is None:
        return None
    if tuple(bias.shape) != (size,):
        msg = f"{name} must be [{size}], got {list(bias.shape)}"
        raise ValueError(msg)
    _check_on_cpu(name, bias)
    stored = bias.to(torch.float32).contiguous()
    if not torch.isfinite(stored).all():
        msg = f"{name} holds a NaN or an infinity"
        raise ValueError(msg)
    return stored


def _check_on_cpu(name: str, tensor: torch.Tensor) -> None:
    if tensor.device.type != "cpu":
        msg = f"{name} must be on the cpu, got {tensor.device}"
        raise ValueError(msg)


def _drawn(part: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return "absent" if part is None else f"{list(part[0])} {part[1]}"


def _check_range(name: str, part: str, values: torch.Tensor, weight_format: Format) -> None:
    """Refuse what its packed form cannot hold: it would become another number."""
    if part in {"codes", "zero_points"} and ELEMENT_BITS[weight_format.element] == 4:
        low, high = (-8, 7) if values.dtype is torch.int8 else (0, 15)
        # GPTQ stores zero points less one: 16 is what its 15 stands for.
        high += part == "zero_points"
        for value in values.aminmax():
            if not low <= int(value) <= high:
                msg = f"{name} must be in {low}..{high}, got {int(value)}"
                raise ValueError(msg)
    stored_type = _SCALE_TYPES.get(weight_format.scale or ScaleType.FLOAT32)
    if part in {"scales", "minimums"} and stored_type is not None:
        stored = values.to(stored_type).float()
        if weight_format.scale is ScaleType.E4M3:
            stored = stored.where(stored >= 0, float("nan"))
        # What is infinite, or becomes it, is refused by csrc/, in the words for NaN.
        is_checked = torch.isfinite(values) & ~torch.isinf(stored)
        if not torch.equal(stored[is_checked], values[is_checked]):
            msg = f"{name} must be numbers of the type {weight_format.scale}"
            raise ValueError(msg)


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
