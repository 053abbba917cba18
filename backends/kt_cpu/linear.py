"""One dense layer, packed in host memory and computed by csrc/dense/."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch

from kt_core.interfaces import LinearKernel, QuantizedTensor
from kt_core.packed import LinearLayout
from kt_core.packed.codec import check_packed
from kt_core.types import ActivationPrecision, Format, LinearSpec
from kt_cpu import _kernels
from kt_cpu.sources import (
    DTYPES,
    address,
    bias_source,
    check_on_cpu,
    compute_precision,
    matrix_source,
    stored,
    training_precision,
)

# Address, type, precision, rows, elements from row to row, address of the result.
_Call: TypeAlias = Callable[[int, _kernels.DType, _kernels.Precision, int, int, int], None]
_Modes: TypeAlias = dict[torch.dtype, tuple[_kernels.DType, _kernels.Precision]]


def linear_spec(spec: LinearSpec, weight_format: Format) -> _kernels.LinearSpec:
    """Return what csrc/ must know about a layer."""
    return _kernels.LinearSpec(
        in_features=spec.in_features,
        out_features=spec.out_features,
        has_bias=spec.has_bias,
        **stored(weight_format),
    )


class CpuLinearKernel(LinearKernel):
    """See ``LinearKernel``; the precision ``auto`` is chosen as for experts."""

    trains = True
    moves_packed = True

    def __init__(
        self,
        device: _kernels.Device,
        spec: LinearSpec,
        weight_format: Format,
        precision: ActivationPrecision,
    ) -> None:
        """Reserve address space; memory is taken by ``load``."""
        self.spec = spec
        self.weight_format = weight_format
        self._spec = linear_spec(spec, weight_format)
        self._layer = _kernels.LinearLayer(device, self._spec)
        native = (torch.float32, torch.bfloat16)
        self._modes: _Modes = {
            dtype: (DTYPES[dtype], compute_precision(precision, weight_format, dtype))
            for dtype in native
        }
        self._training_modes: _Modes = {
            dtype: (DTYPES[dtype], training_precision(precision, weight_format, dtype))
            for dtype in native
        }

    @property
    def size_bytes(self) -> int:
        """See ``LinearKernel.size_bytes``."""
        return self._spec.size_bytes

    @property
    def is_loaded(self) -> bool:
        """See ``LinearKernel.is_loaded``."""
        return self._layer.is_loaded

    def load(
        self, weight: torch.Tensor | QuantizedTensor, bias: torch.Tensor | None = None
    ) -> None:
        """See ``LinearKernel.load``. Releases the GIL while it packs."""
        spec = self.spec
        if (bias is not None) != spec.has_bias:
            msg = f"bias is {'missing' if spec.has_bias else 'not part of this layer'}"
            raise ValueError(msg)
        shape = (spec.out_features, spec.in_features)
        source = matrix_source("weight", weight, shape, self.weight_format)
        stored_bias = bias_source("bias", bias, spec.out_features)
        if not self._layer.load(source.addresses, address(stored_bias)):
            msg = "weight holds a NaN or an infinity"
            raise ValueError(msg)

    def packed(self) -> torch.Tensor:
        """See ``LinearKernel.packed``; a copy."""
        if not self.is_loaded:
            msg = "the dense layer has no weights: load it first"
            raise ValueError(msg)
        return torch.frombuffer(bytearray(self._layer.packed_bytes()), dtype=torch.uint8)

    def load_packed(self, packed: torch.Tensor) -> None:
        """See ``LinearKernel.load_packed``."""
        check_packed(packed, LinearLayout.of(self.spec, self.weight_format))
        self.map_packed(packed.clone())

    def map_packed(self, packed: torch.Tensor) -> bool:
        """See ``LinearKernel.map_packed``."""
        check_on_cpu("packed", packed)
        check_packed(packed, LinearLayout.of(self.spec, self.weight_format))
        self._layer.map_packed(packed.data_ptr(), packed)
        return True

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """See ``LinearKernel.apply``. float16 is computed as float32."""
        if x.requires_grad and torch.is_grad_enabled():
            msg = (
                "apply computes no gradient: use torch.no_grad(), or apply_training and grad_input"
            )
            raise RuntimeError(msg)
        return self._multiply(self._layer.apply, self._modes, x)

    def apply_training(self, x: torch.Tensor) -> torch.Tensor:
        """See ``LinearKernel.apply_training``. The precision ``auto`` is that of the activations.

        That is, float32 for float32 and float16, bf16 for bfloat16.
        """
        return self._multiply(self._layer.apply, self._training_modes, x)

    def grad_input(self, grad_out: torch.Tensor) -> torch.Tensor:
        """See ``LinearKernel.grad_input``.

        Gradients and dequantised weights are rounded to bf16, unless the precision is float32; sums
        are in float32. Quantised activations (the precision int8) are differentiated as if they
        were not rounded.
        """
        return self._multiply(
            self._layer.grad_input, self._training_modes, grad_out, is_backward=True
        )

    def _multiply(
        self, call: _Call, modes: _Modes, x: torch.Tensor, *, is_backward: bool = False
    ) -> torch.Tensor:
        """Check the rows, bring them into a form that csrc/ reads, and let it compute.

        Called some hundred times for a token: what can be left out is.
        """
        width, target_width = self.spec.in_features, self.spec.out_features
        if is_backward:
            width, target_width = target_width, width
        dtype, shape = x.dtype, x.shape
        mode = modes.get(dtype)
        if mode is None or shape[-1:] != (width,) or not x.is_cpu:
            if dtype is torch.float16:
                return self._multiply(call, modes, x.float(), is_backward=is_backward).half()
            msg = (
                f"{'grad_out' if is_backward else 'x'} must be [..., {width}] of float32, bfloat16 "
                f"or float16 on the cpu, got {list(shape)} of {dtype} on {x.device}"
            )
            raise ValueError(msg)
        rows = x if len(shape) == 2 else x.reshape(-1, width)
        count, _ = rows.shape
        stride, step = rows.stride()
        if step != 1 and width > 1:
            rows, stride = rows.contiguous(), width
        out = torch.empty((count, target_width), dtype=dtype)
        call(rows.data_ptr(), *mode, count, stride, out.data_ptr())
        return out if len(shape) == 2 else out.view(*shape[:-1], target_width)
