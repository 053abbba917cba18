"""Which experts lie on the accelerator: the values policies exchange, and what a policy writes.

Nothing here needs numpy to be imported: the command line loads it at every start.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Counts: TypeAlias = NDArray[np.int64]
    Mask: TypeAlias = NDArray[np.bool_]


class ExpertId(NamedTuple):
    """One expert of one layer, both counted from 0; layers without routed experts do not count."""

    layer: int
    expert: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertGrid:
    """All routed experts of a model: what there is to place.

    Attributes:
        num_experts: Experts of each layer.
        expert_bytes: Bytes of one expert on the accelerator, for each layer.
    """

    num_experts: tuple[int, ...]
    expert_bytes: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.num_experts or len(self.num_experts) != len(self.expert_bytes):
            msg = (
                "num_experts and expert_bytes need one value for each layer, and at least one, got "
                f"{len(self.num_experts)} and {len(self.expert_bytes)}"
            )
            raise ValueError(msg)
        if min(*self.num_experts, *self.expert_bytes) < 1:
            msg = f"every layer needs experts of at least a byte, got {self}"
            raise ValueError(msg)

    @property
    def num_layers(self) -> int:
        """Layers with routed experts."""
        return len(self.num_experts)

    @property
    def total_bytes(self) -> int:
        """Bytes of all experts."""
        return sum(n * size for n, size in zip(self.num_experts, self.expert_bytes, strict=True))

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the arrays that online placements get: layers, experts of the widest layer."""
        return self.num_layers, max(self.num_experts)

    def expert_ids(self) -> list[ExpertId]:
        """Every expert, layer by layer."""
        return [
            ExpertId(layer, expert)
            for layer, count in enumerate(self.num_experts)
            for expert in range(count)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingStatistics:
    """How often each expert was chosen.

    Attributes:
        counts: For each layer, for each expert, the pairs of token and expert that were routed to
            it. Not necessarily whole: older counts may weigh less.
        tokens: How many tokens that were; 0 where nothing is known.
    """

    counts: tuple[tuple[float, ...], ...]
    tokens: float

    def __post_init__(self) -> None:
        lowest = min((min(layer, default=0) for layer in self.counts), default=0)
        if not (lowest >= 0 and self.tokens >= 0):  # false for a NaN too
            msg = f"counts and tokens must be >= 0, got a count of {lowest}, {self.tokens} tokens"
            raise ValueError(msg)

    @classmethod
    def unknown(cls, grid: ExpertGrid) -> RoutingStatistics:
        """Return what is known before the first token: nothing."""
        return cls(counts=tuple((0.0,) * count for count in grid.num_experts), tokens=0)

    def check_fits(self, grid: ExpertGrid) -> None:
        """Raise ``ValueError`` unless there is one count for each expert of ``grid``."""
        found = tuple(map(len, self.counts))
        if found != grid.num_experts:
            msg = f"the statistics are of layers of {found} experts, not {grid.num_experts}"
            raise ValueError(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The experts that lie on the accelerator; all others are computed by the host.

    Attributes:
        resident: For each layer the ids of its resident experts, in ascending order.
    """

    resident: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        for layer, ids in enumerate(self.resident):
            if list(ids) != sorted(set(ids)) or (ids and ids[0] < 0):
                msg = f"ids of layer {layer} must ascend from 0 and stand once each, got {ids}"
                raise ValueError(msg)

    @classmethod
    def of(cls, experts: Sequence[ExpertId], grid: ExpertGrid) -> Placement:
        """Return the placement of these experts, given in any order."""
        layers: list[list[int]] = [[] for _ in range(grid.num_layers)]
        for layer, expert in experts:
            layers[layer].append(expert)
        return cls(resident=tuple(tuple(sorted(ids)) for ids in layers))

    @property
    def num_resident(self) -> int:
        """How many experts lie on the accelerator."""
        return sum(map(len, self.resident))

    def size_bytes(self, grid: ExpertGrid) -> int:
        """Bytes that they take there."""
        sizes = zip(self.resident, grid.expert_bytes, strict=True)
        return sum(len(ids) * size for ids, size in sizes)


class Swap(NamedTuple):
    """Load one expert to the accelerator, where those in ``evict`` make room for it first."""

    load: ExpertId
    evict: tuple[ExpertId, ...]


class OnlinePlacement(ABC):
    """Follows the routing of one engine and moves experts. Made by ``PlacementPolicy.online``.

    The engine owns the truth about what is resident: it may refuse a swap or fail in one, and
    simply shows another ``resident`` the next time. It owns the time too: it says how many bytes
    the link can carry beside its other work.
    """

    @abstractmethod
    def observe(
        self, counts: Counts, resident: Mask, *, tokens: int, link_bytes: int
    ) -> Sequence[Swap]:
        """Take note of one step, a prefill chunk or a decode step, and say what to move.

        Called after every step, so it must take microseconds. The engine copies while later steps
        run; an evicted expert is gone at once and a loaded one counts when its copy is done.

        Args:
            counts: ``grid.shape``, whole numbers: pairs routed to each expert in this step.
            resident: ``grid.shape``: what will lie on the accelerator when all copies that were
                begun are done. Must not be written to or kept.
            tokens: Tokens in this step, >= 1.
            link_bytes: Bytes that may be loaded now.

        Returns:
            Swaps in the order to do them. Together they load no more than ``link_bytes``; after
            each, what is resident fits the budget; only experts that are resident are evicted,
            only others are loaded, none twice.
        """


class PlacementPolicy(ABC):
    """Chooses what lies on the accelerator. Has no state: what changes is in ``online``'s result.

    Attributes:
        name: What the user types.
        description: One line for help and tables.
    """

    name: str
    description: str

    @abstractmethod
    def place(
        self, statistics: RoutingStatistics, budget_bytes: int, grid: ExpertGrid
    ) -> Placement:
        """Return what to load at start. A pure function: the same arguments, the same placement.

        Args:
            statistics: Of earlier runs; ``tokens == 0`` where there were none.
            budget_bytes: Bytes for experts on the accelerator, all layers together, >= 0. No more
                are used; room for one more expert of any size is not left.
            grid: What there is to place.

        Raises:
            ValueError: The statistics are of another grid.
        """

    def online(
        self, statistics: RoutingStatistics, budget_bytes: int, grid: ExpertGrid
    ) -> OnlinePlacement | None:
        """Return what moves experts while the engine runs; None, as by default, to move none.

        The arguments are those of ``place``.
        """
        del statistics, budget_bytes, grid
        return None
