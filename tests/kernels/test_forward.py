"""Every instruction set against the float64 reference, beside the grid of test_grid.py."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from kernels.devices import ISAS, device_for, packed_bytes, precisions
from kt_core.interfaces import ExpertWeights, QuantizedTensor, WeightFormat
from kt_core.quant import BUILT_IN_FORMATS
from kt_core.testing import ACTIVATIONS, backward_reference, reference
from kt_core.testing.backend_training import check_gradients
from kt_core.types import (
    SILU,
    Activation,
    ActivationKind,
    ActivationPrecision,
    MoeSpec,
)
from kt_cpu import _kernels
from kt_cpu.backend import CpuDevice

FORMATS = {f.descriptor.name: f for f in BUILT_IN_FORMATS}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def routed(
    tokens: int, k: int, experts: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, experts, (tokens, k), generator=generator)
    return ids, torch.rand(tokens, k, generator=generator) + 0.1


def check(  # noqa: PLR0917 - one cell of the matrix
    device: CpuDevice,
    spec: MoeSpec,
    weight_format: WeightFormat,
    precision: ActivationPrecision,
    tokens: int,
    k: int = 2,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    experts = {e: reference.random_weights(spec, generator) for e in range(spec.num_experts)}
    kernel = device.expert_kernel(spec, weight_format.descriptor, precision=precision)
    for index, weights in experts.items():
        kernel.load(index, weights)
    hidden = torch.randn(tokens, spec.hidden_size, generator=generator).to(dtype)
    ids, scales = routed(tokens, k, spec.num_experts, generator)

    got = kernel.submit(hidden, ids, scales).wait()

    layer = reference.layer(spec, weight_format, experts)
    want, allowed = reference.forward(layer, hidden, ids, scales, precision)
    assert got.shape == hidden.shape
    excess = (got.double() - want).abs() - allowed
    worst = int(excess.argmax()) if excess.numel() else 0
    assert excess.numel() == 0 or float(excess.max()) <= 0, (
        f"at {divmod(worst, spec.hidden_size)}: got {got.flatten()[worst]}, "
        f"want {want.flatten()[worst]} +- {allowed.flatten()[worst]}"
    )


@pytest.fixture(scope="module", params=ISAS)
def device(request: pytest.FixtureRequest) -> Iterator[CpuDevice]:
    with device_for(request.param) as opened:
        yield opened


def stored_elsewhere(weight: torch.Tensor, weight_format: WeightFormat) -> QuantizedTensor:
    """What checkpoints hold and quantising never gives.

    Zero points of 16 (GPTQ stores them less one), negative scales (GGUF's Q4_0), negative minimums
    (Q4_1: groups of positive weights).
    """
    stored = weight_format.quantize(weight)
    assert stored.scales is not None
    scales = stored.scales.clone()
    scales[::2] *= -1
    zeros, minimums = stored.zero_points, stored.minimums
    if zeros is not None:
        zeros = zeros.clone()
        zeros[1::3] = 16
    if minimums is not None:
        minimums = minimums.clone()
        minimums[1::3] *= -1
    return replace(stored, scales=scales, zero_points=zeros, minimums=minimums)


@pytest.mark.parametrize("tokens", [1, 4, 17])
@pytest.mark.parametrize(
    "name",
    ["int8-g32-f16", "int4-g32-f16", "int4-g32-asym", "int4-g128-f16-asym", "int4-g32-f16-min"],
)
def test_numbers_that_quantising_does_not_make(device: CpuDevice, name: str, tokens: int) -> None:
    spec = MoeSpec(num_experts=1, hidden_size=200, intermediate_size=72)
    weight_format = FORMATS[name]
    dense = reference.random_weights(spec, torch.Generator().manual_seed(0))
    parts = {p: stored_elsewhere(getattr(dense, p), weight_format) for p in ("gate", "up", "down")}
    experts = {0: replace(dense, **parts)}
    layer = reference.layer(spec, weight_format, experts)
    hidden, grad = torch.randn(2, tokens, 200, generator=torch.Generator().manual_seed(1))
    pairs = (hidden, torch.zeros(tokens, 1, dtype=torch.int64), torch.ones(tokens, 1))
    for precision in precisions(weight_format):
        kernel = device.expert_kernel(spec, weight_format.descriptor, precision=precision)
        kernel.load(0, experts[0])
        want, allowed = reference.forward(layer, *pairs, precision)
        assert bool(((kernel.submit(*pairs).wait().double() - want).abs() <= allowed).all())
        gradients = backward_reference.backward(layer, *pairs, grad, precision)
        check_gradients(kernel.backward(*pairs, grad), gradients, precision)


@pytest.mark.parametrize("tokens", [0, 2, 4, 7, 8, 9, 130])
def test_any_number_of_tokens(device: CpuDevice, tokens: int) -> None:
    spec = MoeSpec(num_experts=3, hidden_size=64, intermediate_size=48)
    check(device, spec, FORMATS["int4-g32"], ActivationPrecision.INT8, tokens, k=2)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("name", ["bf16", "int8"])
def test_types_of_hidden_states(device: CpuDevice, name: str, dtype: torch.dtype) -> None:
    spec = MoeSpec(num_experts=3, hidden_size=96, intermediate_size=32)
    for precision in precisions(FORMATS[name]):
        check(device, spec, FORMATS[name], precision, tokens=6, dtype=dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
@pytest.mark.parametrize("has_bias", [False, True])
def test_every_activation(device: CpuDevice, activation: Activation, has_bias: bool) -> None:
    spec = MoeSpec(
        num_experts=3,
        hidden_size=48,
        intermediate_size=33,
        activation=activation,
        has_bias=has_bias,
    )
    check(device, spec, FORMATS["bf16"], ActivationPrecision.FLOAT32, tokens=9)
    check(device, spec, FORMATS["int8-g32"], ActivationPrecision.INT8, tokens=3)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_activation_over_its_whole_range(device: CpuDevice, activation: Activation) -> None:
    """Saturation, signed zero, the seam of tanh at 0.625; NaN and infinity stay visible."""
    ends = torch.tensor([-1e30, -200, -90, -87.3, -20, -0.625, -1e-20, -0.0])
    points = torch.cat([ends, -ends, torch.linspace(-30, 30, 2032)])
    up = torch.linspace(-3, 3, len(points)).flip(0)
    out = torch.empty_like(points)
    _activate(device, activation, points, up, out)
    if activation.kind is ActivationKind.RELU2:
        points = points.clamp(max=1e18)
    want = _reference_activation(activation, points, up)
    magnitude = points.abs() * (up.abs() + 1) * (1 + points.abs() * _is_square(activation))
    keep = torch.isfinite(out) & (points.abs() < 1e18)
    error = (out.double() - want).abs()[keep]
    assert bool((error <= 16 * 2.0**-24 * magnitude[keep].double() + 1e-30).all())

    bad = torch.full((16,), float("nan"))
    _activate(device, activation, bad, torch.ones(16), result := torch.empty(16))
    assert bool(torch.isnan(result).all())


def _is_square(activation: Activation) -> bool:
    return activation.kind is ActivationKind.RELU2


def _reference_activation(
    activation: Activation, gate: torch.Tensor, up: torch.Tensor
) -> torch.Tensor:
    from kt_core.moe.activations import activate

    return activate(activation, gate.double(), up.double())


def _activate(
    device: CpuDevice,
    activation: Activation,
    gate: torch.Tensor,
    up: torch.Tensor,
    out: torch.Tensor,
) -> None:
    _kernels.activate(
        device.capabilities.instruction_set or "",
        getattr(_kernels.ActivationKind, activation.kind.value),
        activation.is_gated,
        activation.alpha,
        activation.limit,
        activation.up_limit,
        gate.data_ptr(),
        up.data_ptr(),
        out.data_ptr(),
        gate.numel(),
    )


def test_repeated_experts_and_foreign_pairs(device: CpuDevice) -> None:
    spec = MoeSpec(num_experts=4, hidden_size=32, intermediate_size=32)
    generator = torch.Generator().manual_seed(1)
    experts = {e: reference.random_weights(spec, generator) for e in range(4)}
    kernel = device.expert_kernel(
        spec, FORMATS["bf16"].descriptor, precision=ActivationPrecision.FLOAT32
    )
    for index in (0, 1, 3):  # 2 is never asked for: an empty expert
        kernel.load(index, experts[index])
    hidden = torch.randn(3, 32, generator=generator)
    ids = torch.tensor([[1, 1, 3], [-1, -1, -1], [0, -1, 0]])
    weights = torch.rand(3, 3, generator=generator)

    got = kernel.submit(hidden, ids, weights).wait()

    layer = reference.layer(spec, FORMATS["bf16"], experts)
    want, allowed = reference.forward(layer, hidden, ids, weights, ActivationPrecision.FLOAT32)
    assert bool(((got - want).abs() <= allowed).all())
    assert bool((got[1] == 0).all())


def test_result_does_not_depend_on_threads() -> None:
    spec = MoeSpec(num_experts=5, hidden_size=200, intermediate_size=72)
    results = []
    for threads in (1, 2, 5):
        generator = torch.Generator().manual_seed(2)
        with device_for(ISAS[0], threads) as device:
            kernel = device.expert_kernel(spec, FORMATS["int4-g32"].descriptor)
            for e in range(5):
                kernel.load(e, reference.random_weights(spec, generator))
            hidden = torch.randn(19, 200, generator=generator)
            ids, weights = routed(19, 3, 5, generator)
            results.append(kernel.submit(hidden, ids, weights).wait())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_nan_in_the_hidden_states_stays_visible(device: CpuDevice) -> None:
    spec = MoeSpec(num_experts=1, hidden_size=64, intermediate_size=32)
    for name in ("bf16", "int8", "int4-g32", "int4-g32-min"):
        kernel = device.expert_kernel(spec, FORMATS[name].descriptor)
        kernel.load(0, reference.random_weights(spec, torch.Generator().manual_seed(0)))
        hidden = torch.ones(2, 64)
        hidden[1, 40] = float("nan")
        out = kernel.submit(hidden, torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)).wait()
        assert bool(torch.isfinite(out[0]).all())
        assert bool(torch.isnan(out[1]).all())


def test_every_isa_expected_is_here() -> None:
    """CI says what it expects, so that a machine without it fails instead of skipping."""
    expected = set(filter(None, os.environ.get("KT_EXPECT_ISAS", "").split(",")))
    assert expected <= set(ISAS)


def test_transposed_and_interleaved_weights_are_views(device: CpuDevice) -> None:
    spec = MoeSpec(num_experts=2, hidden_size=40, intermediate_size=24, activation=SILU)
    generator = torch.Generator().manual_seed(3)
    plain = reference.random_weights(spec, generator)
    assert isinstance(plain.up, torch.Tensor)
    assert isinstance(plain.down, torch.Tensor)
    assert isinstance(plain.gate, torch.Tensor)
    fused = torch.stack([plain.gate, plain.up], dim=1).flatten(0, 1).T.contiguous()
    strided = ExpertWeights(gate=fused.T[0::2], up=fused.T[1::2], down=plain.down.T.contiguous().T)
    for name in ("bf16", "int8", "int4-g32"):
        kernel = device.expert_kernel(spec, FORMATS[name].descriptor)
        kernel.load(0, plain)
        kernel.load(1, strided)
        assert packed_bytes(kernel, 0) == packed_bytes(kernel, 1)
