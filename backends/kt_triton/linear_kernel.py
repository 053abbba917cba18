"""A packed dense layer on a GPU, computed by Triton from its packed bytes."""

from __future__ import annotations

import torch

from kt_core.accelerator.packed_linear_kernel import PackedLinearKernel
from kt_core.types import ActivationPrecision, Format, LinearSpec
from kt_triton.launch import compute_dense
from kt_triton.layer import DenseLayer


class TritonLinearKernel(PackedLinearKernel):
    """See ``PackedLinearKernel``; every format, ``BF16`` and ``FLOAT32``.

    Kernels are compiled when a shape, or a number of rows of another kind, is first met: call once
    before a graph is captured. A graph holds the layer's address: capture anew after a load.
    """

    def __init__(
        self,
        device: torch.device,
        spec: LinearSpec,
        weight_format: Format,
        precision: ActivationPrecision = ActivationPrecision.AUTO,
    ) -> None:
        """Take the layer's shape and format, and where it shall lie."""
        super().__init__(device, spec, weight_format, precision)
        self._layer = DenseLayer.of(spec, weight_format)

    def compute(
        self, rows: torch.Tensor, packed: torch.Tensor, precision: ActivationPrecision
    ) -> torch.Tensor:
        """See ``PackedLinearKernel.compute``. The sums' order is fixed: the same bits each time."""
        out = rows.new_empty((len(rows), self.spec.out_features))
        if precision is ActivationPrecision.BF16:
            rows = rows.to(torch.bfloat16)
        self.launch(self._layer, rows, packed, out)
        return out

    def launch(
        self, layer: DenseLayer, x: torch.Tensor, packed: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Start the kernel that suits; tests override this to choose."""
        compute_dense(layer, x, packed, out)
