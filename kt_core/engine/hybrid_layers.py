"""Builds the layers whose experts live on the host and on accelerators, and the lanes between."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kt_core.hardware.graphs import can_capture
from kt_core.interfaces import ExpertDevice, ExpertKernel, HostCall
from kt_core.moe.beside import BesideStream
from kt_core.moe.deferral import Deferral, DeferringLane
from kt_core.moe.host_lane import HostLane, PinnedBuffers
from kt_core.moe.hybrid_experts import HybridExperts
from kt_core.moe.lane import Lane
from kt_core.moe.peer_lane import PeerLane
from kt_core.moe.streamed_layers import StreamedLayers, StreamingLane
from kt_core.types import ActivationPrecision, Format, MoeSpec


class HybridLayers:
    """The layers of one engine, in order, and what they share.

    Attributes:
        layers: ``kernels[0]`` of each is the host's lane, the others are the devices'.
        deferral: What layers put off for the next one.
        streamed: Brings whole layers to the first device, for long prompts.
        beside: What blocks call beside their experts; None where it stays in the model's order.
    """

    def __init__(self, devices: Sequence[ExpertDevice], precision: ActivationPrecision) -> None:
        """Take the devices; hidden states are on the first one."""
        self.layers: list[HybridExperts] = []
        self.deferral = Deferral()
        self.device = torch.device(devices[0].info.torch_device)
        self.streamed = StreamedLayers(self.device)
        self.beside: BesideStream | None = None
        self._devices = tuple(devices)
        self._precision = precision
        cold = torch.Stream(device=self.device)
        self._buffers = PinnedBuffers(cold)
        # What a layer puts off is under way while the next one puts something off.
        self._late_buffers = (PinnedBuffers(cold), PinnedBuffers(cold))
        self._host_lanes: list[HostLane] = []  # of all layers: they are asked after every step
        self._slots: dict[tuple[MoeSpec, Format], tuple[ExpertKernel, ExpertKernel]] = {}

    def add(
        self, spec: MoeSpec, weight_format: Format, host_kernel: ExpertKernel, *, is_last: bool
    ) -> HybridExperts:
        """Make the next layer's module."""
        first = self._devices[0]
        lanes: list[ExpertKernel] = [self._host_lane(spec, weight_format, host_kernel, is_last)]
        for device in self._devices:
            kernel = device.expert_kernel(spec, weight_format, precision=self._precision)
            away = torch.device(device.info.torch_device)
            lanes.append(kernel if device is first else PeerLane(kernel, away))
        module = HybridExperts(spec, lanes, device=self.device)
        self.layers.append(module)
        return module

    def raise_error(self) -> None:
        """Raise what went wrong on the host in calls that the stream has come past.

        Raises:
            RuntimeError: A call failed; its output was zeros.
        """
        for lane in self._host_lanes:
            lane.raise_error()

    def pass_by_host(self) -> None:
        """Let no layer call the host, if none has an expert there.

        All or none: a layer that changed sides as experts move would end a captured graph each
        time.
        """
        if all(all(layer.is_moved()) for layer in self.layers):
            for layer in self.layers:
                layer.uses_host = False

    def why_no_graph(self) -> str | None:
        """Return why a step through all layers cannot be captured, or None if it can."""
        if not can_capture(self.device):
            return f"torch has no graphs for {self.device.type!r}"
        if len(self._devices) > 1:
            return "experts lie on several accelerators, and a graph belongs to one"
        if self._devices[0].host_functions is None:
            return f"nothing calls the host in order of a stream of {self._devices[0].info.name}"
        return None

    def graph_version(self) -> tuple[int, ...]:
        """Return a value that differs once a graph that was captured must not be replayed."""
        changes = sum(kernel.capture_version for layer in self.layers for kernel in layer.kernels)
        hosts = sum(layer.uses_host for layer in self.layers)
        return self.deferral.per_token, changes, hosts

    def take_captured(self) -> list[HostCall]:
        """Hand over the host calls that were captured; they must live as long as their graph."""
        lanes = [layer.kernels[0] for layer in self.layers]
        return [call for lane in lanes if isinstance(lane, Lane) for call in lane.take_captured()]

    def forget_step(self) -> None:
        """Begin anew, after a pass that did not come to its end."""
        self.deferral.take()

    def clear(self) -> None:
        """Let the layers go, and what is called for them."""
        self.layers.clear()
        self._host_lanes.clear()

    def _host_lane(
        self, spec: MoeSpec, weight_format: Format, kernel: ExpertKernel, is_last: bool
    ) -> StreamingLane:
        functions, index = self._devices[0].host_functions, len(self.layers)
        now = HostLane(kernel, self.device, functions, self._buffers)
        late = HostLane(kernel, self.device, functions, self._late_buffers[index % 2])
        deferring = DeferringLane(now, None if is_last else late, self.deferral)
        self._host_lanes += [now] if is_last else [now, late]
        slots = self._slots.get((spec, weight_format))
        if slots is None:
            one, two = (
                self._devices[0].expert_kernel(spec, weight_format, precision=self._precision)
                for _ in range(2)
            )
            slots = self._slots[spec, weight_format] = (one, two)
        self.streamed.add(kernel, slots)
        return StreamingLane(deferring, self.streamed, index, self.deferral)
