"""Experts with operators of torch alone: for an XPU without Triton.

Torch has no grouped product that reads int4, and how many tokens an expert gets is known to the
device only. So every resident expert computes all tokens, and what nobody asked for counts 0:
right, and as often too much as there are more resident experts than a token has.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from kt_core.accelerator.converted_kernel import (
    ConvertedExpert,
    ConvertedExpertKernel,
    converted_bytes,
)
from kt_core.interfaces import QuantizedTensor
from kt_core.moe.activations import activate

GROUP_BYTES = 3
"""A bfloat16 scale and a zero point of a byte."""


class Int4Matrix(NamedTuple):
    """Arguments of ``_weight_int4pack_mm_with_scales_and_zeros``: oneDNN computes it.

    https://github.com/intel/torch-xpu-ops and torch's ``test_linalg.py`` are what it was read from.

    Attributes:
        codes: ``[outputs, inputs / 8]`` int32, the first of eight codes in the lowest bits.
        group: Inputs of a scale.
        scales: ``[groups, outputs]`` bfloat16.
        zeros: ``[groups, outputs]`` int8.
    """

    codes: torch.Tensor
    group: int
    scales: torch.Tensor
    zeros: torch.Tensor

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x @ matrix.T``."""
        operator = torch.ops.aten._weight_int4pack_mm_with_scales_and_zeros
        result: torch.Tensor = operator(x, self.codes, self.group, self.scales, self.zeros)
        return result


class TorchExpertKernel(ConvertedExpertKernel):
    """bf16, and int4 in groups with bfloat16 scales and without minimums."""

    @property
    def bytes_per_expert(self) -> int:
        """See ``ExpertKernel.bytes_per_expert``."""
        return converted_bytes(self.spec, self.weight_format, GROUP_BYTES)

    def convert(self, matrix: QuantizedTensor) -> Any:
        """See ``ConvertedExpertKernel.convert``."""
        if matrix.scales is None:
            return matrix.codes.to(self.device)
        return pack_int4(matrix, self.device)

    def compute(
        self,
        experts: list[ConvertedExpert],
        hidden: torch.Tensor,
        slots: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """See ``ConvertedExpertKernel.compute``."""
        out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        for slot, expert in enumerate(experts):
            factor = weights.where(slots == slot, 0.0).sum(dim=1, keepdim=True)
            up = _project(hidden, expert.up, expert.up_bias)
            gate = up if expert.gate is None else _project(hidden, expert.gate, expert.gate_bias)
            inner = activate(self.spec.activation, gate, up).to(torch.bfloat16)
            out += factor * _project(inner, expert.down, expert.down_bias)
        return out


def pack_int4(matrix: QuantizedTensor, device: torch.device) -> Int4Matrix:
    """Bring int4 in groups into the operator's form."""
    group = matrix.weight_format.group_size
    assert group is not None
    assert matrix.scales is not None
    codes, zeros = matrix.codes.to(torch.int32), matrix.zero_points
    if zeros is None:  # signed codes
        codes = codes + 8
        zeros = torch.full(matrix.scales.shape, 8, dtype=torch.uint8)
    eight = codes.reshape(len(codes), -1, 8)  # whole: why_not_whole has seen to it
    packed = torch.zeros(eight.shape[:2], dtype=torch.int32)
    for place in range(8):
        packed |= eight[:, :, place] << (4 * place)
    return Int4Matrix(
        codes=packed.to(device),
        group=group,
        scales=matrix.scales.T.to(torch.bfloat16).contiguous().to(device),
        zeros=zeros.T.to(torch.int8).contiguous().to(device),
    )


def _project(x: torch.Tensor, matrix: Any, bias: torch.Tensor | None) -> torch.Tensor:
    product = matrix.multiply(x) if isinstance(matrix, Int4Matrix) else x @ matrix.T
    product = product.float()
    return product if bias is None else product + bias
