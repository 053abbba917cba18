"""One layer on the host and on simulated accelerators: the same numbers wherever experts live."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest
import torch

from kt_core.errors import DeviceError
from kt_core.hardware.graphs import capture
from kt_core.interfaces import ExpertDevice, ExpertId, ExpertKernel, HostFunctions, Swap
from kt_core.moe.expert_mover import ExpertMover
from kt_core.moe.host_lane import HostLane, PinnedBuffers
from kt_core.moe.hybrid_experts import HybridExperts
from kt_core.moe.peer_lane import PeerLane
from kt_core.quant import BUILT_IN_FORMATS
from kt_core.testing import reference
from kt_core.testing.backend_harness import is_within, random_layer, random_pairs, worst_of
from kt_core.types import ActivationPrecision, MoeSpec
from kt_cpu.backend import CpuBackend
from kt_sim.native import NativeDevice
from sim import target
from sim.target import WHERE, there

pytestmark = pytest.mark.sim

SPEC = MoeSpec(num_experts=8, hidden_size=64, intermediate_size=96)
FORMAT = next(f for f in BUILT_IN_FORMATS if f.descriptor.name == "int4-g32")
WEIGHTS = random_layer(SPEC)
REFERENCE = reference.layer(SPEC, FORMAT, WEIGHTS)
EXACT = ActivationPrecision.FLOAT32  # so that host and device compute the same numbers


@pytest.fixture(scope="module")
def host() -> Iterator[ExpertDevice]:
    with CpuBackend().open("cpu", threads=2) as opened:
        yield opened


def kernel_on(device: ExpertDevice, experts: set[int]) -> ExpertKernel:
    kernel = device.expert_kernel(SPEC, FORMAT.descriptor, precision=EXACT)
    for expert in experts:
        kernel.load(expert, WEIGHTS[expert])
    return kernel


def hybrid(
    host: ExpertDevice,
    *hot: set[int],
    calls_host: bool = True,
    buffers: PinnedBuffers | None = None,
    functions: HostFunctions | None = None,
) -> HybridExperts:
    """A layer whose experts ``hot[n]`` live on simulated device n, and all others on the host."""
    devices = [target.opened(index) for index in range(len(hot))]
    functions = functions or (devices[0].host_functions if calls_host else None)
    cold = set(range(SPEC.num_experts)) - set().union(*hot)
    lanes: list[ExpertKernel] = [
        HostLane(kernel_on(host, cold), torch.device(WHERE), functions, buffers or PinnedBuffers()),
        kernel_on(devices[0], hot[0]),
    ]
    for device, experts in zip(devices[1:], hot[1:], strict=True):
        where = torch.device(device.info.torch_device)
        lanes.append(PeerLane(kernel_on(device, experts), where))
    return HybridExperts(SPEC, lanes, device=torch.device(WHERE)).eval()


def check(layer: HybridExperts, tokens: int, seed: int = 0) -> None:
    pairs = random_pairs(SPEC, tokens, 3, seed=seed)
    with torch.no_grad():
        got = layer(*there(pairs)).cpu()
    want, allowed = reference.forward(
        REFERENCE, pairs.hidden, pairs.expert_ids, pairs.weights, EXACT
    )
    # Three sums are added instead of one: two more roundings of what they amount to.
    allowed = allowed + 2 * reference.UNIT_ROUNDOFF * (want.abs() + allowed)
    assert is_within(got, want, allowed), worst_of(got, want, allowed)


@pytest.mark.parametrize("calls_host", [True, False], ids=["called", "waiting"])
@pytest.mark.parametrize("tokens", [0, 1, 3, 70])
def test_host_and_device_share_a_layer(host: ExpertDevice, tokens: int, calls_host: bool) -> None:
    check(hybrid(host, {1, 4, 6}, calls_host=calls_host), tokens)


def test_any_residency_on_two_devices(host: ExpertDevice) -> None:
    dice = random.Random(0)
    for seed in range(12):
        homes = [dice.randrange(3) for _ in range(SPEC.num_experts)]
        hot = [{e for e, home in enumerate(homes) if home == n} for n in (1, 2)]
        check(hybrid(host, *hot), tokens=5, seed=seed)


def test_layers_that_share_buffers_do_not_mix_them_up(host: ExpertDevice) -> None:
    buffers = PinnedBuffers()
    layers = [hybrid(host, {n}, buffers=buffers) for n in range(3)]
    for tokens in (4, 9, 2, 4):
        for seed, layer in enumerate(layers):
            check(layer, tokens, seed)


def test_nobody_waits_for_the_host(host: ExpertDevice) -> None:
    """The call returns while the stream still waits for a function of the host."""
    from sim.host_calls import Note

    layer, pairs = hybrid(host, {0, 1}), random_pairs(SPEC, 4, 3)
    arguments = there(pairs)
    with torch.no_grad():
        want = layer(*arguments).cpu()
    note = Note()
    note.gate.clear()
    stream = torch.accelerator.current_stream(WHERE)
    note.launch(stream)
    with torch.no_grad():
        out = layer(*arguments)
    assert not stream.query()
    note.gate.set()
    assert torch.equal(out.cpu(), want)


def test_a_captured_call_follows_its_inputs_and_the_table(host: ExpertDevice) -> None:
    layer, pairs = hybrid(host, {2, 3}), random_pairs(SPEC, 2, 3)
    arguments = there(pairs)
    with torch.no_grad():
        layer(*arguments)  # not within the capture: it makes what is made once
        stream = target.stream()
        with capture(torch.device(WHERE), stream) as graph:
            out = layer(*arguments)
    mover = ExpertMover([layer], torch.device(WHERE))
    for seed in range(4):
        if seed == 2:
            mover.begin([Swap(ExpertId(0, 5), (ExpertId(0, 2),))])
            mover.finish()
        other = random_pairs(SPEC, 2, 3, seed=seed)
        for held, new in zip(
            arguments, (other.hidden, other.expert_ids, other.weights), strict=True
        ):
            held.copy_(new.to(WHERE))
        torch.accelerator.synchronize(WHERE)
        with stream:
            graph.replay()
        stream.synchronize()
        want, allowed = reference.forward(
            REFERENCE, other.hidden, other.expert_ids, other.weights, EXACT
        )
        allowed = allowed + 2 * reference.UNIT_ROUNDOFF * (want.abs() + allowed)
        assert is_within(out.cpu(), want, allowed), worst_of(out.cpu(), want, allowed)


def test_a_captured_call_outlives_the_calls_that_are_kept(host: ExpertDevice) -> None:
    """As many sizes as make a lane forget its calls; the one that was there before, too."""
    layer, pairs = hybrid(host, {2, 3}), random_pairs(SPEC, 2, 3)
    arguments = there(pairs)
    lane = layer.kernels[0]
    assert isinstance(lane, HostLane)
    with torch.no_grad():
        want = layer(*arguments).cpu()
        stream = target.stream()
        with capture(torch.device(WHERE), stream) as graph:
            out = layer(*arguments)
        (kept,) = lane._captured
        assert kept not in {call for call, _ in lane._calls.values()}
        for tokens in range(3, 70):
            check(layer, tokens)
    with stream:
        graph.replay()
    stream.synchronize()
    assert torch.equal(out.cpu(), want)


def test_experts_move_while_the_layer_runs(
    host: ExpertDevice, maybe_device: NativeDevice | None
) -> None:
    """Calls in between are right at any moment, and in the end each expert lies in one place."""
    layer = hybrid(host, {0, 1, 2})
    # Slow enough for calls to pass while copies are under way.
    target.configure(maybe_device, "devices=2,memory_gib=0.25,link_gb_s=0.002,link_latency_us=50")
    mover, dice = ExpertMover([layer], torch.device(WHERE)), random.Random(1)
    for seed in range(25):
        if mover.is_idle:
            hot = sorted(layer.kernels[1].resident())
            cold = sorted(layer.kernels[0].resident())
            mover.begin([Swap(ExpertId(0, dice.choice(cold)), (ExpertId(0, dice.choice(hot)),))])
            mask = mover.homes((1, SPEC.num_experts)) != 0
            assert mask.sum() == 3
        check(layer, tokens=4, seed=seed)
        mover.advance()
    mover.finish()
    assert mover.moves >= 4
    assert layer.kernels[0].resident() | layer.kernels[1].resident() == set(range(8))
    assert not layer.kernels[0].resident() & layer.kernels[1].resident()
    assert len(layer.kernels[1].resident()) == 3
    assert mover.bytes_to_device == mover.bytes_to_host > 0
    check(layer, tokens=4)


def test_experts_that_are_on_their_way_move_again(
    host: ExpertDevice, maybe_device: NativeDevice | None
) -> None:
    """Whoever chooses swaps knows where experts will be, and may want them back at once."""
    layer = hybrid(host, {0, 1, 2})
    target.configure(maybe_device, "devices=2,memory_gib=0.25,link_gb_s=0.002,link_latency_us=50")
    mover, dice = ExpertMover([layer], torch.device(WHERE)), random.Random(1)
    again = 0
    for seed in range(40):
        homes = mover.homes((1, SPEC.num_experts))[0].tolist()
        hot, cold = ([e for e, home in enumerate(homes) if home == n] for n in (1, 0))
        under_way = {move.expert.expert for move in mover._moves}
        load, evict = dice.choice(cold), dice.choice(hot)
        again += len({load, evict} & under_way)
        mover.begin([Swap(ExpertId(0, load), (ExpertId(0, evict),))])
        check(layer, tokens=4, seed=seed)
        mover.advance()
        held = [kernel.resident() for kernel in layer.kernels]
        assert held[0] | held[1] == set(range(8)), "an expert is nowhere"
        assert len(held[1]) <= 3, "more on the accelerator than there is room for"
    assert again > 10
    planned = mover.homes((1, SPEC.num_experts)).copy()
    mover.finish()
    assert not layer.kernels[0].resident() & layer.kernels[1].resident()
    assert [e in layer.kernels[1].resident() for e in range(8)] == (planned[0] == 1).tolist()
    assert mover.bytes_to_device == mover.bytes_to_host > 0
    check(layer, tokens=4)


def test_moving_leaks_nothing(host: ExpertDevice) -> None:
    layer = hybrid(host, {0})
    mover = ExpertMover([layer], torch.device(WHERE))

    def there_and_back() -> int:
        for load, evict in ((1, 0), (0, 1)):
            mover.begin([Swap(ExpertId(0, load), (ExpertId(0, evict),))])
            mover.finish()
            check(layer, tokens=3)
        torch.accelerator.synchronize(WHERE)
        return int(torch.accelerator.memory_allocated(WHERE))

    first = there_and_back()
    assert [there_and_back() for _ in range(5)] == [first] * 5


def test_the_times_of_calls_are_kept_when_asked(host: ExpertDevice) -> None:
    layer = hybrid(host, {0})
    lane = layer.kernels[0]
    assert isinstance(lane, HostLane)
    check(layer, tokens=3)
    assert lane.take_times() == []
    lane.record(is_on=True)
    for tokens in (3, 5, 3):
        check(layer, tokens)
    times = lane.take_times()
    assert len(times) == 3
    for one in times:
        assert 0 < one.started <= one.finished <= one.joined
        assert one.started <= one.join_called <= one.joined
    for before, after in itertools.pairwise(times):
        assert before.joined <= after.started
    assert lane.take_times() == []


def test_an_error_on_the_host_reaches_the_caller(host: ExpertDevice) -> None:
    layer, pairs = hybrid(host, {0}), random_pairs(SPEC, 4, 3)
    lane = layer.kernels[0]
    assert isinstance(lane, HostLane)
    lane.unload(3)  # behind the table's back
    ids = torch.full_like(pairs.expert_ids, 3)
    with torch.no_grad():
        out = layer(pairs.hidden.to(WHERE), ids.to(WHERE), pairs.weights.to(WHERE))
    torch.accelerator.synchronize(WHERE)
    assert not out.cpu().any()
    with pytest.raises(RuntimeError, match="expert 3"):
        lane.raise_error()
    lane.raise_error()  # once is enough
    lane.load(3, WEIGHTS[3])
    check(layer, tokens=4)


def test_a_device_without_memory_leaves_the_expert_on_the_host(
    host: ExpertDevice, device: NativeDevice, caplog: pytest.LogCaptureFixture
) -> None:
    layer = hybrid(host, {0})
    check(layer, tokens=4)
    mover = ExpertMover([layer], torch.device(WHERE))
    device.fail_allocations(0, 2)
    for expert in (1, 2):
        mover.begin([Swap(ExpertId(0, expert), ())])
        mover.finish()
    assert mover.given_up == 2
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "stays on the host" in caplog.text
    check(layer, tokens=4)
    mover.begin([Swap(ExpertId(0, 1), ())])
    mover.finish()
    assert layer.kernels[1].resident() == {0, 1}
    check(layer, tokens=4)


def test_a_lost_device_ends_in_an_error(host: ExpertDevice, device: NativeDevice) -> None:
    layer = hybrid(host, {0, 1})
    pairs = random_pairs(SPEC, 4, 3)
    arguments = there(pairs)
    device.lose(0, "it fell off the bus")
    with pytest.raises(Exception, match="fell off the bus") as caught, torch.no_grad():
        layer(*arguments).cpu()
    assert isinstance(caught.value, (DeviceError, RuntimeError))
    del arguments
    device.revive(0)
    check(layer, tokens=4)
