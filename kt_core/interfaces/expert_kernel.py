"""The experts of one layer on one device: hold their packed weights, compute their outputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kt_core.interfaces.weight_format import QuantizedTensor
from kt_core.types import ActivationPrecision, Format, MoeSpec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWeights:
    """Weights of one expert in canonical orientation, whatever their layout on disk.

    Each projection is either a dense tensor (bfloat16, float16 or float32; any strides, so that
    transposed and interleaved checkpoints are views, not copies) or already quantised.

    Attributes:
        up: ``[intermediate, hidden]``.
        down: ``[hidden, intermediate]``.
        gate: ``[intermediate, hidden]``; None for an expert without a gate.
        up_bias: ``[intermediate]`` or None.
        down_bias: ``[hidden]`` or None.
        gate_bias: ``[intermediate]`` or None.
    """

    up: torch.Tensor | QuantizedTensor
    down: torch.Tensor | QuantizedTensor
    gate: torch.Tensor | QuantizedTensor | None = None
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    gate_bias: torch.Tensor | None = None


class Ticket(ABC):
    """Work that was submitted. Dropping it without waiting must not leak or crash."""

    @abstractmethod
    def wait(self) -> torch.Tensor:
        """Block until the work is done and return ``[tokens, hidden]`` in the hidden states' type.

        Raises:
            RuntimeError: The computation failed; the message says how.
        """


class ExpertKernel(ABC):
    """Packed experts of one layer.

    ``load`` may be called from several threads at once for different experts; everything else
    is called from one thread at a time.

    Attributes:
        spec: Shape and activation of the layer.
        weight_format: How the weights are stored.
    """

    spec: MoeSpec
    weight_format: Format

    @property
    @abstractmethod
    def bytes_per_expert(self) -> int:
        """Bytes of device memory one packed expert takes."""

    def precision_for(self, hidden_type: torch.dtype) -> ActivationPrecision | None:
        """Return what hidden states of this type are turned into: what ``AUTO`` stands for.

        For those who measure kernels. By default None: nobody knows.
        """
        del hidden_type
        return None

    @abstractmethod
    def load(self, expert: int, weights: ExpertWeights) -> None:
        """Quantise (where the weights are dense) and pack one expert; it becomes resident.

        Loading an expert again replaces it. The tensors are not kept.

        Raises:
            ValueError: ``expert`` is out of range, a shape does not fit ``spec``, a quantised
                tensor has another format, or a weight or scale is NaN or infinite.
        """

    @abstractmethod
    def unload(self, expert: int) -> None:
        """Give the memory of one expert back; does nothing when it is not resident."""

    @abstractmethod
    def resident(self) -> frozenset[int]:
        """Experts that are loaded."""

    @abstractmethod
    def submit(
        self, hidden: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor
    ) -> Ticket:
        """Start ``out[t] = sum_k weights[t, k] * expert[expert_ids[t, k]](hidden[t])``.

        The tensors must stay unchanged until the ticket is waited for.

        Args:
            hidden: ``[tokens, hidden]``, bfloat16, float16 or float32, any ``tokens >= 0``.
            expert_ids: ``[tokens, k]`` integers, ``k >= 1``; -1 marks a pair that is somebody
                else's and adds nothing. The same expert may stand twice in a row.
            weights: ``[tokens, k]``, floating point.

        Raises:
            ValueError: A shape or type is wrong, an id is outside ``-1..num_experts-1``, or an
                expert is not resident.
        """
