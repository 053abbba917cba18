"""Experts split over NUMA nodes: 2, 4 and 8 made-up ones on a machine that may have one.

The truth is what a device without nodes gives: the same bytes and the same sums, bit for bit, since
no sum of the forward pass is cut. Gradients, whose sums run over all nodes, have the reference's
bound. Longer than most files: one set of made-up nodes for bytes, sums and system calls.
"""

from __future__ import annotations

import errno
import gc
import logging
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
import torch

from kernels.devices import ISAS, device_for, packed_bytes
from kt_core.interfaces import WeightFormat
from kt_core.quant import BUILT_IN_FORMATS
from kt_core.testing import ACTIVATIONS, backward_reference, reference
from kt_core.testing.backend_training import check_gradients, random_lora
from kt_core.types import (
    Activation,
    ActivationKind,
    ActivationPrecision,
    Capabilities,
    DeviceInfo,
    Element,
    MoeSpec,
)
from kt_cpu import _kernels
from kt_cpu.backend import CpuDevice
from kt_cpu.kernel import CpuExpertKernel
from kt_cpu.topology import Node, Thread, Topology

FORMATS = {f.descriptor.name: f for f in BUILT_IN_FORMATS}
NODE_COUNTS = (2, 4, 8)
# 17 panels of gate and up and 18 of down, the last ones with 4 outputs: 9 pairs each, so that 2, 4
# and 8 nodes get unequal parts, and the last part is no whole number of panels.
SPEC = MoeSpec(num_experts=3, hidden_size=276, intermediate_size=260)
FIRST_ID = 10  # nodes are called by their ids, not by their places
UNGATED = Activation(kind=ActivationKind.RELU2, is_gated=False)
PAGE = mmap.PAGESIZE


@dataclass
class Memory:
    """In place of mbind: writes down what it is asked, and answers with an errno."""

    answer: int = 0
    calls: list[tuple[int, int, int, bool]] = field(default_factory=list)

    def __call__(self, base: int, size: int, node: int, is_strict: bool) -> int:
        self.calls.append((base, size, node, is_strict))
        return self.answer


def made_up(threads: Sequence[int], memory_bytes: int = 1 << 40) -> Topology:
    """So many threads on each node; where they run is left to the system."""
    nodes = tuple(Node(FIRST_ID + n, (), memory_bytes) for n in range(len(threads)))
    return Topology(
        nodes, tuple(Thread(n, ()) for n, count in enumerate(threads) for _ in range(count))
    )


def open_device(
    topology: Topology | None, isa: str = "", memory: Memory | None = None
) -> CpuDevice:
    return device_for(isa, 1, topology=topology, bind=memory or Memory())


@pytest.fixture(scope="module")
def alone() -> Iterator[CpuDevice]:
    with open_device(None) as device:
        yield device


@pytest.fixture(scope="module", params=NODE_COUNTS)
def split(request: pytest.FixtureRequest) -> Iterator[CpuDevice]:
    with open_device(made_up([1] * request.param)) as device:
        yield device


def loaded(
    device: CpuDevice,
    weight_format: WeightFormat,
    spec: MoeSpec = SPEC,
    precision: ActivationPrecision = ActivationPrecision.AUTO,
    *,
    quantized: bool = False,
) -> CpuExpertKernel:
    generator = torch.Generator().manual_seed(1)
    kernel = device.expert_kernel(spec, weight_format.descriptor, precision=precision)
    for expert in range(spec.num_experts):
        weights = reference.random_weights(spec, generator)
        if quantized:
            matrices = {name: getattr(weights, name) for name in ("gate", "up", "down")}
            codes = {n: weight_format.quantize(m) for n, m in matrices.items() if m is not None}
            weights = replace(weights, **codes)
        kernel.load(expert, weights)
    return kernel


def arguments(
    spec: MoeSpec, tokens: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, spec.hidden_size, generator=generator).to(dtype)
    ids = torch.randint(-1, spec.num_experts, (tokens, 2), generator=generator)
    return hidden, ids, torch.rand(tokens, 2, generator=generator)


# ---------------------------------------------------------------- who holds what


def rows_of(kernel: CpuExpertKernel) -> tuple[list[int], list[int]]:
    parts = kernel._layer.parts(0)
    return [up for up, *_ in parts], [down for _, down, *_ in parts]


def test_every_output_is_on_one_node(split: CpuDevice) -> None:
    nodes = split.threads
    ups, downs = rows_of(split.expert_kernel(SPEC, FORMATS["bf16"].descriptor))
    assert (len(ups), sum(ups), sum(downs)) == (nodes, SPEC.intermediate_size, SPEC.hidden_size)
    for rows in (ups, downs):
        assert all(count % 32 == 0 for count in rows[:-1])  # kernels take panels in twos
        assert min(rows) > 0
        pairs = [-(-count // 32) for count in rows]
        assert max(pairs) - min(pairs) <= 1


def test_a_node_with_more_threads_holds_more() -> None:
    with open_device(made_up([3, 1])) as device:
        spec = replace(SPEC, intermediate_size=256, hidden_size=512)
        assert rows_of(device.expert_kernel(spec, FORMATS["bf16"].descriptor)) == (
            [192, 64],
            [384, 128],
        )


@pytest.mark.parametrize(
    ("hidden", "inner", "wanted"), [(512, 1, 1), (512, 40, 2), (33, 512, 2), (97, 100, 4)]
)
def test_small_experts_use_fewer_nodes(
    alone: CpuDevice, split: CpuDevice, hidden: int, inner: int, wanted: int
) -> None:
    spec = MoeSpec(num_experts=2, hidden_size=hidden, intermediate_size=inner)
    kernel = loaded(split, FORMATS["int8"], spec)
    ups, downs = rows_of(kernel)
    assert len(ups) == min(wanted, split.threads)
    assert (sum(ups), sum(downs)) == (inner, hidden)
    want = loaded(alone, FORMATS["int8"], spec).submit(*arguments(spec, 5)).wait()
    assert torch.equal(kernel.submit(*arguments(spec, 5)).wait(), want)


@pytest.mark.parametrize("weight_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("activation", [Activation(kind=ActivationKind.SILU), UNGATED], ids=repr)
def test_packed_bytes_do_not_know_of_nodes(
    alone: CpuDevice,
    split: CpuDevice,
    weight_format: WeightFormat,
    activation: Activation,
    quantized: bool,
) -> None:
    spec = replace(SPEC, activation=activation, has_bias=True)
    want, got = (loaded(d, weight_format, spec, quantized=quantized) for d in (alone, split))
    assert got.bytes_per_expert == want.bytes_per_expert
    for expert in range(spec.num_experts):
        assert packed_bytes(got, expert) == packed_bytes(want, expert)
    backwards = range(spec.num_experts)[::-1]
    gathered = torch.empty(spec.num_experts * got.bytes_per_expert, dtype=torch.uint8)
    got.gather_packed(backwards, gathered)
    assert torch.equal(gathered, torch.cat([want.packed(expert) for expert in backwards]))


@pytest.mark.parametrize("weight_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("activation", [Activation(kind=ActivationKind.SILU), UNGATED], ids=repr)
def test_packed_bytes_are_cut_into_parts_again(
    alone: CpuDevice, split: CpuDevice, weight_format: WeightFormat, activation: Activation
) -> None:
    spec = replace(SPEC, activation=activation, has_bias=True)
    given = loaded(alone, weight_format, spec)
    kernels = [d.expert_kernel(spec, weight_format.descriptor) for d in (alone, split)]
    for expert in range(spec.num_experts):
        for kernel in kernels:
            kernel.load_packed(expert, given.packed(expert))
            assert packed_bytes(kernel, expert) == packed_bytes(given, expert)
    want, got = (kernel.submit(*arguments(spec, 5)).wait() for kernel in kernels)
    assert torch.equal(got, want)


def test_transposed_weights_are_split_by_outputs_too(alone: CpuDevice, split: CpuDevice) -> None:
    """Checkpoints that hold [inputs, outputs] are read in place, with strides."""
    weights = reference.random_weights(SPEC, torch.Generator().manual_seed(0))
    strided = replace(
        weights, **{n: getattr(weights, n).T.contiguous().T for n in ("gate", "up", "down")}
    )
    want, got = (d.expert_kernel(SPEC, FORMATS["int4-g32"].descriptor) for d in (alone, split))
    want.load(0, weights)
    got.load(0, strided)
    assert packed_bytes(got, 0) == packed_bytes(want, 0)


@pytest.mark.parametrize("name", ["gate", "up", "down"])
def test_a_bad_number_on_the_last_node_is_found(split: CpuDevice, name: str) -> None:
    weights = reference.random_weights(SPEC, torch.Generator().manual_seed(0))
    kernel = split.expert_kernel(SPEC, FORMATS["int8"].descriptor)
    kernel.load(0, weights)
    getattr(weights, name)[-1, -1] = float("nan")
    with pytest.raises(ValueError, match=f"the {name} projection of expert 0 holds a NaN"):
        kernel.load(0, weights)
    assert kernel.resident() == frozenset()


# ---------------------------------------------------------------- sums

PRECISIONS = [
    pytest.param(f, p, id=f"{name}-{p.value}")
    for name, f in FORMATS.items()
    for p in ActivationPrecision
    if p != "auto" and (p != "int8" or f.descriptor.element.is_integer)
]


@pytest.mark.parametrize(("weight_format", "precision"), PRECISIONS)
@pytest.mark.parametrize("tokens", [1, 40])
def test_sums_are_those_of_one_node(
    alone: CpuDevice,
    split: CpuDevice,
    weight_format: WeightFormat,
    precision: ActivationPrecision,
    tokens: int,
) -> None:
    call = arguments(SPEC, tokens)
    want, got = (
        loaded(d, weight_format, precision=precision).submit(*call).wait() for d in (alone, split)
    )
    assert bool(want.abs().max() > 0)
    assert torch.equal(got, want)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", [Activation(kind=ActivationKind.SILU), UNGATED], ids=repr)
def test_sums_on_every_instruction_set(isa: str, activation: Activation) -> None:
    spec = replace(SPEC, activation=activation, has_bias=True)
    with open_device(None, isa) as alone, open_device(made_up([2, 1, 1]), isa) as split:
        for name in ("int4-g32", "bf16"):
            for tokens in (1, 40):
                call = arguments(spec, tokens, torch.bfloat16)
                want, got = (
                    loaded(d, FORMATS[name], spec).submit(*call).wait() for d in (alone, split)
                )
                assert torch.equal(got, want)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
@pytest.mark.parametrize("has_bias", [False, True])
def test_training_matches_the_reference(
    alone: CpuDevice, split: CpuDevice, activation: Activation, has_bias: bool
) -> None:
    spec = MoeSpec(
        num_experts=3,
        hidden_size=276,
        intermediate_size=132,
        activation=activation,
        has_bias=has_bias,
    )
    weight_format, lora = FORMATS["int8-g32"], random_lora(spec)
    generator = torch.Generator().manual_seed(1)
    experts = {e: reference.random_weights(spec, generator) for e in range(spec.num_experts)}
    layer = reference.layer(spec, weight_format, experts)
    for precision in (ActivationPrecision.BF16, ActivationPrecision.FLOAT32):
        hidden, ids, weights = arguments(spec, 9)
        ids = ids.clamp(min=0)
        grad = torch.randn(9, spec.hidden_size, generator=generator)
        kernels = [loaded(d, weight_format, spec, precision) for d in (alone, split)]
        want = backward_reference.backward(layer, hidden, ids, weights, grad, precision, lora)
        check_gradients(kernels[1].backward(hidden, ids, weights, grad, lora), want, precision)
        alike = [k.submit_training(hidden, ids, weights, lora).wait() for k in kernels]
        assert torch.equal(*alike)


@pytest.mark.parametrize("tokens", [1, 70])
@pytest.mark.parametrize("name", ["bf16", "int4-g64-asym", "fp8-channel"])
def test_gradients_of_other_formats(split: CpuDevice, name: str, tokens: int) -> None:
    weight_format = FORMATS[name]
    generator = torch.Generator().manual_seed(1)
    experts = {e: reference.random_weights(SPEC, generator) for e in range(SPEC.num_experts)}
    hidden, ids, weights = arguments(SPEC, tokens)
    ids = ids.clamp(min=0)
    grad = torch.randn(tokens, SPEC.hidden_size, generator=generator)
    precision = ActivationPrecision.FLOAT32
    kernel = loaded(split, weight_format, precision=precision)
    layer = reference.layer(SPEC, weight_format, experts)
    want = backward_reference.backward(layer, hidden, ids, weights, grad, precision, None)
    check_gradients(kernel.backward(hidden, ids, weights, grad, None), want, name)


def test_gradients_are_the_same_whatever_the_number_of_threads() -> None:
    """Parts are added in the order of the nodes, whoever computes them."""
    hidden, ids, weights = arguments(SPEC, 40)
    grad = torch.ones(40, SPEC.hidden_size)
    found = []
    for threads in ([1, 1], [2, 2], [4, 4]):
        with open_device(made_up(threads)) as device:
            kernel = loaded(device, FORMATS["bf16"])
            found.append(kernel.backward(hidden, ids, weights, grad, random_lora(SPEC)))
    for other in found[1:]:
        assert torch.equal(other.hidden, found[0].hidden)
        assert torch.equal(other.weights, found[0].weights)


# ---------------------------------------------------------------- what the system is asked


@pytest.mark.parametrize("nodes", NODE_COUNTS)
def test_each_part_is_bound_to_its_node(nodes: int) -> None:
    memory = Memory()
    with open_device(made_up([1] * nodes), memory=memory) as device:
        kernel = loaded(device, FORMATS["int8"])
        spans = []
        for place, (base, size, node, is_strict) in enumerate(memory.calls):
            assert (node, is_strict, base % PAGE) == (FIRST_ID + place, True, 0)
            for expert in range(SPEC.num_experts):
                _, _, address, part_bytes = kernel._layer.parts(expert)[place]
                assert base <= address
                assert address + part_bytes <= base + size
            assert size == SPEC.num_experts * part_bytes
            spans.append((base, base + size))
        assert len(spans) == nodes
        spans.sort()
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))


def test_one_node_is_not_bound() -> None:
    memory = Memory()
    with open_device(made_up([4]), memory=memory) as device:
        kernel = loaded(device, FORMATS["int8"])
        assert len(kernel._layer.parts(0)) == 1
    assert memory.calls == []


def test_nodes_that_are_full_are_only_preferred() -> None:
    """Bound strictly, the last page that does not fit would end the process."""
    memory = Memory()
    probe = MoeSpec(num_experts=4, hidden_size=64, intermediate_size=64)
    with open_device(made_up([1, 1], memory_bytes=5 * PAGE), memory=memory) as device:
        weight_format = FORMATS["bf16"].descriptor  # 3 pages for each node and layer
        first = device.expert_kernel(probe, weight_format)
        second = device.expert_kernel(probe, weight_format)
        assert [size for _, size, _, _ in memory.calls] == [4 * 3 * 64 * 64] * 4
        assert [strict for *_, strict in memory.calls] == [False] * 4
        del first, second
    memory.calls.clear()
    with open_device(made_up([1, 1], memory_bytes=20 * PAGE), memory=memory) as device:
        first = device.expert_kernel(probe, weight_format)
        second = device.expert_kernel(probe, weight_format)
        del first, second  # and what they held can be bound again
        gc.collect()
        third = device.expert_kernel(probe, weight_format)
        assert [strict for *_, strict in memory.calls] == [True, True, False, False, True, True]
        del third


def test_a_refusal_costs_no_result_and_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    call = arguments(SPEC, 3)
    with open_device(None) as alone:
        want = loaded(alone, FORMATS["int8"]).submit(*call).wait()
    with (
        caplog.at_level(logging.WARNING),
        open_device(made_up([1, 1]), memory=Memory(answer=errno.EPERM)) as device,
    ):
        kernels = [loaded(device, FORMATS["int8"]) for _ in range(3)]
        assert torch.equal(kernels[2].submit(*call).wait(), want)
    assert len(caplog.messages) == 1
    assert "Operation not permitted" in caplog.messages[0]
    assert "SYS_NICE" in caplog.messages[0]


def test_the_kernel_binds_and_pages_are_where_they_should_be() -> None:
    """With mbind and move_pages of this machine, which calls node 0 by two names."""
    if why := _kernels.why_not_bound(0):
        pytest.skip(f"memory cannot be bound here: {why}")
    size = 1 << 40
    topology = Topology((Node(0, (), size), Node(0, (), size)), (Thread(0, ()), Thread(1, ())))
    info = DeviceInfo(name="cpu", description="test", torch_device="cpu", memory_bytes=size)
    capabilities = Capabilities(elements=frozenset(Element), instruction_set=ISAS[0])
    with CpuDevice(info, capabilities, 2, topology) as device:
        kernel = loaded(device, FORMATS["bf16"])
        device_handle = device._device
        assert device_handle is not None
        assert device_handle.bind_refusal == ""
        for expert in range(SPEC.num_experts):
            for _, _, address, part_bytes in kernel._layer.parts(expert):
                assert set(_kernels.nodes_of_pages(address, part_bytes)) == {0}
        spare = device.expert_kernel(replace(SPEC, num_experts=64), FORMATS["bf16"].descriptor)
        _, _, address, part_bytes = spare._layer.parts(32)[0]
        # Nobody touched them; huge pages would have been taken by a neighbour.
        assert set(_kernels.nodes_of_pages(address, part_bytes)) == {-errno.ENOENT}


def test_a_node_that_is_not_there_is_refused() -> None:
    assert _kernels.why_not_bound(1023) != ""
    assert _kernels.why_not_bound(-1) == "Invalid argument"
    assert _kernels.bind_pages(mmap.PAGESIZE + 1, mmap.PAGESIZE, 0, True) != 0


def test_layers_come_and_go_under_busy_threads(alone: CpuDevice) -> None:
    """A worker may come to a job when it is done and its layer is gone."""
    call = arguments(SPEC, 5)
    want = loaded(alone, FORMATS["int8"]).submit(*call).wait()
    hidden, ids, weights = call
    with open_device(made_up([2] * 8)) as device:
        kept = loaded(device, FORMATS["int8"])
        for index in range(100):
            passing = device.expert_kernel(SPEC, FORMATS["int8"].descriptor)
            passing.load(0, reference.random_weights(SPEC, torch.Generator().manual_seed(index)))
            passing.submit(hidden, ids.clamp(max=0), weights).wait()
            del passing
            assert torch.equal(kept.submit(*call).wait(), want)
