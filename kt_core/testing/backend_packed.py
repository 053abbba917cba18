"""The rules of ``BackendContract`` for packed bytes: the same on every device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from kt_core.interfaces import ExpertDevice, ExpertKernel, ExpertWeights, WeightFormat
from kt_core.packed import ExpertLayout
from kt_core.packed.codec import pack
from kt_core.testing.backend_harness import SPEC, BackendHarness, random_layer, random_pairs
from kt_core.testing.common import refuses
from kt_core.types import Activation, ActivationKind, MoeSpec

UNGATED = Activation(kind=ActivationKind.RELU2, is_gated=False)
LAYERS = (replace(SPEC, has_bias=True), replace(SPEC, activation=UNGATED))
"""Between them they have every part that an expert can have."""


class PackedRules(BackendHarness):
    """Part of ``BackendContract``: what ``packed`` and ``load_packed`` promise."""

    def test_packed_bytes(self, weight_format: WeightFormat) -> None:
        """They lie as kt_core/packed/ says, on the kernel's device; or the kernel moves none."""
        with self.open() as device:
            for spec in LAYERS:
                kernel = device.expert_kernel(spec, weight_format.descriptor)
                for index, weights in random_layer(spec).items():
                    kernel.load(index, weights)
                    if not kernel.moves_packed:
                        with refuses("packed bytes of a kernel that says it has none"):
                            kernel.packed(index)
                        continue
                    got, want = kernel.packed(index), _packed(spec, weight_format, weights)
                    assert got.device.type == torch.device(device.info.torch_device).type
                    assert got.dtype is torch.uint8
                    assert torch.equal(got.cpu(), want), f"expert {index} is packed otherwise"

    def test_load_packed(self, weight_format: WeightFormat) -> None:
        """Bytes of one kernel make the same expert of another, and are copied."""
        with self.open() as device:
            for spec in LAYERS:
                kernel = self._moving(device, spec, weight_format)
                experts = random_layer(spec)
                for index in (2, 0, 3, 1):
                    kernel.load(index, random_layer(spec, seed=9)[index])
                    packed = _packed(spec, weight_format, experts[index])
                    packed = packed.to(device.info.torch_device)
                    kernel.load_packed(index, packed)
                    packed.fill_(7)
                assert kernel.resident() == frozenset(experts)
                self.check_kernel(kernel, weight_format, experts, random_pairs(spec, 5))
                for index, weights in experts.items():
                    want = _packed(spec, weight_format, weights)
                    assert torch.equal(kernel.packed(index).cpu(), want), f"expert {index} changed"

    def test_load_packed_refuses_what_does_not_fit(self, weight_format: WeightFormat) -> None:
        """Sizes, types, experts; and bytes of an expert that is not there cannot be had."""
        with self.open() as device:
            kernel = self._moving(device, SPEC, weight_format)
            layout = ExpertLayout.of(SPEC, weight_format.descriptor)
            good = torch.zeros(
                layout.size_bytes, dtype=torch.uint8, device=device.info.torch_device
            )
            for what, bad in {
                "a byte too few": good[1:],
                "a byte too many": torch.cat([good, good[:1]]),
                "a matrix": good[None],
                "signed bytes": good.view(torch.int8),
                "every second byte": torch.cat([good, good])[::2],
            }.items():
                with refuses(what):
                    kernel.load_packed(0, bad)
            for expert in (-1, SPEC.num_experts):
                with refuses(f"expert {expert}"):
                    kernel.load_packed(expert, good)
                with refuses(f"expert {expert}"):
                    kernel.packed(expert)
            assert kernel.resident() == frozenset()
            with refuses("an expert that is not resident"):
                kernel.packed(0)

    def _moving(
        self, device: ExpertDevice, spec: MoeSpec, weight_format: WeightFormat
    ) -> ExpertKernel:
        kernel = self.accurate_kernel(device, spec, weight_format)
        if not kernel.moves_packed:
            pytest.skip("the kernel says that it cannot move packed experts")
        return kernel


def _packed(spec: MoeSpec, weight_format: WeightFormat, weights: ExpertWeights) -> torch.Tensor:
    quantized: dict[str, Any] = {
        name: weight_format.quantize(matrix)
        for name in ("gate", "up", "down")
        if isinstance(matrix := getattr(weights, name), torch.Tensor)
    }
    return pack(replace(weights, **quantized), spec, weight_format.descriptor)
