"""Every registered format keeps the contract; and every test of it can fail."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch

from kt_core import plugins
from kt_core.interfaces import QuantizedTensor
from kt_core.quant import BUILT_IN_FORMATS, ReferenceFormat
from kt_core.testing import WeightFormatContract
from kt_core.types import Format

REGISTRY = plugins.load()
BY_NAME = {f.descriptor.name: f.descriptor for f in BUILT_IN_FORMATS}
INT4, INT4_MIN = BY_NAME["int4-g32"], BY_NAME["int4-g32-min"]


class TestRegisteredFormats(WeightFormatContract):
    weight_formats = tuple(REGISTRY.formats)


# From here on: formats that are broken on purpose, each in one way.


class ChangesItsArgument(ReferenceFormat):
    def quantize(self, weight: torch.Tensor) -> QuantizedTensor:
        stored = super().quantize(weight)
        weight.zero_()
        return stored


class KeepsScalesInFloat32(ReferenceFormat):
    def quantize(self, weight: torch.Tensor) -> QuantizedTensor:
        stored = super().quantize(weight)
        assert stored.scales is not None
        return replace(stored, scales=stored.scales * 1.001)


class DequantizesAnotherFormula(ReferenceFormat):
    def dequantize(self, quantized: QuantizedTensor) -> torch.Tensor:
        return super().dequantize(quantized) * 1.01


class KeepsMinimumsInFloat32(ReferenceFormat):
    def quantize(self, weight: torch.Tensor) -> QuantizedTensor:
        stored = super().quantize(weight)
        assert stored.minimums is not None
        return replace(stored, minimums=stored.minimums * 1.001)


class ForgetsTheMinimum(ReferenceFormat):
    def dequantize(self, quantized: QuantizedTensor) -> torch.Tensor:
        assert quantized.minimums is not None
        nothing = torch.zeros_like(quantized.minimums)
        return super().dequantize(replace(quantized, minimums=nothing))


class IsOffByOneStep(ReferenceFormat):
    def quantize(self, weight: torch.Tensor) -> QuantizedTensor:
        stored = super().quantize(weight)
        return replace(stored, codes=(stored.codes + 1).clamp(max=7))


class ForgetsThePartialGroup(ReferenceFormat):
    def quantize(self, weight: torch.Tensor) -> QuantizedTensor:
        kept = weight.clone()
        kept[:, weight.shape[1] // 32 * 32 :] = 0
        return super().quantize(kept)


class HasNoZero(ReferenceFormat):
    def quantize(self, weight: torch.Tensor) -> QuantizedTensor:
        stored = super().quantize(weight)
        return replace(stored, codes=stored.codes.where(stored.codes != 0, 1))


class UsesMoreCodesThanItCanRepeat(ReferenceFormat):
    """The largest weight becomes code 7 of a scale that would want 7.5."""

    def quantize(self, weight: torch.Tensor) -> QuantizedTensor:
        stored = super().quantize(weight)
        assert stored.scales is not None
        scales = (stored.scales * 7 / 7.5).bfloat16().float()
        step = scales.repeat_interleave(32, dim=1)[:, : weight.shape[1]]
        codes = (weight / step).round().clamp(-8, 7).to(torch.int8)
        return replace(stored, codes=codes, scales=scales)


class AcceptsNan(ReferenceFormat):
    def quantize(self, weight: torch.Tensor) -> QuantizedTensor:
        return super().quantize(weight.nan_to_num())


class OverflowsInSilence(ReferenceFormat):
    def quantize(self, weight: torch.Tensor) -> QuantizedTensor:
        stored = super().quantize(weight)
        assert stored.scales is not None
        return replace(stored, scales=stored.scales * 1e10)


class MiscountsItsBits(Format):
    def bits_per_weight(self, in_features: int) -> float:
        return 4.0


MISCOUNTED = MiscountsItsBits(
    name=INT4.name, element=INT4.element, scale=INT4.scale, group_size=INT4.group_size
)
CASES = [
    ("test_names", ReferenceFormat(INT4, aliases=("INT 4",))),
    ("test_shapes_and_types", ChangesItsArgument(INT4)),
    ("test_shapes_and_types", KeepsScalesInFloat32(INT4)),
    ("test_shapes_and_types", DequantizesAnotherFormula(INT4)),
    ("test_shapes_and_types", KeepsMinimumsInFloat32(INT4_MIN)),
    ("test_shapes_and_types", ForgetsTheMinimum(INT4_MIN)),
    ("test_error_is_half_a_step", ForgetsTheMinimum(INT4_MIN)),
    ("test_error_is_half_a_step", IsOffByOneStep(INT4)),
    ("test_error_is_half_a_step", ForgetsThePartialGroup(INT4)),
    ("test_zeros_stay_zero", HasNoZero(INT4)),
    ("test_quantising_again_changes_nothing", UsesMoreCodesThanItCanRepeat(INT4)),
    ("test_refuses_numbers_that_are_not_finite", AcceptsNan(INT4)),
    ("test_large_numbers_stay_finite", OverflowsInSilence(INT4)),
    ("test_bits_per_weight", ReferenceFormat(MISCOUNTED)),
]


@pytest.mark.parametrize(
    ("test", "broken"), CASES, ids=[f"{test}-{type(broken).__name__}" for test, broken in CASES]
)
def test_what_is_broken_is_noticed(test: str, broken: ReferenceFormat) -> None:
    with pytest.raises(AssertionError):
        getattr(WeightFormatContract(), test)(broken)


def test_every_test_of_the_contract_can_fail() -> None:
    tests = inspect.getmembers(WeightFormatContract, inspect.isfunction)
    assert {test for test, _ in CASES} == {name for name, _ in tests if name.startswith("test_")}
