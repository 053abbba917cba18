"""What this machine offers: processor, cores, NUMA nodes, memory, limits, accelerators.

Nothing is read at import and nothing is remembered: each call looks again.
"""

from kt_core.hardware.accelerators import Accelerator, detect_accelerators
from kt_core.hardware.cache import last_level_cache_bytes
from kt_core.hardware.cpu import Cpu, NumaNode, amx_permitted, request_amx_permission
from kt_core.hardware.machine import Hardware, detect
from kt_core.hardware.memory import (
    Memory,
    ProcessMemory,
    available_memory_bytes,
    available_node_bytes,
    process_memory,
)
from kt_core.hardware.system_files import SystemFileError

__all__ = [
    "Accelerator",
    "Cpu",
    "Hardware",
    "Memory",
    "NumaNode",
    "ProcessMemory",
    "SystemFileError",
    "amx_permitted",
    "available_memory_bytes",
    "available_node_bytes",
    "detect",
    "detect_accelerators",
    "last_level_cache_bytes",
    "process_memory",
    "request_amx_permission",
]
