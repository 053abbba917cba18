"""Gradients of every instruction set, beside the grid of test_grid.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kernels.devices import ISAS, device_for
from kt_core.interfaces import LoraWeights, WeightFormat
from kt_core.quant import BUILT_IN_FORMATS
from kt_core.testing import ACTIVATIONS, backward_reference, reference
from kt_core.testing.backend_training import check_gradients, random_lora
from kt_core.types import (
    Activation,
    ActivationPrecision,
    MoeSpec,
)
from kt_cpu.backend import CpuDevice
from kt_cpu.kernel import CpuExpertKernel

FORMATS = {f.descriptor.name: f for f in BUILT_IN_FORMATS}


@pytest.fixture(scope="module", params=ISAS)
def device(request: pytest.FixtureRequest) -> Iterator[CpuDevice]:
    with device_for(request.param) as opened:
        yield opened


def loaded(
    device: CpuDevice,
    spec: MoeSpec,
    weight_format: WeightFormat,
    precision: ActivationPrecision = ActivationPrecision.AUTO,
) -> tuple[CpuExpertKernel, reference.Layer]:
    generator = torch.Generator().manual_seed(0)
    experts = {e: reference.random_weights(spec, generator) for e in range(spec.num_experts)}
    kernel = device.expert_kernel(spec, weight_format.descriptor, precision=precision)
    for index, weights in experts.items():
        kernel.load(index, weights)
    return kernel, reference.layer(spec, weight_format, experts)


def arguments(
    spec: MoeSpec, tokens: int, k: int = 2, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, spec.hidden_size, generator=generator).to(dtype)
    grad = torch.randn(tokens, spec.hidden_size, generator=generator).to(dtype)
    ids = torch.randint(0, spec.num_experts, (tokens, k), generator=generator)
    return hidden, ids, torch.rand(tokens, k, generator=generator) + 0.1, grad


def check(  # noqa: PLR0917 - one cell of the matrix
    device: CpuDevice,
    spec: MoeSpec,
    weight_format: WeightFormat,
    precision: ActivationPrecision,
    tokens: int,
    lora: LoraWeights | None = None,
) -> None:
    kernel, layer = loaded(device, spec, weight_format, precision)
    hidden, ids, weights, grad = arguments(spec, tokens)
    want = backward_reference.backward(layer, hidden, ids, weights, grad, precision, lora)
    check_gradients(kernel.backward(hidden, ids, weights, grad, lora), want, precision)
    out = backward_reference.forward(layer, hidden, ids, weights, precision, lora)
    got = kernel.submit_training(hidden, ids, weights, lora).wait()
    assert bool(((got.double() - out.value).abs() <= out.error).all())


@pytest.mark.parametrize(("hidden", "inner"), [(1, 1), (15, 17), (16, 16), (63, 65), (129, 31)])
@pytest.mark.parametrize("name", ["bf16", "int8", "int4-g32-f32-min", "int4-g64-asym"])
def test_odd_shapes(device: CpuDevice, name: str, hidden: int, inner: int) -> None:
    spec = MoeSpec(num_experts=3, hidden_size=hidden, intermediate_size=inner)
    for precision in (ActivationPrecision.BF16, ActivationPrecision.FLOAT32):
        for lora in (None, random_lora(spec)):
            check(device, spec, FORMATS[name], precision, 5, lora)


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
    check(device, spec, FORMATS["int8-g32"], ActivationPrecision.FLOAT32, 9, random_lora(spec))


@pytest.mark.parametrize("tokens", [1, 70, 130])
def test_lora_of_many_tokens(device: CpuDevice, tokens: int) -> None:
    """Rows of one expert come in blocks of 64."""
    spec = MoeSpec(num_experts=2, hidden_size=160, intermediate_size=72)
    lora = random_lora(spec)
    check(device, spec, FORMATS["int4-g32"], ActivationPrecision.BF16, tokens, lora)


def test_finite_differences_agree() -> None:
    """The gradient is that of the forward pass itself, not only of the reference."""
    spec = MoeSpec(num_experts=2, hidden_size=24, intermediate_size=20)
    with device_for(ISAS[0]) as device:
        kernel, _ = loaded(device, spec, FORMATS["int4-g32"], ActivationPrecision.FLOAT32)
        hidden, ids, weights, grad = arguments(spec, 3)
        found = kernel.backward(hidden, ids, weights, grad)
        generator = torch.Generator().manual_seed(1)
        for which, gradient in ((hidden, found.hidden), (weights, found.weights)):
            direction = torch.randn(which.shape, generator=generator)
            step = 2.0**-7
            values = []
            for sign in (1, -1):
                moved = [
                    which + sign * step * direction if t is which else t
                    for t in (hidden, ids, weights)
                ]
                out = kernel.submit_training(*moved).wait()
                values.append(float((out.double() * grad).sum()))
            slope = (values[0] - values[1]) / (2 * step)
            # Central differences err by step^2 / 6 times the third derivative, and by the rounding
            # of the two sums over 2 * step: together some 1e-3 of terms of size one here.
            assert slope == pytest.approx(float((gradient * direction).sum()), rel=2e-3, abs=2e-3)


def test_gradients_do_not_depend_on_threads() -> None:
    spec = MoeSpec(num_experts=5, hidden_size=200, intermediate_size=72)
    results = []
    for threads in (1, 2, 5):
        with device_for(ISAS[0], threads) as device:
            kernel, _ = loaded(device, spec, FORMATS["int4-g32"])
            found = kernel.backward(*arguments(spec, 90, k=3), random_lora(spec))
            assert found.lora is not None
            matrices = reference.lora_matrices(found.lora).values()
            results.append([found.hidden, found.weights, *matrices])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_auto_trains_without_quantised_activations() -> None:
    """Where the precision is ours to choose, the gradient is that of what was computed."""
    spec = MoeSpec(num_experts=2, hidden_size=96, intermediate_size=40)
    with device_for(ISAS[0]) as device:
        for dtype, named in (
            (torch.bfloat16, ActivationPrecision.BF16),
            (torch.float32, ActivationPrecision.FLOAT32),
        ):
            hidden, ids, weights, grad = arguments(spec, 5, dtype=dtype)
            outputs, grads = [], []
            for precision in (ActivationPrecision.AUTO, named):
                kernel, _ = loaded(device, spec, FORMATS["int8"], precision)
                outputs.append(kernel.submit_training(hidden, ids, weights).wait())
                grads.append(kernel.backward(hidden, ids, weights, grad).hidden)
            assert torch.equal(*outputs)
            assert torch.equal(*grads)


def test_a_nan_stays_visible(device: CpuDevice) -> None:
    spec = MoeSpec(num_experts=1, hidden_size=64, intermediate_size=32)
    for name in ("bf16", "int8", "int4-g32"):
        for precision in (ActivationPrecision.BF16, ActivationPrecision.FLOAT32):
            kernel, _ = loaded(device, spec, FORMATS[name], precision)
            hidden, ids, weights, grad = arguments(spec, 2)
            grad[1, 40] = float("nan")
            found = kernel.backward(hidden, ids * 0, weights, grad)
            assert bool(torch.isfinite(found.hidden[0]).all())
            assert bool(torch.isnan(found.hidden[1]).all())
            assert bool(torch.isnan(found.weights[1]).all())
