"""Long prompts through the accelerator alone: when, with which experts, and in which order."""

from __future__ import annotations

import pytest
import torch

from kt_core.engine.hybrid_layers import HybridLayers
from kt_core.interfaces import ExpertDevice, ExpertId, Swap
from kt_core.moe.deferral import Deferral
from kt_core.moe.expert_mover import ExpertMover
from kt_core.moe.hybrid_experts import HybridExperts
from kt_core.moe.streamed_layers import StreamRates
from kt_core.testing import reference
from kt_core.testing.backend_harness import is_within, random_pairs, worst_of
from sim import target
from sim.target import WHERE, there
from sim.test_hybrid_experts import (
    EXACT,
    FORMAT,
    REFERENCE,
    SPEC,
    WEIGHTS,
    host,
    kernel_on,
)  # fmt: skip

pytestmark = pytest.mark.sim
__all__ = ["host"]

ALWAYS = StreamRates(link_bytes_per_s=1e18, host_pairs_per_s=1e-9)
NEVER = StreamRates(link_bytes_per_s=1.0, host_pairs_per_s=1e18)


def hybrid(host: ExpertDevice, *hot: set[int]) -> HybridLayers:
    """Layers whose experts ``hot[n]`` live on the device in layer n."""
    device = target.opened()
    layers = HybridLayers([device], EXACT)
    for index, experts in enumerate(hot):
        kernel = kernel_on(host, set(range(SPEC.num_experts)) - experts)
        module = layers.add(SPEC, FORMAT.descriptor, kernel, is_last=index == len(hot) - 1)
        for expert in experts:
            module.kernels[1].load(expert, WEIGHTS[expert])
        module.refresh_placement()
        module.eval()
    return layers


def check(layer: HybridExperts, tokens: int, seed: int = 0) -> None:
    pairs = random_pairs(SPEC, tokens, 3, seed=seed)
    with torch.no_grad():
        got = layer(*there(pairs)).cpu()
    want, allowed = reference.forward(
        REFERENCE, pairs.hidden, pairs.expert_ids, pairs.weights, EXACT
    )
    allowed = allowed + 2 * reference.UNIT_ROUNDOFF * (want.abs() + allowed)
    assert is_within(got, want, allowed), worst_of(got, want, allowed)


def test_the_same_numbers_either_way(host: ExpertDevice) -> None:
    layers = hybrid(host, {0, 1}, set(), {7}, set(range(8)))
    for rates, streamed in ((None, 0), (ALWAYS, 3), (NEVER, 3), (ALWAYS, 6)):
        layers.streamed.rates = rates
        for layer in layers.layers:
            check(layer, tokens=20)
        assert layers.streamed.streamed == streamed
    cold = 6 + 8 + 7
    size = layers.layers[0].kernels[0].bytes_per_expert
    # Two layers share each slot, so each pass copies what is cold once.
    assert layers.streamed.bytes_to_device == 2 * cold * size


def test_the_crossover_is_where_link_and_host_take_equally_long(host: ExpertDevice) -> None:
    layers = hybrid(host, {0, 1}).streamed
    size = SPEC.num_experts * layers.host_of_most().bytes_per_expert
    # The link takes 1 s for a layer of eight cold experts, the host computes 100 pairs in it.
    layers.rates = StreamRates(link_bytes_per_s=size, host_pairs_per_s=100)
    assert not layers.pays(0, 100)
    assert layers.pays(0, 101)


def test_experts_that_moved_are_streamed_from_where_they_are(host: ExpertDevice) -> None:
    layers = hybrid(host, {0, 1}, {2, 3})
    layers.streamed.rates = ALWAYS
    mover = ExpertMover(layers.layers, torch.device(WHERE))
    for seed in range(3):
        check(layers.layers[0], tokens=20, seed=seed)  # and then the pass is interrupted
        mover.begin([Swap(ExpertId(1, 4 + seed), (ExpertId(1, 2 if seed == 0 else 3 + seed),))])
        mover.finish()
        check(layers.layers[1], tokens=20, seed=seed)


def test_a_long_call_brings_what_the_layer_before_put_off(host: ExpertDevice) -> None:
    layers = hybrid(host, set(), set())
    layers.deferral.per_token = 1
    pairs = random_pairs(SPEC, 6, 3)
    arguments = there(pairs)
    with torch.no_grad():
        first = layers.layers[0](*arguments).cpu()
        layers.streamed.rates = ALWAYS
        second = layers.layers[1](*arguments).cpu()
    late = Deferral(1).choose(torch.ones_like(pairs.expert_ids, dtype=torch.bool), pairs.weights)
    for got, extra in ((first, None), (second, late)):
        kept = torch.where(late, -1, pairs.expert_ids) if extra is None else pairs.expert_ids
        want, allowed = reference.forward(REFERENCE, pairs.hidden, kept, pairs.weights, EXACT)
        if extra is not None:
            ids = torch.where(extra, pairs.expert_ids, -1)
            more, slack = reference.forward(REFERENCE, pairs.hidden, ids, pairs.weights, EXACT)
            want, allowed = want + more, allowed + slack + 2**-23 * (want.abs() + more.abs())
        assert is_within(got, want, allowed + 2**-23 * want.abs())


def test_the_next_layer_is_copied_while_this_one_is_computed(host: ExpertDevice) -> None:
    layers = hybrid(host, set(), set())
    layers.streamed.rates = ALWAYS
    size = layers.layers[0].kernels[0].bytes_per_expert
    check(layers.layers[0], tokens=20)
    assert layers.streamed.bytes_to_device == 16 * size
    check(layers.layers[1], tokens=20)
    assert layers.streamed.bytes_to_device == 16 * size
