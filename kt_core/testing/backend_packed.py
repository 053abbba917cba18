"""The rules of ``BackendContract`` for packed bytes: the same on every device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from kt_core.interfaces import ExpertDevice, ExpertKernel, ExpertWeights, WeightFormat
from kt_core.packed.codec import pack
from kt_core.testing.backend_harness import SPEC, BackendHarness, random_layer, random_pairs
from kt_core.testing.common import refuses
from kt_core.types import Activation, ActivationKind, MoeSpec

UNGATED = Activation(kind=ActivationKind.RELU2, is_gated=False)
LAYERS = (replace(SPEC, has_bias=True), replace(SPEC, activation=UNGATED))
"""Between them they have every part that an expert can have."""


class PackedRules(BackendHarness):
    """Part of ``BackendContract``: what ``packed``, ``load_packed`` and their like promise."""

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
        """Bytes of another layer, and experts that the layer does not have."""
        with self.open() as device:
            kernel = self._moving(device, SPEC, weight_format)
            good = _packed(SPEC, weight_format, random_layer(SPEC)[0])
            for what, bad in _misfits(good):
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

    def test_gather_packed(self, weight_format: WeightFormat) -> None:
        """Any experts in any order, at any address, as they are now."""
        with self.open() as device:
            for spec in LAYERS:
                kernel = self._moving(device, spec, weight_format)
                experts = random_layer(spec)
                for index in experts:
                    kernel.load(index, random_layer(spec, seed=9)[index])
                kernel.load(1, experts[1])
                for index in (0, 3):
                    packed = _packed(spec, weight_format, experts[index])
                    kernel.load_packed(index, packed.to(device.info.torch_device))
                kernel.unload(2)
                for chosen in ([3, 0, 1], [1], [0, 3], []):
                    want = _packed_together(spec, weight_format, experts, chosen)
                    for first in (64, 1):
                        end = first + want.numel()
                        room = torch.full((end + 64,), 7, dtype=torch.uint8)
                        kernel.gather_packed(chosen, room[first:end])
                        got, beside = room[first:end], torch.cat([room[:first], room[end:]])
                        assert torch.equal(got, want), f"experts {chosen} are gathered otherwise"
                        assert beside.eq(7).all(), "bytes beside them changed"

    def test_gather_packed_refuses_what_does_not_fit(self, weight_format: WeightFormat) -> None:
        """Room for more or less, experts that are not there, and such as are named twice."""
        with self.open() as device:
            kernel = self._moving(device, SPEC, weight_format)
            for index in (0, 1):
                kernel.load(index, random_layer(SPEC)[index])
            good = _packed_together(SPEC, weight_format, random_layer(SPEC), (0, 1))
            for what, bad in _misfits(good):
                with refuses(what):
                    kernel.gather_packed((0, 1), bad)
            with refuses("room for one more"):
                kernel.gather_packed((0,), good)
            for experts in ((0, 2), (0, -1), (0, SPEC.num_experts), (0, 0)):
                with refuses(f"experts {experts}"):
                    kernel.gather_packed(experts, good)

    def test_load_packed_together(self, weight_format: WeightFormat) -> None:
        """Several experts from one tensor, which is copied; each is its own from then on."""
        with self.open() as device:
            for spec in LAYERS:
                kernel = self._moving(device, spec, weight_format)
                experts = random_layer(spec)
                kernel.load(3, random_layer(spec, seed=9)[3])
                kernel.load_packed_together((), torch.empty(0, dtype=torch.uint8))
                for chosen, seed in (((2, 0, 3), 9), ((1,), 0), ((3, 2, 0), 0)):
                    packed = _packed_together(spec, weight_format, random_layer(spec, seed), chosen)
                    packed = packed.to(device.info.torch_device)
                    kernel.load_packed_together(chosen, packed)
                    packed.fill_(7)
                assert kernel.resident() == frozenset(experts)
                self.check_kernel(kernel, weight_format, experts, random_pairs(spec, 5))
                kernel.unload(2)
                kernel.load(0, random_layer(spec, seed=9)[0])
                left = {1: experts[1], 3: experts[3], 0: random_layer(spec, seed=9)[0]}
                assert kernel.resident() == frozenset(left)
                for index, weights in left.items():
                    want = _packed(spec, weight_format, weights)
                    assert torch.equal(kernel.packed(index).cpu(), want), f"expert {index} changed"
                with refuses("an expert that was unloaded"):
                    kernel.packed(2)

    def test_load_packed_together_refuses_what_does_not_fit(
        self, weight_format: WeightFormat
    ) -> None:
        """And changes nothing."""
        with self.open() as device:
            kernel = self._moving(device, SPEC, weight_format)
            experts = random_layer(SPEC)
            kernel.load(0, experts[0])
            good = _packed_together(SPEC, weight_format, experts, (1, 2))
            for what, bad in _misfits(good):
                with refuses(what):
                    kernel.load_packed_together((0, 1), bad)
            with refuses("bytes of one more"):
                kernel.load_packed_together((0,), good)
            for several in ((0, -1), (0, SPEC.num_experts), (0, 0)):
                with refuses(f"experts {several}"):
                    kernel.load_packed_together(several, good)
            assert kernel.resident() == frozenset({0})
            assert torch.equal(kernel.packed(0).cpu(), _packed(SPEC, weight_format, experts[0]))

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


def _packed_together(
    spec: MoeSpec,
    weight_format: WeightFormat,
    experts: Mapping[int, ExpertWeights],
    chosen: Sequence[int],
) -> torch.Tensor:
    none = torch.empty(0, dtype=torch.uint8)
    return torch.cat([none, *(_packed(spec, weight_format, experts[e]) for e in chosen)])


def _misfits(good: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """What looks like packed bytes, and is not."""
    yield "a byte too few", good[1:]
    yield "a byte too many", torch.cat([good, good[:1]])
    yield "a matrix", good[None]
    yield "signed bytes", good.view(torch.int8)
    yield "every second byte", torch.cat([good, good])[::2]
