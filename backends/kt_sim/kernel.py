"""Experts of one layer in simulated memory: packed, moved as bytes, computed in stream order.

The computation is what a GPU's kernel would be: it reads ids and a table of addresses where they
lie, on the device, and nobody on the host waits for it. It is written in torch for the CPU, over
the device's bytes, and says what a device would have moved and computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import linear

from kt_core.accelerator.packed_kernel import PackedExpertKernel
from kt_core.moe.activations import activate
from kt_core.packed import ExpertLayout
from kt_core.types import ActivationPrecision, Format, MoeSpec
from kt_sim.decoded import DecodedExpert, DecodedExperts
from kt_sim.device import launch, start


class SimExpertKernel(PackedExpertKernel):
    """Packed experts in the memory of one simulated device."""

    def __init__(
        self,
        device: torch.device,
        spec: MoeSpec,
        weight_format: Format,
        precision: ActivationPrecision,
        decoded: DecodedExperts,
    ) -> None:
        """Take the layer's shape and format, where it shall lie, and what the device remembers."""
        super().__init__(device, spec, weight_format, precision)
        self._decoded = decoded

    def compute(
        self,
        hidden: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        precision: ActivationPrecision,
    ) -> torch.Tensor:
        """See ``PackedExpertKernel.compute``."""
        out = torch.empty(hidden.shape, dtype=hidden.dtype, device=self.device)
        layer = _Layer(self.spec, self.weight_format, precision, self._decoded)
        launch(layer.compute, [hidden, expert_ids, weights, self.table, out], "experts")
        return out


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
