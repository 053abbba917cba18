"""The contract of ``kt_core.interfaces.WeightFormat``, as tests."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields

import pytest
import torch

from kt_core.interfaces import QuantizedTensor, WeightFormat
from kt_core.testing.common import OneTorchThread, refuses
from kt_core.testing.reference import (
    BF16_ROUNDOFF,
    F16_ROUNDOFF,
    F16_SMALLEST_HALF_STEP,
    UNIT_ROUNDOFF,
)
from kt_core.types import ELEMENT_BITS, SCALE_BITS, Element, Format, ScaleType

NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
# Input features: one group and parts of groups, on both sides of 32, 64 and 128.
SIZES = (1, 31, 32, 33, 64, 65, 127, 128, 129, 300)
# Codes of one group, from the lowest to the highest that quantising uses.
STEPS = {Element.INT8: 254, Element.INT4: 14}
STEPS_WITH_OFFSET = 15
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Of the small floats: half the distance of two numbers, relative to them and the least there is,
# and the largest number.
HALF_STEP = {Element.FP8: (2.0**-4, 2.0**-10), Element.FP4: (2.0**-2, 0.25)}
LARGEST = {Element.FP8: 448.0, Element.FP4: 6.0}
SCALE_ROUNDOFF = {ScaleType.BF16: BF16_ROUNDOFF, ScaleType.FLOAT16: F16_ROUNDOFF}
SMALLEST_FLOAT16 = 2.0**-14  # with all its digits
SCALE_TYPES = {
    ScaleType.BF16: torch.bfloat16,
    ScaleType.FLOAT16: torch.float16,
    ScaleType.E8M0: torch.float8_e8m0fnu,
    ScaleType.E4M3: torch.float8_e4m3fn,
}


class WeightFormatContract(OneTorchThread):
    """What every weight format must do. Subclass it in a test file and name the formats::

        class TestMyFormats(WeightFormatContract):
            weight_formats = (MyFormat(),)

    Attributes:
        weight_formats: The formats under test.
    """

    weight_formats: Sequence[WeightFormat] = ()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run each test for each format."""
        if "weight_format" in metafunc.fixturenames:
            names = [f.descriptor.name for f in self.weight_formats]
            metafunc.parametrize("weight_format", self.weight_formats, ids=names)

    def test_names(self, weight_format: WeightFormat) -> None:
        """Lower-case words joined by hyphens, each once."""
        names = [weight_format.descriptor.name, *weight_format.aliases]
        assert isinstance(weight_format, WeightFormat)
        assert isinstance(weight_format.descriptor, Format)
        assert isinstance(weight_format.aliases, tuple)
        assert len(set(names)) == len(names), f"a name stands twice: {names}"
        for name in names:
            assert NAME.fullmatch(name), f"{name!r} is not made of lower-case words and hyphens"
            assert name != "auto", "'auto' means: whichever fits"

    def test_shapes_and_types(self, weight_format: WeightFormat) -> None:
        """Canonical form, whatever the type and strides of the weights; they are not changed."""
        descriptor = weight_format.descriptor
        for inputs in SIZES:
            for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
                weight = _random(3, inputs).to(dtype).T.contiguous().T
                before = weight.clone()
                stored = weight_format.quantize(weight)
                assert torch.equal(weight, before), "quantize changed its argument"
                _check_stored(stored, descriptor, 3, inputs)
                restored = weight_format.dequantize(stored)
                assert restored.shape == weight.shape
                assert restored.dtype is torch.float32
                want = _formula(stored)
                assert torch.equal(restored, want), "not scale * (code - zero point) - minimum"

    def test_error_is_half_a_step(self, weight_format: WeightFormat) -> None:
        """No weight is further from its code than rounding to the nearest explains."""
        for inputs in SIZES:
            for weight in (_random(16, inputs), _one_sided(16, inputs), _with_outlier(16, inputs)):
                stored = weight_format.quantize(weight)
                error = (weight_format.dequantize(stored).double() - weight.double()).abs()
                allowed = _allowed_error(stored, weight)
                worst = float((error - allowed).max())
                assert worst <= 0, f"{inputs} inputs: {worst:.3g} more than half a step"

    def test_zeros_stay_zero(self, weight_format: WeightFormat) -> None:
        """Exactly: one zero, a group of zeros, a matrix of zeros.

        With a minimum one zero among other numbers is as far off as they are.
        """
        weight = _random(4, 300)
        weight[0] = 0
        weight[1, :200] = 0
        if not weight_format.descriptor.has_minimum:
            weight[2:, ::3] = 0
        is_zero = weight == 0
        is_zero[1, 128:] &= not weight_format.descriptor.has_minimum  # in a group with others
        restored = weight_format.dequantize(weight_format.quantize(weight))
        assert bool((restored[is_zero] == 0).all())
        nothing = weight_format.dequantize(weight_format.quantize(torch.zeros(2, 33)))
        assert bool((nothing == 0).all())

    def test_quantising_again_changes_nothing(self, weight_format: WeightFormat) -> None:
        """What was dequantised has the same codes.

        Not with zero points or minimums: there the lowest and the highest weight are rounded one by
        one, a group may end up one step narrower than its scale allows, and the second scale is
        smaller. Nor with float16 scales below 2^-14, which have fewer digits than codes.
        """
        descriptor = weight_format.descriptor
        for inputs in SIZES:
            first = weight_format.quantize(_random(16, inputs))
            restored = weight_format.dequantize(first)
            second = weight_format.quantize(restored)
            if descriptor.has_zero_point or descriptor.has_minimum:
                error = (weight_format.dequantize(second).double() - restored.double()).abs()
                assert bool((error <= _allowed_error(second, restored)).all())
                continue
            keep = torch.full_like(restored, True, dtype=torch.bool)
            if descriptor.scale is ScaleType.FLOAT16:
                keep = _spread(first, _scales(first)) >= SMALLEST_FLOAT16
            assert torch.equal(second.codes.float()[keep], first.codes.float()[keep])

    def test_refuses_numbers_that_are_not_finite(self, weight_format: WeightFormat) -> None:
        """A NaN or an infinity, wherever it stands."""
        for value in (float("nan"), float("inf"), -float("inf")):
            for at in ((0, 0), (3, 299)):
                for dtype in (torch.float32, torch.bfloat16):
                    weight = _random(4, 300).to(dtype)
                    weight[at] = value
                    with refuses(f"{value} at {at}"):
                        weight_format.quantize(weight)

    def test_large_numbers_stay_finite(self, weight_format: WeightFormat) -> None:
        """A weight the format cannot hold is refused, it does not become infinite."""
        for value in (1e30, 3.4e38):  # the second rounds to infinity in bfloat16
            weight = torch.full((2, 33), value)
            weight[:, ::2] *= -1
            try:
                stored = weight_format.quantize(weight)
            except ValueError:
                continue
            assert bool(torch.isfinite(weight_format.dequantize(stored)).all()), f"{value}"

    def test_bits_per_weight(self, weight_format: WeightFormat) -> None:
        """The descriptor counts what is stored."""
        descriptor = weight_format.descriptor
        for inputs in SIZES:
            stored = weight_format.quantize(_random(2, inputs))
            bits = stored.codes.numel() * ELEMENT_BITS[descriptor.element]
            if stored.scales is not None and descriptor.scale is not None:
                bits += stored.scales.numel() * SCALE_BITS[descriptor.scale]
            if stored.zero_points is not None:
                bits += stored.zero_points.numel() * 8
            if stored.minimums is not None and descriptor.scale is not None:
                bits += stored.minimums.numel() * SCALE_BITS[descriptor.scale]
            if stored.output_scales is not None:
                bits += stored.output_scales.numel() * 32
            claimed = descriptor.bits_per_weight(inputs) * stored.codes.numel()
            assert abs(claimed - bits) < 1e-6 * bits


def _random(rows: int, inputs: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(inputs)
    spread = torch.logspace(-3, 1, rows)[:, None]
    return torch.randn(rows, inputs, generator=generator) * spread


def _one_sided(rows: int, inputs: int) -> torch.Tensor:
    """Groups that do not reach zero, and, every other row, that lie below it."""
    signs = torch.ones(rows, 1)
    signs[::2] = -1
    return signs * (_random(rows, inputs).abs() + 1)


def _with_outlier(rows: int, inputs: int) -> torch.Tensor:
    weight = _random(rows, inputs)
    weight[:, -1] = -50
    return weight


def _check_stored(stored: QuantizedTensor, descriptor: Format, rows: int, inputs: int) -> None:
    types = {
        Element.BF16: torch.bfloat16,
        Element.FP8: torch.float8_e4m3fn,
        Element.FP4: torch.uint8,
    }
    has_offset = descriptor.has_zero_point or descriptor.has_minimum
    integer = torch.uint8 if has_offset else torch.int8
    groups = (rows, descriptor.num_groups(inputs))
    wanted = {
        "codes": ((rows, inputs), types.get(descriptor.element, integer)),
        "scales": None if descriptor.scale is None else (groups, torch.float32),
        "zero_points": (groups, torch.uint8) if descriptor.has_zero_point else None,
        "minimums": (groups, torch.float32) if descriptor.has_minimum else None,
        "output_scales": ((rows,), torch.float32) if descriptor.has_output_scale else None,
    }
    assert [field.name for field in fields(stored)] == ["weight_format", *wanted]
    assert stored.weight_format == descriptor
    for name, want in wanted.items():
        value = getattr(stored, name)
        got = None if value is None else (tuple(value.shape), value.dtype)
        assert got == want, f"{name} of {inputs} inputs: {got}, want {want}"
    scale_type = SCALE_TYPES.get(descriptor.scale) if descriptor.scale else None
    for name in ("scales", "minimums"):
        value = getattr(stored, name)
        if scale_type is not None and value is not None:
            assert torch.equal(value.to(scale_type).float(), value), f"{name}: {descriptor.scale}?"
    if descriptor.element is Element.FP4:
        assert int(stored.codes.max()) <= 15
    if descriptor.element is Element.INT4:
        low, high = (0, 15) if has_offset else (-8, 7)
        assert low <= int(stored.codes.min()) <= int(stored.codes.max()) <= high


def _formula(stored: QuantizedTensor) -> torch.Tensor:
    """``scale * (code - zero point) - minimum``, each operation rounded to float32."""
    if stored.weight_format.element is Element.FP4:
        codes = torch.tensor([*FP4_VALUES, *(-value for value in FP4_VALUES)])[stored.codes.long()]
    else:
        codes = stored.codes.float()
    if stored.zero_points is not None:
        codes = codes - _spread(stored, stored.zero_points)
    weights = codes if stored.scales is None else codes * _spread(stored, _scales(stored))
    return weights if stored.minimums is None else weights - _spread(stored, stored.minimums)


def _scales(stored: QuantizedTensor) -> torch.Tensor:
    """``[out, groups]``, what stands for the whole output multiplied in."""
    assert stored.scales is not None
    if stored.output_scales is None:
        return stored.scales
    return stored.scales * stored.output_scales[:, None]


def _spread(stored: QuantizedTensor, per_group: torch.Tensor) -> torch.Tensor:
    """Give every input feature the value of its group."""
    inputs = stored.codes.shape[1]
    column = torch.arange(inputs) // (stored.weight_format.group_size or inputs)
    return per_group.float()[:, column]


def _allowed_error(stored: QuantizedTensor, weight: torch.Tensor) -> torch.Tensor:
    """Half a step, and what follows from rounding the scale to its stored type.

    A scale that was rounded down leaves the outermost weight beyond the last code: by
    ``steps * u`` of a step, ``u`` the roundoff of the scale's type, over the whole range. Symmetric
    codes share that between both ends, and where it is under half a step it is no more than half a
    step; with a zero point it adds to the rounding of the zero point. A minimum that was rounded
    down leaves the lowest weight below code 0, by ``u`` of itself.
    """
    magnitude = weight.double().abs()
    if stored.scales is None:
        return BF16_ROUNDOFF * magnitude
    descriptor = stored.weight_format
    step = _spread(stored, _scales(stored)).double()
    if not descriptor.element.is_integer:
        return _allowed_float_error(stored, step, magnitude)
    lost = _lost_by_rounding(step, descriptor)
    if descriptor.has_zero_point:
        error = 0.5 * step + STEPS_WITH_OFFSET * lost
    elif stored.minimums is not None:
        minimum = _spread(stored, stored.minimums).double()
        ends = torch.maximum(STEPS_WITH_OFFSET * lost, _lost_by_rounding(minimum, descriptor))
        error = torch.maximum(0.5 * step, ends)
        magnitude = magnitude + 2 * minimum.abs()
    else:
        error = torch.maximum(0.5 * step, STEPS[descriptor.element] / 2 * lost)
    # Dividing by the scale and multiplying with the code round once each, in float32; so do adding
    # and subtracting the minimum.
    return error + 4 * UNIT_ROUNDOFF * magnitude


def _lost_by_rounding(value: torch.Tensor, descriptor: Format) -> torch.Tensor:
    """How far a scale or minimum may be from the number that was rounded to it."""
    roundoff = SCALE_ROUNDOFF.get(descriptor.scale or ScaleType.FLOAT32, UNIT_ROUNDOFF)
    lost = roundoff / (1 - roundoff) * value.abs()
    if descriptor.scale is ScaleType.FLOAT16:
        lost = lost.clamp(min=F16_SMALLEST_HALF_STEP)
    return lost


def _allowed_float_error(
    stored: QuantizedTensor, step: torch.Tensor, magnitude: torch.Tensor
) -> torch.Tensor:
    """Half the distance of two numbers, and what is cut off beyond the largest.

    A power of two is at most a factor below ``max|w| / largest``: 8 / 6 for e2m1, 512 / 448 for
    e4m3. An e4m3 scale is rounded by 2^-4 of itself, or, where it is subnormal, by 2^-10.
    """
    descriptor = stored.weight_format
    relative, least = HALF_STEP[descriptor.element]
    error = torch.maximum(relative * magnitude, least * step)
    beyond = (magnitude - LARGEST[descriptor.element] * step).clamp(min=0)
    if descriptor.scale is ScaleType.E8M0:
        beyond = torch.minimum(beyond, LARGEST[descriptor.element] / 3 * step)
    elif descriptor.scale is ScaleType.E4M3:
        assert stored.output_scales is not None
        scale = _spread(stored, stored.scales if stored.scales is not None else step).double()
        lost = torch.maximum(scale * 2.0**-4, torch.full_like(scale, 2.0**-10))
        lost = lost * stored.output_scales[:, None] * (1 + 4 * UNIT_ROUNDOFF)
        beyond = torch.minimum(beyond, LARGEST[descriptor.element] * lost)
    else:
        beyond = torch.zeros_like(beyond)
    return torch.maximum(error, beyond) + 4 * UNIT_ROUNDOFF * magnitude
