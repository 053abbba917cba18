"""Experts of one layer in simulated memory: packed, moved as bytes, computed in stream order.

The computation is what a GPU's kernel would be: it reads ids and a table of addresses where they
lie, on the device, and nobody on the host waits for it. It is written in torch for the CPU, over
the device's bytes, and says what a device would have moved and computed.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import linear

from kt_core.interfaces import ExpertKernel, ExpertWeights, QuantizedTensor, Ticket
from kt_core.interfaces.checks import check_expert, check_finite, check_pairs, check_weights
from kt_core.moe.activations import activate
from kt_core.packed import ExpertLayout
from kt_core.packed.codec import check_packed, pack
from kt_core.quant import ReferenceFormat
from kt_core.types import ActivationPrecision, Format, MoeSpec
from kt_sim.decoded import DecodedExpert, DecodedExperts
from kt_sim.device import launch, start


class SimTicket(Ticket):
    """Work in a stream. The result may be used by whatever is put into that stream later."""

    def __init__(self, out: torch.Tensor) -> None:
        """Take the result that will be there."""
        self._out = out

    def wait(self) -> torch.Tensor:
        """Return the result; does not block."""
        return self._out


class SimExpertKernel(ExpertKernel):
    """Packed experts in the memory of one simulated device.

    An expert is resident for what is put into a stream after it was loaded in that stream; who
    loads in one stream and computes in another makes the other wait, as everywhere in torch.
    """

    moves_packed = True

    def __init__(
        self,
        device: str,
        spec: MoeSpec,
        weight_format: Format,
        precision: ActivationPrecision,
        decoded: DecodedExperts,
    ) -> None:
        """Take the layer's shape and format, where it shall lie, and what the device remembers."""
        self.spec = spec
        self.weight_format = weight_format
        self._device = torch.device(device)
        self._precision = precision
        self._decoded = decoded
        self._layout = ExpertLayout.of(spec, weight_format)
        self._format = ReferenceFormat(weight_format)
        self._packed: dict[int, torch.Tensor] = {}
        # Where each expert's bytes lie, 0 for none: what the kernel reads, changed in stream order,
        # and outside of inference mode too, wherever the kernel was made.
        with torch.inference_mode(mode=False):
            self._table = torch.zeros(spec.num_experts, dtype=torch.int64, device=self._device)
        self._lock = threading.Lock()  # of the two together

    @property
    def bytes_per_expert(self) -> int:
        """See ``ExpertKernel.bytes_per_expert``."""
        return self._layout.size_bytes

    def precision_for(self, hidden_type: torch.dtype) -> ActivationPrecision:
        """See ``ExpertKernel.precision_for``."""
        if self._precision is not ActivationPrecision.AUTO:
            return self._precision
        is_bf16 = hidden_type is torch.bfloat16
        return ActivationPrecision.BF16 if is_bf16 else ActivationPrecision.FLOAT32

    def load(self, expert: int, weights: ExpertWeights) -> None:
        """See ``ExpertKernel.load``."""
        check_expert(self.spec, expert)
        check_weights(self.spec, self.weight_format, weights)
        check_finite(weights)
        quantized = replace(
            weights,
            gate=None if weights.gate is None else self._quantized(weights.gate),
            up=self._quantized(weights.up),
            down=self._quantized(weights.down),
        )
        self._put(expert, pack(quantized, self.spec, self.weight_format))

    def _quantized(self, weight: torch.Tensor | QuantizedTensor) -> QuantizedTensor:
        return weight if isinstance(weight, QuantizedTensor) else self._format.quantize(weight)

    def packed(self, expert: int) -> torch.Tensor:
        """See ``ExpertKernel.packed``; a view."""
        try:
            return self._packed[expert]
        except KeyError:
            msg = f"expert {expert} is not resident"
            raise ValueError(msg) from None

    def load_packed(self, expert: int, packed: torch.Tensor) -> None:
        """See ``ExpertKernel.load_packed``."""
        check_expert(self.spec, expert)
        check_packed(packed, self._layout)
        self._put(expert, packed)

    def _put(self, expert: int, packed: torch.Tensor) -> None:
        """Copy the bytes to memory of their own, and point to them: both in the current stream."""
        held = torch.empty(self._layout.size_bytes, dtype=torch.uint8, device=self._device)
        # Pageable memory is copied before this returns, whatever is asked for.
        held.copy_(packed, non_blocking=True)
        with self._lock:
            self._release(expert)
            self._packed[expert] = held
            self._table[expert].fill_(held.data_ptr())

    def unload(self, expert: int) -> None:
        """See ``ExpertKernel.unload``; in the order of the current stream."""
        with self._lock:
            if self._release(expert):
                self._table[expert].fill_(0)

    def _release(self, expert: int) -> bool:
        held = self._packed.pop(expert, None)
        if held is None:
            return False
        # What was put into the current stream may still read it, and it may be of another stream.
        held.record_stream(torch.accelerator.current_stream(self._device))
        return True

    def resident(self) -> frozenset[int]:
        """See ``ExpertKernel.resident``."""
        return frozenset(self._packed)

    def submit(
        self, hidden: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor
    ) -> Ticket:
        """See ``ExpertKernel.submit``."""
        check_pairs(self.spec, hidden, expert_ids, weights)
        for name, tensor in (("hidden", hidden), ("expert_ids", expert_ids), ("weights", weights)):
            if tensor.device != self._device:
                msg = f"{name} must be on {self._device}, got {tensor.device}"
                raise ValueError(msg)
        out = torch.empty(hidden.shape, dtype=hidden.dtype, device=self._device)
        precision = self.precision_for(hidden.dtype)
        layer = _Layer(self.spec, self.weight_format, precision, self._decoded)
        launch(layer.compute, [hidden, expert_ids, weights, self._table, out], "experts")
        return SimTicket(out)


@dataclass(frozen=True, slots=True)
class _Layer:
    """What a stream's thread computes: all tensors are the device's bytes, seen from the host."""

    spec: MoeSpec
    weight_format: Format
    precision: ActivationPrecision
    decoded: DecodedExperts

    def compute(
        self,
        hidden: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        table: torch.Tensor,
        out: torch.Tensor,
    ) -> tuple[float, float, bool]:
        """See ``kt_sim.device.launch``.

        Each active expert's packed bytes are moved once, and so is each token, there and back.
        """
        spec = self.spec
        packed_bytes = ExpertLayout.of(spec, self.weight_format).size_bytes
        ids = expert_ids.to(torch.int64)
        addresses = table.tolist()
        summed = torch.zeros(hidden.shape, dtype=torch.float32)
        moved, pairs = sum(t.nbytes for t in (hidden, expert_ids, weights, out)), 0
        for expert in sorted(set(ids.flatten().tolist())):
            if not 0 <= expert < spec.num_experts or addresses[expert] == 0:
                continue  # somebody else's, or nobody's
            packed = start().bytes_at(addresses[expert], packed_bytes)
            numbers = self.decoded.get(addresses[expert], packed, spec, self.weight_format)
            token, k = torch.where(ids == expert)
            value = self._expert(numbers, hidden[token])
            summed.index_add_(0, token, value * weights[token, k, None].float())
            moved += packed_bytes
            pairs += len(token)
        out.copy_(summed)
        flops = 2.0 * pairs * spec.weights_per_expert
        return float(moved), flops, self.precision is ActivationPrecision.BF16

    def _expert(self, numbers: DecodedExpert, hidden: torch.Tensor) -> torch.Tensor:
        """Return ``[tokens, hidden]`` float32 for ``[tokens, hidden]`` of any type."""
        x = self._rounded(hidden.float())
        up = linear(x, numbers.up, numbers.up_bias)
        if numbers.gate is None:
            inner = activate(self.spec.activation, up)
        else:
            gate = linear(x, numbers.gate, numbers.gate_bias)
            inner = activate(self.spec.activation, gate, up)
        return linear(self._rounded(inner), numbers.down, numbers.down_bias)

    def _rounded(self, x: torch.Tensor) -> torch.Tensor:
        return x.bfloat16().float() if self.precision is ActivationPrecision.BF16 else x
