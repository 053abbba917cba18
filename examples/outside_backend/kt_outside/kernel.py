"""The kernel of ``slowpoke``. It imports torch, so kt imports it only when a model is loaded."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from kt_core.interfaces import ExpertKernel, ExpertWeights, QuantizedTensor, Ticket
from kt_core.interfaces.checks import (
    check_expert,
    check_finite,
    check_pairs,
    check_resident,
    check_weights,
)
from kt_core.moe.activations import activate
from kt_core.quant import ReferenceFormat
from kt_core.types import Element, Format, MoeSpec


# --8<-- [start:ticket]
class DoneTicket(Ticket):
    """Work that was done when it was submitted. A device with a queue waits for it here."""

    def __init__(self, out: torch.Tensor) -> None:
        """Take the result."""
        self._out = out

    def wait(self) -> torch.Tensor:
        """Return the result."""
        return self._out


# --8<-- [end:ticket]


# --8<-- [start:kernel]
class SlowpokeKernel(ExpertKernel):
    """Keeps the quantised tensors, and dequantises an expert each time it is asked."""

    def __init__(self, spec: MoeSpec, weight_format: Format) -> None:
        """Take the layer's shape and format. A device with its own memory reserves it here."""
        self.spec = spec
        self.weight_format = weight_format
        self._format = ReferenceFormat(weight_format)
        self._experts: dict[int, ExpertWeights] = {}

    @property
    def bytes_per_expert(self) -> int:
        """Return what ``expert_bytes`` of the device returned."""
        return stored_bytes(self.spec, self.weight_format)

    def load(self, expert: int, weights: ExpertWeights) -> None:
        """Check, quantise and keep one expert. Several threads load several experts at once."""
        check_expert(self.spec, expert)
        check_weights(self.spec, self.weight_format, weights)
        check_finite(weights)
        self._experts[expert] = ExpertWeights(
            up=self._store(weights.up),
            down=self._store(weights.down),
            gate=None if weights.gate is None else self._store(weights.gate),
            up_bias=_float32(weights.up_bias),
            down_bias=_float32(weights.down_bias),
            gate_bias=_float32(weights.gate_bias),
        )

    def unload(self, expert: int) -> None:
        """Forget one expert."""
        self._experts.pop(expert, None)

    def resident(self) -> frozenset[int]:
        """Return what is loaded."""
        return frozenset(self._experts)

    def submit(
        self, hidden: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor
    ) -> Ticket:
        """Compute ``out[t] = sum_k weights[t, k] * expert[expert_ids[t, k]](hidden[t])``."""
        check_pairs(self.spec, hidden, expert_ids, weights)
        check_resident(self.spec, self._experts, expert_ids)
        out = torch.zeros(hidden.shape)
        for expert in sorted(set(expert_ids.flatten().tolist()) - {-1}):  # -1: somebody else's
            token, k = torch.where(expert_ids == expert)
            value = self._compute(self._experts[expert], hidden[token].float())
            out.index_add_(0, token, value * weights[token, k, None].float())
        return DoneTicket(out.to(hidden.dtype))

    def _compute(self, weights: ExpertWeights, x: torch.Tensor) -> torch.Tensor:
        up = linear(x, self._dense(weights.up), weights.up_bias)
        if weights.gate is None:
            inner = activate(self.spec.activation, up)
        else:
            gate = linear(x, self._dense(weights.gate), weights.gate_bias)
            inner = activate(self.spec.activation, gate, up)
        return linear(inner, self._dense(weights.down), weights.down_bias)

    def _store(self, weight: torch.Tensor | QuantizedTensor) -> QuantizedTensor:
        """Quantise what is dense; the caller's tensors are his own, so nothing of them is kept."""
        if isinstance(weight, torch.Tensor):
            weight = self._format.quantize(weight)
        parts = {
            "scales": weight.scales,
            "zero_points": weight.zero_points,
            "minimums": weight.minimums,
            "output_scales": weight.output_scales,
        }
        return QuantizedTensor(
            weight_format=weight.weight_format,
            codes=_copy(weight.codes),
            **{name: _copy(part) for name, part in parts.items() if part is not None},
        )

    def _dense(self, weight: torch.Tensor | QuantizedTensor) -> torch.Tensor:
        assert isinstance(weight, QuantizedTensor)
        return self._format.dequantize(weight)


# --8<-- [end:kernel]


# --8<-- [start:bytes]
def stored_bytes(spec: MoeSpec, weight_format: Format) -> int:
    """Return the bytes of one expert as ``SlowpokeKernel`` keeps it: a code takes whole bytes."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    shapes = [(inner, hidden), (hidden, inner)]
    if spec.activation.is_gated:
        shapes.append((inner, hidden))
    code_bytes = 2 if weight_format.element is Element.BF16 else 1
    group_bytes = 0 if weight_format.scale is None else 4
    group_bytes += 1 if weight_format.has_zero_point else 0
    group_bytes += 4 if weight_format.has_minimum else 0
    total = 0
    for outputs, inputs in shapes:
        total += outputs * (inputs * code_bytes + weight_format.num_groups(inputs) * group_bytes)
        total += outputs * 4 if spec.has_bias else 0
        total += outputs * 4 if weight_format.has_output_scale else 0
    return total


# --8<-- [end:bytes]


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy whose rows lie one after the other, whatever the strides of ``tensor``."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _float32(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.to(torch.float32, copy=True)
