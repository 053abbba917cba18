"""The reference that defines what stored numbers mean: examples worked out by hand, and a bound.

The slow truth of the packers is itself only checked here, so no number below comes from running it.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from kt_core.interfaces import QuantizedTensor
from kt_core.quant import BUILT_IN_FORMATS
from kt_core.quant.reference import dequantize, quantize
from kt_core.types import Element, Format, ScaleType

FORMATS = {f.descriptor.name: f.descriptor for f in BUILT_IN_FORMATS}
INTEGER = {name: f for name, f in FORMATS.items() if f.element.is_integer}
SMALLEST_BF16 = 2.0**-133
SMALLEST_FLOAT32 = 2.0**-149


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values])


def expect(
    weight: torch.Tensor,
    name: str,
    *,
    codes: Sequence[int],
    scales: Sequence[float],
    zeros: Sequence[int] | None = None,
    minimums: Sequence[float] | None = None,
    values: Sequence[float] | None = None,
) -> None:
    """Of one row: what is stored, and (where it is not codes times scale) what that stands for."""
    got = quantize(weight, FORMATS[name])
    assert got.weight_format is FORMATS[name]
    assert got.codes.tolist() == [list(codes)]
    is_signed = zeros is None and minimums is None
    assert got.codes.dtype is (torch.int8 if is_signed else torch.uint8)
    assert got.scales is not None
    assert got.scales.dtype is torch.float32
    assert got.scales.tolist() == [list(scales)]
    if zeros is None:
        assert got.zero_points is None
    else:
        assert got.zero_points is not None
        assert got.zero_points.dtype is torch.uint8
        assert got.zero_points.tolist() == [list(zeros)]
    if minimums is None:
        assert got.minimums is None
    else:
        assert got.minimums is not None
        assert got.minimums.dtype is torch.float32
        assert got.minimums.tolist() == [list(minimums)]
    if values is not None:
        assert dequantize(got).tolist() == [list(values)]


# ---------------------------------------------------------------- examples


def test_int8_per_output() -> None:
    """max = 254, so scale 2; the second row has a scale of its own."""
    got = quantize(
        torch.tensor([[254.0, -254, 3, -1.9, 0], [0.5, 127, -64, 1, 2]]), FORMATS["int8"]
    )
    assert got.codes.tolist() == [[127, -127, 2, -1, 0], [0, 127, -64, 1, 2]]
    assert got.scales is not None
    assert got.scales.tolist() == [[2.0], [1.0]]
    assert dequantize(got).tolist() == [[254, -254, 4, -2, 0], [0, 127, -64, 1, 2]]


def test_ties_go_to_the_even_code() -> None:
    expect(
        row(127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -126.5, 125.5),
        "int8",
        codes=[127, 0, 2, 2, 0, -2, -2, 126, -126, 126],
        scales=[1.0],
    )
    expect(
        row(7, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 6.5, -6.5, 5.5),
        "int4-g32",
        codes=[7, 0, 2, 2, 0, -2, -2, 6, -6, 6],
        scales=[1.0],
    )
    # low = -5 and high = 10: scale 1, zero 5; the weight is rounded, then the zero is added
    expect(
        row(-5, 10, 0.5, 1.5, -0.5, -1.5, 9.5, -4.5),
        "int4-g32-asym",
        codes=[0, 15, 5, 7, 5, 3, 15, 1],
        scales=[1.0],
        zeros=[5],
        values=[-5, 10, 0, 2, 0, -2, 10, -4],
    )


def test_minimums_by_hand() -> None:
    """low = -4.5, high = 10.5: minimum 4.5, scale 1; no code is 0, ties go to the even code."""
    expect(
        row(-4.5, 10.5, 0.0, 0.1, -3.0, 2.6),
        "int4-g32-f32-min",
        codes=[0, 15, 4, 5, 2, 7],
        scales=[1.0],
        minimums=[4.5],
        values=[-4.5, 10.5, -0.5, 0.5, -2.5, 2.5],
    )
    # one-sided groups: 0 is always within the range
    expect(row(15, 3.4), "int4-g32-min", codes=[15, 3], scales=[1.0], minimums=[0.0])
    expect(row(-15, -3.4), "int4-g32-min", codes=[0, 12], scales=[1.0], minimums=[15.0])


def test_minimum_is_rounded_before_the_scale_is_made() -> None:
    """bf16 has 1 and 1 + 1/128; 1.003 becomes 1, so the scale is (14 + 1) / 15 and not 15.003 / 15.

    What lies below the minimum as it is stored gets code 0.
    """
    expect(row(-1.003, 14), "int4-g32-min", codes=[0, 15], scales=[1.0], minimums=[1.0])
    # 1.006 becomes 1 + 1/128; (14 + 1.0078) / 15 = 1.0005, stored as 1; (14 + 1.0078) / 1 = 15
    expect(
        row(-1.006, 14, 0), "int4-g32-min", codes=[0, 15, 1], scales=[1.0], minimums=[1 + 1 / 128]
    )


def test_float16_scales() -> None:
    """float16 has 1, 1 + 1/1024, 1 + 2/1024; below 2^-14 its numbers are multiples of 2^-24."""
    step = 1 / 1024
    for exact, stored in [
        (1 + 0.49 * step, 1.0),
        (1 + 0.5 * step, 1.0),
        (1 + 0.51 * step, 1 + step),
        (1 + 1.5 * step, 1 + 2 * step),
        (2.0**-14 + 0.4 * 2.0**-24, 2.0**-14),
        (2.5 * 2.0**-24, 2 * 2.0**-24),
        (0.6 * 2.0**-24, 2.0**-24),
        (0.5 * 2.0**-24, 0.0),
        (65519.0, 65504.0),
    ]:
        got = quantize(row(7 * exact), FORMATS["int4-g32-f16"])
        assert got.scales is not None
        assert got.scales.item() == stored
        assert got.codes.item() == (0 if stored == 0 else min(round(7 * exact / stored), 7))
    with pytest.raises(ValueError, match="numbers too large for the format"):
        quantize(row(7 * 65520.0), FORMATS["int4-g32-f16"])
    with pytest.raises(ValueError, match="numbers too large for the format"):
        quantize(row(-65520.0), FORMATS["int4-g32-f16-min"])
    # too small a group has no weights, and no minimum either
    expect(
        row(-7.4 * 2.0**-25), "int4-g32-f16-min", codes=[0], scales=[0.0], minimums=[0], values=[0]
    )


def test_what_ggml_and_gptq_store() -> None:
    """Numbers that quantising does not make: negative scales, negative minimums, zero point 16."""
    codes = torch.tensor([[0, 8, 15]], dtype=torch.uint8)
    scales = torch.tensor([[-0.5]])
    q4_0 = QuantizedTensor(
        weight_format=FORMATS["int4-g32-f16"], codes=(codes.int() - 8).to(torch.int8), scales=scales
    )
    assert dequantize(q4_0).tolist() == [[4.0, 0.0, -3.5]]
    q4_1 = QuantizedTensor(
        weight_format=FORMATS["int4-g32-f16-min"],
        codes=codes,
        scales=-scales,
        minimums=torch.tensor([[-0.25]]),
    )
    assert dequantize(q4_1).tolist() == [[0.25, 4.25, 7.75]]
    gptq = QuantizedTensor(
        weight_format=FORMATS["int4-g128-f16-asym"],
        codes=codes,
        scales=-scales,
        zero_points=torch.tensor([[16]], dtype=torch.uint8),
    )
    assert dequantize(gptq).tolist() == [[-8.0, -4.0, -0.5]]


def test_tie_of_the_zero_point_goes_to_the_even_one() -> None:
    """4.5 becomes 4, 5.5 becomes 6; a weight that no code reaches gets the last one."""
    expect(row(-4.5, 10.5), "int4-g32-asym", codes=[0, 14], scales=[1.0], zeros=[4])
    expect(row(-5.5, 9.5), "int4-g32-asym", codes=[0, 15], scales=[1.0], zeros=[6], values=[-6, 9])


def test_scale_is_rounded_before_the_codes_are_made() -> None:
    """bf16 has 1, 1 + 1/128, 1 + 2/128; in between the tie goes to the even one."""
    step = 1 / 128
    for exact, stored in [
        (1 + 0.49 * step, 1.0),
        (1 + 0.5 * step, 1.0),
        (1 + 0.51 * step, 1 + step),
        (1 + 1.5 * step, 1 + 2 * step),
    ]:
        got = quantize(row(7 * exact, -3.3), FORMATS["int4-g32"])
        assert got.scales is not None
        assert got.scales.item() == stored
    # max / 7 = 1.0039, stored as 1: 4.5078 is nearer to 5 in units of 1, to 4 in units of 1.0039
    expect(row(7 * (1 + 0.499 * step), 4.5078), "int4-g32", codes=[7, 5], scales=[1.0])
    # per output the scale is float32, and nothing is rounded away
    third = torch.tensor(1 / 3, dtype=torch.float32)
    got = quantize((third * 127).reshape(1, 1), FORMATS["int8"])
    assert got.scales is not None
    assert got.scales.item() == (third * 127 / 127).item() != third.bfloat16().item()


def test_every_group_has_its_own_scale_and_the_last_may_be_partial() -> None:
    weight = torch.cat([torch.full((32,), 7.0), torch.full((32,), 14.0), row(28, -4)[0]])
    got = quantize(weight[None], FORMATS["int4-g32"])
    assert got.codes.tolist() == [[7] * 32 + [7] * 32 + [7, -1]]
    assert got.scales is not None
    assert got.scales.tolist() == [[1.0, 2.0, 4.0]]
    assert dequantize(got).tolist() == [[7.0] * 32 + [14.0] * 32 + [28.0, -4.0]]


@pytest.mark.parametrize("size", [32, 64, 128])
def test_dequantise_takes_scale_and_zero_of_the_group(size: int) -> None:
    """Column i belongs to group i // size: said here without the code under test."""
    columns = 2 * size + 3
    form = FORMATS[f"int4-g{size}-asym"]
    codes = torch.arange(2 * columns).reshape(2, columns).remainder(16).to(torch.uint8)
    scales = torch.tensor([[1.0, 10.0, 100.0], [0.5, 0.25, 0.125]])
    zeros = torch.tensor([[0, 8, 15], [3, 2, 1]], dtype=torch.uint8)
    quantized = QuantizedTensor(weight_format=form, codes=codes, scales=scales, zero_points=zeros)
    got = dequantize(quantized)
    assert got.dtype is torch.float32
    for r in range(2):
        for c in range(columns):
            g = c // size
            want = float(scales[r, g]) * (int(codes[r, c]) - int(zeros[r, g]))
            assert got[r, c].item() == want


def test_bf16_is_the_weight_itself() -> None:
    weight = row(1.0, 1 + 1 / 256, 1 + 3 / 256, -0.0, 3.3895e38, SMALLEST_BF16, 0.4 * SMALLEST_BF16)
    got = quantize(weight, FORMATS["bf16"])
    assert got.codes.dtype is torch.bfloat16
    assert got.scales is None
    assert got.zero_points is None
    largest = float.fromhex("0x1.fep127")
    want = [1.0, 1.0, 1 + 2 / 128, -0.0, largest, SMALLEST_BF16, 0.0]
    assert dequantize(got).tolist() == [want]
    assert torch.signbit(got.codes)[0].tolist() == [False] * 3 + [True] + [False] * 3


# ---------------------------------------------------------------- one-sided and empty groups


def test_negative_only_and_positive_only_groups_with_a_zero_point() -> None:
    """0 is always within the range, so that it is stored exactly."""
    expect(
        row(-15, -1, -7.5, -0.0),
        "int4-g32-asym",
        codes=[0, 14, 7, 15],
        scales=[1.0],
        zeros=[15],
        values=[-15, -1, -8, 0],
    )
    expect(
        row(15, 1, 7.5, 14.6),
        "int4-g32-asym",
        codes=[15, 1, 8, 15],
        scales=[1.0],
        zeros=[0],
        values=[15, 1, 8, 15],
    )


@pytest.mark.parametrize("name", INTEGER)
def test_group_of_zeros(name: str) -> None:
    got = quantize(torch.tensor([[0.0, -0.0] * 70, [1.0, 0.0] * 70]), FORMATS[name])
    assert got.scales is not None
    assert not got.scales[0].any()
    assert bool((got.scales[1] > 0).all())
    assert not got.codes[0].any()
    assert got.zero_points is None or not got.zero_points[0].any()
    assert dequantize(got)[0].tolist() == [0.0] * 140


def test_subnormal_weights() -> None:
    """Scales are subnormal too, and far from exact: what matters is that the codes follow them."""
    # float32 scales: 127 * 2^-149 has the scale 2^-149
    tiny = [127 * SMALLEST_FLOAT32, -3 * SMALLEST_FLOAT32]
    expect(row(*tiny), "int8", codes=[127, -3], scales=[SMALLEST_FLOAT32], values=tiny)
    # bf16 scales: 7 * 2^-133 has the scale 2^-133
    tiny = [7 * SMALLEST_BF16, -2 * SMALLEST_BF16]
    expect(row(*tiny), "int4-g32", codes=[7, -2], scales=[SMALLEST_BF16], values=tiny)
    # 9.8 / 7 = 1.4, stored as 1: 9.8 is beyond the last code, and -8 is one that exists
    large = 9.8 * SMALLEST_BF16
    expect(row(large, -large), "int4-g32", codes=[7, -8], scales=[SMALLEST_BF16])
    # 3.5 / 7 = 0.5, stored as 0: the group is too small to have weights
    expect(row(3.5 * SMALLEST_BF16), "int4-g32", codes=[0], scales=[0.0], values=[0.0])
    expect(
        row(-7 * SMALLEST_BF16), "int4-g32-asym", codes=[0], scales=[0.0], zeros=[0], values=[0.0]
    )
    # 8 / 15 = 0.53, stored as 1
    expect(row(-8 * SMALLEST_BF16), "int4-g32-asym", codes=[0], scales=[SMALLEST_BF16], zeros=[8])


# ---------------------------------------------------------------- how far off it may be


@pytest.mark.parametrize("name", INTEGER)
def test_error_is_at_most_half_a_step(name: str) -> None:
    """Rounding errs by half a step. Two things are cut off besides:

    * a bf16 scale may be too small by 2^-8, so max|w| lies at most 127 * 2^-8 < 0.5 steps (int8) or
      7 * 2^-8 (int4) beyond the last code: no more than rounding costs, and never added to it;
    * with a zero point, the codes of low and high may both have been rounded away from 0: half a
      step, and 15 * 2^-8 for the scale.

    With a minimum nothing is cut off but what rounding the minimum and the scale cost: less than
    half a step, and never added to it.

    Float32 division and product, 2^-24 each of at most 127 steps: 2^-16. Float16 is more exact than
    bf16 as far as 2^-14, and ends at 65504: other weights are for its own test.
    """
    form = FORMATS[name]
    beyond = 15 * 2.0**-8 if form.has_zero_point else 0.0
    magnitudes = torch.pow(10.0, torch.arange(64).unsqueeze(1) / 2 - 16)
    if form.scale is ScaleType.FLOAT16:
        magnitudes = magnitudes.clamp(1.0, 1e3)
    generator = torch.Generator().manual_seed(0)
    size = form.group_size or 300
    for shift in (0.0, 1.5, -1.5, 40.0):
        weight = torch.randn(64, 300, generator=generator) + shift
        weight *= magnitudes
        got = quantize(weight, form)
        assert got.scales is not None
        step = got.scales.double().repeat_interleave(size, dim=1)[:, :300]
        error = (dequantize(got).double() - weight.double()).abs()
        assert bool((error <= (0.5 + beyond + 2.0**-16) * step).all())
        # and a scale is not larger than the range asks for
        groups = torch.split(weight, size, dim=1)
        for index, group in enumerate(groups):
            span = group.abs().amax(1) / (127 if form.element is Element.INT8 else 7)
            if form.has_zero_point or form.has_minimum:
                span = (group.amax(1).clamp(min=0) - group.amin(1).clamp(max=0)) / 15
            # the minimum's own rounding is part of the scale's, once more
            rounding = 2.0**-8 * (2 if form.has_minimum else 1) + 2.0**-22
            assert bool((got.scales[:, index] <= span * (1 + rounding)).all())


@pytest.mark.parametrize("name", INTEGER)
def test_codes_stay_within_their_bits(name: str) -> None:
    form = FORMATS[name]
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(50, 200, generator=generator) * torch.pow(
        2.0, torch.linspace(-149, 100, 50).unsqueeze(1)
    )
    if form.scale is ScaleType.FLOAT16:
        weight = weight.clamp(-1e4, 1e4)
    got = quantize(weight, form)
    low, high = (-8, 7) if form.has_signed_codes else (0, 15)
    if form.element is Element.INT8:
        low, high = -127, 127
    assert low <= int(got.codes.min())
    assert int(got.codes.max()) <= high
    assert got.scales is not None
    types = {ScaleType.BF16: torch.bfloat16, ScaleType.FLOAT16: torch.float16}
    stored = types.get(form.scale or ScaleType.FLOAT32, torch.float32)
    for numbers in (got.scales, got.minimums):
        assert numbers is None or torch.equal(numbers, numbers.to(stored).float())


# ---------------------------------------------------------------- sources


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_type_of_the_source_does_not_matter(name: str, dtype: torch.dtype) -> None:
    weight = torch.randn(5, 77, generator=torch.Generator().manual_seed(2)).bfloat16().to(dtype)
    expect_equal(quantize(weight, FORMATS[name]), quantize(weight.float(), FORMATS[name]))


@pytest.mark.parametrize("name", FORMATS)
def test_strided_sources(name: str) -> None:
    weight = torch.randn(77, 10, generator=torch.Generator().manual_seed(3)).T[::2]
    expect_equal(
        quantize(weight, FORMATS[name]), quantize(weight.clone().contiguous(), FORMATS[name])
    )


def expect_equal(got: QuantizedTensor, want: QuantizedTensor) -> None:
    for part in ("codes", "scales", "zero_points", "minimums", "output_scales"):
        a, b = getattr(got, part), getattr(want, part)
        assert (a is None and b is None) or torch.equal(a, b)
        assert a is None or part == "codes" or a.is_contiguous()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_weight_that_is_not_finite(name: str, value: float, dtype: torch.dtype) -> None:
    weight = torch.ones(3, 70, dtype=dtype)
    weight[-1, -1] = value
    with pytest.raises(ValueError, match="the weight holds a NaN or an infinity"):
        quantize(weight, FORMATS[name])


def test_weight_that_becomes_infinite_when_it_is_stored() -> None:
    beyond_bf16 = float.fromhex("0x1.ffp127")
    too_large: list[tuple[str, torch.Tensor]] = [
        ("bf16", row(beyond_bf16)),
        ("bf16", torch.tensor([[1e300]], dtype=torch.float64)),
        ("int8", torch.tensor([[-1e300]], dtype=torch.float64)),
        ("int4-g32-asym", row(3e38, -3e38)),  # max - min
    ]
    for name, weight in too_large:
        assert bool(torch.isfinite(weight).all())
        with pytest.raises(ValueError, match="or numbers too large for the format"):
            quantize(weight, FORMATS[name])
    quantize(row(beyond_bf16, -beyond_bf16), FORMATS["int8-g32"])
    quantize(row(beyond_bf16, -beyond_bf16), FORMATS["int4-g32"])


@pytest.mark.parametrize("shape", [(32,), (1, 2, 32), ()])
def test_only_matrices(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected a matrix \[out_features, in_features\]"):
        quantize(torch.ones(shape), FORMATS["int8"])


def test_a_format_that_is_not_built_in() -> None:
    """Whole rows with a zero point: the descriptor alone says what happens."""
    form = Format(name="mine", element=Element.INT4, scale=ScaleType.FLOAT32, has_zero_point=True)
    got = quantize(torch.tensor([[-5.0, 10.0] + [0.0] * 200]), form)
    assert got.scales is not None
    assert got.zero_points is not None
    assert got.scales.tolist() == [[1.0]]
    assert got.zero_points.tolist() == [[5]]
    assert dequantize(got).tolist() == [[-5.0, 10.0] + [0.0] * 200]


# ---------------------------------------------------------------- small floats


def test_fp8_by_hand() -> None:
    """max = 448, so scale 1; 17 and 19 are ties of steps of 2, 2^-10 is half the smallest step."""
    got = quantize(
        row(448, -1.0625, 17, 19, 2.0**-9, 2.0**-10, 3 * 2.0**-10, -0.0), FORMATS["fp8-channel"]
    )
    assert got.codes.dtype is torch.float8_e4m3fn
    assert got.scales is not None
    assert got.scales.tolist() == [[1.0]]
    want = [448, -1.0, 16, 20, 2.0**-9, 0.0, 2.0**-8, -0.0]
    assert dequantize(got).tolist() == [want]


def test_mxfp4_by_hand() -> None:
    """max = 7 lies in 4..8: scale 1, and 7 is clamped to 6; ties go to the even code."""
    got = quantize(row(7, -0.25, 0.75, 1.25, 1.75, 2.5, -3.5, 5), FORMATS["mxfp4"])
    assert got.codes.tolist() == [[7, 8, 2, 2, 4, 4, 14, 6]]
    assert got.scales is not None
    assert got.scales.tolist() == [[1.0]]
    assert dequantize(got).tolist() == [[6, -0.0, 1, 1, 2, 2, -4, 4]]
    eighth = quantize(row(0.9), FORMATS["mxfp4"])
    assert eighth.scales is not None
    assert eighth.scales.item() == 2.0**-3  # floor(log2(0.9)) - 2


def test_nvfp4_by_hand() -> None:
    """max = 2688 = 6 * 448: the output's scale is 1. Groups of 16: 2688 / 6 = 448, 12.1 / 6 = 2."""
    weight = torch.zeros(1, 33)
    weight[0, 0], weight[0, 1], weight[0, 16], weight[0, 17] = 2688, -448, 12.1, 7
    got = quantize(weight, FORMATS["nvfp4"])
    assert got.output_scales is not None
    assert got.output_scales.tolist() == [1.0]
    assert got.scales is not None
    assert got.scales.tolist() == [[448.0, 2.0, 0.0]]
    assert got.codes[0, [0, 1, 16, 17]].tolist() == [7, 10, 7, 6]
    assert dequantize(got)[0, [0, 1, 16, 17]].tolist() == [2688, -448, 12, 8]
