"""What `kt quant` tells of what it did."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from kt_core.types import Format

if TYPE_CHECKING:
    from kt_core.engine.evaluation import Evaluation

Squares: TypeAlias = tuple[float, float]
"""Squared errors of weights, and their squares, summed."""


@dataclass(frozen=True, slots=True)
class LayerReport:
    """How one experts module, or one dense layer, came out.

    Attributes:
        name: Its path.
        format: What its weights became.
        bits_per_weight: Bits of what is packed by its weights, padding and biases included.
        relative_error: Root of the squared errors of all weights by the squared weights.
    """

    name: str
    format: str
    bits_per_weight: float
    relative_error: float

    @classmethod
    def of(
        cls, name: str, weight_format: Format, bits_per_weight: float, squares: Iterable[Squares]
    ) -> LayerReport:
        """Sum up the parts of a layer."""
        errors, weights = (sum(column) for column in zip(*squares, strict=True))
        return cls(
            name=name,
            format=weight_format.name,
            bits_per_weight=bits_per_weight,
            relative_error=(errors / weights) ** 0.5 if weights else 0.0,
        )


@dataclass(slots=True)
class QuantReport:
    """What `kt quant` did.

    Attributes:
        target: Where the packed model is.
        method: How the weights were quantised.
        layers: How the experts of each layer came out.
        dense_layers: How each dense layer that was packed came out.
        resumed_files: Files that an earlier run had written.
        expert_bytes: Packed experts.
        dense_bytes: Everything else.
        seconds: How long it took, this time.
        evaluation: How it compares with the source, if that was asked for.
    """

    target: str
    method: str
    layers: list[LayerReport] = field(default_factory=list)
    dense_layers: list[LayerReport] = field(default_factory=list)
    resumed_files: int = 0
    expert_bytes: int = 0
    dense_bytes: int = 0
    seconds: float = 0.0
    evaluation: Evaluation | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)
