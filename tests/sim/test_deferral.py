"""Pairs that come a layer late: which ones, and what the layers then add up to."""

from __future__ import annotations

import pytest
import torch

from kt_core.interfaces import ExpertDevice
from kt_core.moe.deferral import Deferral, DeferringLane
from kt_core.moe.host_lane import HostLane, PinnedBuffers
from kt_core.moe.hybrid_experts import HybridExperts
from kt_core.testing import reference
from kt_core.testing.backend_harness import is_within, random_pairs, worst_of
from sim import target
from sim.target import WHERE, there
from sim.test_hybrid_experts import EXACT, REFERENCE, SPEC, host, kernel_on

pytestmark = pytest.mark.sim
__all__ = ["host"]

HOT = {1, 4, 6}


def layers_of(host: ExpertDevice, count: int, deferral: Deferral) -> list[HybridExperts]:
    device, where = target.opened(), torch.device(WHERE)
    shared, late = PinnedBuffers(), (PinnedBuffers(), PinnedBuffers())
    layers = []
    for index in range(count):
        kernel = kernel_on(host, set(range(SPEC.num_experts)) - HOT)
        lanes = [
            HostLane(kernel, where, device.host_functions, buffers)
            for buffers in (shared, late[index % 2])
        ]
        is_last = index == count - 1
        lane = DeferringLane(lanes[0], None if is_last else lanes[1], deferral)
        layers.append(HybridExperts(SPEC, [lane, kernel_on(device, HOT)], device=where).eval())
    return layers


def test_the_lowest_cold_ones_are_put_off_and_never_all() -> None:
    cold = torch.tensor([[True, True, False, True], [False, False, False, True], [True] * 4])
    weights = torch.tensor([[0.4, 0.1, 0.05, 0.3], [0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]])
    chosen = [Deferral(count).choose(cold, weights).tolist() for count in (1, 2, 9)]
    assert chosen[0] == [
        [False, True, False, False],
        [False, False, False, True],
        [False] * 3 + [True],
    ]
    assert chosen[1][0] == [False, True, False, True]
    assert chosen[2][2] == [False, True, True, True]


@pytest.mark.parametrize("count", [1, 2])
def test_what_is_put_off_is_added_one_layer_later(host: ExpertDevice, count: int) -> None:
    """Each layer's output, as the reference computes it for the pairs it should hold."""
    layers = layers_of(host, 4, Deferral(count))
    inputs = [random_pairs(SPEC, 6, 3, seed=seed) for seed in range(len(layers))]
    with torch.no_grad():
        outputs = [layer(*there(pairs)).cpu() for layer, pairs in zip(layers, inputs, strict=True)]
    late = torch.zeros_like(inputs[0].expert_ids, dtype=torch.bool)
    before = None
    for index, pairs in enumerate(inputs):
        cold = ~torch.isin(pairs.expert_ids, torch.tensor(sorted(HOT)))
        is_last = index == len(layers) - 1
        now_late = (
            torch.zeros_like(cold) if is_last else Deferral(count).choose(cold, pairs.weights)
        )
        parts = [(pairs, torch.where(now_late, -1, pairs.expert_ids))]
        if before is not None:
            parts.append((before, torch.where(late, before.expert_ids, -1)))
        sums = [
            reference.forward(REFERENCE, part.hidden, ids, part.weights, EXACT)
            for part, ids in parts
        ]
        want = sum((value for value, _ in sums), torch.zeros(()))
        # The parts are added: three more roundings of what they amount to.
        magnitude = sum((value.abs() + allowed for value, allowed in sums), torch.zeros(()))
        allowed = sum((a for _, a in sums), torch.zeros(())) + 3 * 2**-24 * magnitude
        assert now_late.any() or is_last
        assert is_within(outputs[index], want, allowed), worst_of(outputs[index], want, allowed)
        late, before = now_late, pairs


def test_off_changes_nothing(host: ExpertDevice) -> None:
    deferral = Deferral(0)
    pairs = random_pairs(SPEC, 6, 3)
    for layer in layers_of(host, 2, deferral):
        with torch.no_grad():
            got = layer(*there(pairs)).cpu()
        want, allowed = reference.forward(
            REFERENCE, pairs.hidden, pairs.expert_ids, pairs.weights, EXACT
        )
        assert is_within(got, want, allowed + 2**-23 * want.abs())
    assert deferral.take() is None
