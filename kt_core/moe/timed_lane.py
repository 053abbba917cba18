"""A kernel whose calls are put on a timeline. In the way only while a timeline is wanted."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from kt_core.interfaces import ExpertKernel, Ticket
from kt_core.moe.lane import Lane
from kt_core.moe.timeline import Kind, Label, Timeline


class TimedLane(Lane):
    """Puts events before and behind what a kernel puts into its device's current stream."""

    def __init__(
        self,
        kernel: ExpertKernel,
        timeline: Timeline,
        device: torch.device,
        layer: int,
        kinds: tuple[Kind | None, Kind | None],
    ) -> None:
        """Stand for ``kernel``.

        Args:
            kernel: Puts its work into the current stream of ``device``.
            timeline: Gets the spans.
            device: Names the row, too.
            layer: The layer's number.
            kinds: Of what ``submit`` and waiting for its ticket put there; None for what does not
                matter.
        """
        super().__init__(kernel)
        self._timeline = timeline
        self._device = device
        self._layer = layer
        self._submit, self._wait = kinds

    def submit(
        self, hidden: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor
    ) -> Ticket:
        """See ``ExpertKernel.submit``."""
        with self._spanned(self._submit):
            ticket = self.kernel.submit(hidden, expert_ids, weights)
        return _Timed(ticket, self._spanned(self._wait))

    def _spanned(self, kind: Kind | None) -> AbstractContextManager[None]:
        if kind is None:
            return nullcontext()
        stream = torch.accelerator.current_stream(self._device)
        name = f"{kind} experts of layer {self._layer}"
        label = Label(kind, str(self._device), name, self._layer)
        return self._timeline.span(stream, label)


class _Timed(Ticket):
    """A ticket whose waiting is put on a timeline."""

    def __init__(self, ticket: Ticket, span: AbstractContextManager[None]) -> None:
        self._ticket = ticket
        self._span = span

    def wait(self) -> torch.Tensor:
        with self._span:
            return self._ticket.wait()
