"""What an engine says about itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """How a model was loaded.

    Attributes:
        model: The model directory.
        model_type: ``model_type`` of its config.
        format: Format of the routed experts.
        device: Device that computes them.
        isa: Instruction set of its kernels; None where the device has one only.
        threads: Host threads it computes with.
        dtype: Type of the dense part and the hidden states.
        placement: Number of experts by device.
        expert_layers: Layers with routed experts.
        expert_bytes: Bytes of all packed experts.
        dense_format: Format of packed dense layers; ``none`` where torch computes them.
        dense_layers: Number of packed dense layers.
        dense_bytes: Bytes of everything but the experts, packed or not.
        load_s: Seconds the loading took.
        peak_memory_bytes: Largest resident set of this process so far, mapped files included.
    """

    model: str
    model_type: str
    format: str
    device: str
    isa: str | None
    threads: int
    dtype: str
    placement: dict[str, int]
    expert_layers: int
    expert_bytes: int
    dense_format: str
    dense_layers: int
    dense_bytes: int
    load_s: float
    peak_memory_bytes: int
