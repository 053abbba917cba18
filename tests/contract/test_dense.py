"""Every test of the contract for dense layers can fail: kernels that are broken on purpose."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from kt_core.interfaces import ExpertDevice, QuantizedTensor
from kt_core.quant import BUILT_IN_FORMATS
from kt_core.testing import BackendContract, ReferenceBackend, ReferenceDevice, ReferenceLinear
from kt_core.testing.backend_dense import BackendDense
from kt_core.types import Capabilities, LinearSpec

FORMATS = {f.descriptor.name: f for f in BUILT_IN_FORMATS}
INT8 = {"weight_format": FORMATS["int8-g32"]}


class ComputesNone(ReferenceBackend):
    """And is right about it: its tests skip."""

    def capabilities(self, device: str) -> Capabilities:
        return replace(super().capabilities(device), computes_dense=False)

    def open(self, device: str, *, threads: int | None = None) -> ExpertDevice:
        class OnlyExperts(ReferenceDevice):
            linear_bytes = ExpertDevice.linear_bytes
            linear_kernel = ExpertDevice.linear_kernel  # type: ignore[assignment]

        return OnlyExperts(self.devices()[0], self.capabilities(device), self._formats)


class ComputesAgainstItsWord(ReferenceBackend):
    def capabilities(self, device: str) -> Capabilities:
        return replace(super().capabilities(device), computes_dense=False)


class IgnoresTheBias(ReferenceLinear):
    def load(self, weight: Any, bias: Any = None) -> None:
        super().load(weight, None if bias is None else torch.zeros_like(bias))


class LosesTheLastOddOutput(ReferenceLinear):
    def apply(self, x: torch.Tensor) -> torch.Tensor:
        out = super().apply(x)
        if self.spec.out_features % 2:
            out[..., -1] = 0
        return out


class AnswersInFloat32(ReferenceLinear):
    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return super().apply(x).float()


class TakesRowsForContiguous(ReferenceLinear):
    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return super().apply(torch.as_strided(x, x.shape, torch.empty(x.shape).stride()))


class WritesOverItsRows(ReferenceLinear):
    def apply(self, x: torch.Tensor) -> torch.Tensor:
        out = super().apply(x)
        x.zero_()
        return out


class AddsTheBiasToTheGradient(ReferenceLinear):
    def grad_input(self, grad_out: torch.Tensor) -> torch.Tensor:
        bias = self._loaded().bias
        assert bias is not None
        return super().grad_input(grad_out) + (grad_out @ bias.to(grad_out.dtype))[:, None]


class ClaimsTooFewBytes(ReferenceLinear):
    @property
    def size_bytes(self) -> int:
        return self.spec.out_features * self.spec.in_features


class LoadsOnce(ReferenceLinear):
    def load(self, weight: Any, bias: Any = None) -> None:
        if self._layer is None:
            super().load(weight, bias)


class KeepsTheOldAfterAnError(ReferenceLinear):
    def load(self, weight: Any, bias: Any = None) -> None:
        before = self._layer
        try:
            super().load(weight, bias)
        except ValueError:
            self._layer = before
            raise


class FlipsABit(ReferenceLinear):
    def load_packed(self, packed: torch.Tensor) -> None:
        changed = packed.clone()
        changed[len(changed) // 2] ^= 64
        super().load_packed(changed)


class ReadsCodesFromTheWrongEnd(ReferenceLinear):
    def load(self, weight: Any, bias: Any = None) -> None:
        if isinstance(weight, QuantizedTensor):
            weight = replace(weight, codes=weight.codes.flip(1))
        super().load(weight, bias)


class KeepsTheBias(ReferenceLinear):
    def load(self, weight: Any, bias: Any = None) -> None:
        super().load(weight, bias)
        self._kept = bias

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        layer = self._loaded()
        self._layer = replace(layer, bias=self._kept.double())
        return super().apply(x)


class ChecksNothing(ReferenceLinear):
    def load(self, weight: Any, bias: Any = None) -> None:
        try:
            super().load(weight, bias)
        except ValueError:
            super().load(torch.zeros(self.spec.out_features, self.spec.in_features), None)


class SharesScratchBetweenThreads(ReferenceLinear):
    scratch = torch.zeros(72, 160)

    def load(self, weight: Any, bias: Any = None) -> None:
        self.scratch.copy_(weight)
        super().load(self.scratch.zero_(), bias)  # as another thread would do meanwhile


@dataclass
class Case:
    test: str
    broken: type[ReferenceLinear] | type[ReferenceBackend]
    arguments: dict[str, Any] = field(default_factory=dict)


CASES = [
    Case("test_says_whether_it_computes_dense", ComputesAgainstItsWord, INT8),
    Case("test_dense_matches_the_reference", IgnoresTheBias, {**INT8, "tokens": 3}),
    Case("test_types_of_dense_activations", AnswersInFloat32, INT8),
    Case("test_odd_dense_shapes", LosesTheLastOddOutput, INT8),
    Case("test_dense_rows_of_any_shape", TakesRowsForContiguous),
    Case("test_dense_rows_of_any_shape", WritesOverItsRows),
    Case(
        "test_dense_gradients_match_the_reference",
        AddsTheBiasToTheGradient,
        {**INT8, "tokens": 3},
    ),
    Case("test_dense_bytes", ClaimsTooFewBytes, INT8),
    Case("test_dense_load_replaces", LoadsOnce, INT8),
    Case("test_dense_load_replaces", KeepsTheOldAfterAnError, INT8),
    Case("test_packed_dense_bytes", FlipsABit, INT8),
    Case("test_dense_weights_in_any_form", ReadsCodesFromTheWrongEnd, INT8),
    Case("test_dense_weights_in_any_form", KeepsTheBias, INT8),
    Case("test_dense_refuses_what_does_not_fit", ChecksNothing, INT8),
    Case("test_dense_layers_load_at_once", SharesScratchBetweenThreads, INT8),
]


class BrokenBackend(ReferenceBackend):
    """The reference with other kernels of dense layers."""

    def __init__(self, linear_class: type[ReferenceLinear]) -> None:
        super().__init__()
        self._linear_class = linear_class

    def open(self, device: str, *, threads: int | None = None) -> ExpertDevice:
        opened = super().open(device, threads=threads)
        assert isinstance(opened, ReferenceDevice)
        opened.linear_class = self._linear_class
        return opened


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.broken.__name__)
def test_what_is_broken_is_noticed(case: Case) -> None:
    suite = BackendContract()
    if issubclass(case.broken, ReferenceLinear):
        suite.backend = BrokenBackend(case.broken)
    else:
        suite.backend = case.broken()
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        getattr(suite, case.test)(**case.arguments)
    suite.backend = ReferenceBackend()
    getattr(suite, case.test)(**case.arguments)  # and not when nothing is


def test_every_test_of_dense_layers_can_fail() -> None:
    tests = {n for n, _ in inspect.getmembers(BackendDense, inspect.isfunction)}
    inherited = set(dir(BackendDense.__base__))
    assert {case.test for case in CASES} == {n for n in tests - inherited if n.startswith("test_")}


def test_a_device_without_dense_layers_passes_and_skips() -> None:
    suite = BackendContract()
    suite.backend = ComputesNone()
    suite.test_says_whether_it_computes_dense(FORMATS["int8"])
    with pytest.raises(pytest.skip.Exception, match="computes no dense layers"):
        suite.test_dense_matches_the_reference(FORMATS["int8"], 3)


def test_a_spec_has_sizes() -> None:
    with pytest.raises(ValueError, match="out_features must be >= 1, got 0"):
        LinearSpec(in_features=1, out_features=0)
