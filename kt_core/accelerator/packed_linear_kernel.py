"""A packed dense layer on a device of torch's: its bytes in one tensor there."""

from __future__ import annotations

from abc import abstractmethod

import torch

from kt_core.accelerator.precision import named_precision
from kt_core.interfaces import LinearKernel, QuantizedTensor
from kt_core.interfaces.checks import check_linear, check_linear_finite, check_rows
from kt_core.packed import LinearLayout
from kt_core.packed.codec import check_packed, pack_linear
from kt_core.quant import ReferenceFormat
from kt_core.types import ActivationPrecision, Format, LinearSpec


class PackedLinearKernel(LinearKernel):
    """Keeps the packed layer on the device; a subclass computes with it.

    As everywhere in torch, work is put into the current stream: whoever loads in one stream and
    computes in another makes one wait for the other.
    """

    moves_packed = True

    def __init__(
        self,
        device: torch.device,
        spec: LinearSpec,
        weight_format: Format,
        precision: ActivationPrecision = ActivationPrecision.AUTO,
    ) -> None:
        """Take the layer; memory is taken when it is loaded."""
        self.spec = spec
        self.weight_format = weight_format
        self.device = device
        self._precision = precision
        self._layout = LinearLayout.of(spec, weight_format)
        self._packed: torch.Tensor | None = None

    @abstractmethod
    def compute(
        self, rows: torch.Tensor, packed: torch.Tensor, precision: ActivationPrecision
    ) -> torch.Tensor:
        """Put the computation into the current stream and return what it will write.

        Args:
            rows: ``[rows, in_features]``, contiguous, on the device; at least one.
            packed: ``[bytes]`` uint8, the layer, on the device.
            precision: Never ``AUTO``.

        Returns:
            ``[rows, out_features]`` of the type of ``rows``.
        """

    @property
    def size_bytes(self) -> int:
        """See ``LinearKernel.size_bytes``."""
        return self._layout.size_bytes

    @property
    def is_loaded(self) -> bool:
        """See ``LinearKernel.is_loaded``."""
        return self._packed is not None

    def load(
        self, weight: torch.Tensor | QuantizedTensor, bias: torch.Tensor | None = None
    ) -> None:
        """See ``LinearKernel.load``. Packed where the weights lie, in torch; then copied.

        To load large layers fast, pack them with a backend that has kernels for it, and copy.
        """
        self._packed = None
        check_linear(self.spec, self.weight_format, weight, bias)
        check_linear_finite(weight, bias)
        if isinstance(weight, torch.Tensor):
            weight = ReferenceFormat(self.weight_format).quantize(weight)
        self.load_packed(pack_linear(weight, bias, self.spec, self.weight_format))

    def packed(self) -> torch.Tensor:
        """See ``LinearKernel.packed``; a view."""
        if self._packed is None:
            msg = "the dense layer has no weights: load it first"
            raise ValueError(msg)
        return self._packed

    def load_packed(self, packed: torch.Tensor) -> None:
        """See ``LinearKernel.load_packed``."""
        check_packed(packed, self._layout)
        held = torch.empty(self._layout.size_bytes, dtype=torch.uint8, device=self.device)
        self._packed = held.copy_(packed, non_blocking=True)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """See ``LinearKernel.apply``; does not wait for the device."""
        if x.requires_grad and torch.is_grad_enabled():
            msg = "apply computes no gradient: use torch.no_grad()"
            raise RuntimeError(msg)
        check_rows("x", x, self.spec.in_features)
        if x.device != self.device:
            msg = f"x must be on {self.device}, got {x.device}"
            raise ValueError(msg)
        packed = self.packed()
        rows = x.detach().reshape(-1, self.spec.in_features).contiguous()
        if len(rows):
            out = self.compute(rows, packed, named_precision(self._precision, x.dtype))
        else:
            out = rows.new_empty((0, self.spec.out_features))
        return out.view(*x.shape[:-1], self.spec.out_features)
