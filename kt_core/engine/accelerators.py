"""The accelerators of one engine: which experts they hold, and how these follow the routing.

The dense part and the hidden states live on the first device. Experts live there, on further
devices, or on the host, which computes the cold ones meanwhile.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kt_core.engine.hybrid_layers import HybridLayers
from kt_core.errors import DeviceError, NotEnoughMemoryError, TraceError
from kt_core.interfaces import (
    ExpertDevice,
    ExpertGrid,
    ExpertId,
    ExpertKernel,
    OnlinePlacement,
    PlacementPolicy,
    RoutingStatistics,
)
from kt_core.moe.expert_mover import ExpertMover
from kt_core.moe.hybrid_experts import HybridExperts
from kt_core.moe.streamed_layers import StreamRates
from kt_core.placement.devices import HOST, direct, spread
from kt_core.placement.machine import LINK_SHARE, LinkBudget
from kt_core.placement.statistics import (
    load_statistics,
    merge,
    save_statistics,
    statistics_file,
)
from kt_core.plan.hot_experts import card_reserve_bytes, computing_bytes, hot_budget_bytes
from kt_core.plan.outline import ModelOutline
from kt_core.types import ActivationPrecision, Format, MoeSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_log = logging.getLogger(__name__)

# The cache and the scratch that room is left for: tokens of context, and of a prompt at once.
CONTEXT, PROMPT = 8192, 2048
# Enough for the link's bandwidth to hide its latency.
_PROBE_BYTES = 32 << 20
_PROBE_TOKENS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class HotExpertsWish:
    """What the user wants of accelerators.

    Attributes:
        hot_experts: ``auto``, a number of experts or a share of them: see ``hot_budget_bytes``.
        memory_bytes: Memory of each device that may be used; None for all there is.
        policy: Chooses what is hot.
        statistics: Of earlier runs of this model; None where there were none.
    """

    hot_experts: str
    memory_bytes: int | None
    policy: PlacementPolicy
    statistics: RoutingStatistics | None = None


@dataclass(slots=True)
class AcceleratorCounters:
    """What has happened since the model was loaded.

    Attributes:
        tokens: Tokens that went through the model.
        pairs: Pairs of token and expert.
        hot_pairs: Those that an accelerator computed.
    """

    tokens: int = 0
    pairs: int = 0
    hot_pairs: int = 0


class Accelerators:
    """Devices in use, and the experts of one model on them.

    Attributes:
        devices: In the order of their kernels in every layer, behind the host's.
        host: Computes cold experts.
        wish: What the user wants.
        counters: What has happened.
        hybrid: The layers.
        mover: Moves experts.
        budget_bytes: What experts on them may take together.
    """

    def __init__(
        self,
        devices: Sequence[ExpertDevice],
        host: ExpertDevice,
        wish: HotExpertsWish,
        precision: ActivationPrecision,
    ) -> None:
        """Take devices that are open; they are closed with this."""
        self.devices = tuple(devices)
        self.host = host
        self.wish = wish
        self.counters = AcceleratorCounters()
        self.hybrid = HybridLayers(devices, precision)
        self.mover = ExpertMover(
            self.hybrid.layers,
            *(torch.device(device.info.torch_device) for device in self.devices),
        )
        self.budget_bytes = 0
        self._rooms = [0] * len(self.devices)
        self._can_stream = False
        self._grid: ExpertGrid | None = None
        self._homes: dict[ExpertId, int] = {}  # of what is hot at start
        self._online: OnlinePlacement | None = None
        self._link: LinkBudget | None = None
        self._counts: torch.Tensor | None = None
        self._seen: NDArray[np.int64] | None = None
        self._hot: tuple[int, NDArray[np.bool_] | None] = -1, None
        self._lock = threading.Lock()

    @property
    def torch_device(self) -> torch.device:
        """Where the dense part and the hidden states live."""
        return self.hybrid.device

    @property
    def room_bytes(self) -> int:
        """Memory that the devices have left for experts."""
        return sum(self._rooms)

    def make_room(
        self, outline: ModelOutline, saved_dense_bytes: int, *, graph: bool, advice: str
    ) -> None:
        """Find what is left for experts: on the first device, beside the dense part and a cache.

        Args:
            outline: The model.
            saved_dense_bytes: By how much packed dense layers make it smaller.
            graph: Whether steps are replayed from graphs, whose caches keep all tokens.
            advice: What to know, or to do, about a dense part that does not fit.

        Raises:
            NotEnoughMemoryError: Not even these fit.
        """
        limit = self.wish.memory_bytes
        sizes = [device.info.memory_bytes for device in self.devices]
        usable = [size if limit is None else min(size, limit) for size in sizes]
        self._rooms = [
            max(0, most - card_reserve_bytes(size))
            for most, size in zip(usable, sizes, strict=True)
        ]
        context = min(CONTEXT, outline.max_context or CONTEXT)
        prompt = min(PROMPT, context)
        parts = computing_bytes(outline, context, prompt, saved_dense_bytes, keeps_all=graph)
        needed = sum(parts.values())
        if needed > self._rooms[0]:
            needed += usable[0] - self._rooms[0]
            msg = (
                f"the dense part with a cache of {context} tokens takes {needed / 1e9:.2f} GB on "
                f"{self.devices[0].info.name}, which has {usable[0] / 1e9:.2f} GB: {advice}take a "
                f"larger device, or run on the host (--device {self.host.info.name})"
            )
            raise NotEnoughMemoryError(msg)
        self._rooms[0] -= needed

    def choose(self, layers: Sequence[tuple[MoeSpec, Format]]) -> None:
        """Decide what is hot, once it is known what there is.

        Args:
            layers: Shape and format of each layer's experts.

        Raises:
            InvalidRequestError: The wish cannot be understood.
            NotEnoughMemoryError: It does not fit.
        """
        grid = ExpertGrid(
            num_experts=tuple(spec.num_experts for spec, _ in layers),
            expert_bytes=tuple(self.devices[0].expert_bytes(*layer) for layer in layers),
        )
        room, slots = self.room_bytes, _slot_bytes(layers, grid)
        wish = self.wish.hot_experts
        self.budget_bytes = hot_budget_bytes(wish, grid, room)
        slots_fit = self._rooms[0] >= slots  # they lie where the hidden states do
        if wish == "auto" and self.budget_bytes < grid.total_bytes and slots_fit:
            self.budget_bytes = min(self.budget_bytes, room - slots)
        self._can_stream = slots_fit and room - self.budget_bytes >= slots
        if self._can_stream:
            self._rooms[0] -= slots
        known = self.wish.statistics or RoutingStatistics.unknown(grid)
        self._grid = grid
        placement = self.wish.policy.place(known, self.budget_bytes, grid)
        self._homes = spread(placement, grid, self._rooms)
        if (left_out := placement.num_resident - len(self._homes)) > 0:
            _log.warning(
                "%d experts stay on the host, no single device has room for them: a smaller "
                "--hot-experts avoids this warning",
                left_out,
            )
        self._online = self.wish.policy.online(known, self.budget_bytes, grid)
        self._counts = torch.zeros(grid.shape, dtype=torch.int64, device=self.torch_device)

    def layer(
        self, spec: MoeSpec, weight_format: Format, host_kernel: ExpertKernel
    ) -> HybridExperts:
        """Make the next layer's module; its experts are on the host, or come there first."""
        assert self._grid is not None
        assert self._counts is not None
        index = len(self.hybrid.layers)
        is_last = index == self._grid.num_layers - 1
        module = self.hybrid.add(spec, weight_format, host_kernel, is_last=is_last)
        module.counts = self._counts[index, : spec.num_experts]
        return module

    def settle(self, layer: int, expert: int) -> None:
        """Take an expert that the host has just packed to its device, if it is hot.

        May be called from several threads.
        """
        found = ExpertId(layer, expert)
        if (home := self._homes.get(found)) is None:
            return
        with self._lock:
            self.mover.load_now(found, home)

    def take_places(self) -> None:
        """Let layers know where experts are, once these are loaded: the model runs from now on."""
        for layer in self.hybrid.layers:
            layer.refresh_placement()
        self.hybrid.pass_by_host()

    def start(self, dtype: torch.dtype) -> None:
        """Measure the rates, and begin to follow the routing.

        Args:
            dtype: Of the hidden states.
        """
        import numpy as np

        assert self._grid is not None
        assert self._counts is not None
        self._counts.zero_()  # of what was tried out
        self._seen = np.zeros(self._grid.shape, dtype=np.int64)
        if self._online is not None:
            # One budget for all: what the slowest carries, all can.
            share = LINK_SHARE * min(map(self._measure_link, self.devices))
            largest = max(self._grid.expert_bytes)
            self._link = LinkBudget(share, largest_expert_bytes=largest)
        streamed = self.hybrid.streamed
        can_stream = self._can_stream and streamed.can_fill
        if can_stream and (pairs_per_s := self._measure_host(dtype)):
            # In this order: the host has read what is mapped.
            streamed.rates = StreamRates(streamed.measure_fill(), pairs_per_s)

    def after_step(self, tokens: int, step_s: float) -> None:
        """Take note of a step that is done, and move experts.

        Args:
            tokens: That went through the model.
            step_s: How long it took.

        Raises:
            RuntimeError: Experts failed on the host.
        """
        assert self._counts is not None
        self.hybrid.raise_error()
        total = self._counts.cpu().numpy()
        counts, self._seen = total - self._seen, total
        self.counters.tokens += tokens
        self.counters.pairs += int(counts.sum())
        self.counters.hot_pairs += int(counts[self._is_hot(counts.shape)].sum())
        self.mover.advance()
        if self._online is None or self._link is None:
            return
        granted = self._link.grant(step_s)
        homes = self.mover.homes(counts.shape)
        swaps = self._online.observe(counts, homes != HOST, tokens=tokens, link_bytes=granted)
        if swaps:
            assert self._grid is not None
            directed = direct(swaps, homes, self._grid, self._rooms)
            self._link.spend(sum(self._grid.expert_bytes[swap.load.layer] for swap, _ in directed))
            for swap, device in directed:
                self.mover.begin([swap], device)

    def _is_hot(self, shape: tuple[int, ...]) -> NDArray[np.bool_]:
        """Return ``[layers, experts]``: which experts accelerators compute; made after moves."""
        import numpy as np

        changes, mask = self._hot
        now = sum(layer.changes for layer in self.hybrid.layers)
        if mask is None or changes != now:
            mask = np.zeros(shape, dtype=np.bool_)
            for index, layer in enumerate(self.hybrid.layers):
                mask[index, : layer.spec.num_experts] = layer.is_moved()
            self._hot = now, mask
        return mask

    def statistics(self) -> RoutingStatistics:
        """Return how often experts were chosen since the model was loaded."""
        assert self._grid is not None
        assert self._counts is not None
        rows = self._counts.cpu().tolist()
        counts = tuple(
            tuple(row[:count]) for row, count in zip(rows, self._grid.num_experts, strict=True)
        )
        return RoutingStatistics(counts=counts, tokens=self.counters.tokens)

    def placement_counts(self) -> dict[str, int]:
        """Return how many experts live on each device, the host first."""
        names = [self.host.info.name, *(device.info.name for device in self.devices)]
        return {
            name: sum(len(layer.kernels[index].resident()) for layer in self.hybrid.layers)
            for index, name in enumerate(names)
        }

    def close(self) -> None:
        """Wait for what is under way, and let the devices go, those that are lost too."""
        try:
            self.mover.finish()
        except (DeviceError, RuntimeError) as error:
            _log.warning("an accelerator failed while experts were moved: %s", _first_line(error))
            self.mover.abandon()
        self.hybrid.clear()
        for device in self.devices:
            device.close()

    @staticmethod
    def _measure_link(device: ExpertDevice) -> float:
        """Return the bytes per second that a copy to a device reaches."""
        where = torch.device(device.info.torch_device)
        source = torch.empty(_PROBE_BYTES, dtype=torch.uint8, pin_memory=True)
        target = torch.empty(_PROBE_BYTES, dtype=torch.uint8, device=where)
        torch.accelerator.synchronize(where)
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.accelerator.synchronize(where)
        return _PROBE_BYTES / (time.perf_counter() - start)

    def _measure_host(self, dtype: torch.dtype) -> float | None:
        """Return pairs per second of the host with many tokens; None where it has no experts."""
        kernel = self.hybrid.streamed.host_of_most()
        cold = sorted(kernel.resident())
        if not cold:
            return None
        hidden = torch.randn(_PROBE_TOKENS, kernel.spec.hidden_size).to(dtype)
        ids = torch.tensor(cold).repeat(_PROBE_TOKENS * 8 // len(cold) + 1)[: _PROBE_TOKENS * 8]
        pairs = ids.view(_PROBE_TOKENS, 8), torch.ones(_PROBE_TOKENS, 8)
        kernel.submit(hidden, *pairs).wait()
        start = time.perf_counter()
        kernel.submit(hidden, *pairs).wait()
        return ids.numel() / (time.perf_counter() - start)


def _slot_bytes(layers: Sequence[tuple[MoeSpec, Format]], grid: ExpertGrid) -> int:
    """Return the bytes of two layers of each shape and format: what streamed layers need."""
    sizes = {
        layer: count * size
        for layer, count, size in zip(layers, grid.num_experts, grid.expert_bytes, strict=True)
    }
    return 2 * sum(sizes.values())


def known_statistics(directory: Path) -> RoutingStatistics | None:
    """Return what earlier runs of a model learned; None where there were none."""
    return load_statistics(statistics_file(directory))


def remember_statistics(directory: Path, accelerators: Accelerators) -> None:
    """Add what this run learned. A failure is a warning: the next run is slower at first."""
    if accelerators.counters.tokens == 0:
        return
    file = statistics_file(directory)
    try:
        learned = accelerators.statistics()
        if (known := load_statistics(file)) is not None:
            learned = merge(known, learned)
        save_statistics(learned, file)
    except (TraceError, ValueError, DeviceError, RuntimeError) as error:
        _log.warning("routing statistics were not kept: %s", _first_line(error))


def _first_line(error: BaseException) -> str:
    """What an error says, without the traces that runtimes append."""
    return str(error).partition("\n")[0]
