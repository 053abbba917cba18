"""Long prompts go through the accelerator alone: cold experts are brought there layer by layer.

Two slots take turns: while the accelerator computes a layer in one, the next layer's experts are
copied into the other. That takes as long as the link needs for the layer's bytes, or the host to
stage them, however many tokens there are; the host takes as long as there are pairs. Both rates are
measured, and whichever is faster for a call is used.

A layer goes in pieces of whole experts, one after the other in pinned memory: each is one job of
the host, which has nothing else to do meanwhile, one copy, and one change of the slot's table.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from kt_core.hardware.graphs import is_capturing
from kt_core.interfaces import ExpertKernel, Ticket
from kt_core.moe.deferral import Deferral, DeferringLane, Sum
from kt_core.moe.lane import Lane
from kt_core.moe.timeline import Kind, Label, Timeline, spanned
from kt_core.packed import ExpertLayout

# A layer of fewer bytes goes in one piece. Of more, the first piece leaves while the others are
# staged; at 25 GB/s it takes 1.3 ms, beside which the 0.1 ms that Python needs for it are little.
_PIECE_BYTES = 32 << 20
# Pieces on their way at the same time, each with pinned memory: as long as these take, the link
# does not wait for Python, which launches the next layer meanwhile. Of experts that are larger than
# a piece there are fewer, so that they do not pin gigabytes.
_PIECES, _LARGE_PIECES = 4, 2
# What the rate is measured with: enough for several pieces.
_MEASURED_BYTES = 256 << 20


@dataclass(slots=True)
class _Slot:
    kernel: ExpertKernel
    layer: int = -1  # whose experts it holds, or will,
    experts: frozenset[int] = frozenset()  # and which of them
    filled: torch.Event | None = None  # in the stream of the copies
    used: torch.Event | None = None  # in the model's stream


@dataclass(frozen=True, slots=True)
class StreamRates:
    """What a device and a host were measured to reach.

    Attributes:
        fill_bytes_per_s: Of filling slots: staging a layer's experts, and copying them.
        host_pairs_per_s: Of the host with many tokens, for experts of this layer's shape.
    """

    fill_bytes_per_s: float
    host_pairs_per_s: float


class StreamedLayers:
    """The slots of one engine.

    Attributes:
        rates: What decides; None to stream nothing.
        streamed: Calls that went this way.
        bytes_to_device: Copied for them.
        timeline: Where copies are noted; None for nowhere.
    """

    def __init__(self, device: torch.device) -> None:
        """Start without layers; ``device`` is where hidden states are."""
        self.rates: StreamRates | None = None
        self.streamed = 0
        self.bytes_to_device = 0
        self.timeline: Timeline | None = None
        self._hosts: list[ExpertKernel] = []
        self._slots: list[_Slot] = []
        self._made: dict[int, _Slot] = {}
        self._device = device
        self._copies = torch.Stream(device=device)
        self._stages: deque[tuple[torch.Tensor, torch.Event]] = deque()

    def add(self, host: ExpertKernel, slots: tuple[ExpertKernel, ExpertKernel]) -> None:
        """Take the next layer.

        Args:
            host: Holds its cold experts.
            slots: Empty kernels on the device; layers of one shape and format share theirs.
        """
        kernel = slots[len(self._hosts) % 2]
        self._slots.append(self._made.setdefault(id(kernel), _Slot(kernel)))
        self._hosts.append(host)

    @property
    def can_fill(self) -> bool:
        """Whether slots take what the host's kernels give: not those with a layout of their own."""
        kernels = (*self._hosts, *(slot.kernel for slot in self._slots))
        return all(kernel.moves_packed for kernel in kernels)

    def host_of_most(self) -> ExpertKernel:
        """Return the host's kernel with the most bytes of experts: the one to measure."""
        return self._hosts[self._layer_of_most()]

    def _layer_of_most(self) -> int:
        sizes = [len(host.resident()) * host.bytes_per_expert for host in self._hosts]
        return sizes.index(max(sizes))

    def measure_fill(self) -> float:
        """Return the bytes per second of filling slots, with experts of ``host_of_most``.

        Waits for the device, and leaves the slot empty. The first fill pins memory and reads what
        is mapped; the two that count follow each other, as those of a prompt do.
        """
        layer = self._layer_of_most()
        host, slot = self._hosts[layer], self._slots[layer]
        experts = sorted(host.resident())[: max(1, _MEASURED_BYTES // _packed_bytes(host))]
        self._bring(host, slot, experts, layer)
        self._copies.synchronize()
        start = time.perf_counter()
        size = sum(self._bring(host, slot, experts, layer) for _ in range(2))
        self._copies.synchronize()
        seconds = time.perf_counter() - start
        with self._copies:
            slot.kernel.unload_all()
        return size / seconds

    def pays(self, layer: int, pairs: int) -> bool:
        """Whether a slot is filled faster than the host computes so many pairs of all experts."""
        if self.rates is None:
            return False
        host = self._hosts[layer]
        # Both take in proportion to the cold experts: whether there are any is asked last, since
        # a decode step comes here once a layer.
        expert_s = host.bytes_per_expert / self.rates.fill_bytes_per_s
        is_faster = pairs / host.spec.num_experts > expert_s * self.rates.host_pairs_per_s
        return is_faster and bool(host.resident())

    def submit(
        self, layer: int, hidden: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor
    ) -> Ticket:
        """As ``ExpertKernel.submit`` of the layer's host kernel, computed on the device."""
        slot = self._slots[layer]
        if not self._is_filled(layer):
            self._fill(layer)
        stream = torch.accelerator.current_stream(self._device)
        if slot.filled is not None:
            stream.wait_event(slot.filled)
        ticket = slot.kernel.submit(hidden, expert_ids, weights)
        slot.used = stream.record_event()
        self.streamed += 1
        if layer + 1 < len(self._slots) and not self._is_filled(layer + 1):
            self._fill(layer + 1)
        return ticket

    def _is_filled(self, layer: int) -> bool:
        slot = self._slots[layer]
        return slot.layer == layer and slot.experts == self._hosts[layer].resident()

    def _fill(self, layer: int) -> None:
        """Put the copies of a layer's cold experts into their stream. The host stages them."""
        host, slot = self._hosts[layer], self._slots[layer]
        if slot.used is not None:
            self._copies.wait_event(slot.used)
        slot.layer, experts = -1, host.resident()
        self.bytes_to_device += self._bring(host, slot, sorted(experts), layer)
        slot.layer, slot.experts = layer, experts
        slot.filled = self._copies.record_event()

    def _bring(self, host: ExpertKernel, slot: _Slot, experts: Sequence[int], layer: int) -> int:
        """Have a slot hold these experts and no others, in the stream of the copies.

        Returns:
            The bytes that are on their way.
        """
        with self._copies:
            # Their memory, of this stream, is what the new ones get.
            slot.kernel.unload_all()
        size = _packed_bytes(host)
        most = max(1, _PIECE_BYTES // size)
        for first in range(0, len(experts), most):
            piece = experts[first : first + most]
            staged = self._stage(len(piece) * size)
            host.gather_packed(piece, staged)
            with self._copies, self._noted(layer, piece):
                slot.kernel.load_packed_together(piece, staged)
            self._stages.append((staged, self._copies.record_event()))
        return len(experts) * size

    def _noted(self, layer: int, experts: Sequence[int]) -> AbstractContextManager[None]:
        name = f"{len(experts)} experts of layer {layer}"
        label = Label(Kind.STREAMED, f"{self._device} streamed layers", name, layer)
        return spanned(self.timeline, self._copies, label)

    def _stage(self, size: int) -> torch.Tensor:
        """Return pinned memory that no copy reads any more."""
        while len(self._stages) >= (_PIECES if size <= _PIECE_BYTES else _LARGE_PIECES):
            staged, event = self._stages.popleft()
            event.synchronize()
            if staged.numel() == size:
                return staged
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def _packed_bytes(kernel: ExpertKernel) -> int:
    """Return the bytes of one packed expert."""
    return ExpertLayout.of(kernel.spec, kernel.weight_format).size_bytes


class StreamingLane(Lane):
    """A host lane whose long calls go through the accelerator instead."""

    def __init__(
        self, lane: DeferringLane, layers: StreamedLayers, layer: int, deferral: Deferral
    ) -> None:
        """Stand for layer number ``layer`` of ``layers``. Long calls put nothing off."""
        super().__init__(lane)
        self._layers, self._layer = layers, layer
        self._deferral = deferral

    def submit(
        self, hidden: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor
    ) -> Ticket:
        """See ``ExpertKernel.submit``."""
        if not self._layers.pays(self._layer, expert_ids.numel()) or _is_captured(hidden):
            return self.kernel.submit(hidden, expert_ids, weights)
        before = self._deferral.take()
        return Sum(self._layers.submit(self._layer, hidden, expert_ids, weights), before)


def _is_captured(hidden: torch.Tensor) -> bool:
    """Whether a graph is made of this call: the host, which fills the slots, is not part of it."""
    return is_capturing(torch.accelerator.current_stream(hidden.device))
