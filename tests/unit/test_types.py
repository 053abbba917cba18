"""The values that cross boundaries: what they refuse, and their numbers, worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from kt_core.quant import BUILT_IN_FORMATS
from kt_core.types import (
    SILU,
    UNGATED_KINDS,
    Activation,
    ActivationKind,
    Element,
    Format,
    MoeSpec,
    ScaleType,
)

FORMATS = {f.descriptor.name: f.descriptor for f in BUILT_IN_FORMATS}


# ---------------------------------------------------------------- MoeSpec


def spec(**changes: Any) -> MoeSpec:
    return MoeSpec(**{"num_experts": 8, "hidden_size": 64, "intermediate_size": 96, **changes})


@pytest.mark.parametrize("field", ["num_experts", "hidden_size", "intermediate_size"])
@pytest.mark.parametrize("value", [0, -1])
def test_spec_needs_at_least_one_of_everything(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{field} must be >= 1, got {value}"):
        spec(**{field: value})
    assert getattr(spec(**{field: 1}), field) == 1


def test_weights_per_expert() -> None:
    assert spec().weights_per_expert == 3 * 64 * 96
    ungated = Activation(kind=ActivationKind.RELU2, is_gated=False)
    assert spec(activation=ungated, has_bias=True).weights_per_expert == 2 * 64 * 96


def test_spec_defaults_are_the_usual_expert() -> None:
    assert spec().activation is SILU
    assert Activation(kind=ActivationKind.SILU, is_gated=True) == SILU
    assert not spec().has_bias


@pytest.mark.parametrize("value", [spec(), SILU, FORMATS["int8"]], ids=lambda v: type(v).__name__)
def test_values_are_frozen_equal_and_hashable(value: Any) -> None:
    field = next(iter(value.__dataclass_fields__))
    with pytest.raises(FrozenInstanceError):
        setattr(value, field, getattr(value, field))
    copy = replace(value)
    assert copy == value
    assert hash(copy) == hash(value)


# ---------------------------------------------------------------- Activation

KINDS = list(ActivationKind)


def activation(kind: ActivationKind, **changes: Any) -> Activation:
    finite = {"limit": 7.0, "up_limit": 9.0} if kind is ActivationKind.SWIGLU_SOFTCAP else {}
    return Activation(kind=kind, **{**finite, **changes})


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_plain_kinds_stand_without_a_gate(kind: ActivationKind) -> None:
    assert activation(kind).is_gated
    if kind in UNGATED_KINDS:
        assert not activation(kind, is_gated=False).is_gated
    else:
        with pytest.raises(ValueError, match=f"activation {kind.value!r} needs a gate"):
            activation(kind, is_gated=False)


def test_ungated_kinds_are_those_without_parameters() -> None:
    assert {kind.value for kind in UNGATED_KINDS} == {"silu", "gelu", "gelu_tanh", "relu", "relu2"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("field", ["limit", "up_limit"])
@pytest.mark.parametrize("value", [0.0, -1.0, -math.inf, math.nan])
def test_limits_must_be_positive(kind: ActivationKind, field: str, value: float) -> None:
    with pytest.raises(ValueError, match="limit and up_limit must be > 0"):
        activation(kind, **{field: value})


@pytest.mark.parametrize("field", ["limit", "up_limit"])
def test_softcap_needs_both_limits(field: str) -> None:
    """``cap(x, inf) = inf * tanh(0)`` is NaN."""
    with pytest.raises(ValueError, match="needs a finite limit and up_limit"):
        activation(ActivationKind.SWIGLU_SOFTCAP, **{field: math.inf})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_alpha_must_be_finite(value: float) -> None:
    with pytest.raises(ValueError, match="alpha must be finite"):
        activation(ActivationKind.SWIGLU_OAI, alpha=value)


# ---------------------------------------------------------------- Format


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"element": Element.BF16, "scale": ScaleType.BF16},
            "every element has scales, except bf16",
        ),
        ({"element": Element.INT8}, "every element has scales, except bf16"),
        ({"element": Element.INT4}, "every element has scales, except bf16"),
        ({"element": Element.BF16, "group_size": 32}, "without scales there are no groups"),
        ({"element": Element.INT4, "scale": ScaleType.BF16, "group_size": 16}, "got 16"),
        ({"element": Element.INT4, "scale": ScaleType.BF16, "group_size": 0}, "32, 64, 128"),
        ({"element": Element.INT8, "scale": ScaleType.BF16, "group_size": 256}, "got 256"),
        (
            {"element": Element.INT8, "scale": ScaleType.FLOAT32, "has_zero_point": True},
            "only int4 has zero points",
        ),
        ({"element": Element.BF16, "has_zero_point": True}, "only int4 has zero points"),
        (
            {"element": Element.INT8, "scale": ScaleType.FLOAT32, "has_minimum": True},
            "only int4 has zero points or minimums",
        ),
        (
            {
                "element": Element.INT4,
                "scale": ScaleType.FLOAT32,
                "has_zero_point": True,
                "has_minimum": True,
            },
            "a zero point or a minimum, not both",
        ),
        (
            {"element": Element.INT8, "scale": ScaleType.E8M0},
            "integers have float32, bf16 or float16",
        ),
        ({"element": Element.FP4, "scale": ScaleType.E4M3, "group_size": 8}, "16, 32, 64, 128"),
    ],
)
def test_formats_that_make_no_sense(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Format(name="mine", **fields)
    assert "format 'mine'" in str(caught.value)


@pytest.mark.parametrize("size", [32, 64, 128, None])
def test_num_groups_counts_the_partial_one(size: int | None) -> None:
    form = Format(name="f", element=Element.INT4, scale=ScaleType.BF16, group_size=size)
    wanted = {
        32: {1: 1, 31: 1, 32: 1, 33: 2, 64: 2, 4097: 129},
        64: {1: 1, 63: 1, 64: 1, 65: 2, 4097: 65},
        128: {1: 1, 128: 1, 129: 2, 4097: 33},
        None: {1: 1, 32: 1, 4097: 1},
    }
    for inputs, groups in wanted[size].items():
        assert form.num_groups(inputs) == groups


# (bits of a code) + (bits of a scale and of a zero point, which is 8) * groups / inputs
BITS: list[tuple[str, int, float]] = [
    ("bf16", 4096, 16.0),
    ("bf16", 1, 16.0),
    ("int8", 4096, 8 + 32 / 4096),  # one float32 per output
    ("int8", 1, 40.0),
    ("int8-g16", 4096, 9.0),  # 16 / 16
    ("int8-g32", 4096, 8.5),  # 16 / 32
    ("int8-g64", 4096, 8.25),
    ("int8-g128", 4096, 8.125),
    ("int4-g32", 4096, 4.5),
    ("int4-g64", 4096, 4.25),
    ("int4-g128", 4096, 4.125),
    ("int4-g32-asym", 4096, 4.75),  # (16 + 8) / 32
    ("int4-g64-asym", 4096, 4.375),
    ("int4-g128-asym", 4096, 4.1875),
    ("int4-g32-min", 4096, 5.0),  # (16 + 16) / 32
    ("int4-g64-min", 4096, 4.5),
    ("int4-g128-min", 4096, 4.25),
    ("int4-g32-f32-min", 4096, 6.0),  # (32 + 32) / 32
    ("int8-g32-f16", 4096, 8.5),  # float16 is as large as bf16
    ("int8-g16-f32", 4096, 10.0),  # 32 / 16
    ("int8-g32-f32", 4096, 9.0),
    ("int4-g32-f16", 4096, 4.5),
    ("int4-g64-f16", 4096, 4.25),
    ("int4-g128-f16", 4096, 4.125),
    ("int4-g32-f16-asym", 4096, 4.75),
    ("int4-g64-f16-asym", 4096, 4.375),
    ("int4-g128-f16-asym", 4096, 4.1875),
    ("int4-g32-f16-min", 4096, 5.0),
    ("int4-g32", 40, 4.8),  # two groups for 40 inputs: 4 + 32 / 40
    ("fp8", 4096, 8.25),  # 32 / 128
    ("fp8-channel", 4096, 8 + 32 / 4096),
    ("mxfp8", 4096, 8.25),  # 8 / 32
    ("mxfp4", 4096, 4.25),
    ("nvfp4", 4096, 4.5 + 32 / 4096),  # 8 / 16, and one float32 per output
    ("int4-g128-asym", 16, 5.5),  # one group for 16: 4 + 24 / 16
]


@pytest.mark.parametrize(("name", "inputs", "bits"), BITS)
def test_bits_per_weight(name: str, inputs: int, bits: float) -> None:
    assert FORMATS[name].bits_per_weight(inputs) == bits


def test_every_built_in_format_has_its_bits_checked() -> None:
    assert {name for name, _, _ in BITS} == set(FORMATS)


def test_names_of_built_in_formats_say_what_they_are() -> None:
    checks: dict[str, Callable[[Format], bool]] = {
        "bf16": lambda f: f.element is Element.BF16,
        "int8": lambda f: f.element is Element.INT8,
        "int4": lambda f: f.element is Element.INT4,
        "asym": lambda f: f.has_zero_point,
        "min": lambda f: f.has_minimum,
        "f16": lambda f: f.scale is ScaleType.FLOAT16,
        "f32": lambda f: f.scale is ScaleType.FLOAT32 and f.group_size is not None,
        "fp8": lambda f: f.element is Element.FP8 and f.group_size == 128,
        "channel": lambda f: f.element is Element.FP8 and f.group_size is None,
        "mxfp8": lambda f: f.element is Element.FP8 and f.scale is ScaleType.E8M0,
        "mxfp4": lambda f: f.element is Element.FP4 and f.scale is ScaleType.E8M0,
        "nvfp4": lambda f: f.element is Element.FP4 and f.scale is ScaleType.E4M3,
        "g16": lambda f: f.group_size == 16,
        "g32": lambda f: f.group_size == 32,
        "g64": lambda f: f.group_size == 64,
        "g128": lambda f: f.group_size == 128,
    }
    for name, form in FORMATS.items():
        if form.element.is_integer or form.element is Element.BF16:
            words = {word for word, is_true in checks.items() if is_true(form)}
            assert words == set(name.split("-"))
        else:
            assert all(checks[word](form) for word in name.split("-")[-1:])
