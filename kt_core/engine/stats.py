"""What an engine says about itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kt_core.engine.accelerators import Accelerators
    from kt_core.engine.device_time import DeviceTime
    from kt_core.engine.forward_passes import DecodeCounters


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceleratorStats:
    """What accelerators have done since the model was loaded.

    Attributes:
        devices: Their names; the first one holds the dense part.
        policy: Chooses which experts they hold.
        budget_bytes: What experts on them may take.
        tokens: Tokens that went through the model.
        pairs: Pairs of token and expert.
        hit_rate: Part of the pairs that an accelerator computed; None before the first.
        moved_experts: Experts that changed places.
        link_bytes_to_device: Bytes of experts copied to accelerators.
        link_bytes_to_host: Bytes copied back.
        streamed_layers: Layers of long prompts that went through the accelerator alone.
        link_bytes_streamed: Bytes of experts copied for them.
    """

    devices: tuple[str, ...]
    policy: str
    budget_bytes: int
    tokens: int
    pairs: int
    hit_rate: float | None
    moved_experts: int
    link_bytes_to_device: int
    link_bytes_to_host: int
    streamed_layers: int
    link_bytes_streamed: int


def accelerator_stats(accelerators: Accelerators) -> AcceleratorStats:
    """Return what the accelerators of an engine say."""
    counters, mover = accelerators.counters, accelerators.mover
    return AcceleratorStats(
        devices=tuple(device.info.name for device in accelerators.devices),
        policy=accelerators.wish.policy.name,
        budget_bytes=accelerators.budget_bytes,
        tokens=counters.tokens,
        pairs=counters.pairs,
        hit_rate=counters.hot_pairs / counters.pairs if counters.pairs else None,
        moved_experts=mover.moves,
        link_bytes_to_device=mover.bytes_to_device,
        link_bytes_to_host=mover.bytes_to_host,
        streamed_layers=accelerators.hybrid.streamed.streamed,
        link_bytes_streamed=accelerators.hybrid.streamed.bytes_to_device,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """How a model was loaded, and what has happened since.

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
        decode: How tokens were decoded since then: from graphs, or why not.
        accelerators: What they have done; None where there are none.
        steps_s: Seconds that forward passes took since then: all of prompts and answers.
        time_by_device: What the host did in them, and the accelerator with the dense part.
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
    decode: DecodeCounters
    steps_s: float
    time_by_device: dict[str, DeviceTime]
    peak_memory_bytes: int
    accelerators: AcceleratorStats | None = None
