"""Which threads run where, and what the backend says of it: on machines that were made up."""

from __future__ import annotations

import pytest

from kt_core import hardware
from kt_core.errors import BackendUnavailableError
from kt_core.hardware import Cpu, Hardware, Memory, NumaNode
from kt_cpu import CpuBackend, _kernels
from kt_cpu.topology import (
    MOST_NODES,
    Node,
    Thread,
    Topology,
    computing_nodes,
    flat_topology,
    plan_topology,
)

GIB = 1 << 30


def machine(*nodes: tuple[int, int], smt: int = 2, without_memory: tuple[int, ...] = ()) -> Cpu:
    """Nodes as (id, cores); second threads are numbered behind all first ones, as on Linux."""
    cores = sum(count for _, count in nodes)
    made, first = [], 0
    for number, count in nodes:
        here = range(first, first + count)
        cpus = [core + thread * cores for thread in range(smt) for core in here]
        size = 0 if number in without_memory else GIB
        made.append(NumaNode(id=number, cpus=tuple(cpus), memory_bytes=size))
        first += count
    return Cpu(
        name="made up",
        vendor="",
        architecture="x86_64",
        features=frozenset(),
        logical_cpus=tuple(range(cores * smt)),
        physical_cores=tuple(range(cores)),
        numa_nodes=tuple(made),
        cgroup_cpus=None,
    )


def plan(cpu: Cpu, threads: int) -> Topology:
    return plan_topology(cpu, threads, lambda node: (node + 1) * GIB)


def test_all_cores_have_a_thread_of_their_own() -> None:
    found = plan(machine((0, 2), (3, 2)), 4)
    assert found.nodes == (Node(0, (0, 1, 4, 5), GIB), Node(3, (2, 3, 6, 7), 4 * GIB))
    assert found.threads == (Thread(0, (0,)), Thread(0, (1,)), Thread(1, (2,)), Thread(1, (3,)))


def test_fewer_threads_spread_evenly_and_are_kept_to_physical_cores() -> None:
    found = plan(machine((0, 4), (1, 4)), 3)
    # The first is whoever waits, and not ours to pin.
    assert found.threads == (Thread(0, ()), Thread(0, (0, 1, 2, 3)), Thread(1, (4, 5, 6, 7)))


def test_a_full_node_beside_one_that_is_not() -> None:
    found = plan(machine((0, 2), (1, 6)), 6)
    assert [thread.node for thread in found.threads] == [0, 0, 1, 1, 1, 1]
    assert found.threads[:2] == (Thread(0, (0,)), Thread(0, (1,)))
    assert set(found.threads[2:]) == {Thread(1, (2, 3, 4, 5, 6, 7))}


def test_more_threads_than_cores_share_all_processors_of_the_node() -> None:
    found = plan(machine((0, 2), (1, 2)), 6)
    assert found.threads[0] == Thread(0, ())
    assert set(found.threads[1:]) == {Thread(0, (0, 1, 4, 5)), Thread(1, (2, 3, 6, 7))}
    assert [thread.node for thread in found.threads] == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("cores", [(4, 4), (1, 7), (2, 2, 2, 2), (3, 5, 1), (8,)])
def test_no_core_is_crowded_while_another_is_free(cores: tuple[int, ...]) -> None:
    cpu = machine(*enumerate(cores))
    for threads in range(2, 40):
        found = plan(cpu, threads)
        assert len(found.threads) == threads
        nodes = range(len(found.nodes))
        counts = [sum(thread.node == n for thread in found.threads) for n in nodes]
        assert min(counts) >= 1
        if threads <= sum(cores):
            used = [cores[node.id] for node in found.nodes]
            assert all(count <= core for count, core in zip(counts, used, strict=True))
            not_full = [c for c, core in zip(counts, used, strict=True) if c < core]
            assert not not_full or max(counts) - min(not_full) <= 1
        for thread in found.threads:
            assert set(thread.cpus) <= set(found.nodes[thread.node].cpus)
        own = [thread.cpus for thread in found.threads if len(thread.cpus) == 1]
        assert len(set(own)) == len(own)


def test_fewer_threads_than_nodes_leave_nodes_out() -> None:
    found = plan(machine((0, 4), (1, 4), (2, 4)), 2)
    assert [node.id for node in found.nodes] == [0, 1]


def test_one_thread_needs_no_plan() -> None:
    assert plan(machine((0, 4), (1, 4)), 1) == flat_topology(1)


def test_cores_without_memory_join_the_first_node_that_has_some() -> None:
    cpu = machine((0, 2), (1, 2), (2, 2), without_memory=(0,))
    assert computing_nodes(cpu) == (1, 2)
    found = plan(cpu, 6)
    assert [node.id for node in found.nodes] == [1, 2]
    assert [thread.cpus for thread in found.threads] == [(0,), (1,), (2,), (3,), (4,), (5,)]
    assert [thread.node for thread in found.threads] == [0, 0, 0, 0, 1, 1]


def test_memory_without_cores_computes_nothing() -> None:
    cpu = machine((0, 2), (1, 0))
    assert computing_nodes(cpu) == (0,)
    assert [node.id for node in plan(cpu, 2).nodes] == [0]


def test_no_memory_anywhere_is_one_node() -> None:
    cpu = machine((0, 2), (1, 2), without_memory=(0, 1))
    found = plan(cpu, 4)
    assert [thread.cpus for thread in found.threads] == [(0,), (1,), (2,), (3,)]
    assert len(found.nodes) == 1


def test_more_nodes_than_csrc_counts() -> None:
    nodes = MOST_NODES + 1
    assert plan(machine(*((n, 1) for n in range(nodes))), nodes) == flat_topology(nodes)


# ---------------------------------------------------------------- the backend


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(total_bytes=2 * GIB, available_bytes=2 * GIB, cgroup_limit_bytes=None)
    found = Hardware(cpu=machine((0, 1), (1, 1)), memory=memory, accelerators=())
    monkeypatch.setattr(hardware, "detect", lambda **_: found)
    monkeypatch.delenv("KT_NUMA", raising=False)


def remarks() -> tuple[str, ...]:
    (device,) = CpuBackend().devices()
    return device.remarks


def test_nothing_to_remark_where_memory_can_be_bound(
    two_nodes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    del two_nodes
    monkeypatch.setattr(_kernels, "why_not_bound", lambda _: "")
    assert remarks() == ()


def test_a_refusal_is_remarked_before_anything_is_opened(
    two_nodes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    del two_nodes
    monkeypatch.setattr(_kernels, "why_not_bound", lambda _: "Operation not permitted")
    (remark,) = remarks()
    assert "(Operation not permitted)" in remark
    assert "add the capability SYS_NICE" in remark


def test_numa_switched_off_is_remarked(two_nodes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    del two_nodes
    monkeypatch.setenv("KT_NUMA", "off")
    assert remarks() == ("KT_NUMA=off: experts lie anywhere on 2 NUMA nodes",)
    assert CpuBackend().why_unavailable() is None


def test_an_unknown_setting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KT_NUMA", "of")
    backend = CpuBackend()
    assert backend.why_unavailable() == (
        "KT_NUMA=of is unknown; set it to auto or off, or not at all"
    )
    with pytest.raises(BackendUnavailableError, match="KT_NUMA=of is unknown"):
        backend.open("cpu")
