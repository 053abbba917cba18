"""A weight format: its descriptor, and the slow reference that defines what its numbers mean."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kt_core.types import Format

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedTensor:
    """One matrix ``[out_features, in_features]`` in canonical, unpacked form.

    ``weight = scale * (code - zero_point)``, the scale of input feature ``i`` being in column
    ``i // group_size``.

    Attributes:
        weight_format: What the numbers mean.
        codes: ``[out, in]``: bfloat16 (the weights), int8 (signed) or uint8 (with zero point).
        scales: ``[out, groups]`` float32 holding values the format's scale type can represent;
            None for bf16.
        zero_points: ``[out, groups]`` uint8; None for a format without.
    """

    weight_format: Format
    codes: torch.Tensor
    scales: torch.Tensor | None = None
    zero_points: torch.Tensor | None = None


class WeightFormat(ABC):
    """A storage format of expert weights.

    Attributes:
        descriptor: Element, scale, group size; its ``name`` is what users type.
        aliases: Other words for the same format.
    """

    descriptor: Format
    aliases: tuple[str, ...] = ()

    @abstractmethod
    def quantize(self, weight: torch.Tensor) -> QuantizedTensor:
        """Quantise ``[out, in]`` of any floating type. Backends must produce the same codes.

        Raises:
            ValueError: A weight is NaN or infinite.
        """

    @abstractmethod
    def dequantize(self, quantized: QuantizedTensor) -> torch.Tensor:
        """Return the float32 weights ``[out, in]`` that the stored numbers stand for."""
