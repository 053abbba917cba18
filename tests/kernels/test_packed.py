"""kt_core/packed/ against csrc/: the same bytes, and the same numbers out of them."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from kernels.devices import device_for, packed_bytes
from kt_core.interfaces import ExpertWeights, QuantizedTensor, stored_parts
from kt_core.packed import ExpertLayout, MatrixLayout
from kt_core.packed.codec import pack, unpack
from kt_core.quant import BUILT_IN_FORMATS
from kt_core.quant.reference import quantize
from kt_core.testing import reference
from kt_core.types import SILU, Activation, ActivationKind, Element, Format, MoeSpec, ScaleType
from kt_cpu.backend import CpuDevice

UNREGISTERED = [
    Format(name="int4-row", element=Element.INT4, scale=ScaleType.FLOAT32),
    Format(name="int4-row-asym", element=Element.INT4, scale=ScaleType.BF16, has_zero_point=True),
    Format(name="int4-row-min", element=Element.INT4, scale=ScaleType.FLOAT32, has_minimum=True),
    Format(name="int8-row-f16", element=Element.INT8, scale=ScaleType.FLOAT16),
]
FORMATS = {f.name: f for f in [*(b.descriptor for b in BUILT_IN_FORMATS), *UNREGISTERED]}
UNGATED = Activation(kind=ActivationKind.RELU2, is_gated=False)
SHAPES = [(1, 1), (33, 97), (64, 16), (160, 72), (200, 300), (257, 31)]
MATRICES = ("gate", "up", "down")


@pytest.fixture(scope="module")
def device() -> Iterator[CpuDevice]:
    with device_for(threads=1) as opened:
        yield opened


def random_weights(spec: MoeSpec) -> ExpertWeights:
    """With outputs and groups of zeros among them, whose scales are the least there is."""
    weights = reference.random_weights(spec, torch.Generator().manual_seed(3))
    for matrix in (weights.gate, weights.up, weights.down):
        if isinstance(matrix, torch.Tensor):
            matrix[-1] = 0
            matrix[:, :32] = 0 if matrix.shape[1] > 32 else matrix[:, :32]
    return weights


def quantized(weights: ExpertWeights, weight_format: Format) -> ExpertWeights:
    dense = {n: m for n in MATRICES if (m := getattr(weights, n)) is not None}
    return replace(weights, **{n: quantize(m, weight_format) for n, m in dense.items()})


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def expect_same(name: str, got: Any, want: Any) -> None:
    """Bit for bit, types and shapes included; parts of quantised tensors one by one."""
    if isinstance(want, QuantizedTensor):
        assert isinstance(got, QuantizedTensor), name
        assert got.weight_format == want.weight_format
        for field in fields(QuantizedTensor)[1:]:
            part = field.name
            expect_same(f"{part} of {name}", getattr(got, part), getattr(want, part))
    elif want is None:
        assert got is None, name
    else:
        assert (got.dtype, got.shape) == (want.dtype, want.shape), name
        assert torch.equal(bits(got), bits(want)), name


@pytest.mark.parametrize("weight_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("activation", [SILU, UNGATED], ids=["gated", "ungated"])
@pytest.mark.parametrize("has_bias", [False, True], ids=["no_bias", "bias"])
def test_same_bytes_and_same_numbers(
    device: CpuDevice, weight_format: Format, activation: Activation, has_bias: bool
) -> None:
    for hidden, inner in SHAPES:
        spec = MoeSpec(
            num_experts=1, hidden_size=hidden, intermediate_size=inner,
            activation=activation, has_bias=has_bias,
        )  # fmt: skip
        weights = random_weights(spec)
        stored = quantized(weights, weight_format)
        kernel = device.expert_kernel(spec, weight_format)
        kernel.load(0, weights)
        assert ExpertLayout.of(spec, weight_format).size_bytes == kernel.bytes_per_expert
        packed = kernel.packed(0)
        assert torch.equal(pack(stored, spec, weight_format), packed), f"{hidden} x {inner}"
        back = unpack(packed, spec, weight_format)
        for field in fields(ExpertWeights):
            expect_same(field.name, getattr(back, field.name), getattr(stored, field.name))


@pytest.mark.parametrize("weight_format", FORMATS.values(), ids=FORMATS)
def test_stored_numbers_that_no_quantiser_of_ours_makes(
    device: CpuDevice, weight_format: Format
) -> None:
    """Any codes, zero points up to 16, scales of 0: what checkpoints hold."""
    spec = MoeSpec(num_experts=1, hidden_size=150, intermediate_size=40)
    generator = torch.Generator().manual_seed(5)
    shapes = {"gate": (40, 150), "up": (40, 150), "down": (150, 40)}
    made = {n: any_numbers(weight_format, *shape, generator) for n, shape in shapes.items()}
    weights = ExpertWeights(gate=made["gate"], up=made["up"], down=made["down"])
    kernel = device.expert_kernel(spec, weight_format)
    kernel.load(0, weights)
    assert torch.equal(pack(weights, spec, weight_format), kernel.packed(0))
    back = unpack(kernel.packed(0), spec, weight_format)
    for name, want in made.items():
        got = getattr(back, name)
        for part in ("scales", "zero_points", "minimums", "output_scales"):
            expect_same(f"{part} of {name}", getattr(got, part), getattr(want, part))
        if weight_format.scale is not ScaleType.E4M3:  # groups of scale 0 lose their codes
            expect_same(f"codes of {name}", got.codes, want.codes)


def any_numbers(
    weight_format: Format, rows: int, cols: int, generator: torch.Generator
) -> QuantizedTensor:
    made: dict[str, torch.Tensor] = {}
    for name, part in stored_parts(weight_format, rows, cols).items():
        if part is None:
            continue
        shape, dtype = part
        values = torch.randn(shape, generator=generator)
        if name == "codes" and dtype in (torch.int8, torch.uint8):
            is_4_bit = weight_format.element is not Element.INT8
            low = 0 if dtype is torch.uint8 else -8 if is_4_bit else -128
            high = low + (16 if is_4_bit else 256)
            made[name] = torch.randint(low, high, shape, generator=generator).to(dtype)
        elif name == "zero_points":
            made[name] = torch.randint(0, 17, shape, generator=generator).to(dtype)
        elif name in ("scales", "minimums"):
            values = values.abs()
            values[::5] = 0
            made[name] = as_stored(values, weight_format.scale)
        else:
            made[name] = values.to(dtype)
    return QuantizedTensor(weight_format=weight_format, **made)  # type: ignore[arg-type]


def as_stored(values: torch.Tensor, scale: ScaleType | None) -> torch.Tensor:
    match scale:
        case ScaleType.BF16:
            return values.bfloat16().float()
        case ScaleType.FLOAT16:
            return values.half().float()
        case ScaleType.E8M0:
            return torch.exp2(values.clamp_min(1e-30).log2().floor().clamp_min(-127))
        case ScaleType.E4M3:
            return values.to(torch.float8_e4m3fn).float()
    return values


@pytest.mark.parametrize("weight_format", FORMATS.values(), ids=FORMATS)
def test_offsets(weight_format: Format) -> None:
    """Of each group: where the codec looks for its parts, and that no two overlap."""
    layout = MatrixLayout.of(weight_format, 20, 600)
    taken = [range(layout.front_bytes)]
    for group in range(layout.groups):
        for at, size in (
            (layout.scales_at(group), layout.scale_bytes),
            (layout.offsets_at(group), layout.offset_bytes),
            (layout.weights_at(group), layout.group_bytes),
        ):
            taken.append(range(at, at + size))
    covered = [byte for part in taken for byte in part]
    assert len(covered) == len(set(covered))
    assert max(covered) == layout.panel_bytes - 1
    assert layout.panel_bytes % 64 == 0


def test_a_view_keeps_the_layer(device: CpuDevice) -> None:
    spec = MoeSpec(num_experts=1, hidden_size=64, intermediate_size=64)
    kernel = device.expert_kernel(spec, FORMATS["int8"])
    kernel.load(0, random_weights(spec))
    assert kernel.packed(0).data_ptr() == kernel.packed(0).data_ptr(), "not a view"
    view, want = kernel.packed(0), packed_bytes(kernel, 0)
    del kernel
    gc.collect()
    assert view.numpy().tobytes() == want


@pytest.mark.parametrize("offset", [0, 1, 63])
def test_large_experts_are_gathered_in_pieces(offset: int) -> None:
    """Of a MiB and what is left, by three threads, to any address."""
    spec = MoeSpec(num_experts=3, hidden_size=1000, intermediate_size=700)
    with device_for(threads=3) as device:
        kernel = device.expert_kernel(spec, FORMATS["int8"])
        size = kernel.bytes_per_expert
        assert size > 2 << 20
        generator = torch.Generator().manual_seed(3)
        packed = torch.randint(0, 256, (3, size), dtype=torch.uint8, generator=generator)
        for expert in range(3):
            kernel.load_packed(expert, packed[expert])
        room = torch.zeros(offset + 3 * size + 64, dtype=torch.uint8)
        kernel.gather_packed([2, 0, 1], room[offset : offset + 3 * size])
        assert torch.equal(room[offset : offset + 3 * size], packed[[2, 0, 1]].flatten())
        assert not room[:offset].any()
        assert not room[offset + 3 * size :].any()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda w: replace(w, gate=None), "gate must be quantised to 'int4-g32'"),
        (lambda w: replace(w, up=torch.zeros(72, 160)), "up must be quantised"),
        (lambda w: replace(w, up=w.down), r"up must be \[72, 160\], got \[160, 72\]"),
        (lambda w: replace(w, up_bias=w.down_bias), r"a bias must be \[72\], got \[160\]"),
        (lambda w: replace(w, down_bias=None), "a bias must be .* got None"),
    ],
)
def test_pack_refuses_what_does_not_fit(change: Any, why: str) -> None:
    spec = MoeSpec(num_experts=1, hidden_size=160, intermediate_size=72, has_bias=True)
    weights = quantized(random_weights(spec), FORMATS["int4-g32"])
    with pytest.raises(ValueError, match=why):
        pack(change(weights), spec, FORMATS["int4-g32"])


def test_unpack_refuses_what_does_not_fit() -> None:
    spec = MoeSpec(num_experts=1, hidden_size=160, intermediate_size=72)
    size = ExpertLayout.of(spec, FORMATS["int8"]).size_bytes
    with pytest.raises(ValueError, match=rf"a packed int8 expert of this layer is \[{size}\]"):
        unpack(torch.zeros(size + 64, dtype=torch.uint8), spec, FORMATS["int8"])
    with pytest.raises(ValueError, match="in one piece"):
        unpack(torch.zeros(2 * size, dtype=torch.uint8)[::2], spec, FORMATS["int8"])
