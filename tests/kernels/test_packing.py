"""The packed bytes of an expert, read back as csrc/format/layout.hpp draws them.

The decoder here shares nothing with csrc/: it takes the bytes apart by the drawing alone. What it
finds must be the reference's codes, scales and zero points, bit for bit, on every instruction set.
Longer than most files, because all of it needs the decoder.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kernels.devices import ISAS, device_for, packed_bytes
from kt_core.interfaces import ExpertWeights, QuantizedTensor
from kt_core.quant import BUILT_IN_FORMATS
from kt_core.quant.reference import dequantize, quantize
from kt_core.types import (
    Activation,
    ActivationKind,
    ActivationPrecision,
    Element,
    Format,
    MoeSpec,
    ScaleType,
)
from kt_cpu.backend import CpuDevice
from kt_cpu.kernel import CpuExpertKernel

# csrc/ is written over descriptors: these are not registered, and must work all the same.
UNREGISTERED = [
    Format(name="int4-row", element=Element.INT4, scale=ScaleType.FLOAT32),
    Format(name="int4-row-asym", element=Element.INT4, scale=ScaleType.BF16, has_zero_point=True),
    Format(name="int8-g64-f32", element=Element.INT8, scale=ScaleType.FLOAT32, group_size=64),
    Format(name="int4-row-min", element=Element.INT4, scale=ScaleType.FLOAT32, has_minimum=True),
    Format(
        name="int4-g128-f16-min",
        element=Element.INT4,
        scale=ScaleType.FLOAT16,
        group_size=128,
        has_minimum=True,
    ),
]
FORMATS = {f.name: f for f in [*(b.descriptor for b in BUILT_IN_FORMATS), *UNREGISTERED]}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PROJECTIONS = ("gate", "up", "down")
LARGEST_FLOAT16 = 65504.0  # of minimums too
UNGATED = Activation(kind=ActivationKind.RELU2, is_gated=False)


@pytest.fixture(scope="module", params=ISAS)
def device(request: pytest.FixtureRequest) -> Iterator[CpuDevice]:
    with open_device(request.param) as opened:
        yield opened


def open_device(isa: str) -> CpuDevice:
    return device_for(isa, 1)


# ---------------------------------------------------------------- the drawing, read in Python


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


@dataclass(frozen=True)
class Matrix:
    """One packed matrix, padding included: ``weight = scales * (codes - zeros) - minimums``."""

    codes: NDArray[np.int32]  # [padded rows, padded cols]; the 16 bits of a bfloat16
    scales: NDArray[np.float32]  # [padded rows, groups]; no groups for bf16
    zeros: NDArray[np.int32]  # [padded rows, groups]; 0 where codes are signed
    minimums: NDArray[np.float32]  # [padded rows, groups], or no groups
    outputs: NDArray[np.float32]  # [padded rows], or empty


class Bytes:
    """Taken off the front, in pieces that each fill whole 64-byte rows."""

    def __init__(self, raw: bytes) -> None:
        self.raw, self.at = raw, 0

    def take(self, count: int, dtype: str) -> NDArray[np.generic]:
        size = count * np.dtype(dtype).itemsize
        piece = self.raw[self.at : self.at + size]
        padding = self.raw[self.at + size : self.at + round_up(size, 64)]
        assert len(piece) == size, "the expert is shorter than drawn"
        assert not any(padding), "padding holds something"
        self.at += round_up(size, 64)
        return np.frombuffer(piece, dtype)


SCALE_TYPES = {
    None: "V0",
    ScaleType.FLOAT32: "<f4",
    ScaleType.BF16: "<u2",
    ScaleType.FLOAT16: "<f2",
    ScaleType.E8M0: "u1",
    ScaleType.E4M3: "u1",
}


def read_scales(raw: NDArray[np.generic], kind: ScaleType | None) -> NDArray[np.generic]:
    """One-byte scales: an exponent of bias 127, or e5m3 with bias 10 (zero means zero)."""
    match kind:
        case ScaleType.BF16:
            return (raw.astype(np.uint32) << 16).view(np.float32)
        case ScaleType.E8M0:
            return np.ldexp(np.float32(1), raw.astype(np.int32) - 127)
        case ScaleType.E4M3:
            exponent = (raw >> 3).astype(np.int32) - 10
            value = np.ldexp(1 + (raw & 7) / 8, exponent).astype(np.float32)
            return np.where(raw == 0, np.float32(0), value)
    return raw


def take_panel(raw: Bytes, weight_format: Format, cols: int) -> Matrix:
    group_size = weight_format.group_size
    padded = round_up(cols, max(64, group_size or 0))
    group_cols = group_size or padded
    groups = padded // group_cols
    scale_bytes = 16 * np.dtype(SCALE_TYPES[weight_format.scale]).itemsize
    zero_bytes = 16 if weight_format.has_zero_point else 0
    minimum_bytes = scale_bytes if weight_format.has_minimum else 0
    group_bytes = scale_bytes + zero_bytes + minimum_bytes
    block = 1
    while group_size and block * group_bytes % 64:
        block *= 2

    outputs = raw.take(16 if weight_format.has_output_scale else 0, "<f4")
    codes, scales, minimums, zeros = [], [], [], np.zeros((16, groups), np.int32)
    for first in range(0, groups, block):
        last = min(first + block, groups)
        header = raw.take(block * group_bytes, "u1")
        split = block * scale_bytes
        for found, piece in ((scales, header[:split]), (minimums, header[split:])):
            if scale_bytes and (found is scales or minimum_bytes):
                stored = piece.view(SCALE_TYPES[weight_format.scale]).reshape(block, 16)
                found.extend(read_scales(stored[: last - first], weight_format.scale))
                assert not stored[last - first :].any(), "padding holds something"
        if zero_bytes:
            points = header[split:].reshape(block, 16)
            zeros[:, first:last] = points[: last - first].T
            assert not points[last - first :].any(), "padding holds something"
        codes.append(take_codes(raw, weight_format, (last - first) * group_cols))
    per_group = (np.array(found, np.float32).reshape(-1, 16).T for found in (scales, minimums))
    scale, minimum = per_group
    return Matrix(np.concatenate(codes, axis=1), scale, zeros, minimum, outputs.astype(np.float32))


def take_codes(raw: Bytes, weight_format: Format, cols: int) -> NDArray[np.int32]:
    match weight_format.element:
        case Element.BF16:
            lanes = raw.take(cols * 16, "<u2").reshape(-1, 16, 2).astype(np.int32)
        case Element.INT8:
            lanes = raw.take(cols * 16, "u1").reshape(-1, 16, 4).astype(np.int32) - 128
        case Element.INT4:
            pairs = raw.take(cols * 8, "u1").reshape(-1, 16, 4).astype(np.int32)
            lanes = np.concatenate([pairs & 15, pairs >> 4], axis=-1)
            lanes = lanes - 8 if weight_format.has_signed_codes else lanes
        case Element.FP8:
            lanes = raw.take(cols * 16, "u1").reshape(-1, 16, 4)[..., [0, 2, 1, 3]]
            lanes = lanes.astype(np.int32)
        case Element.FP4:
            halves = raw.take(cols * 4, "<u2").reshape(-1, 16, 2).astype(np.int32)
            nibbles = [halves >> shift & 15 for shift in (0, 4, 8, 12)]
            lanes = np.stack(nibbles, axis=-2).reshape(-1, 16, 8)
    return lanes.transpose(1, 0, 2).reshape(16, cols)


def stacked(panels: list[Matrix]) -> Matrix:
    return Matrix(
        np.concatenate([p.codes for p in panels]),
        np.concatenate([p.scales for p in panels]),
        np.concatenate([p.zeros for p in panels]),
        np.concatenate([p.minimums for p in panels]),
        np.concatenate([p.outputs for p in panels]),
    )


def decode(
    raw: bytes, spec: MoeSpec, weight_format: Format
) -> tuple[dict[str, Matrix], dict[str, NDArray[np.generic]]]:
    """Matrices and biases of one packed expert."""
    rest = Bytes(raw)
    hidden, inner = spec.hidden_size, spec.intermediate_size
    gated = ["gate"] if spec.activation.is_gated else []
    panels: dict[str, list[Matrix]] = {name: [] for name in (*gated, "up", "down")}
    for _ in range(0, inner, 16):
        for name in (*gated, "up"):
            panels[name].append(take_panel(rest, weight_format, hidden))
    for _ in range(0, hidden, 16):
        panels["down"].append(take_panel(rest, weight_format, inner))
    biases = {}
    if spec.has_bias:
        for name in (*gated, "up", "down"):
            biases[name] = rest.take(round_up(hidden if name == "down" else inner, 16), "<f4")
    assert rest.at == len(raw), "the expert is longer than drawn"
    return {name: stacked(p) for name, p in panels.items()}, biases


def expect_matrix(name: str, got: Matrix, want: QuantizedTensor) -> None:
    """The numbers are the reference's; what was added to fill panels and rows is worth 0."""
    rows, cols = want.codes.shape
    if want.scales is None:
        bits = want.codes.contiguous().view(torch.int16).numpy().view(np.uint16).astype(np.int32)
        np.testing.assert_array_equal(got.codes[:rows, :cols], bits, err_msg=name)
        assert not got.codes[rows:].any(), name
        assert not got.codes[:, cols:].any(), name
        return
    groups = want.scales.shape[1]
    codes = want.codes
    if codes.dtype is torch.float8_e4m3fn:
        codes = codes.view(torch.uint8)
    np.testing.assert_array_equal(got.codes[:rows, :cols], codes.numpy(), err_msg=name)
    if want.output_scales is not None:
        np.testing.assert_array_equal(
            got.outputs[:rows].view(np.uint32), want.output_scales.numpy().view(np.uint32)
        )
        assert not got.outputs[rows:].any(), name
    expect_same_bits(f"scales of {name}", got.scales[:rows, :groups], want.scales)
    if want.minimums is not None:
        expect_same_bits(f"minimums of {name}", got.minimums[:rows, :groups], want.minimums)
        assert not got.minimums[rows:].any(), name
        assert not got.minimums[:, groups:].any(), name
    if want.zero_points is not None:
        np.testing.assert_array_equal(
            got.zeros[:rows, :groups], want.zero_points.numpy(), err_msg=f"zeros of {name}"
        )
    if want.weight_format.scale is not ScaleType.E8M0:  # has no zero
        assert not got.scales[rows:].any(), name
        assert not got.scales[:, groups:].any(), name

    def spread(per_group: NDArray[np.generic]) -> NDArray[np.generic]:
        return np.repeat(per_group, got.codes.shape[1] // per_group.shape[1], axis=1)

    value = got.codes - spread(got.zeros)
    assert not value[rows:].any(), f"{name}: outputs beyond the last are not 0"
    if want.minimums is None:
        assert not value[:, cols:].any(), f"{name}: inputs beyond the last are not 0"
    else:  # no code nearer to 0: half a step, and the rounding of these products
        step = spread(got.scales).astype(np.float64)
        weight = (step * got.codes - spread(got.minimums))[:, cols:]
        assert (np.abs(weight) <= 0.50001 * step[:, cols:]).all(), name


def expect_same_bits(name: str, got: NDArray[np.float32], want: torch.Tensor) -> None:
    bits = np.ascontiguousarray(got).view(np.uint32)
    np.testing.assert_array_equal(bits, want.numpy().view(np.uint32), err_msg=name)


def expect_expert(kernel: CpuExpertKernel, expert: int, weights: ExpertWeights) -> None:
    spec, weight_format = kernel.spec, kernel.weight_format
    matrices, biases = decode(packed_bytes(kernel, expert), spec, weight_format)
    for name, matrix in matrices.items():
        tensor = getattr(weights, name)
        expect_matrix(name, matrix, quantize(tensor, weight_format))
    for name, bias in biases.items():
        want = getattr(weights, f"{name}_bias").float().numpy()
        np.testing.assert_array_equal(bias[: len(want)], want)
        assert not bias[len(want) :].any()


# ---------------------------------------------------------------- what is packed


def random_weights(
    spec: MoeSpec, dtype: torch.dtype = torch.float32, seed: int = 0
) -> ExpertWeights:
    """Rows of different size, positive ones, negative ones and mixed ones."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, cols: int) -> torch.Tensor:
        values = torch.randn(rows, cols, generator=generator)
        values[1::4] = values[1::4].abs()
        values[2::4] = -values[2::4].abs()
        return (values * torch.rand(rows, 1, generator=generator)).to(dtype)

    def bias(size: int) -> torch.Tensor | None:
        return torch.randn(size, generator=generator).to(dtype) if spec.has_bias else None

    inner, hidden, gated = spec.intermediate_size, spec.hidden_size, spec.activation.is_gated
    return ExpertWeights(
        gate=matrix(inner, hidden) if gated else None,
        up=matrix(inner, hidden),
        down=matrix(hidden, inner),
        gate_bias=bias(inner) if gated else None,
        up_bias=bias(inner),
        down_bias=bias(hidden),
    )


def loaded(
    device: CpuDevice, spec: MoeSpec, weight_format: Format, *experts: ExpertWeights
) -> CpuExpertKernel:
    kernel = device.expert_kernel(spec, weight_format)
    for index, weights in enumerate(experts):
        kernel.load(index, weights)
    return kernel


@pytest.mark.parametrize("weight_format", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize(
    ("hidden", "inner", "dtype"),
    [
        (1, 1, "float32"),
        (16, 64, "bfloat16"),
        (63, 17, "float16"),
        (33, 40, "bfloat16"),
        (129, 31, "float16"),
        (97, 130, "float32"),
    ],
)
def test_bytes_are_as_drawn(
    device: CpuDevice, weight_format: Format, hidden: int, inner: int, dtype: str
) -> None:
    """Odd shapes, every type on disk; the second expert is checked, so that strides count."""
    spec = MoeSpec(num_experts=2, hidden_size=hidden, intermediate_size=inner)
    weights = random_weights(spec, DTYPES[dtype])
    kernel = loaded(device, spec, weight_format, random_weights(spec, seed=1), weights)
    expect_expert(kernel, 1, weights)


@pytest.mark.parametrize("activation", [Activation(kind=ActivationKind.SILU), UNGATED])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_biases_and_experts_without_a_gate(
    device: CpuDevice, activation: Activation, dtype: torch.dtype
) -> None:
    spec = MoeSpec(
        num_experts=2,
        hidden_size=50,
        intermediate_size=34,
        activation=activation,
        has_bias=True,
    )
    weights = random_weights(spec, dtype)
    for name in ("bf16", "int8", "int4-g32-asym"):
        expect_expert(
            loaded(device, spec, FORMATS[name], random_weights(spec, seed=1), weights), 1, weights
        )


def strided_views(matrix: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same numbers, in the layouts that checkpoints have."""
    rows, cols = matrix.shape
    wide = torch.full((rows * 2 + 1, cols * 3 + 1), float("nan"), dtype=matrix.dtype)
    every = wide[1::2, 1::3]
    every.copy_(matrix)
    deep = torch.full((cols * 2, rows), float("nan"), dtype=matrix.dtype)
    deep[1::2].copy_(matrix.T)
    return {
        "transposed": matrix.T.contiguous().T,
        "transposed, every second input": deep[1::2].T,
        "every second output, every third input": every,
        "one row for all": matrix[:1].expand(rows, cols),
        "one column for all": matrix[:, :1].expand(rows, cols),
    }


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("name", ["bf16", "int8", "int4-g32", "int4-g64-asym"])
def test_strided_sources(device: CpuDevice, name: str, dtype: torch.dtype) -> None:
    spec = MoeSpec(num_experts=1, hidden_size=43, intermediate_size=37)
    plain = random_weights(spec, dtype)
    gates, ups, downs = (strided_views(getattr(plain, name)) for name in PROJECTIONS)
    for kind in gates:
        weights = ExpertWeights(gate=gates[kind], up=ups[kind], down=downs[kind])
        expect_expert(loaded(device, spec, FORMATS[name], weights), 0, weights)


def extreme_rows(cols: int) -> dict[str, torch.Tensor]:
    """One row each of numbers that rounding, division or the scale's own type trip over."""
    ramp = torch.arange(cols, dtype=torch.float32)
    signs = 1 - 2 * (ramp % 2)
    halves = (ramp % 7 + 0.5) * signs
    rows = {
        "all zero": ramp * 0,
        "negative zero": -(ramp * 0),
        "one outlier": torch.where(ramp == 5, 1e30, 1e-3 * signs),
        "tiny": 1e-37 * signs * (1 + ramp),
        "subnormal": 1.4012984643e-45 * (1 + ramp % 29) * signs,
        "around the smallest scale": 1.4012984643e-45 * (ramp % 8),
        "huge": 1e35 * signs * (ramp % 11),
        "largest of bf16 but one": torch.full_like(ramp, 3.3762e38),
        "ties of int4": torch.where(ramp % 32 == 3, 7, halves.clamp(-6.5, 6.5)),
        "ties of int8": torch.where(ramp % 32 == 3, 127, halves * 17),
        # range 15, so scale 1 and zero 5
        "ties with a zero point": torch.where(
            ramp % 32 == 3, -5, torch.where(ramp % 32 == 9, 10, halves.clamp(-4.5, 6.5))
        ),
        # range 15 and -low / scale = 4.5: the zero point itself is a tie
        "tie of the zero point": torch.where(
            ramp % 32 == 3, -4.5, torch.where(ramp % 32 == 9, 10.5, ramp % 4)
        ),
        # 1 + 2^-8 is halfway between two bf16: ties of the scale
        "ties of the scale": 7 * (1 + (1 + 2 * (ramp // 32 % 2)) * 2.0**-8) * signs,
        "negative only": -1 - ramp % 5,
        "positive only": 1 + ramp % 5,
        "signs alternate": signs,
    }
    return {name: row.float() for name, row in rows.items()}


@pytest.mark.parametrize("weight_format", FORMATS.values(), ids=FORMATS.keys())
def test_extreme_values(device: CpuDevice, weight_format: Format) -> None:
    matrix = torch.stack(list(extreme_rows(139).values()))
    if weight_format.scale is ScaleType.FLOAT16:
        matrix = matrix.clamp(-LARGEST_FLOAT16, LARGEST_FLOAT16)
    rows, cols = matrix.shape
    spec = MoeSpec(num_experts=1, hidden_size=cols, intermediate_size=rows, activation=UNGATED)
    weights = ExpertWeights(up=matrix, down=matrix.T.contiguous())
    expect_expert(loaded(device, spec, weight_format, weights), 0, weights)


@pytest.mark.parametrize("weight_format", FORMATS.values(), ids=FORMATS.keys())
def test_every_binary_exponent(device: CpuDevice, weight_format: Format) -> None:
    """Random mantissas over the whole range of float32: 60,000 quotients per format."""
    generator = torch.Generator().manual_seed(7)
    exponents = torch.linspace(-148, 120, 200).unsqueeze(1)
    matrix = torch.randn(200, 300, generator=generator) * torch.pow(2.0, exponents)
    if weight_format.scale is ScaleType.FLOAT16:
        matrix = matrix.clamp(-LARGEST_FLOAT16, LARGEST_FLOAT16)
    spec = MoeSpec(num_experts=1, hidden_size=300, intermediate_size=200, activation=UNGATED)
    weights = ExpertWeights(up=matrix, down=matrix.T)
    expect_expert(loaded(device, spec, weight_format, weights), 0, weights)


@pytest.mark.parametrize("weight_format", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize(("hidden", "inner"), [(1, 1), (64, 128), (43, 149)])
def test_quantised_tensors_give_the_same_bytes(
    device: CpuDevice, weight_format: Format, hidden: int, inner: int
) -> None:
    spec = MoeSpec(num_experts=2, hidden_size=hidden, intermediate_size=inner)
    dense = random_weights(spec)
    kernel = loaded(device, spec, weight_format, dense, quantized(dense, weight_format))
    assert packed_bytes(kernel, 0) == packed_bytes(kernel, 1)
    expect_expert(kernel, 1, dense)


def quantized(dense: ExpertWeights, weight_format: Format) -> ExpertWeights:
    parts = {name: quantize(getattr(dense, name), weight_format) for name in PROJECTIONS}
    return replace(dense, **parts)


@pytest.mark.parametrize("form", ["int4-g32-asym", "int4-g32-f16-min"])
def test_quantised_tensors_may_be_strided_views(form: str) -> None:
    spec = MoeSpec(num_experts=2, hidden_size=70, intermediate_size=33)
    weight_format = FORMATS[form]
    dense = random_weights(spec)
    views = {}
    for name in PROJECTIONS:
        parts = quantize(getattr(dense, name), weight_format)
        strided = {
            part: getattr(parts, part).T.contiguous().T
            for part in ("codes", "scales", "zero_points", "minimums")
            if getattr(parts, part) is not None
        }
        views[name] = replace(parts, **strided)
    with open_device("scalar") as device:
        kernel = loaded(device, spec, weight_format, dense, ExpertWeights(**views))
    assert packed_bytes(kernel, 0) == packed_bytes(kernel, 1)


def test_loading_again_replaces_the_expert(device: CpuDevice) -> None:
    """Also what lies beyond the last output and input."""
    spec = MoeSpec(num_experts=1, hidden_size=37, intermediate_size=19, has_bias=True)
    for name in ("bf16", "int8-g32", "int4-g128-asym"):
        first, second = random_weights(spec), random_weights(spec, seed=1)
        kernel = loaded(device, spec, FORMATS[name], first)
        kernel.load(0, second)
        expect_expert(kernel, 0, second)


# H = 96, I = 40, worked out by hand. Outputs: gate and up have 3 panels of 16, down has 6. Inputs:
# 96 are padded to 128; 40 to 64, and to 128 in groups of 128. A panel is blocks of 1, 2 or 4
# groups: scales and zero points in whole 64-byte rows, then inputs * 16 * bits / 8 of weights:
#   bf16            gate, up: 4096                           down: 2048
#   int8            64 + 2048                                64 + 1024
#   int8-g32        2 blocks of (64 + 2 * 512)               1 block: 64 + 1024
#   int4-g32        2 blocks of (64 + 2 * 256)               1 block: 64 + 512
#   int4-g32-asym   1 block of 4 * (32 + 16) + 1024          half a block: 192 + 512
#   int4-g128       half a block: 64 + 1024                  the same
#   int4-g128-asym  a quarter of a block: 192 + 1024         the same
#   fp8             1 block: 64 + 2048                       the same
#   fp8-channel     64 + 2048                                64 + 1024
#   int8-g32-f16    as int8-g32                              as int8-g32
#   int4-g32-min    4 blocks of (32 + 32 + 256)              2 blocks of (32 + 32 + 256)
#   int4-g32-f32-min  4 blocks of (64 + 64 + 256)            2 blocks of (64 + 64 + 256)
#   int4-g128-f16-asym  as int4-g128-asym                    as int4-g128-asym
#   mxfp8           1 block: 4 * 16 + 2048                   half a block: 64 + 1024
#   mxfp4           1 block: 4 * 16 + 1024                   half a block: 64 + 512
#   nvfp4           64, 2 blocks of (4 * 16 + 512)           64, 1 block: 64 + 512
DRAWN_BYTES = {
    "bf16": 6 * 4096 + 6 * 2048,
    "int8": 6 * 2112 + 6 * 1088,
    "int8-g32": 6 * 2176 + 6 * 1088,
    "int4-g32": 6 * 1152 + 6 * 576,
    "int4-g32-asym": 6 * 1216 + 6 * 704,
    "int4-g128": 6 * 1088 + 6 * 1088,
    "int4-g128-asym": 6 * 1216 + 6 * 1216,
    "int8-g32-f16": 6 * 2176 + 6 * 1088,
    "int4-g32-min": 6 * 1280 + 6 * 640,
    "int4-g32-f32-min": 6 * 1536 + 6 * 768,
    "int4-g128-f16-asym": 6 * 1216 + 6 * 1216,
    "fp8": 6 * 2112 + 6 * 2112,
    "fp8-channel": 6 * 2112 + 6 * 1088,
    "mxfp8": 6 * 2112 + 6 * 1088,
    "mxfp4": 6 * 1088 + 6 * 576,
    "nvfp4": 6 * 1216 + 6 * 640,
}


@pytest.mark.parametrize(("name", "size"), DRAWN_BYTES.items())
def test_bytes_per_expert_by_hand(name: str, size: int) -> None:
    gated = MoeSpec(num_experts=1, hidden_size=96, intermediate_size=40)
    with open_device("scalar") as device:
        assert device.expert_bytes(gated, FORMATS[name]) == size
        # float32 biases of 48, 48 and 96 padded outputs
        with_bias = replace(gated, has_bias=True)
        assert device.expert_bytes(with_bias, FORMATS[name]) == size + 4 * (48 + 48 + 96)
        kernel = device.expert_kernel(with_bias, FORMATS[name])
        kernel.load(0, random_weights(with_bias))
        assert kernel.bytes_per_expert == len(packed_bytes(kernel, 0)) == size + 768


# ---------------------------------------------------------------- what is refused

NOT_FINITE = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}
SMALL = MoeSpec(num_experts=2, hidden_size=37, intermediate_size=19, has_bias=True)


def with_value(
    weights: ExpertWeights, name: str, at: tuple[int, ...], value: float
) -> ExpertWeights:
    tensor = getattr(weights, name).clone()
    tensor[at] = value
    return replace(weights, **{name: tensor})


def expect_refusal(kernel: CpuExpertKernel, bad: ExpertWeights, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernel.load(1, bad)
    assert kernel.resident() == frozenset()


def expect_healing(kernel: CpuExpertKernel, good: ExpertWeights) -> None:
    """What was refused cannot be asked for; a good expert can be loaded in its place."""
    hidden, ids = torch.zeros(1, kernel.spec.hidden_size), torch.ones(1, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="expert 1 is not resident"):
        kernel.submit(hidden, ids, torch.ones(1, 1))
    kernel.load(1, good)
    assert kernel.resident() == {1}
    expect_expert(kernel, 1, good)


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("name", ["bf16", "int8", "int4-g32", "int4-g64-asym"])
def test_weight_that_is_not_finite(device: CpuDevice, name: str, projection: str) -> None:
    kernel = device.expert_kernel(SMALL, FORMATS[name])
    for dtype in DTYPES.values():
        good = random_weights(SMALL, dtype)
        for value in NOT_FINITE.values():
            for at in [(0, 0), (17, 16), (-1, -1)]:
                bad = with_value(good, projection, at, value)
                message = f"the {projection} projection of expert 1 holds a NaN or an infinity"
                expect_refusal(kernel, bad, message)
    expect_healing(kernel, good)


@pytest.mark.parametrize("name", ["gate_bias", "up_bias", "down_bias"])
def test_bias_that_is_not_finite(name: str) -> None:
    good = random_weights(SMALL)
    with open_device("scalar") as device:
        kernel = device.expert_kernel(SMALL, FORMATS["int8"])
        for value in NOT_FINITE.values():
            bad = with_value(good, name, (-1,), value)
            expect_refusal(kernel, bad, f"{name} holds a NaN or an infinity")
        # finite in float64, infinite in the float32 that is stored
        wide = replace(good, **{name: getattr(good, name).double() + 1e300})
        expect_refusal(kernel, wide, f"{name} (holds a NaN or an infinity|must be)")
        expect_healing(kernel, good)


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize(
    "name",
    ["int8", "int8-g32", "int4-g32", "int4-g64-asym", "int4-g32-f16", "int4-g32-min", "fp8"],
)
def test_scale_that_is_not_finite(device: CpuDevice, name: str, projection: str) -> None:
    kernel = device.expert_kernel(SMALL, FORMATS[name])
    dense = random_weights(SMALL)
    good = quantized(dense, FORMATS[name])
    # a float32 scale that its type cannot hold becomes infinite when it is stored
    too_large = {ScaleType.BF16: {"overflow": 3.4e38}, ScaleType.FLOAT16: {"overflow": 65520.0}}
    overflow = too_large.get(FORMATS[name].scale or ScaleType.FLOAT32, {})
    for part in ("scales", "minimums") if FORMATS[name].has_minimum else ("scales",):
        for value in {**NOT_FINITE, **overflow}.values():
            tensor = getattr(good, projection)
            numbers = getattr(tensor, part).clone()
            numbers[-1, -1] = value
            bad = replace(good, **{projection: replace(tensor, **{part: numbers})})
            message = f"the {projection} projection of expert 1 holds a NaN or an infinity"
            expect_refusal(kernel, bad, message)
    expect_healing(kernel, dense)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_quantised_bf16_that_is_not_finite(projection: str) -> None:
    dense = random_weights(SMALL)
    good = quantized(dense, FORMATS["bf16"])
    codes = getattr(good, projection).codes.clone()
    codes[3, 2] = float("inf")
    bad = replace(good, **{projection: replace(getattr(good, projection), codes=codes)})
    with open_device("scalar") as device:
        kernel = device.expert_kernel(SMALL, FORMATS["bf16"])
        expect_refusal(kernel, bad, f"the {projection} projection of expert 1")
        expect_healing(kernel, dense)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_weight_beyond_the_range_of_bf16(device: CpuDevice, projection: str) -> None:
    """bf16 ends at 3.3895e38; beyond the middle to the next power of two float32 rounds away."""
    good = random_weights(SMALL)
    kernel = device.expert_kernel(SMALL, FORMATS["bf16"])
    edge = float.fromhex("0x1.fep127")
    half_step = float.fromhex("0x1p119")
    fits = with_value(good, projection, (-1, -1), edge + 0.99 * half_step)
    kernel.load(0, fits)
    expect_expert(kernel, 0, fits)
    kernel.unload(0)
    for value in (edge + half_step, -edge - half_step):
        bad = with_value(good, projection, (-1, -1), value)
        expect_refusal(kernel, bad, f"the {projection} projection of expert 1 holds")
    expect_healing(kernel, good)


def test_group_whose_range_overflows(device: CpuDevice) -> None:
    """max - min is infinite in float32: an infinite scale would turn outputs into NaN."""
    good = random_weights(SMALL)
    bad = with_value(with_value(good, "up", (0, 0), 3e38), "up", (0, 1), -3e38)
    kernel = device.expert_kernel(SMALL, FORMATS["int4-g32-asym"])
    expect_refusal(kernel, bad, "the up projection of expert 1 holds a NaN or an infinity")
    expect_healing(kernel, good)
    kernel = device.expert_kernel(SMALL, FORMATS["int4-g32"])
    kernel.load(1, bad)
    expect_expert(kernel, 1, bad)


@pytest.mark.parametrize(
    ("name", "part", "change", "message"),
    [
        ("int4-g32", "codes", lambda t: t[:, 1:], "codes of up must be .*19, 37"),
        ("int4-g32", "codes", lambda t: t.to(torch.int32), "torch.int8.*, got"),
        ("int4-g32", "codes", lambda t: t + 8, "codes of up must be in -8..7, got 15"),
        ("int4-g32", "codes", lambda t: t - 9, "codes of up must be in -8..7, got -1"),
        ("int4-g32-asym", "codes", lambda t: t + 1, "codes of up must be in 0..15, got 16"),
        ("int4-g32-asym", "zero_points", lambda t: t[:1], "zero_points of up must be .*19, 2"),
        ("int4-g32-asym", "zero_points", lambda t: None, "zero_points of up must be"),
        ("int4-g32-asym", "zero_points", lambda t: t * 0 + 17, "must be in 0..16, got 17"),
        ("int4-g32-min", "codes", lambda t: t + 1, "codes of up must be in 0..15, got 16"),
        ("int4-g32-min", "minimums", lambda t: None, "minimums of up must be"),
        ("int4-g32-min", "minimums", lambda t: t[:, :1], "minimums of up must be .*19, 2"),
        ("int4-g32", "minimums", lambda t: torch.zeros(19, 2), "minimums of up must be absent"),
        ("int4-g32", "scales", lambda t: t[:, :1], "scales of up must be .*19, 2"),
        ("int8", "scales", lambda t: t.bfloat16(), "torch.float32.*, got"),
        ("int8", "codes", lambda t: t.to("meta"), "codes of up must be on the cpu, got meta"),
        ("int8", "scales", lambda t: t.to("meta"), "scales of up must be on the cpu, got meta"),
    ],
)
def test_quantised_tensor_of_a_wrong_kind(
    name: str, part: str, change: object, message: str
) -> None:
    assert callable(change)
    good = quantized(random_weights(SMALL), FORMATS[name])
    assert isinstance(good.up, QuantizedTensor)
    bad = replace(good, up=replace(good.up, **{part: change(getattr(good.up, part))}))
    with open_device("scalar") as device:
        kernel = device.expert_kernel(SMALL, FORMATS[name])
        with pytest.raises(ValueError, match=message):
            kernel.load(0, bad)
        other = device.expert_kernel(SMALL, FORMATS["bf16"])
        with pytest.raises(ValueError, match=f"gate is '{name}', this layer 'bf16'"):
            other.load(0, good)
    assert kernel.resident() == other.resident() == frozenset()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"up": torch.zeros(37, 19)}, r"up must be \[19, 37\].*, got \[37, 19\]"),
        ({"down": torch.zeros(19, 37)}, r"down must be \[37, 19\]"),
        ({"gate": torch.zeros(19 * 37)}, r"gate must be \[19, 37\]"),
        ({"gate": None}, "gate is missing"),
        ({"gate_bias": None}, "gate_bias is missing"),
        ({"down_bias": None}, "down_bias is missing"),
        ({"up_bias": torch.zeros(37)}, r"up_bias must be \[19\]"),
        (
            {"up": torch.zeros(19, 37, dtype=torch.int8)},
            "up must be .*float32, bfloat16 or float16",
        ),
        ({"up": torch.zeros(19, 37, dtype=torch.float64)}, "got .*torch.float64"),
        ({"up": torch.zeros(19, 37, device="meta")}, "up must be on the cpu, got meta"),
        ({"up_bias": torch.zeros(19, device="meta")}, "up_bias must be on the cpu, got meta"),
    ],
)
def test_weights_of_a_wrong_kind(changes: dict[str, torch.Tensor | None], message: str) -> None:
    with open_device("scalar") as device:
        kernel = device.expert_kernel(SMALL, FORMATS["bf16"])
        with pytest.raises(ValueError, match=message):
            kernel.load(0, replace(random_weights(SMALL), **changes))
        assert kernel.resident() == frozenset()


def test_parts_that_the_layer_does_not_have() -> None:
    spec = replace(SMALL, has_bias=False, activation=UNGATED)
    good = random_weights(spec)
    with open_device("scalar") as device:
        kernel = device.expert_kernel(spec, FORMATS["bf16"])
        for name, extra in {"gate": torch.zeros(19, 37), "up_bias": torch.zeros(19)}.items():
            with pytest.raises(ValueError, match=f"{name} is not part of this layer"):
                kernel.load(0, replace(good, **{name: extra}))
        kernel.load(0, good)
        expect_expert(kernel, 0, good)


# ---------------------------------------------------------------- the unregistered formats compute


@pytest.mark.parametrize("precision", [ActivationPrecision.FLOAT32, ActivationPrecision.INT8])
@pytest.mark.parametrize("weight_format", UNREGISTERED, ids=lambda f: f.name)
def test_formats_that_only_a_descriptor_describes(
    device: CpuDevice, weight_format: Format, precision: ActivationPrecision
) -> None:
    """One scale and zero point per output over several blocks of activations.

    Longest dot product: 300 terms, ``300 u sum |terms|`` (Higham 2002, section 3.1); the relu
    between doubles it at most, and 4 covers the roundings of the weights and the weighted sum.
    An int8 activation is off by at most half a step, ``max / 254``; so is what lies between.
    """
    spec = MoeSpec(
        num_experts=1,
        hidden_size=300,
        intermediate_size=290,
        activation=Activation(kind=ActivationKind.RELU, is_gated=False),
    )
    dense = random_weights(spec)
    kernel = device.expert_kernel(spec, weight_format, precision=precision)
    kernel.load(0, dense)
    up, down = (
        dequantize(quantize(getattr(dense, name), weight_format)).double()
        for name in ("up", "down")
    )
    hidden = torch.randn(3, 300, generator=torch.Generator().manual_seed(3))
    ids = torch.zeros(3, 1, dtype=torch.int64)

    got = kernel.submit(hidden, ids, torch.ones(3, 1)).wait()

    x = hidden.double()
    inner = (x @ up.T).relu()
    allowed = 4 * 300 * 2.0**-24 * ((x.abs() @ up.abs().T) @ down.abs().T)
    if precision is ActivationPrecision.INT8:
        inner_error = x.abs().amax(1, keepdim=True) / 254 * up.abs().sum(1)
        inner_error += (inner + inner_error).amax(1, keepdim=True) / 254
        allowed += inner_error @ down.abs().T
    assert bool(((got - inner @ down.T).abs() <= allowed).all())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mxfp4", 3.0),
        ("mxfp8", -2.0),
        ("nvfp4", 0.3),
        ("nvfp4", -1.0),
        ("int8-g32", 1.001),
        ("int4-g32-f16", 0.1),
        ("int4-g32-f16", 2.0**-25),
    ],
)
def test_scale_of_another_type(name: str, value: float) -> None:
    good = quantized(random_weights(SMALL), FORMATS[name])
    assert isinstance(good.up, QuantizedTensor)
    assert good.up.scales is not None
    scales = good.up.scales.clone()
    scales[0, 0] = value
    with open_device("scalar") as device:
        kernel = device.expert_kernel(SMALL, FORMATS[name])
        bad = replace(good, up=replace(good.up, scales=scales))
        expect_refusal(
            kernel, bad, f"scales of up must be numbers of the type {FORMATS[name].scale}"
        )


@pytest.mark.parametrize("name", ["fp8", "fp8-channel", "mxfp8"])
def test_fp8_that_is_not_a_number(device: CpuDevice, name: str) -> None:
    good = quantized(random_weights(SMALL), FORMATS[name])
    assert isinstance(good.down, QuantizedTensor)
    kernel = device.expert_kernel(SMALL, FORMATS[name])
    for bits in (0x7F, 0xFF):
        codes = good.down.codes.clone()
        codes.view(torch.uint8)[-1, -1] = bits
        bad = replace(good, down=replace(good.down, codes=codes))
        expect_refusal(kernel, bad, "the down projection of expert 1 holds a NaN")
