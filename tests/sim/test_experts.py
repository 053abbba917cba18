"""Experts in simulated memory: nobody waits for them, they move as bytes, they can be captured."""

from __future__ import annotations

import gc

import pytest
import torch

from kt_core.errors import DeviceError
from kt_core.hardware.graphs import capture
from kt_core.interfaces import ExpertDevice, ExpertKernel
from kt_core.quant import BUILT_IN_FORMATS
from kt_core.testing.backend_harness import Pairs, random_layer, random_pairs
from kt_core.types import MoeSpec
from kt_sim.native import NativeDevice
from kt_sim.settings import parse
from sim import target
from sim.host_calls import Note
from sim.target import WHERE

pytestmark = pytest.mark.sim

SPEC = MoeSpec(num_experts=8, hidden_size=64, intermediate_size=96)
FORMAT = next(f.descriptor for f in BUILT_IN_FORMATS if f.descriptor.name == "int4-g32")


@pytest.fixture
def opened() -> ExpertDevice:
    return target.opened()


def loaded(device: ExpertDevice, experts: range | None = None) -> ExpertKernel:
    kernel = device.expert_kernel(SPEC, FORMAT)
    for index, weights in random_layer(SPEC).items():
        if experts is None or index in experts:
            kernel.load(index, weights)
    return kernel


def on_device(pairs: Pairs, where: str = WHERE) -> tuple[torch.Tensor, ...]:
    return tuple(t.to(where) for t in (pairs.hidden, pairs.expert_ids, pairs.weights))


def test_nobody_waits(opened: ExpertDevice) -> None:
    kernel, arguments = loaded(opened), on_device(random_pairs(SPEC, 5))
    torch.accelerator.synchronize()
    want = kernel.submit(*arguments).wait().cpu()
    stream, note = target.stream(), Note()
    note.gate.clear()
    note.launch(stream)
    with stream:
        out = kernel.submit(*arguments).wait()
    assert not stream.query()
    note.gate.set()
    stream.synchronize()
    assert torch.equal(out.cpu(), want)


def test_experts_move_as_bytes_between_devices_and_pinned_memory(opened: ExpertDevice) -> None:
    here, pairs = loaded(opened), random_pairs(SPEC, 9)
    want = here.submit(*on_device(pairs)).wait().cpu()
    other = target.opened(1)
    there = other.expert_kernel(SPEC, FORMAT)
    back = opened.expert_kernel(SPEC, FORMAT)
    held = []  # pinned memory must live until the copy is done
    for index in range(SPEC.num_experts):
        there.load_packed(index, here.packed(index))
        held.append(there.packed(index).cpu().pin_memory())
        back.load_packed(index, held[-1])
    assert torch.equal(there.submit(*on_device(pairs, other.info.torch_device)).wait().cpu(), want)
    assert torch.equal(back.submit(*on_device(pairs)).wait().cpu(), want)


def test_loading_from_pinned_memory_does_not_wait(opened: ExpertDevice) -> None:
    source, pairs = loaded(opened), random_pairs(SPEC, 4)
    pinned = [source.packed(index).cpu().pin_memory() for index in range(SPEC.num_experts)]
    kernel, arguments = opened.expert_kernel(SPEC, FORMAT), on_device(pairs)
    stream, note = target.stream(), Note()
    torch.accelerator.synchronize()
    note.gate.clear()
    note.launch(stream)
    with stream:
        for index, packed in enumerate(pinned):
            kernel.load_packed(index, packed)
        out = kernel.submit(*arguments).wait()
    assert not stream.query()
    note.gate.set()
    stream.synchronize()
    assert torch.equal(out.cpu(), source.submit(*arguments).wait().cpu())


def test_an_expert_leaves_in_the_order_of_the_stream(opened: ExpertDevice) -> None:
    """Work that was submitted before still finds it, even where its memory is wanted at once."""
    kernel, arguments = loaded(opened), on_device(random_pairs(SPEC, 4))
    want = kernel.submit(*arguments).wait().cpu()
    stream, note = target.stream(), Note()
    torch.accelerator.synchronize()
    note.gate.clear()
    note.launch(stream)
    with stream:
        before = kernel.submit(*arguments).wait()
        for index in range(SPEC.num_experts):
            kernel.unload(index)
        after = kernel.submit(*arguments).wait()
    bytes_per_expert = kernel.bytes_per_expert
    rubbish = [  # in another stream, which does not stand still
        torch.full((bytes_per_expert,), 255, dtype=torch.uint8, device=WHERE) for _ in range(8)
    ]
    torch.accelerator.current_stream().synchronize()
    note.gate.set()
    stream.synchronize()
    del rubbish
    assert torch.equal(before.cpu(), want)
    assert bool((after == 0).all())


def test_a_layer_is_captured(opened: ExpertDevice) -> None:
    kernel = loaded(opened)
    first, second = random_pairs(SPEC, 3, seed=1), random_pairs(SPEC, 3, seed=2)
    arguments, out = on_device(first), torch.zeros(3, SPEC.hidden_size, device=WHERE)
    with capture(torch.device(WHERE)) as graph:
        out.copy_(kernel.submit(*arguments).wait())
    for pairs in (first, second):
        for static, fresh in zip(arguments, on_device(pairs), strict=True):
            static.copy_(fresh)
        graph.replay()
        torch.accelerator.synchronize()
        assert torch.equal(out.cpu(), kernel.submit(*on_device(pairs)).wait().cpu())
    kernel.unload(0)  # a replay sees the table as it is
    graph.replay()
    torch.accelerator.synchronize()
    assert torch.equal(out.cpu(), kernel.submit(*on_device(second)).wait().cpu())


def test_memory_is_what_is_claimed_and_goes_with_the_expert(opened: ExpertDevice) -> None:
    kernel = opened.expert_kernel(SPEC, FORMAT)
    torch.accelerator.synchronize()
    gc.collect()  # what other tests left, in cycles
    torch.accelerator.empty_cache()  # blocks are not split, and a larger one counts whole
    before = torch.accelerator.memory_allocated(0)
    for index, weights in random_layer(SPEC).items():
        kernel.load(index, weights)
    taken = torch.accelerator.memory_allocated(0) - before
    claimed = opened.expert_bytes(SPEC, FORMAT) * SPEC.num_experts
    assert claimed <= taken < claimed + 512 * SPEC.num_experts  # the allocator's granule
    arguments = on_device(random_pairs(SPEC, 4))
    held = torch.accelerator.memory_allocated(0)
    for _ in range(10):
        kernel.submit(*arguments)
        kernel.load_packed(0, kernel.packed(1))
    torch.accelerator.synchronize()
    assert torch.accelerator.memory_allocated(0) == held
    for index in range(SPEC.num_experts):
        kernel.unload(index)
    assert torch.accelerator.memory_allocated(0) == held - taken


def test_no_room_for_an_expert_leaves_the_others(
    opened: ExpertDevice, device: NativeDevice
) -> None:
    kernel = loaded(opened, range(4))
    pairs = on_device(random_pairs(MoeSpec(num_experts=4, hidden_size=64, intermediate_size=96), 6))
    want = kernel.submit(*pairs).wait().cpu()
    device.fail_allocations(0, 1)
    with pytest.raises(torch.OutOfMemoryError, match="sim:0 is out of memory"):
        kernel.load(5, random_layer(SPEC)[5])
    assert kernel.resident() == {0, 1, 2, 3}
    assert torch.equal(kernel.submit(*pairs).wait().cpu(), want)


def test_the_time_of_a_call_is_that_of_its_bytes(
    opened: ExpertDevice, device: NativeDevice
) -> None:
    """One active expert is charged once, however many tokens go there."""
    kernel = loaded(opened)
    pairs = random_pairs(SPEC, 4)
    same = Pairs(pairs.hidden, torch.zeros_like(pairs.expert_ids), pairs.weights)
    rate = kernel.bytes_per_expert / 0.02 / 1e9  # 20 ms for an expert
    times = {}
    for name, arguments in {"one": on_device(same), "many": on_device(pairs)}.items():
        begin, end = (torch.Event("sim", enable_timing=True) for _ in range(2))
        torch.accelerator.synchronize()
        machine = f"devices=2,memory_gib=0.25,memory_gb_s={rate},float32_tflops=0"
        device.configure(**parse(machine).native())
        begin.record()
        kernel.submit(*arguments)
        end.record()
        end.synchronize()
        times[name] = begin.elapsed_time(end)
    active = len(pairs.expert_ids.unique())
    assert active > 1
    assert times["one"] >= 20
    assert times["many"] >= 20 * active


def test_a_lost_device_says_so(opened: ExpertDevice, device: NativeDevice) -> None:
    kernel, arguments = loaded(opened), on_device(random_pairs(SPEC, 2))
    device.lose(0, "it fell off the bus")
    with pytest.raises(RuntimeError, match="sim:0 is lost: it fell off the bus"):
        kernel.submit(*arguments)
    note = Note()
    with pytest.raises(DeviceError, match=r"code 2 \(the device is lost\)"):
        note.launch(torch.accelerator.current_stream(0))
    assert note.calls == 0


def test_tensors_elsewhere_are_refused(opened: ExpertDevice) -> None:
    kernel, pairs = loaded(opened), random_pairs(SPEC, 2)
    with pytest.raises(ValueError, match=rf"hidden must be on {WHERE}, got cpu"):
        kernel.submit(pairs.hidden, pairs.expert_ids, pairs.weights)
