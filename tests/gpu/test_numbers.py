"""Every format against the float64 reference, with the kernels for few and for many tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gpu.kernels import WHERE, KernelsBackend
from kt_core.interfaces import ExpertKernel, WeightFormat
from kt_core.quant import BUILT_IN_FORMATS
from kt_core.testing import ACTIVATIONS, reference
from kt_core.testing.backend_harness import (
    Pairs,
    is_within,
    random_layer,
    random_pairs,
    worst_of,
)
from kt_core.types import SILU, Activation, ActivationPrecision, MoeSpec

BF16, FLOAT32 = ActivationPrecision.BF16, ActivationPrecision.FLOAT32
FORMATS = {f.descriptor.name: f for f in BUILT_IN_FORMATS}
# The interpreter takes about a millisecond for each function that a kernel calls.
SMALL = MoeSpec(num_experts=3, hidden_size=100, intermediate_size=40)
# Neither size is a multiple of 16, of a group or of a tile; the inputs are several tiles.
ODD = MoeSpec(num_experts=5, hidden_size=205, intermediate_size=109)

both = pytest.mark.parametrize("is_few", [True, False], ids=["few", "many"])


def loaded(
    spec: MoeSpec, weight_format: WeightFormat, precision: ActivationPrecision, *, is_few: bool
) -> ExpertKernel:
    """Make a kernel that holds ``random_layer(spec)``."""
    device = KernelsBackend(is_few=is_few).open("kernels")
    kernel = device.expert_kernel(spec, weight_format.descriptor, precision=precision)
    for index, weights in random_layer(spec).items():
        kernel.load(index, weights)
    return kernel


def there(pairs: Pairs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The arguments of a call, where kernels read them."""
    return pairs.hidden.to(WHERE), pairs.expert_ids.to(WHERE), pairs.weights.to(WHERE)


def check(
    spec: MoeSpec,
    weight_format: WeightFormat,
    pairs: Pairs,
    precision: ActivationPrecision,
    *,
    is_few: bool,
) -> None:
    """Compute and compare with the reference."""
    kernel = loaded(spec, weight_format, precision, is_few=is_few)
    got = kernel.submit(*there(pairs)).wait().cpu()
    layer = reference.layer(spec, weight_format, random_layer(spec))
    want, allowed = reference.forward(
        layer, pairs.hidden, pairs.expert_ids, pairs.weights, precision
    )
    assert is_within(got, want, allowed), worst_of(got, want, allowed)


@both
@pytest.mark.parametrize("name", FORMATS)
def test_every_format(name: str, is_few: bool) -> None:
    """bfloat16 as it comes, in the mode that models use."""
    pairs = random_pairs(SMALL, 3, dtype=torch.bfloat16)
    check(SMALL, FORMATS[name], pairs, BF16, is_few=is_few)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("name", ["bf16", "int4-g32-min", "nvfp4"])
def test_accurate_mode(name: str, dtype: torch.dtype, is_few: bool) -> None:
    """Hidden states that are no bfloat16 lose nothing."""
    check(SMALL, FORMATS[name], random_pairs(SMALL, 3, dtype=dtype), FLOAT32, is_few=is_few)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: f"{a.kind.value}-{a.is_gated}")
def test_activations(activation: Activation) -> None:
    """Every formula, which both kinds of kernels take from one place."""
    check(_tiny(activation), FORMATS["bf16"], random_pairs(_tiny(SILU), 3), FLOAT32, is_few=True)


@both
@pytest.mark.parametrize("is_gated", [True, False], ids=["gated", "ungated"])
def test_biases(is_gated: bool, is_few: bool) -> None:
    """They stand behind the panels."""
    spec = replace(_tiny(replace(SILU, is_gated=is_gated)), has_bias=True)
    check(spec, FORMATS["bf16"], random_pairs(spec, 3), FLOAT32, is_few=is_few)


def _tiny(activation: Activation) -> MoeSpec:
    return replace(SMALL, hidden_size=40, intermediate_size=24, activation=activation)


@pytest.mark.triton
@pytest.mark.parametrize("precision", [BF16, FLOAT32])
@pytest.mark.parametrize(
    ("tokens", "is_few"), [(1, True), (3, True), (1, False), (3, False), (17, False), (70, False)]
)
@pytest.mark.parametrize("name", FORMATS)
def test_sweep(name: str, tokens: int, precision: ActivationPrecision, is_few: bool) -> None:
    """Odd sizes of several tiles, from one token to several blocks of an expert."""
    dtype = torch.bfloat16 if precision is BF16 else torch.float32
    pairs = random_pairs(ODD, tokens, k=3, dtype=dtype)
    check(ODD, FORMATS[name], pairs, precision, is_few=is_few)
