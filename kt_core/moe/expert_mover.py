"""Moves experts between the host and accelerators while a model runs.

An expert moves in steps that follow each other without anybody waiting: its bytes are copied in a
stream of their own, one for each accelerator; when they are there, the next step of the model
begins with the new home; when no earlier step can want the old copy any more, it goes. Between
steps of the model ``advance`` looks what has come to pass. So for a while an expert lies twice in
memory, and never nowhere.

The model's stream waits for what other accelerators compute for it, so that a point in this one
stream tells when an old copy is done with, wherever that is.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING

import torch

from kt_core.interfaces import ExpertId, Swap
from kt_core.moe.hybrid_experts import HybridExperts
from kt_core.moe.timeline import Kind, Label, Timeline, spanned
from kt_core.placement.devices import HOST

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_log = logging.getLogger(__name__)


class _Stage(Enum):
    WAITING = auto()  # for room on the accelerator, or for an earlier move of the same expert
    COPYING = auto()
    LEAVING = auto()  # at home in the new place; earlier steps may use the old copy


@dataclass(slots=True)
class _Move:
    expert: ExpertId
    target: int  # among the layer's kernels
    room_for: tuple[ExpertId, ...] = ()  # evicted first
    stage: _Stage = _Stage.WAITING
    staged: torch.Tensor | None = None
    event: torch.Event | None = None


class ExpertMover:
    """The experts of one engine that are on their way.

    Attributes:
        bytes_to_device: Copied to accelerators so far.
        bytes_to_host: Copied back.
        moves: Experts that have arrived.
        given_up: Experts that stayed on the host, since the accelerator had no memory for them.
        timeline: Where moves are noted; None for nowhere.
    """

    def __init__(
        self, layers: Sequence[HybridExperts], device: torch.device, *peers: torch.device
    ) -> None:
        """Take the layers: ``kernels[0]`` on the host, the others on accelerators.

        Args:
            layers: In the order of ``ExpertId.layer``.
            device: Of ``kernels[1]``; the model runs in its stream.
            peers: Of the kernels behind it.
        """
        self._layers = layers
        self._device = device
        self._copies = [torch.Stream(device=one) for one in (device, *peers)]
        self._moves: deque[_Move] = deque()
        self._staging: dict[int, list[torch.Tensor]] = {}
        self._homes: NDArray[np.int64] | None = None
        self.bytes_to_device = 0
        self.bytes_to_host = 0
        self.moves = 0
        self.given_up = 0
        self.timeline: Timeline | None = None

    def load_now(self, expert: ExpertId, target: int) -> None:
        """Move an expert from the host before the model runs, and wait until it is there."""
        layer = self._layers[expert.layer]
        host, accelerator = layer.kernels[HOST], layer.kernels[target]
        copies = self._copies_with(HOST, target)
        with copies:
            accelerator.load_packed(expert.expert, host.packed(expert.expert))
        copies.synchronize()
        host.unload(expert.expert)
        self._note_home(expert, target)

    def begin(self, swaps: Sequence[Swap], target: int = 1) -> None:
        """Begin to move experts. Returns at once.

        Args:
            swaps: Experts to load, each with those that make room for it.
            target: The kernel that gets them, among those of their layers.
        """
        for load, evicted in swaps:
            new = [*(_Move(expert, HOST) for expert in evicted), _Move(load, target, evicted)]
            for move in new:
                self._moves.append(move)
                self._note_home(move.expert, move.target)
                self._start_if_possible(move)

    def homes(self, shape: tuple[int, int]) -> NDArray[np.int64]:
        """Return ``[layers, experts]``: the kernel of each expert when all moves are done.

        Asked for after every step, so it is kept, and changed in place: for reading only.
        """
        if self._homes is None:
            import numpy as np

            self._homes = np.full(shape, HOST, dtype=np.int64)
            for index, layer in enumerate(self._layers):
                for number, kernel in enumerate(layer.kernels[1:], start=1):
                    self._homes[index, sorted(kernel.resident())] = number
            for move in self._moves:
                self._homes[move.expert] = move.target
        return self._homes

    def _note_home(self, expert: ExpertId, target: int) -> None:
        if self._homes is not None:
            self._homes[expert] = target

    @property
    def is_idle(self) -> bool:
        """Whether nothing is on its way."""
        return not self._moves

    def advance(self) -> None:
        """Take every move as far as it can go without waiting. Call it between steps."""
        for move in list(self._moves):
            match move.stage:
                case _Stage.WAITING:
                    self._start_if_possible(move)
                case _Stage.COPYING if move.event is not None and move.event.query():
                    self._change_home(move)
                case _Stage.LEAVING if move.event is not None and move.event.query():
                    self._leave(move)
                case _:
                    pass

    def finish(self) -> None:
        """Wait until nothing is on its way."""
        while self._moves:
            torch.accelerator.synchronize(self._device)
            for copies in self._copies:
                copies.synchronize()
            self.advance()

    def abandon(self) -> None:
        """Forget what is on its way, where it can arrive no more: a device is lost."""
        self._moves.clear()
        self._homes = None

    def _start_if_possible(self, move: _Move) -> None:
        """Begin to copy, unless its expert is on another way still, or one that makes room is."""
        before = itertools.takewhile(lambda other: other is not move, self._moves)
        if any(other.expert in (move.expert, *move.room_for) for other in before):
            return
        kernels = self._layers[move.expert.layer].kernels
        here = [n for n, kernel in enumerate(kernels) if move.expert.expert in kernel.resident()]
        if here == [move.target]:  # a load was given up that this was to undo
            self._moves.remove(move)
        else:
            self._start_copy(move, source=here[0])

    def _copies_with(self, one: int, other: int) -> torch.Stream:
        """The stream for copies between two kernels, of which one is the host's."""
        assert HOST in (one, other)
        return self._copies[max(one, other) - 1]

    def _start_copy(self, move: _Move, source: int) -> None:
        kernels = self._layers[move.expert.layer].kernels
        copies = self._copies_with(source, move.target)
        from_kernel, to_kernel = kernels[source], kernels[move.target]
        packed = from_kernel.packed(move.expert.expert)
        move.staged = self._take_staging(packed.numel())
        if move.target == HOST:
            with copies, self._noted(move, copies):
                move.staged.copy_(packed, non_blocking=True)
            self.bytes_to_host += packed.numel()
        else:
            move.staged.copy_(packed)
            try:
                with copies, self._noted(move, copies):
                    to_kernel.load_packed(move.expert.expert, move.staged)
            except torch.OutOfMemoryError as error:
                self._give_up(move, error)
                return
            self.bytes_to_device += packed.numel()
        move.stage, move.event = _Stage.COPYING, copies.record_event()

    def _noted(self, move: _Move, copies: torch.Stream) -> AbstractContextManager[None]:
        where = "host" if move.target == HOST else "device"
        name = f"expert {move.expert.expert} of layer {move.expert.layer} to the {where}"
        label = Label(Kind.MOVE, f"{copies.device} moves", name, move.expert.layer)
        return spanned(self.timeline, copies, label)

    def _give_up(self, move: _Move, error: torch.OutOfMemoryError) -> None:
        """Leave an expert where it is: somebody else took the memory that it was to have."""
        if self.given_up == 0:
            _log.warning(
                "an expert stays on the host, the accelerator has no memory left for it (%s); a "
                "smaller --hot-experts or --accelerator-memory leaves more room",
                str(error).splitlines()[0],
            )
        self.given_up += 1
        self._moves.remove(move)
        self._homes = None
        assert move.staged is not None
        self._put_staging(move.staged)

    def _change_home(self, move: _Move) -> None:
        """Let the steps that begin now find the expert in its new place."""
        layer = self._layers[move.expert.layer]
        if move.target == HOST:
            assert move.staged is not None
            layer.kernels[HOST].load_packed(move.expert.expert, move.staged)
        layer.move_home(move.expert.expert, move.target)
        stream = torch.accelerator.current_stream(self._device)
        move.stage, move.event = _Stage.LEAVING, stream.record_event()

    def _leave(self, move: _Move) -> None:
        """Give the old copy's memory back."""
        self._moves.remove(move)
        for index, kernel in enumerate(self._layers[move.expert.layer].kernels):
            if index != move.target and move.expert.expert in kernel.resident():
                # In the stream of the copies: the next expert's are ordered behind it.
                with self._copies_with(index, move.target):
                    kernel.unload(move.expert.expert)
        assert move.staged is not None
        self._put_staging(move.staged)
        self.moves += 1

    def _put_staging(self, staged: torch.Tensor) -> None:
        self._staging.setdefault(staged.numel(), []).append(staged)

    def _take_staging(self, size: int) -> torch.Tensor:
        held = self._staging.get(size)
        return held.pop() if held else torch.empty(size, dtype=torch.uint8, pin_memory=True)
