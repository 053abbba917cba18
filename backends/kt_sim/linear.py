"""A packed dense layer in simulated memory, computed in stream order: as ``kt_sim.kernel``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from kt_core.accelerator.packed_linear_kernel import PackedLinearKernel
from kt_core.packed.codec import unpack_linear
from kt_core.quant import ReferenceFormat
from kt_core.types import ActivationPrecision, Format, LinearSpec
from kt_sim.device import launch


class SimLinearKernel(PackedLinearKernel):
    """One packed layer in the memory of a simulated device."""

    def __init__(
        self,
        device: torch.device,
        spec: LinearSpec,
        weight_format: Format,
        precision: ActivationPrecision,
    ) -> None:
        """Take the layer's shape and format, and where it shall lie."""
        super().__init__(device, spec, weight_format, precision)
        self._decoded = _Decoded(spec, weight_format)

    def compute(
        self, rows: torch.Tensor, packed: torch.Tensor, precision: ActivationPrecision
    ) -> torch.Tensor:
        """See ``PackedLinearKernel.compute``."""
        shape = (len(rows), self.spec.out_features)
        out = torch.empty(shape, dtype=rows.dtype, device=self.device)
        product = _Product(self._decoded, precision)
        launch(product.compute, [rows, packed, out], "a dense layer")
        return out


@dataclass(slots=True)
class _Decoded:
    """A layer in float32, kept on the host: decoding takes a hundred times as long as computing.

    What is kept is compared with the device's bytes, all of them, each time it is used.
    """

    spec: LinearSpec
    weight_format: Format
    packed: torch.Tensor | None = None
    numbers: tuple[torch.Tensor, torch.Tensor | None] | None = None

    def of(self, packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return ``[out_features, in_features]`` and the bias."""
        if self.packed is None or self.numbers is None or not torch.equal(self.packed, packed):
            self.packed = packed.clone()
            weight, bias = unpack_linear(self.packed, self.spec, self.weight_format)
            self.numbers = ReferenceFormat(self.weight_format).dequantize(weight).float(), bias
        return self.numbers


@dataclass(frozen=True, slots=True)
class _Product:
    """What a stream's thread computes: all tensors are the device's bytes, seen from the host."""

    decoded: _Decoded
    precision: ActivationPrecision

    def compute(
        self, rows: torch.Tensor, packed: torch.Tensor, out: torch.Tensor
    ) -> tuple[float, float, bool]:
        """See ``kt_sim.device.launch``."""
        is_bf16 = self.precision is ActivationPrecision.BF16
        weight, bias = self.decoded.of(packed)
        x = rows.bfloat16().float() if is_bf16 else rows.float()
        out.copy_(functional.linear(x, weight, bias))
        moved = rows.nbytes + packed.nbytes + out.nbytes
        return float(moved), 2.0 * len(rows) * weight.numel(), is_bf16
