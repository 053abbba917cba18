"""Follows a run: which device was at what, step by step and layer by layer.

While a profiler is entered, hooks of torch's modules and lanes around the kernels of every layer
put events into streams, and the host's kernels keep the times of their calls. Between steps the
times are read. Once it is left, all of that is gone, and nothing is slower than before.
"""

from __future__ import annotations

import logging
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from kt_core.engine.chrome_trace import write_trace
from kt_core.engine.overlap import device_times, layer_calls, overlap_of
from kt_core.interfaces import ExpertKernel
from kt_core.moe.hybrid_experts import HybridExperts
from kt_core.moe.lane import Lane
from kt_core.moe.peer_lane import PeerLane
from kt_core.moe.timed_lane import TimedLane
from kt_core.moe.timeline import Kind, Label, Mark, Span, Timeline

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from kt_core.engine.engine import Engine

_log = logging.getLogger(__name__)

# Half a gigabyte of Python objects: a thousand steps of a model of a hundred layers.
MOST_SPANS = 1_000_000
LAUNCHES, STEPS = "launching", "steps"


class Profiler:
    """Follows an engine while it is entered; use it as a context manager, once.

    Attributes:
        timeline: What was seen; complete once the profiler is left.
        host: The row of the experts that the host computes.
        devices: The rows of the accelerators, the one of the dense part first; none without.
    """

    def __init__(self, engine: Engine) -> None:
        """Take an engine, which stays open until the profiler is left."""
        self._model: nn.Module = engine.model
        self._accelerators = engine.accelerators
        if self._accelerators:
            self._layers = list(self._accelerators.hybrid.layers)
        else:
            modules = engine.model.modules()
            self._layers = [module for module in modules if isinstance(module, HybridExperts)]
        infos = [device.info for device in self._accelerators.devices] if self._accelerators else []
        self.timeline = Timeline([torch.device(info.torch_device) for info in infos])
        self.host = engine.stats().device
        self.devices = tuple(str(device) for device in self.timeline.devices)
        self._hooks: list[RemovableHandle] = []
        self._kernels: list[tuple[ExpertKernel, ...]] = []
        self._step: tuple[Kind, str, Mark] | None = None
        self._layer: tuple[Mark, Mark] | None = None

    def __enter__(self) -> Self:
        """Begin to follow, once what is under way is done."""
        self._synchronize()
        self._hooks = [
            self._model.register_forward_pre_hook(self._before_step, with_kwargs=True),
            self._model.register_forward_hook(self._after_step),
        ]
        for index, layer in enumerate(self._layers):
            self._hooks += [
                layer.register_forward_pre_hook(self._before_layer),
                layer.register_forward_hook(partial(self._after_layer, index)),
            ]
            self._kernels.append(layer.kernels)
            if self._accelerators:
                layer.kernels = tuple(self._timed(kernel, index) for kernel in layer.kernels)
                _lane(layer).record(is_on=True, timeline=self.timeline)
        self._share(self.timeline)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Follow no more, and read the times that are left."""
        try:
            self._synchronize()  # while the host still keeps its times
            self._settle()
        except RuntimeError as failure:
            if error is None:
                raise
            _log.warning("the last step is not in the profile, since a device failed: %s", failure)
        finally:
            self._detach()

    def report(self) -> dict[str, Any]:
        """Return figures for scripts: ``overlap`` and ``time_by_device``, in seconds."""
        spans, uncertainty_s = self.timeline.spans, self.timeline.uncertainty_ns / 1e9
        times = device_times(spans, self.host, self.devices)
        return {
            "overlap": {**overlap_of(layer_calls(spans)), "clock_uncertainty_s": uncertainty_s},
            "time_by_device": {name: asdict(time) for name, time in times.items()},
        }

    def save(self, target: Path) -> None:
        """Write what was seen as a Chrome trace, whole or not at all.

        Raises:
            OSError: It cannot be written.
        """
        rows = (STEPS, LAUNCHES, self.host, *self.devices)
        write_trace(target, self.timeline.spans, rows, self.report())

    def _synchronize(self) -> None:
        for device in self.timeline.devices:
            torch.accelerator.synchronize(device)

    def _detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for layer, kernels in zip(self._layers, self._kernels, strict=False):
            layer.kernels = kernels
            if self._accelerators:
                _lane(layer).record(is_on=False)
        self._kernels = []
        self._share(None)

    def _share(self, timeline: Timeline | None) -> None:
        if self._accelerators:
            self._accelerators.mover.timeline = timeline
            self._accelerators.hybrid.streamed.timeline = timeline
            if self._accelerators.hybrid.beside:
                self._accelerators.hybrid.beside.timeline = timeline

    def _timed(self, kernel: ExpertKernel, layer: int) -> ExpertKernel:
        first = self.timeline.devices[0]
        if isinstance(kernel, PeerLane):
            inner = TimedLane(kernel.kernel, self.timeline, kernel.device, layer, (Kind.HOT, None))
            return PeerLane(inner, kernel.device)
        kinds = (None, Kind.JOIN) if isinstance(kernel, Lane) else (Kind.HOT, None)
        return TimedLane(kernel, self.timeline, first, layer, kinds)

    def _stream(self) -> torch.Stream | None:
        devices = self.timeline.devices
        return torch.accelerator.current_stream(devices[0]) if devices else None

    def _before_step(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        del module
        self._settle()
        if len(self.timeline.spans) > MOST_SPANS:
            _log.warning(
                "the profile is full and ends here, after %d steps", self.timeline.step + 1
            )
            self._detach()
            return
        self.timeline.begin_step()
        ids = kwargs.get("input_ids", args[0] if args else None)
        tokens = 1 if ids is None else ids.shape[1]
        is_prefill = tokens > 1 or kwargs.get("past_key_values") is None
        kind = Kind.PREFILL if is_prefill else Kind.DECODE
        name = f"prefill of {tokens} tokens" if is_prefill else "decode"
        self._step = kind, name, self.timeline.mark(self._stream())

    def _after_step(self, *_: Any) -> None:
        if self._step is not None:
            kind, name, begin = self._step
            end = self.timeline.mark(self._stream())
            self.timeline.between(begin, end, Label(kind, STEPS, name))

    def _before_layer(self, *_: Any) -> None:
        timeline = self.timeline
        if timeline.step >= 0:
            self._layer = timeline.mark(None), timeline.mark(self._stream())

    def _after_layer(self, index: int, *_: Any) -> None:
        if self._layer is None:
            return
        (launched, begin), self._layer = self._layer, None
        timeline, stream, name = self.timeline, self._stream(), f"experts of layer {index}"
        row = self.devices[0] if self.devices else self.host
        timeline.between(begin, timeline.mark(stream), Label(Kind.LAYER, row, name, index))
        if stream is not None:
            label = Label(Kind.LAUNCH, LAUNCHES, name, index)
            timeline.between(launched, timeline.mark(None), label)

    def _settle(self) -> None:
        """Read the times of the step that has passed."""
        if not self._accelerators:
            self.timeline.settle()
            return
        for index, layer in enumerate(self._layers):
            label = Label(Kind.COLD, self.host, f"experts of layer {index}", index)
            for call in _lane(layer).take_times():
                self.timeline.add(call.started, call.finished, label)
        new = self.timeline.settle()
        self.timeline.spans += dense_spans(new, self.devices[0])


def _lane(layer: HybridExperts) -> Lane:
    lane = layer.kernels[0]
    assert isinstance(lane, Lane)
    return lane


def dense_spans(spans: list[Span], row: str) -> list[Span]:
    """Return what lies between the layers of each step in the stream."""
    found = []
    label = Label(Kind.DENSE, row, "dense part")
    for step in (span for span in spans if span.kind in (Kind.PREFILL, Kind.DECODE)):
        layers = [span for span in spans if span.kind is Kind.LAYER and span.step == step.step]
        layers.sort(key=lambda layer: layer.begin_ns)
        ends = [step.begin_ns, *(layer.end_ns for layer in layers)]
        begins = [*(layer.begin_ns for layer in layers), step.end_ns]
        found += [
            Span(begin, end, step.step, label) for begin, end in zip(ends, begins, strict=True)
        ]
    return found
