"""The experts of one layer on a GPU, computed by Triton from their packed bytes."""

from __future__ import annotations

import torch

from kt_core.accelerator.packed_kernel import PackedExpertKernel
from kt_core.types import ActivationPrecision, Format, MoeSpec
from kt_triton.launch import Call, compute
from kt_triton.layer import Layer


class TritonExpertKernel(PackedExpertKernel):
    """See ``PackedExpertKernel``; every format and activation, ``BF16`` and ``FLOAT32``.

    Kernels are compiled when a shape, or a number of tokens of another kind, is first met: call
    once before a graph is captured.
    """

    def __init__(
        self,
        device: torch.device,
        spec: MoeSpec,
        weight_format: Format,
        precision: ActivationPrecision = ActivationPrecision.AUTO,
    ) -> None:
        """Take the layer."""
        super().__init__(device, spec, weight_format, precision)
        self._layer = Layer.of(spec, weight_format)

    def compute(
        self,
        hidden: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        precision: ActivationPrecision,
    ) -> torch.Tensor:
        """See ``PackedExpertKernel.compute``. The sums' order is fixed: the same bits each time."""
        out = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        if precision is ActivationPrecision.BF16:
            hidden = hidden.to(torch.bfloat16)
        ids, factors = expert_ids.contiguous(), weights.contiguous()
        call = Call(hidden.contiguous(), ids, factors, self.table, out)
        self.launch(self._layer, call, precision)
        return out

    def launch(self, layer: Layer, call: Call, precision: ActivationPrecision) -> None:
        """Start the kernels that suit; tests override this to choose."""
        compute(layer, call, precision)
