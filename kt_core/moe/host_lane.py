"""The way of a layer's cold pairs from an accelerator's stream to the host and back.

A stream of its own copies hidden states, ids and weights to pinned memory, calls the host to start,
calls it again to join, and copies the output back. The model's stream goes on meanwhile, and waits
for that one where the output is wanted: so neither the copies nor a host that is slow to return
from a call keep the accelerator from its own experts. Nobody on the host waits for a stream, ids
are read by the called function only, and a stream that is captured records all of it.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch

from kt_core.hardware.graphs import is_capturing
from kt_core.interfaces import ExpertKernel, HostCall, HostCallTimes, HostFunctions, Ticket
from kt_core.moe.lane import Lane
from kt_core.moe.timeline import Kind, Label, Timeline, spanned

# Calls of one layer that are kept: each number of tokens has its own.
_MOST_CALLS = 64


@dataclass(frozen=True, slots=True)
class PairBuffers:
    """What a host call reads and writes, in pinned memory, for some number of tokens.

    Attributes:
        hidden: ``[tokens, hidden]``.
        expert_ids: ``[tokens, k]`` int64.
        weights: ``[tokens, k]`` float32.
        out: ``[tokens, hidden]``.
    """

    hidden: torch.Tensor
    expert_ids: torch.Tensor
    weights: torch.Tensor
    out: torch.Tensor

    def first(self, tokens: int) -> PairBuffers:
        """Return the part of the first tokens, a view."""
        return PairBuffers(
            self.hidden[:tokens], self.expert_ids[:tokens], self.weights[:tokens], self.out[:tokens]
        )


class PinnedBuffers:
    """Pinned memory that the layers of one engine share: a stream passes one after the other.

    Layers whose calls may be under way at the same time need one of these each.
    """

    def __init__(self, stream: torch.Stream | None = None) -> None:
        """Start with none.

        Args:
            stream: The one that passes, which all lanes of a host share; None for a new one.
        """
        self._buffers: dict[tuple[int, int, torch.dtype], PairBuffers] = {}
        self._stream = stream

    def stream_on(self, device: torch.device) -> torch.Stream:
        """Return the stream that fills and reads them."""
        if self._stream is None:
            self._stream = torch.Stream(device=device)
        return self._stream

    def take(self, tokens: int, k: int, hidden_size: int, dtype: torch.dtype) -> PairBuffers:
        """Return room for so many tokens. Outgrown buffers live as long as calls that use them."""
        key = (k, hidden_size, dtype)
        held = self._buffers.get(key)
        if held is None or len(held.hidden) < tokens:
            room = 1 << max(tokens - 1, 0).bit_length()
            held = PairBuffers(
                hidden=torch.empty(room, hidden_size, dtype=dtype, pin_memory=True),
                expert_ids=torch.empty(room, k, dtype=torch.int64, pin_memory=True),
                weights=torch.empty(room, k, dtype=torch.float32, pin_memory=True),
                out=torch.empty(room, hidden_size, dtype=dtype, pin_memory=True),
            )
            self._buffers[key] = held
        return held.first(tokens)


class HostLane(Lane):
    """A host kernel that takes and returns tensors of an accelerator, in order of its stream."""

    def __init__(
        self,
        kernel: ExpertKernel,
        device: torch.device,
        host_functions: HostFunctions | None,
        buffers: PinnedBuffers,
    ) -> None:
        """Stand for ``kernel`` on ``device``.

        Args:
            kernel: Computes on the host.
            device: Where hidden states come from.
            host_functions: The device's; None where the host must wait for the stream.
            buffers: Shared by all layers of an engine.
        """
        super().__init__(kernel)
        self._device = device
        self._host_functions = host_functions
        self._buffers = buffers
        self._own = None if host_functions is None else buffers.stream_on(device)
        self._calls: dict[tuple[int, int, torch.dtype], tuple[HostCall, PairBuffers]] = {}
        self._captured: list[HostCall] = []
        # Asked after every step, for which a WeakSet is slow.
        self._taken: list[weakref.ref[HostCall]] = []
        self._records = False
        self._timeline: Timeline | None = None
        row = f"{device} cold pairs"
        self._there = Label(Kind.COPY, row, "hidden states to the host")
        self._back = Label(Kind.COPY, row, "output to the device")

    def submit(
        self, hidden: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor
    ) -> Ticket:
        """See ``ExpertKernel.submit``; the tensors lie on the device."""
        tokens, k = expert_ids.shape
        if tokens == 0:
            return _Done(torch.empty_like(hidden))
        dtype = torch.float32 if hidden.dtype is torch.float16 else hidden.dtype
        call, buffers = self._call(tokens, k, dtype)
        stream = torch.accelerator.current_stream(self._device)
        sent = (hidden.to(dtype), expert_ids.to(torch.int64), weights.to(torch.float32))
        if call is None or self._host_functions is None or self._own is None:
            _copy(sent, buffers)
            stream.synchronize()
            return _Waited(
                self.kernel.submit(buffers.hidden, buffers.expert_ids, buffers.weights), hidden
            )
        # Made by the model's stream, before the other one goes on: see _Called.
        out = torch.empty(hidden.shape, dtype=dtype, device=hidden.device)
        self._own.wait_event(stream.record_event())
        with self._own, spanned(self._timeline, self._own, self._there):
            _copy(sent, buffers)
        self._host_functions.launch(self._own, call.start, call.argument)
        return _Called(self, call, (buffers, sent, out), hidden.dtype, stream)

    def join(self, call: HostCall, pinned: torch.Tensor, out: torch.Tensor) -> None:
        """Let the lane's stream join a call and copy its output; the current one waits for that."""
        own = self._let_join(call)
        with own, spanned(self._timeline, own, self._back):
            out.copy_(pinned, non_blocking=True)
        torch.accelerator.current_stream(self._device).wait_event(own.record_event())

    def give_up(self, call: HostCall, stream: torch.Stream) -> None:
        """As ``join``, for an output that nobody wants; ``stream`` is the one that waits."""
        stream.wait_event(self._let_join(call).record_event())

    def _let_join(self, call: HostCall) -> torch.Stream:
        assert self._own is not None
        assert self._host_functions is not None
        self._host_functions.launch(self._own, call.join, call.argument)
        return self._own

    def raise_error(self) -> None:
        """Raise what went wrong in a call that the stream has come past.

        Raises:
            RuntimeError: A call failed; its output was zeros.
        """
        for call, _ in self._calls.values():
            call.raise_error()
        for call in self._captured:
            call.raise_error()
        for taken in self._taken:
            if (alive := taken()) is not None:
                alive.raise_error()

    def take_captured(self) -> list[HostCall]:
        """See ``Lane.take_captured``. Their errors and times are still asked for here."""
        taken, self._captured = self._captured, []
        alive = [one for one in self._taken if one() is not None]
        self._taken = alive + [weakref.ref(call) for call in taken]
        return taken

    def record(self, is_on: bool, timeline: Timeline | None = None) -> None:
        """See ``Lane.record``."""
        self._records, self._timeline = is_on, timeline
        for call in self._all_calls():
            call.record(is_on)

    def take_times(self) -> list[HostCallTimes]:
        """See ``Lane.take_times``."""
        return sorted(times for call in self._all_calls() for times in call.take_times())

    def _all_calls(self) -> list[HostCall]:
        taken = [call for one in self._taken if (call := one()) is not None]
        return [*(call for call, _ in self._calls.values()), *self._captured, *taken]

    def _call(self, tokens: int, k: int, dtype: torch.dtype) -> tuple[HostCall | None, PairBuffers]:
        key = (tokens, k, dtype)
        is_captured = is_capturing(torch.accelerator.current_stream(self._device))
        if not is_captured and (held := self._calls.get(key)) is not None:
            return held
        buffers = self._buffers.take(tokens, k, self.spec.hidden_size, dtype)
        call = self.kernel.host_call(
            buffers.hidden, buffers.expert_ids, buffers.weights, buffers.out
        )
        if call is None:
            return None, buffers
        call.record(self._records)
        if is_captured:
            self._captured.append(call)  # the graph calls it as long as it lives: take_captured
            return call, buffers
        if len(self._calls) >= _MOST_CALLS:
            torch.accelerator.synchronize(self._device)  # none of them is under way
            self.raise_error()
            self._calls.clear()
        self._calls[key] = (call, buffers)
        return call, buffers


def _copy(sent: tuple[torch.Tensor, ...], buffers: PairBuffers) -> None:
    for tensor, pinned in zip(
        sent, (buffers.hidden, buffers.expert_ids, buffers.weights), strict=True
    ):
        pinned.copy_(tensor, non_blocking=True)


class _Done(Ticket):
    """Nothing was to be done."""

    def __init__(self, out: torch.Tensor) -> None:
        self._out = out

    def wait(self) -> torch.Tensor:
        return self._out


class _Called(Ticket):
    """A call that the lane's stream has started, or will.

    What that stream reads and writes was allocated by the model's, which therefore waits for it
    before this lets go of the tensors.
    """

    def __init__(
        self,
        lane: HostLane,
        call: HostCall,
        tensors: tuple[PairBuffers, tuple[torch.Tensor, ...], torch.Tensor],
        dtype: torch.dtype,
        stream: torch.Stream,
    ) -> None:
        """Take what was submitted.

        Args:
            lane: Submitted it.
            call: Was started.
            tensors: Pinned memory, what was copied there, and room for the output.
            dtype: Of the output.
            stream: The model's.
        """
        self._lane: HostLane | None = lane
        self._call = call
        self._buffers, self._sent, self._out = tensors
        self._dtype = dtype
        self._stream = stream
        self._is_captured = is_capturing(stream)

    def wait(self) -> torch.Tensor:
        """Let the streams join the call and copy its output."""
        if self._lane is not None:
            self._lane.join(self._call, self._buffers.out, self._out)
            self._lane = None
        return self._out.to(self._dtype)

    def __del__(self) -> None:
        """Join what nobody waited for: the buffers will be used again.

        What was to be captured has not begun, if the capture ended before it was joined.
        """
        if self._lane is None or (self._is_captured and not is_capturing(self._stream)):
            return
        self._lane.give_up(self._call, self._stream)


class _Waited(Ticket):
    """Work that the host started itself, after it had waited for the stream."""

    def __init__(self, ticket: Ticket, like: torch.Tensor) -> None:
        self._ticket = ticket
        self._like = like

    def wait(self) -> torch.Tensor:
        return self._ticket.wait().to(device=self._like.device, dtype=self._like.dtype)
