"""Which thread runs where, and next to which memory: docs/decisions/0008-numa.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kt_core.hardware import Cpu, NumaNode

# As in csrc/runtime/topology.hpp.
MOST_NODES = 32


class Node(NamedTuple):
    """A NUMA node that computes.

    Attributes:
        id: The kernel's number.
        cpus: Logical processors on it.
        memory_bytes: What may be bound to it so that it goes nowhere else.
    """

    id: int
    cpus: tuple[int, ...]
    memory_bytes: int


class Thread(NamedTuple):
    """A thread of a pool.

    Attributes:
        node: Place among the topology's nodes.
        cpus: Logical processors it may run on; empty for any.
    """

    node: int
    cpus: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Topology:
    """Nodes and threads of one engine; the first thread is whoever waits for a result."""

    nodes: tuple[Node, ...]
    threads: tuple[Thread, ...]


def flat_topology(threads: int) -> Topology:
    """Return one node, and threads that the system may move as it likes."""
    return Topology((Node(0, (), 0),), (Thread(0, ()),) * threads)


def plan_topology(cpu: Cpu, threads: int, available_bytes: Callable[[int], int]) -> Topology:
    """Spread threads evenly over the nodes, as far as these have cores.

    Where a node has a thread for every core, each thread is pinned to a core of its own. Where it
    has fewer, they are pinned to the physical cores of the node together: so the system can keep
    them away from cores that are busy with something else, such as another engine. Where it has
    more, they share all its processors.

    Args:
        cpu: What this process may use.
        threads: How many, at least 1.
        available_bytes: Memory that a node has to give, by its id.
    """
    found = _nodes_with_cores(cpu)
    if threads == 1 or len(found) > MOST_NODES:
        return flat_topology(threads)
    counts = _spread(threads, [len(cores) for _, cores in found])
    used = [(*pair, count) for pair, count in zip(found, counts, strict=True) if count]
    nodes = tuple(Node(node.id, node.cpus, available_bytes(node.id)) for node, _, _ in used)
    placed: list[Thread] = []
    for index, (node, cores, count) in enumerate(used):
        if count == len(cores):
            placed += [Thread(index, (core,)) for core in cores]
        else:
            placed += [Thread(index, cores if count < len(cores) else node.cpus)] * count
    if len(placed[0].cpus) > 1:  # whoever waits is not ours to pin; see ThreadPool::CallersNode
        placed[0] = Thread(0, ())
    return Topology(nodes, tuple(placed))


def computing_nodes(cpu: Cpu) -> tuple[int, ...]:
    """Return the ids of the nodes that experts can be split over."""
    return tuple(node.id for node, _ in _nodes_with_cores(cpu))


def _nodes_with_cores(cpu: Cpu) -> list[tuple[NumaNode, tuple[int, ...]]]:
    """Return the nodes that have memory and physical cores; others' cores go to the first."""
    cores = {node.id: set(node.cpus).intersection(cpu.physical_cores) for node in cpu.numa_nodes}
    able = [node for node in cpu.numa_nodes if node.memory_bytes and cores[node.id]]
    if not able:
        whole = NumaNode(id=0, cpus=cpu.logical_cpus, memory_bytes=0)
        return [(whole, cpu.physical_cores)]
    homeless = set(cpu.physical_cores).difference(*(cores[node.id] for node in able))
    cores[able[0].id] |= homeless
    return [(node, tuple(sorted(cores[node.id]))) for node in able]


def _spread(threads: int, cores: Sequence[int]) -> list[int]:
    """Return how many threads each node gets: equally many, and none beyond its cores in vain."""
    counts = [0] * len(cores)
    for _ in range(threads):
        # Nodes with a free core first; where all are full, those of the fewest full rounds.
        best = min(range(len(cores)), key=lambda n: (counts[n] // cores[n], counts[n], n))
        counts[best] += 1
    return counts
