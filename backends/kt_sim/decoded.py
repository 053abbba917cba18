"""Packed experts as float32 matrices, kept on the host: so that simulating is not mostly unpacking.

A GPU's kernel decodes weights as it multiplies; in torch that takes a hundred times as long as the
product itself. What is kept is compared with the device's bytes, all of them, each time it is used:
no expert is ever computed with weights that are not there.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

import torch

from kt_core.interfaces import ExpertWeights, QuantizedTensor
from kt_core.packed.codec import unpack
from kt_core.quant import ReferenceFormat
from kt_core.types import Format, MoeSpec


@dataclass(frozen=True, slots=True)
class DecodedExpert:
    """An expert's numbers in float32.

    Attributes:
        spec: The expert's layer.
        weight_format: That layer's format.
        packed: A copy of the bytes it was decoded from.
        gate: ``[intermediate, hidden]``, or None.
        up: ``[intermediate, hidden]``.
        down: ``[hidden, intermediate]``.
        gate_bias: ``[intermediate]``, or None.
        up_bias: As ``gate_bias``.
        down_bias: ``[hidden]``, or None.
    """

    spec: MoeSpec
    weight_format: Format
    packed: torch.Tensor
    gate: torch.Tensor | None
    up: torch.Tensor
    down: torch.Tensor
    gate_bias: torch.Tensor | None
    up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None

    @property
    def size_bytes(self) -> int:
        """Host memory it takes, biases not counted."""
        matrices = (self.packed, self.gate, self.up, self.down)
        return sum(matrix.nbytes for matrix in matrices if matrix is not None)


class DecodedExperts:
    """The experts of one device that were used last, by their address. Streams share it."""

    def __init__(self, limit_bytes: int) -> None:
        """Keep up to so many bytes on the host."""
        self._limit_bytes = limit_bytes
        self._held_bytes = 0
        self._experts: OrderedDict[int, DecodedExpert] = OrderedDict()
        self._lock = threading.Lock()

    def get(
        self, address: int, packed: torch.Tensor, spec: MoeSpec, weight_format: Format
    ) -> DecodedExpert:
        """Return the numbers of an expert.

        Args:
            address: Where it lies on the device.
            packed: ``[bytes]`` uint8, what lies there now; not kept.
            spec: Its layer.
            weight_format: Its layer's format.
        """
        with self._lock:
            found = self._experts.get(address)
            if found is not None:
                self._experts.move_to_end(address)
        if (
            found is not None
            and (found.spec, found.weight_format) == (spec, weight_format)
            and torch.equal(found.packed, packed)
        ):
            return found
        made = _decode(packed.clone(), spec, weight_format)
        with self._lock:
            self._drop(address)
            self._experts[address] = made
            self._held_bytes += made.size_bytes
            while self._held_bytes > self._limit_bytes:
                self._drop(next(iter(self._experts)))
        return made

    def _drop(self, address: int) -> None:
        dropped = self._experts.pop(address, None)
        if dropped is not None:
            self._held_bytes -= dropped.size_bytes


def _decode(packed: torch.Tensor, spec: MoeSpec, weight_format: Format) -> DecodedExpert:
    weights: ExpertWeights = unpack(packed, spec, weight_format)
    dequantize = ReferenceFormat(weight_format).dequantize

    def dense(weight: torch.Tensor | QuantizedTensor) -> torch.Tensor:
        assert isinstance(weight, QuantizedTensor), "a packed expert holds quantised matrices"
        return dequantize(weight).float()

    return DecodedExpert(
        spec=spec,
        weight_format=weight_format,
        packed=packed,
        gate=None if weights.gate is None else dense(weights.gate),
        up=dense(weights.up),
        down=dense(weights.down),
        gate_bias=weights.gate_bias,
        up_bias=weights.up_bias,
        down_bias=weights.down_bias,
    )
