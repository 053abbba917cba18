"""Packed experts on a device of torch's: their bytes, and a table of addresses in stream order."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from kt_core.accelerator.precision import named_precision
from kt_core.interfaces import ExpertKernel, ExpertWeights, QuantizedTensor, Ticket
from kt_core.interfaces.checks import (
    check_expert,
    check_experts,
    check_finite,
    check_pairs,
    check_resident,
    check_weights,
)
from kt_core.packed import ExpertLayout
from kt_core.packed.codec import check_packed, pack
from kt_core.quant import ReferenceFormat
from kt_core.types import ActivationPrecision, Format, MoeSpec

_MATRICES = ("gate", "up", "down")


class StreamTicket(Ticket):
    """Work in a stream: the result may be used by whatever is put into that stream later."""

    def __init__(self, out: torch.Tensor) -> None:
        """Take the result that will be there."""
        self._out = out

    def wait(self) -> torch.Tensor:
        """Return the result; does not block."""
        return self._out


def check_tensors(
    spec: MoeSpec,
    device: torch.device,
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
) -> None:
    """Refuse arguments of ``submit`` that do not fit, or want a gradient. Reads no tensor.

    Raises:
        ValueError: A shape, a type or a device is wrong.
        RuntimeError: A gradient is wanted, which no kernel here computes.
    """
    check_pairs(spec, hidden, expert_ids, weights)
    for name, tensor in (("hidden", hidden), ("expert_ids", expert_ids), ("weights", weights)):
        if tensor.device != device:
            msg = f"{name} must be on {device}, got {tensor.device}"
            raise ValueError(msg)
    if torch.is_grad_enabled() and (hidden.requires_grad or weights.requires_grad):
        msg = (
            "submit computes no gradient: use torch.no_grad(), or a device whose capabilities "
            "say that it trains"
        )
        raise RuntimeError(msg)


class PackedExpertKernel(ExpertKernel):
    """Keeps packed experts in tensors on the device; a subclass computes with them.

    What was loaded together lies in one tensor, whose memory goes with the last expert of it.

    Which experts are resident is said twice: to the host by a dictionary, to the device by
    ``table``, ``[num_experts]`` int64, an address for each expert or 0. The table lies on the
    device and is changed in the current stream, so that swaps need no wait, and a captured graph
    sees them.

    Whoever loads or unloads in one stream and computes in another makes one wait for the other, as
    everywhere in torch.
    """

    moves_packed = True

    def __init__(
        self,
        device: torch.device,
        spec: MoeSpec,
        weight_format: Format,
        precision: ActivationPrecision = ActivationPrecision.AUTO,
    ) -> None:
        """Take the layer; memory is taken expert by expert, as they come."""
        self.spec = spec
        self.weight_format = weight_format
        self.device = device
        self._precision = precision
        self._layout = ExpertLayout.of(spec, weight_format)
        self._packed: dict[int, torch.Tensor] = {}
        self._lock = threading.Lock()  # of dictionary and table together
        # It is changed outside of inference mode too, wherever the kernel was made.
        with torch.inference_mode(mode=False):
            self.table = torch.zeros(spec.num_experts, dtype=torch.int64, device=device)

    @abstractmethod
    def compute(
        self,
        hidden: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        precision: ActivationPrecision,
    ) -> torch.Tensor:
        """Put the computation into the current stream and return what it will write.

        Args:
            hidden: As checked by ``submit``, as are the others; on the kernel's device.
            expert_ids: Not to be read by the host. What ``table`` has no address for adds nothing.
            weights: See ``ExpertKernel.submit``.
            precision: Never ``AUTO``.
        """

    @property
    def bytes_per_expert(self) -> int:
        """See ``ExpertKernel.bytes_per_expert``."""
        return self._layout.size_bytes

    def precision_for(self, hidden_type: torch.dtype) -> ActivationPrecision:
        """See ``ExpertKernel.precision_for``: bfloat16 stays what it is, others lose nothing."""
        return named_precision(self._precision, hidden_type)

    def load(self, expert: int, weights: ExpertWeights) -> None:
        """See ``ExpertKernel.load``. Packed where the weights lie, in torch; then copied.

        To load many experts fast, pack them with a backend that has kernels for it, and copy.
        """
        check_expert(self.spec, expert)
        check_weights(self.spec, self.weight_format, weights)
        check_finite(weights)
        parts: dict[str, Any] = {
            name: self._quantized(getattr(weights, name)) for name in _MATRICES
        }
        self._put((expert,), pack(replace(weights, **parts), self.spec, self.weight_format))

    def _quantized(self, matrix: torch.Tensor | QuantizedTensor | None) -> QuantizedTensor | None:
        if isinstance(matrix, torch.Tensor):
            return ReferenceFormat(self.weight_format).quantize(matrix)
        return matrix

    def packed(self, expert: int) -> torch.Tensor:
        """See ``ExpertKernel.packed``; a view."""
        try:
            return self._packed[expert]
        except KeyError:
            msg = f"expert {expert} is not resident"
            raise ValueError(msg) from None

    def load_packed(self, expert: int, packed: torch.Tensor) -> None:
        """See ``ExpertKernel.load_packed``."""
        check_expert(self.spec, expert)
        check_packed(packed, self._layout)
        self._put((expert,), packed)

    def load_packed_together(self, experts: Sequence[int], packed: torch.Tensor) -> None:
        """See ``ExpertKernel.load_packed_together``: one allocation, one copy."""
        check_experts(self.spec, experts)
        check_packed(packed, self._layout, len(experts))
        if experts:
            self._put(experts, packed)

    def _put(self, experts: Sequence[int], packed: torch.Tensor) -> None:
        """Copy the bytes to memory of their own, then point there: both in the current stream."""
        held = torch.empty(packed.numel(), dtype=torch.uint8, device=self.device)
        # Pageable memory is copied before this returns, whatever is asked for.
        held.copy_(packed, non_blocking=True)
        places = held.view(len(experts), -1).unbind()
        with self._lock:
            self._point(experts, [place.data_ptr() for place in places])
            for expert, place in zip(experts, places, strict=True):
                replaced = self._packed.get(expert)
                self._packed[expert] = place
                self._release(replaced)

    def _point(self, experts: Sequence[int], addresses: Sequence[int]) -> None:
        """Put addresses into the table, in the current stream; the host does not wait."""
        if len(experts) == 1:
            self.table[experts[0]].fill_(addresses[0])
            return
        pinned = torch.tensor([experts, addresses], pin_memory=not self._is_host)
        there = pinned.to(self.device, non_blocking=True)
        self.table.index_copy_(0, there[0], there[1])

    def unload(self, expert: int) -> None:
        """See ``ExpertKernel.unload``; in the order of the current stream."""
        with self._lock:
            held = self._packed.pop(expert, None)
            if held is not None:
                self.table[expert].fill_(0)
                self._release(held)

    def unload_all(self) -> None:
        """See ``ExpertKernel.unload_all``; in the order of the current stream."""
        with self._lock:
            self.table.zero_()
            for held in self._packed.values():
                self._release(held)
            self._packed.clear()

    def _release(self, held: torch.Tensor | None) -> None:
        """Give memory back once the current stream, which may not be its own, has come this far."""
        if held is not None and not self._is_host:
            held.record_stream(torch.accelerator.current_stream(self.device))

    @property
    def _is_host(self) -> bool:
        return self.device.type == "cpu"

    def resident(self) -> frozenset[int]:
        """See ``ExpertKernel.resident``."""
        return frozenset(self._packed)

    def submit(
        self, hidden: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor
    ) -> Ticket:
        """See ``ExpertKernel.submit``."""
        check_tensors(self.spec, self.device, hidden, expert_ids, weights)
        if self._is_host:  # nobody waits for anything
            check_resident(self.spec, self._packed, expert_ids)
        precision = self.precision_for(hidden.dtype)
        out = self.compute(hidden.detach(), expert_ids, weights.detach(), precision)
        return StreamTicket(out)
