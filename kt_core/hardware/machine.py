"""The whole machine in one value."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kt_core.hardware.accelerators import Accelerator, detect_accelerators
from kt_core.hardware.cgroup import read_limits
from kt_core.hardware.cpu import Cpu, detect_cpu
from kt_core.hardware.memory import Memory, detect_memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What this process has to work with.

    Attributes:
        cpu: Processors, cores and NUMA nodes.
        memory: Host memory, at the moment of asking.
        accelerators: Devices that torch can use, by index; often none.
    """

    cpu: Cpu
    memory: Memory
    accelerators: tuple[Accelerator, ...]


def detect(
    *,
    root: Path = Path("/"),
    affinity: Iterable[int] | None = None,
    with_accelerators: bool = True,
) -> Hardware:
    """Look at the machine; takes milliseconds, and torch's import where there was none yet.

    Args:
        root: The folder that holds ``proc`` and ``sys``: ``/`` but in tests.
        affinity: Logical processors to use; None for those the calling thread may run on. With
            ``OMP_PROC_BIND`` set, OpenMP pins the main thread to one of them when torch is
            imported; who needs to support that asks os.sched_getaffinity before and passes it.
        with_accelerators: Whether to ask torch for them, and so to import it.

    Raises:
        SystemFileError: A file of the system is there but cannot be read or understood.
    """
    limits = read_limits(root)
    memory = detect_memory(root=root, limits=limits)
    cpu = detect_cpu(
        root=root,
        affinity=affinity,
        cgroup_cpus=limits.cpus,
        memory_bytes=memory.total_bytes,
    )
    accelerators = detect_accelerators() if with_accelerators else ()
    return Hardware(cpu=cpu, memory=memory, accelerators=accelerators)
