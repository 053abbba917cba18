"""Dense layers: every instruction set, format and precision against the float64 reference."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from kernels.devices import ISAS, device_for, packed_bytes, precisions
from kt_core.errors import UnsupportedFormatError
from kt_core.interfaces import WeightFormat
from kt_core.packed.codec import pack_linear, unpack_linear
from kt_core.quant import BUILT_IN_FORMATS
from kt_core.testing import reference_linear
from kt_core.testing.backend_harness import is_within, worst_of
from kt_core.types import ActivationPrecision, LinearSpec
from kt_cpu.backend import CpuDevice
from kt_cpu.linear import CpuLinearKernel

FORMATS = {f.descriptor.name: f for f in BUILT_IN_FORMATS}
# One of each kind: without scales, a scale per output, groups, zero points, scales of outputs.
KINDS = ("bf16", "int8", "int4-g32", "int4-g64-asym", "fp8", "mxfp4", "nvfp4")
FLOAT32 = ActivationPrecision.FLOAT32


@pytest.fixture(scope="module", params=ISAS)
def device(request: pytest.FixtureRequest) -> Iterator[CpuDevice]:
    with device_for(request.param) as opened:
        yield opened


def loaded(
    device: CpuDevice,
    spec: LinearSpec,
    weight_format: WeightFormat,
    precision: ActivationPrecision = ActivationPrecision.AUTO,
) -> tuple[CpuLinearKernel, reference_linear.Dense]:
    weight, bias = reference_linear.random_linear(spec, torch.Generator().manual_seed(0))
    kernel = device.linear_kernel(spec, weight_format.descriptor, precision=precision)
    kernel.load(weight, bias)
    return kernel, reference_linear.dense(weight_format, weight, bias)


def random_rows(rows: int, features: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, features, generator=generator).to(dtype)


def check(  # noqa: PLR0917 - one cell of the matrix
    device: CpuDevice,
    spec: LinearSpec,
    weight_format: WeightFormat,
    precision: ActivationPrecision,
    rows: int,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Compare both passes."""
    kernel, layer = loaded(device, spec, weight_format, precision)
    x = random_rows(rows, spec.in_features, dtype)
    got, want = kernel.apply(x), reference_linear.forward(layer, x, precision)
    assert got.dtype is dtype
    assert got.shape == want.value.shape
    assert is_within(got, want.value, want.error), worst_of(got, want.value, want.error)
    grad = random_rows(rows, spec.out_features, dtype)
    got, want = kernel.grad_input(grad), reference_linear.grad_input(layer, grad, precision)
    assert got.dtype is dtype
    assert got.shape == want.value.shape
    assert is_within(got, want.value, want.error), worst_of(got, want.value, want.error)


CELLS = [
    pytest.param(f, p, id=f"{name}-{p.value}") for name, f in FORMATS.items() for p in precisions(f)
]


@pytest.mark.parametrize(("weight_format", "precision"), CELLS)
@pytest.mark.parametrize("rows", [1, 3, 17, 130])  # 130: unpacked first, in two threads' chunks
def test_matches_the_reference(
    device: CpuDevice, weight_format: WeightFormat, precision: ActivationPrecision, rows: int
) -> None:
    spec = LinearSpec(in_features=160, out_features=72, has_bias=True)
    check(device, spec, weight_format, precision, rows)


@pytest.mark.parametrize("inputs", [1, 17, 63, 64, 100])
@pytest.mark.parametrize("outputs", [1, 15, 16, 17, 33, 48])
@pytest.mark.parametrize("name", KINDS)
def test_odd_shapes(device: CpuDevice, name: str, inputs: int, outputs: int) -> None:
    spec = LinearSpec(in_features=inputs, out_features=outputs, has_bias=outputs % 2 == 0)
    for precision in precisions(FORMATS[name]):
        for rows in (0, 3, 17):
            check(device, spec, FORMATS[name], precision, rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["bf16", "int8", "mxfp4"])
def test_types_of_activations(device: CpuDevice, name: str, dtype: torch.dtype) -> None:
    spec = LinearSpec(in_features=96, out_features=32)
    for precision in precisions(FORMATS[name]):
        check(device, spec, FORMATS[name], precision, 6, dtype)


@pytest.mark.parametrize("rows", [2, 255, 256, 257, 600])
@pytest.mark.parametrize("threads", [1, 2])
def test_blocks_of_rows(rows: int, threads: int) -> None:
    """More rows than a block of them holds, and as many; work large enough to be shared."""
    spec = LinearSpec(in_features=130, out_features=200, has_bias=True)
    with device_for(ISAS[0], threads) as device:
        for name in ("int4-g32", "bf16"):
            check(device, spec, FORMATS[name], precisions(FORMATS[name])[0], rows)


def test_result_does_not_depend_on_threads() -> None:
    spec = LinearSpec(in_features=700, out_features=900, has_bias=True)
    results = []
    for threads in (1, 2, 5):
        with device_for(ISAS[0], threads) as device:
            kernel, _ = loaded(device, spec, FORMATS["int4-g32"])
            out = [kernel.apply(random_rows(rows, 700)) for rows in (1, 5, 300)]
            results.append([*out, kernel.grad_input(random_rows(19, 900))])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_two_threads_may_compute_at_once() -> None:
    """Of one device: their jobs come one after the other."""
    spec = LinearSpec(in_features=512, out_features=2048)
    with device_for(ISAS[0]) as device, ThreadPoolExecutor(2) as pool:
        layers = [loaded(device, spec, FORMATS[name])[0] for name in ("bf16", "int8")]
        x = random_rows(8, 512)
        want = [kernel.apply(x) for kernel in layers]
        for got in [pool.map(lambda kernel: kernel.apply(x), layers) for _ in range(20)]:
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_work_beside_experts_under_way() -> None:
    """A shared expert is computed between submitting routed ones and waiting for them."""
    from kt_core.testing import reference
    from kt_core.types import MoeSpec

    spec = MoeSpec(num_experts=4, hidden_size=256, intermediate_size=512)
    with device_for(ISAS[0]) as device:
        experts = device.expert_kernel(spec, FORMATS["int8"].descriptor)
        generator = torch.Generator().manual_seed(0)
        for index in range(4):
            experts.load(index, reference.random_weights(spec, generator))
        dense, _ = loaded(device, LinearSpec(in_features=256, out_features=3000), FORMATS["int8"])
        hidden = random_rows(40, 256)
        ids, weights = torch.randint(0, 4, (40, 2), generator=generator), torch.ones(40, 2)
        want = experts.submit(hidden, ids, weights).wait(), dense.apply(hidden)
        for _ in range(20):
            ticket = experts.submit(hidden, ids, weights)
            assert torch.equal(dense.apply(hidden), want[1])
            assert torch.equal(ticket.wait(), want[0])


def test_a_nan_in_a_row_stays_in_it(device: CpuDevice) -> None:
    spec = LinearSpec(in_features=64, out_features=32)
    for name in ("bf16", "int8", "int4-g32"):
        kernel, _ = loaded(device, spec, FORMATS[name])
        x = torch.ones(2, 64)
        x[1, 40] = float("nan")
        out = kernel.apply(x)
        assert bool(torch.isfinite(out[0]).all())
        assert bool(torch.isnan(out[1]).all())


def test_the_packed_matrix_is_that_of_an_expert(device: CpuDevice) -> None:
    """One layout: what is packed as a down projection can be packed as a dense layer."""
    from kt_core.interfaces import ExpertWeights
    from kt_core.types import Activation, ActivationKind, MoeSpec

    weight, _ = reference_linear.random_linear(
        LinearSpec(in_features=40, out_features=24), torch.Generator().manual_seed(0)
    )
    relu = Activation(kind=ActivationKind.RELU, is_gated=False)
    spec = MoeSpec(num_experts=1, hidden_size=24, intermediate_size=40, activation=relu)
    for name in KINDS:
        expert = device.expert_kernel(spec, FORMATS[name].descriptor)
        expert.load(0, ExpertWeights(up=torch.zeros(40, 24), down=weight))
        kernel, _ = loaded(device, LinearSpec(in_features=40, out_features=24), FORMATS[name])
        assert packed_bytes(expert, 0).endswith(bytes(kernel.packed().numpy()))


def test_gradients_are_not_computed_silently(device: CpuDevice) -> None:
    kernel, _ = loaded(device, LinearSpec(in_features=8, out_features=8), FORMATS["bf16"])
    x = torch.ones(1, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"torch\.no_grad"):
        kernel.apply(x)
    with torch.no_grad():
        kernel.apply(x)


def test_precisions_that_a_format_lacks(device: CpuDevice) -> None:
    spec = LinearSpec(in_features=8, out_features=8)
    with pytest.raises(UnsupportedFormatError, match="'bf16' has no int8 activations"):
        device.linear_kernel(spec, FORMATS["bf16"].descriptor, precision=ActivationPrecision.INT8)


def test_a_closed_device_makes_no_kernel() -> None:
    device = device_for(ISAS[0])
    device.close()
    with pytest.raises(RuntimeError, match="closed"):
        device.linear_kernel(LinearSpec(in_features=8, out_features=8), FORMATS["bf16"].descriptor)


@pytest.mark.parametrize("weight_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("has_bias", [False, True])
def test_packed_bytes_are_used_where_they_are(
    device: CpuDevice, weight_format: WeightFormat, has_bias: bool
) -> None:
    """The codec's bytes are the kernel's; mapped, they give the same, and are not copied."""
    spec = LinearSpec(in_features=100, out_features=37, has_bias=has_bias)
    weight, bias = reference_linear.random_linear(spec, torch.Generator().manual_seed(0))
    kernel, _ = loaded(device, spec, weight_format)
    descriptor = weight_format.descriptor
    packed = pack_linear(weight_format.quantize(weight), bias, spec, descriptor)
    assert torch.equal(kernel.packed(), packed)
    matrix, stored_bias = unpack_linear(packed, spec, descriptor)
    assert torch.equal(
        weight_format.dequantize(matrix), weight_format.dequantize(weight_format.quantize(weight))
    )
    assert (stored_bias is None) == (bias is None)
    assert bias is None or torch.equal(stored_bias, bias.float())
    memory = torch.empty(len(packed) + 64, dtype=torch.uint8)
    place = memory[-memory.data_ptr() % 64 :][: len(packed)]
    place.copy_(packed)
    mapped = device.linear_kernel(spec, descriptor)
    assert mapped.map_packed(place)
    x = random_rows(3, spec.in_features)
    want = kernel.apply(x)
    assert torch.equal(mapped.apply(x), want)
    place.zero_()
    assert not torch.equal(mapped.apply(x), want)
    mapped.load(weight, bias)  # memory of its own again
    assert torch.equal(mapped.apply(x), want)


def test_what_cannot_be_mapped(device: CpuDevice) -> None:
    spec = LinearSpec(in_features=64, out_features=32, has_bias=False)
    kernel = device.linear_kernel(spec, FORMATS["int8"].descriptor)
    size = kernel.size_bytes
    memory = torch.zeros(size + 128, dtype=torch.uint8)
    start = -memory.data_ptr() % 64
    with pytest.raises(ValueError, match="must lie at a multiple of 64 bytes"):
        kernel.map_packed(memory[start + 1 : start + 1 + size])
    with pytest.raises(ValueError, match=rf"int8 layer of this shape is \[{size}\]"):
        kernel.map_packed(memory[start : start + size - 1])
    assert not kernel.is_loaded
