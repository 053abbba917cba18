"""Experts that stay where somebody else has them: in a mapped file, at a page's very end."""

from __future__ import annotations

import ctypes
import gc
import mmap
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kernels.devices import ISAS, device_for, packed_bytes, precisions
from kernels.test_numa import made_up
from kt_core.interfaces import WeightFormat
from kt_core.quant import BUILT_IN_FORMATS
from kt_core.testing import reference
from kt_core.types import MoeSpec
from kt_cpu.backend import CpuDevice
from kt_cpu.kernel import CpuExpertKernel

FORMATS = {f.descriptor.name: f for f in BUILT_IN_FORMATS}
INT8 = FORMATS["int8-g32"]
SPEC = MoeSpec(num_experts=3, hidden_size=160, intermediate_size=72)
PROT_NONE = 0


@pytest.fixture(scope="module", params=ISAS)
def device(request: pytest.FixtureRequest) -> Iterator[CpuDevice]:
    with device_for(request.param) as opened:
        yield opened


@pytest.fixture(scope="module")
def best() -> Iterator[CpuDevice]:
    with device_for() as opened:
        yield opened


def loaded(device: CpuDevice, weight_format: WeightFormat = INT8) -> CpuExpertKernel:
    kernel = device.expert_kernel(SPEC, weight_format.descriptor)
    generator = torch.Generator().manual_seed(1)
    for expert in range(SPEC.num_experts):
        kernel.load(expert, reference.random_weights(SPEC, generator))
    return kernel


def output(kernel: CpuExpertKernel, tokens: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(tokens, SPEC.hidden_size, generator=generator)
    ids = torch.arange(2 * tokens).reshape(tokens, 2) % SPEC.num_experts
    return kernel.submit(hidden, ids, torch.ones(tokens, 2)).wait()


class AtThePagesEnd:
    """Bytes whose last one is the last of a page, the next page being out of bounds."""

    def __init__(self, content: bytes) -> None:
        pages = -(-len(content) // mmap.PAGESIZE)
        self._map = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
        start = pages * mmap.PAGESIZE - len(content)
        self._map[start : start + len(content)] = content
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        libc = ctypes.CDLL(None, use_errno=True)
        last = ctypes.c_void_p(base + pages * mmap.PAGESIZE)
        assert libc.mprotect(last, ctypes.c_size_t(mmap.PAGESIZE), PROT_NONE) == 0
        everything = torch.frombuffer(self._map, dtype=torch.uint8)
        self.tensor = everything[start : start + len(content)]


@pytest.mark.parametrize("weight_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("tokens", [1, 40])
def test_nothing_behind_an_expert_is_read(
    device: CpuDevice, weight_format: WeightFormat, tokens: int
) -> None:
    """Every kernel, on every instruction set: a byte more would end this process."""
    owned = loaded(device, weight_format)
    for precision in precisions(weight_format):
        mapped = device.expert_kernel(SPEC, weight_format.descriptor, precision=precision)
        want = device.expert_kernel(SPEC, weight_format.descriptor, precision=precision)
        for expert in range(SPEC.num_experts):
            guarded = AtThePagesEnd(packed_bytes(owned, expert))
            assert mapped.map_packed(expert, guarded.tensor)
            assert mapped.packed(expert).data_ptr() == guarded.tensor.data_ptr()
            want.load_packed(expert, owned.packed(expert))
        assert torch.equal(output(mapped, tokens), output(want, tokens))
    gathered = torch.empty(SPEC.num_experts * mapped.bytes_per_expert, dtype=torch.uint8)
    mapped.gather_packed(range(SPEC.num_experts), gathered)
    assert torch.equal(gathered, torch.cat([want.packed(e) for e in range(SPEC.num_experts)]))


def read_only(file: Path) -> torch.Tensor:
    with file.open("rb") as stream:
        mapped = mmap.mmap(stream.fileno(), 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.frombuffer(mapped, dtype=torch.uint8)


def test_a_file_that_cannot_be_written(best: CpuDevice, tmp_path: Path) -> None:
    """Packed experts in a file, the training pass included."""
    owned = loaded(best)
    (tmp_path / "experts").write_bytes(b"".join(packed_bytes(owned, e) for e in range(3)))
    rows = read_only(tmp_path / "experts").view(3, -1)
    mapped = best.expert_kernel(SPEC, INT8.descriptor)
    for expert in range(3):
        assert mapped.map_packed(expert, rows[expert])
    assert mapped.resident() == {0, 1, 2}
    assert torch.equal(output(mapped), output(owned))
    arguments = (torch.ones(2, SPEC.hidden_size), torch.tensor([[0], [2]]), torch.ones(2, 1))
    grad = torch.ones(2, SPEC.hidden_size)
    got, want = (kernel.backward(*arguments, grad) for kernel in (mapped, owned))
    assert torch.equal(got.hidden, want.hidden)


def test_the_memory_is_kept_as_long_as_it_is_used(best: CpuDevice) -> None:
    owned = loaded(best)
    mapped = best.expert_kernel(SPEC, INT8.descriptor)

    def give(kernel: CpuExpertKernel, expert: int) -> weakref.ref[mmap.mmap]:
        memory = mmap.mmap(-1, 1 << 20)
        packed = torch.frombuffer(memory, dtype=torch.uint8)[: kernel.bytes_per_expert]
        packed.copy_(owned.packed(expert))
        kernel.map_packed(expert, packed)
        return weakref.ref(memory)

    given = [give(mapped, expert) for expert in range(3)]
    gc.collect()
    assert all(memory() is not None for memory in given)
    assert torch.equal(output(mapped), output(owned))
    mapped.unload(0)
    mapped.load_packed(1, owned.packed(1))
    again = give(mapped, 2)
    gc.collect()
    assert [memory() is None for memory in given] == [True, True, True]
    assert mapped.resident() == {1, 2}
    ticket = mapped.submit(
        torch.ones(64, SPEC.hidden_size), torch.full((64, 1), 2), torch.ones(64, 1)
    )
    del mapped
    gc.collect()
    assert again() is not None, "a ticket reads it"
    want = owned.submit(torch.ones(64, SPEC.hidden_size), torch.full((64, 1), 2), torch.ones(64, 1))
    assert torch.equal(ticket.wait(), want.wait())
    del ticket
    gc.collect()
    assert again() is None


def test_an_expert_comes_home_when_it_is_loaded(best: CpuDevice) -> None:
    """A mapped one is replaced, not written into."""
    owned = loaded(best)
    mapped = best.expert_kernel(SPEC, INT8.descriptor)
    foreign = owned.packed(0).clone()
    mapped.map_packed(1, foreign)
    mapped.load(1, reference.random_weights(SPEC, torch.Generator().manual_seed(9)))
    assert torch.equal(foreign, owned.packed(0))
    assert mapped.packed(1).data_ptr() != foreign.data_ptr()
    mapped.map_packed(1, foreign)
    mapped.map_packed(1, owned.packed(2))
    assert packed_bytes(mapped, 1) == packed_bytes(owned, 2)


def test_what_cannot_be_mapped(best: CpuDevice) -> None:
    kernel = best.expert_kernel(SPEC, INT8.descriptor)
    size = kernel.bytes_per_expert
    memory = torch.zeros(size + 64, dtype=torch.uint8)
    shift = -memory.data_ptr() % 64
    with pytest.raises(ValueError, match="at a multiple of 64 bytes"):
        kernel.map_packed(0, memory[shift + 1 : shift + 1 + size])
    with pytest.raises(ValueError, match=rf"is \[{size}\] torch.uint8"):
        kernel.map_packed(0, memory)
    with pytest.raises(ValueError, match="expert must be in"):
        kernel.map_packed(3, memory[:size])
    assert kernel.resident() == frozenset()


def test_nodes_get_copies(best: CpuDevice) -> None:
    spec = replace(SPEC, intermediate_size=96)
    generator = torch.Generator().manual_seed(1)
    owned = best.expert_kernel(spec, INT8.descriptor)
    owned.load(0, reference.random_weights(spec, generator))
    with device_for(topology=made_up([1, 1]), bind=lambda *_: 0) as split:
        kernel = split.expert_kernel(spec, INT8.descriptor)
        packed = owned.packed(0).clone()
        assert not kernel.map_packed(0, packed)
        packed.fill_(7)
        assert packed_bytes(kernel, 0) == packed_bytes(owned, 0)
