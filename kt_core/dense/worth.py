"""Whether packing a dense layer is worth it."""

from __future__ import annotations

from kt_core.types import LinearSpec

# What rounding a size of some hundred up to whole panels may add, where nothing else is saved.
_MOST_GROWTH = 1.125


def is_worth_packing(spec: LinearSpec, packed_bytes: int, element_bytes: int) -> bool:
    """Whether the packed weight is no larger than the one it replaces, but for some padding.

    Args:
        spec: The layer's shape.
        packed_bytes: Of its packed weight, without the bias.
        element_bytes: Of an element of the weight that it replaces.
    """
    return packed_bytes <= _MOST_GROWTH * spec.in_features * spec.out_features * element_bytes
