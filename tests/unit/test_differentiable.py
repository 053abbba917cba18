"""The operator ``kt::moe_experts``: traced, differentiated, checkpointed, over several kernels."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kt_core.errors import UnsupportedTrainingError
from kt_core.interfaces import ExpertKernel, LoraWeights
from kt_core.moe.differentiable import LORA_NAMES, moe_experts, moe_experts_backward, number_of
from kt_core.moe.hybrid_experts import HybridExperts
from kt_core.quant import BUILT_IN_FORMATS
from kt_core.testing import reference
from kt_core.testing.backend_training import random_lora
from kt_core.testing.reference_kernel import ExactKernel, ReferenceKernel
from kt_core.types import MoeSpec

SPEC = MoeSpec(num_experts=4, hidden_size=12, intermediate_size=10)


def kernel_with(
    experts: set[int], kernel: ExpertKernel | None = None, spec: MoeSpec = SPEC
) -> ExpertKernel:
    kernel = kernel or ExactKernel(spec)
    generator = torch.Generator().manual_seed(0)
    for index in range(spec.num_experts):
        weights = reference.random_weights(spec, generator, std=0.5)
        if index in experts:
            kernel.load(index, weights)
    return kernel


def arguments(
    dtype: torch.dtype = torch.float64, tokens: int = 5
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(tokens, SPEC.hidden_size, generator=generator).to(dtype)
    ids = torch.randint(0, SPEC.num_experts, (tokens, 2), generator=generator)
    weights = torch.rand(tokens, 2, generator=generator).to(dtype)
    return hidden.requires_grad_(), ids, weights.requires_grad_()


def lora_in(dtype: torch.dtype) -> LoraWeights:
    lora = random_lora(SPEC)
    matrices = {n: m.to(dtype).requires_grad_() for n, m in reference.lora_matrices(lora).items()}
    return replace(lora, **matrices)


@pytest.mark.parametrize("homes", [[{0, 1, 2, 3}], [{0, 3}, {1, 2}]])
@pytest.mark.parametrize("with_lora", [False, True])
def test_gradcheck(homes: list[set[int]], with_lora: bool) -> None:
    layer = HybridExperts(SPEC, [kernel_with(home) for home in homes])
    hidden, ids, weights = arguments()
    lora = lora_in(torch.float64) if with_lora else None
    matrices = [] if lora is None else list(reference.lora_matrices(lora).values())

    def compute(
        hidden: torch.Tensor, weights: torch.Tensor, *matrices: torch.Tensor
    ) -> torch.Tensor:
        if lora is not None:
            layer.lora = replace(lora, **dict(zip(LORA_NAMES, matrices, strict=True)))
        out: torch.Tensor = layer(hidden, ids, weights)
        return out

    # Every element of hidden states and weights; with LoRA, one random direction of each tensor.
    inputs = (hidden, weights, *matrices)
    assert torch.autograd.gradcheck(compute, inputs, fast_mode=with_lora)


@pytest.mark.parametrize("with_lora", [False, True])
def test_opcheck(with_lora: bool) -> None:
    kernel = kernel_with({0, 1, 2, 3}, ReferenceKernel(SPEC, BUILT_IN_FORMATS[0]))
    hidden, ids, weights = arguments(torch.float32)
    lora = lora_in(torch.float32)
    matrices = [getattr(lora, name) if with_lora else None for name in LORA_NAMES]
    rest = (ids[None], weights, [number_of(kernel)], 0.5, *matrices)
    torch.library.opcheck(moe_experts, (hidden, *rest))
    plain = [r.detach() if isinstance(r, torch.Tensor) else r for r in rest]
    grad = torch.ones_like(hidden)
    torch.library.opcheck(moe_experts_backward, (grad, hidden.detach(), *plain))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_checkpointing(use_reentrant: bool, dtype: torch.dtype) -> None:
    """The first pass runs without gradients, and must compute the numbers of the second."""
    int8 = next(f for f in BUILT_IN_FORMATS if f.descriptor.name == "int8")
    layer = HybridExperts(SPEC, [kernel_with({0, 1, 2, 3}, ReferenceKernel(SPEC, int8))])
    found = []
    for is_checkpointed in (False, True):
        hidden, ids, weights = arguments(dtype)
        inputs = (hidden * 1, ids, weights * 1)
        if is_checkpointed:
            out = checkpoint(layer, *inputs, use_reentrant=use_reentrant)
        else:
            out = layer(*inputs)
        out.square().sum().backward()
        found.append((out, hidden.grad, weights.grad))
    for plain, checkpointed in zip(*found, strict=True):
        assert torch.equal(plain, checkpointed)


def test_compiles_without_a_graph_break() -> None:
    layer = HybridExperts(SPEC, [kernel_with({0, 1, 2, 3})])
    found = []
    for compute in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        hidden, ids, weights = arguments()
        compute(hidden, ids, weights).square().sum().backward()
        found.append((hidden.grad, weights.grad))
    for eager, compiled in zip(*found, strict=True):
        assert torch.equal(eager, compiled)


def test_lora_trains() -> None:
    """A step against the gradient makes the loss smaller."""
    layer = HybridExperts(SPEC, [kernel_with({0, 1, 2, 3})])
    lora = layer.lora = lora_in(torch.float64)
    hidden, ids, weights = (t.detach() for t in arguments())
    losses = []
    for _ in range(2):
        loss = layer(hidden, ids, weights).square().sum()
        losses.append(float(loss.detach()))
        loss.backward()
        with torch.no_grad():
            for matrix in reference.lora_matrices(lora).values():
                assert matrix.grad is not None
                matrix.sub_(1e-3 * matrix.grad)
    assert losses[1] < losses[0]


def test_a_kernel_without_a_gradient_says_so() -> None:
    class Untrained(ExactKernel):
        trains = False

    layer = HybridExperts(SPEC, [kernel_with({0, 1, 2, 3}, Untrained(SPEC))])
    hidden, ids, weights = arguments()
    with pytest.raises(UnsupportedTrainingError, match=r"Untrained has no gradient .*'bf16'"):
        layer(hidden, ids, weights)
    with torch.no_grad():
        assert layer(hidden, ids, weights).shape == hidden.shape


def test_numbers_keep_no_kernel_alive() -> None:
    kernel = kernel_with({0, 1, 2, 3})
    number = number_of(kernel)
    del kernel
    gc.collect()
    hidden, ids, weights = arguments()
    with pytest.raises(RuntimeError, match="are gone"):
        moe_experts(hidden, ids[None], weights, [number])
