"""Experts in a form of the vendor's: for devices whose operators do not read packed bytes."""

from __future__ import annotations

import threading
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch

from kt_core.accelerator.packed_kernel import StreamTicket, check_tensors
from kt_core.interfaces import ExpertKernel, ExpertWeights, QuantizedTensor, Ticket
from kt_core.interfaces.checks import check_expert, check_finite, check_weights
from kt_core.quant import ReferenceFormat
from kt_core.types import ELEMENT_BITS, ActivationPrecision, Format, MoeSpec


@dataclass(frozen=True, slots=True)
class ConvertedExpert:
    """One expert on the device; matrices are whatever ``ConvertedExpertKernel.convert`` makes."""

    gate: Any
    up: Any
    down: Any
    gate_bias: torch.Tensor | None
    up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None


class ConvertedExpertKernel(ExpertKernel):
    """Keeps what ``convert`` makes of each matrix; cannot move experts as packed bytes.

    ``slots``, ``[num_experts + 1]`` int64 on the device, says where an expert stands among the
    resident ones, in ascending order; how many there are for those that are not, and in the last
    place, which is what an id of -1 finds. The host knows the list, so a graph that was captured
    ends with a load or an unload: ``capture_version`` says so.
    """

    def __init__(
        self,
        device: torch.device,
        spec: MoeSpec,
        weight_format: Format,
        precision: ActivationPrecision = ActivationPrecision.AUTO,
    ) -> None:
        """Take the layer."""
        del precision  # there is one, and it has been checked
        self.spec = spec
        self.weight_format = weight_format
        self.device = device
        self._experts: dict[int, ConvertedExpert] = {}
        self._lock = threading.Lock()
        self._changes = 0
        self.slots = torch.zeros(spec.num_experts + 1, dtype=torch.int64, device=device)

    @abstractmethod
    def convert(self, matrix: QuantizedTensor) -> Any:
        """Return a matrix in the vendor's form, on the device."""

    @abstractmethod
    def compute(
        self,
        experts: list[ConvertedExpert],
        hidden: torch.Tensor,
        slots: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """Put the computation into the current stream and return its result.

        Args:
            experts: The resident ones, in the order of their slots; at least one.
            hidden: ``[tokens, hidden]`` of ``ActivationPrecision.BF16``: bfloat16.
            slots: ``[tokens, k]`` int64; ``len(experts)`` for a pair that is not ours.
            weights: ``[tokens, k]`` float32, 0 for a pair that is not ours.
        """

    @property
    def capture_version(self) -> int:
        """See ``ExpertKernel.capture_version``: the list of matrices is captured."""
        return self._changes

    def precision_for(self, hidden_type: torch.dtype) -> ActivationPrecision:
        """See ``ExpertKernel.precision_for``."""
        del hidden_type
        return ActivationPrecision.BF16

    def load(self, expert: int, weights: ExpertWeights) -> None:
        """See ``ExpertKernel.load``; converted on the host, then copied."""
        check_expert(self.spec, expert)
        check_weights(self.spec, self.weight_format, weights)
        check_finite(weights)
        converted = ConvertedExpert(
            gate=self._converted(weights.gate),
            up=self._converted(weights.up),
            down=self._converted(weights.down),
            gate_bias=self._bias(weights.gate_bias),
            up_bias=self._bias(weights.up_bias),
            down_bias=self._bias(weights.down_bias),
        )
        with self._lock:
            self._experts[expert] = converted
            self._renumber()

    def _converted(self, matrix: torch.Tensor | QuantizedTensor | None) -> Any:
        if isinstance(matrix, torch.Tensor):
            matrix = ReferenceFormat(self.weight_format).quantize(matrix)
        return None if matrix is None else self.convert(matrix)

    def _bias(self, bias: torch.Tensor | None) -> torch.Tensor | None:
        return None if bias is None else bias.to(self.device, torch.float32, copy=True)

    def _renumber(self) -> None:
        self._changes += 1
        count = len(self._experts)
        numbers = dict(zip(sorted(self._experts), range(count), strict=True))
        wanted = [numbers.get(expert, count) for expert in range(self.spec.num_experts)]
        self.slots.copy_(torch.tensor([*wanted, count]))

    def unload(self, expert: int) -> None:
        """See ``ExpertKernel.unload``."""
        with self._lock:
            if self._experts.pop(expert, None) is not None:
                self._renumber()

    def resident(self) -> frozenset[int]:
        """See ``ExpertKernel.resident``."""
        return frozenset(self._experts)

    def submit(
        self, hidden: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor
    ) -> Ticket:
        """See ``ExpertKernel.submit``."""
        check_tensors(self.spec, self.device, hidden, expert_ids, weights)
        with self._lock:
            experts = [self._experts[expert] for expert in sorted(self._experts)]
        if not experts or not len(hidden):
            return StreamTicket(torch.zeros_like(hidden))
        ids = expert_ids.to(torch.int64)
        is_known = (ids >= 0) & (ids < self.spec.num_experts)
        slots = self.slots[ids.where(is_known, self.spec.num_experts)]
        factors = weights.detach().float().where(slots < len(experts), 0.0)
        out = self.compute(experts, hidden.detach().to(torch.bfloat16), slots, factors)
        return StreamTicket(out.to(hidden.dtype))


def converted_bytes(spec: MoeSpec, weight_format: Format, group_bytes: int) -> int:
    """Bytes of an expert whose codes are packed without padding, and of its biases in float32.

    Args:
        spec: The layer.
        weight_format: Its format.
        group_bytes: What is kept for each group besides its codes.
    """
    hidden, inner = spec.hidden_size, spec.intermediate_size
    upper = 2 if spec.activation.is_gated else 1
    groups = 0
    if weight_format.scale is not None:
        groups = upper * inner * weight_format.num_groups(hidden)
        groups += hidden * weight_format.num_groups(inner)
    bias = 4 * (upper * inner + hidden) if spec.has_bias else 0
    codes = spec.weights_per_expert * ELEMENT_BITS[weight_format.element] // 8
    return codes + groups * group_bytes + bias


def why_not_whole(spec: MoeSpec, weight_format: Format) -> str | None:
    """Return why operators that know neither padding nor partial groups cannot compute a layer."""
    unit = weight_format.group_size or 1
    for name, size in (("hidden", spec.hidden_size), ("intermediate", spec.intermediate_size)):
        if size % max(unit, 8):
            return (
                f"format {weight_format.name!r} needs a {name} size that is a multiple of "
                f"{max(unit, 8)} on this device, got {size}; leave these experts on the cpu, or "
                f"take a format of smaller groups"
            )
    return None
