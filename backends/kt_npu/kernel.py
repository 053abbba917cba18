"""The experts of one layer on an NPU: pairs sorted by expert, three grouped products."""

from __future__ import annotations

import torch

from kt_core.accelerator.converted_kernel import (
    ConvertedExpert,
    ConvertedExpertKernel,
    converted_bytes,
)
from kt_core.interfaces import QuantizedTensor
from kt_core.moe.activations import activate
from kt_npu.operators import NpuMatrix, grouped_product, pack_int4

GROUP_BYTES = 4
"""Scale and offset, bfloat16."""


class NpuExpertKernel(ConvertedExpertKernel):
    """bf16, and int4 in groups with bfloat16 scales and without minimums."""

    @property
    def bytes_per_expert(self) -> int:
        """See ``ExpertKernel.bytes_per_expert``."""
        return converted_bytes(self.spec, self.weight_format, GROUP_BYTES)

    def convert(self, matrix: QuantizedTensor) -> NpuMatrix:
        """See ``ConvertedExpertKernel.convert``."""
        if matrix.scales is None:
            return NpuMatrix(matrix.codes.T.contiguous().to(self.device))
        codes, zeros = matrix.codes.to(torch.int32), matrix.zero_points
        offset = torch.zeros(matrix.scales.shape)
        if zeros is not None:  # codes 0..15 become -8..7
            codes, offset = codes - 8, 8.0 - zeros.float()
        return NpuMatrix(
            weight=pack_int4(codes.T.contiguous().to(self.device)),
            scale=matrix.scales.T.to(torch.bfloat16).contiguous().to(self.device),
            offset=offset.T.to(torch.bfloat16).contiguous().to(self.device),
        )

    def compute(
        self,
        experts: list[ConvertedExpert],
        hidden: torch.Tensor,
        slots: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """See ``ConvertedExpertKernel.compute``. Adds a token's experts in ascending order of k."""
        tokens, top_k = slots.shape
        slot, order = torch.sort(slots.flatten(), stable=True)
        every = torch.arange(len(experts), device=hidden.device)
        ends = torch.searchsorted(slot, every, right=True)

        def project(x: torch.Tensor, name: str) -> torch.Tensor:
            product = grouped_product(x, [getattr(e, name) for e in experts], ends).float()
            if not self.spec.has_bias:
                return product
            biases = torch.stack([getattr(e, f"{name}_bias") for e in experts])
            return product + biases[slot.clamp(max=len(experts) - 1)]

        x = hidden[order // top_k]
        up = project(x, "up")
        gate = project(x, "gate") if self.spec.activation.is_gated else up
        inner = activate(self.spec.activation, gate, up).to(torch.bfloat16)
        # Behind the last run is anything, and 0 times it may be no number.
        is_ours = (slot < len(experts))[:, None]
        values = project(inner, "down").where(is_ours, 0.0)
        by_pair = torch.empty_like(values).index_copy_(0, order, values)
        return (by_pair.view(tokens, top_k, -1) * weights[..., None]).sum(dim=1)
