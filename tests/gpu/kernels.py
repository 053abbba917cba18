"""The Triton kernels: interpreted on the host, or on the GPU whose backend KT_TEST_DEVICE names."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from kt_core.accelerator import TorchBackend
from kt_core.interfaces import ExpertKernel, LinearKernel
from kt_core.types import (
    ActivationPrecision,
    Capabilities,
    DeviceInfo,
    Element,
    Format,
    LinearSpec,
    MoeSpec,
)
from kt_triton import launch
from kt_triton.kernel import TritonExpertKernel
from kt_triton.launch import Call
from kt_triton.layer import DenseLayer, Layer
from kt_triton.linear_kernel import TritonLinearKernel

IS_INTERPRETED = not os.environ.get("KT_TEST_DEVICE")
# Where tensors of calls lie. Torch has one name for the GPUs of both vendors.
WHERE = "cpu" if IS_INTERPRETED else "cuda:0"


class KernelsBackend(TorchBackend):
    """One device; tests say which kernels it uses."""

    name = "kernels"
    device_type = torch.device(WHERE).type

    def __init__(self, *, is_few: bool | None = None) -> None:
        """Take which kernels to use: those for few tokens, for many, or those that suit."""
        self._is_few = is_few

    def why_unavailable(self) -> str | None:
        """Return None: whoever imports this has Triton."""
        return None

    def devices(self) -> Sequence[DeviceInfo]:
        """Return the one device."""
        return [
            DeviceInfo(
                name=self.name,
                description="Triton's interpreter" if IS_INTERPRETED else "a GPU",
                torch_device=WHERE,
                memory_bytes=1 << 30,
            )
        ]

    def what_it_computes(self) -> Capabilities:
        """Every format."""
        return Capabilities(elements=frozenset(Element), computes_dense=True)

    def kernel(
        self,
        device: torch.device,
        spec: MoeSpec,
        weight_format: Format,
        precision: ActivationPrecision,
    ) -> ExpertKernel:
        """Make a kernel that uses the wanted ones."""
        return _Chosen(device, spec, weight_format, precision, self._is_few)

    def linear_kernel(
        self,
        device: torch.device,
        spec: LinearSpec,
        weight_format: Format,
        precision: ActivationPrecision,
    ) -> LinearKernel:
        """Make a dense kernel that uses the wanted ones: rows are what tokens are to experts."""
        return _ChosenLinear(device, spec, weight_format, precision, self._is_few)


class _Chosen(TritonExpertKernel):
    def __init__(
        self,
        device: torch.device,
        spec: MoeSpec,
        weight_format: Format,
        precision: ActivationPrecision,
        is_few: bool | None,
    ) -> None:
        super().__init__(device, spec, weight_format, precision)
        self._is_few = is_few

    def launch(self, layer: Layer, call: Call, precision: ActivationPrecision) -> None:
        launch.compute(layer, call, precision, is_few=self._is_few)


class _ChosenLinear(TritonLinearKernel):
    def __init__(
        self,
        device: torch.device,
        spec: LinearSpec,
        weight_format: Format,
        precision: ActivationPrecision,
        is_few: bool | None,
    ) -> None:
        super().__init__(device, spec, weight_format, precision)
        self._is_few = is_few

    def launch(
        self, layer: DenseLayer, x: torch.Tensor, packed: torch.Tensor, out: torch.Tensor
    ) -> None:
        launch.compute_dense(layer, x, packed, out, is_few=self._is_few)
