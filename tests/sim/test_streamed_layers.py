"""Long prompts through the accelerator alone: when, with which experts, and in which order."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kt_core.engine.hybrid_layers import HybridLayers
from kt_core.interfaces import ExpertDevice, ExpertId, Swap
from kt_core.moe import streamed_layers
from kt_core.moe.deferral import Deferral
from kt_core.moe.expert_mover import ExpertMover
from kt_core.moe.hybrid_experts import HybridExperts
from kt_core.moe.streamed_layers import StreamRates
from kt_core.testing import reference
from kt_core.testing.backend_harness import is_within, random_pairs, worst_of
from kt_sim.native import NativeDevice
from kt_sim.settings import parse
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

ALWAYS = StreamRates(fill_bytes_per_s=1e18, host_pairs_per_s=1e-9)
NEVER = StreamRates(fill_bytes_per_s=1.0, host_pairs_per_s=1e18)


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


def test_the_crossover_is_where_filling_and_the_host_take_equally_long(host: ExpertDevice) -> None:
    layers = hybrid(host, {0, 1}).streamed
    size = SPEC.num_experts * layers.host_of_most().bytes_per_expert
    # Filling a slot takes 1 s for a layer of eight cold experts, the host computes 100 pairs in it.
    layers.rates = StreamRates(fill_bytes_per_s=size, host_pairs_per_s=100)
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


class CopiesOfExperts(TorchDispatchMode):
    """Notes how many experts each copy from the host to the device has. Tables are smaller."""

    def __init__(self, bytes_per_expert: int) -> None:
        super().__init__()
        self._bytes_per_expert = bytes_per_expert
        self.experts: list[float] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.copy_.default and args[1].is_cpu and not args[0].is_cpu:
            self.experts.append(args[1].nbytes / self._bytes_per_expert)
        return func(*args, **(kwargs or {}))


def copies_of_a_pass(layers: HybridLayers, seed: int = 0) -> list[float]:
    """Experts in each copy, layer by layer; the numbers are checked."""
    with CopiesOfExperts(layers.layers[0].kernels[0].bytes_per_expert) as copies:
        for layer in layers.layers:
            check(layer, tokens=20, seed=seed)
    return [experts for experts in copies.experts if experts >= 1]


def test_a_layer_is_one_copy(host: ExpertDevice) -> None:
    layers = hybrid(host, {0, 1}, set(), {7}, {1, 4, 6})
    layers.streamed.rates = ALWAYS
    for seed in range(2):
        assert copies_of_a_pass(layers, seed) == [6, 8, 7, 5]


@pytest.mark.parametrize(("of_an_expert", "copies", "pinned"), [(3.5, [3, 3, 2], 4), (0.5, 8, 2)])
def test_a_large_layer_goes_in_pieces_of_whole_experts(
    host: ExpertDevice,
    monkeypatch: pytest.MonkeyPatch,
    of_an_expert: float,
    copies: list[float] | int,
    pinned: int,
) -> None:
    layers = hybrid(host, set(), set(), set())
    layers.streamed.rates = ALWAYS
    size = layers.layers[0].kernels[0].bytes_per_expert
    monkeypatch.setattr(streamed_layers, "_PIECE_BYTES", int(of_an_expert * size))
    one_layer = [1.0] * copies if isinstance(copies, int) else copies
    held: list[int] = []
    stage = layers.streamed._stage

    def noted(size: int) -> torch.Tensor:
        staged = stage(size)
        held.append(1 + len(layers.streamed._stages))
        return staged

    monkeypatch.setattr(layers.streamed, "_stage", noted)
    assert copies_of_a_pass(layers) == 3 * one_layer
    assert max(held) == pinned


def test_slots_take_no_more_memory_than_a_layer_each(host: ExpertDevice) -> None:
    layers = hybrid(host, {0, 1, 2}, {5}, {3, 4, 5, 6}, set())
    size = layers.layers[0].kernels[0].bytes_per_expert
    layers.streamed.rates = None
    copies_of_a_pass(layers)  # what a call allocates is there
    torch.accelerator.synchronize()
    before = torch.accelerator.memory_allocated(0)
    layers.streamed.rates = ALWAYS
    taken = []
    for seed in range(3):
        copies_of_a_pass(layers, seed)
        torch.accelerator.synchronize()
        taken.append(torch.accelerator.memory_allocated(0) - before)
    # At the end of four cold experts and of eight, in blocks that once held others.
    assert (4 + 8) * size <= taken[0] <= 2 * SPEC.num_experts * size
    assert taken == [taken[0]] * 3


def test_without_memory_for_a_layer_the_next_call_is_right(
    host: ExpertDevice, device: NativeDevice
) -> None:
    layers = hybrid(host, set())
    layers.streamed.rates = ALWAYS
    arguments = there(random_pairs(SPEC, 20, 3))
    device.fail_allocations(0, 1)
    with pytest.raises(torch.OutOfMemoryError), torch.no_grad():
        layers.streamed.submit(0, *arguments)
    check(layers.layers[0], tokens=20)


def test_the_rate_of_filling_knows_of_link_and_staging(
    host: ExpertDevice, device: NativeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = hybrid(host, {0, 1}, {3}).streamed
    kernel = layers.host_of_most()
    layer_bytes = 7 * kernel.bytes_per_expert
    device.configure(**parse("devices=2,memory_gib=0.25,link_gb_s=0.01").native())
    assert 0 < layers.measure_fill() <= 0.01e9
    device.configure(**parse(target.FAST).native())
    gather, staging_s = kernel.gather_packed, 0.05

    def slow(experts: Sequence[int], out: torch.Tensor) -> None:
        time.sleep(staging_s)
        gather(experts, out)

    monkeypatch.setattr(kernel, "gather_packed", slow)
    assert 0 < layers.measure_fill() <= layer_bytes / staging_s


def test_a_device_with_a_layout_of_its_own_takes_no_layers(
    host: ExpertDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = hybrid(host, {0, 1}, set()).streamed
    assert layers.can_fill
    monkeypatch.setattr(layers._slots[1].kernel, "moves_packed", False)
    assert not layers.can_fill


def test_measuring_leaves_nothing_behind(host: ExpertDevice) -> None:
    layers = hybrid(host, {0, 1}, set())
    torch.accelerator.synchronize()
    before = torch.accelerator.memory_allocated(0)
    assert layers.streamed.measure_fill() > 0
    torch.accelerator.synchronize()
    assert torch.accelerator.memory_allocated(0) == before
    assert layers.streamed.bytes_to_device == layers.streamed.streamed == 0
    layers.streamed.rates = ALWAYS
    assert copies_of_a_pass(layers) == [6, 8]
