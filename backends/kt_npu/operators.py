"""The operators of torch-npu that experts need: the one file that knows how they are called.

Read from Huawei's documentation of ``torch_npu.npu_grouped_matmul`` and
``torch_npu.npu_convert_weight_to_int4pack`` (torch-npu 7, CANN 8); never run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# Arguments of npu_grouped_matmul, in its own numbers.
_ROWS_ARE_GROUPED = 0  # group_type: x is cut along its rows
_ONE_RESULT = 3  # split_item: the groups' results lie in one tensor
_ENDS = 0  # group_list_type: the list holds where groups end


class NpuMatrix(NamedTuple):
    """A matrix as the operator takes it, ``[inputs, outputs]``.

    Attributes:
        weight: bfloat16; or int4 in int32, ``[inputs, outputs / 8]``.
        scale: ``[groups, outputs]`` bfloat16; None for bfloat16 weights.
        offset: ``[groups, outputs]`` bfloat16: ``weight = scale * (code + offset)``.
    """

    weight: torch.Tensor
    scale: torch.Tensor | None = None
    offset: torch.Tensor | None = None


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """Pack codes -8..7, ``[inputs, outputs]`` int32 on the NPU, eight to an int32."""
    import torch_npu

    packed: torch.Tensor = torch_npu.npu_convert_weight_to_int4pack(codes)
    return packed


def grouped_product(
    x: torch.Tensor, matrices: list[NpuMatrix], group_ends: torch.Tensor
) -> torch.Tensor:
    """Multiply runs of rows with a matrix each.

    Args:
        x: ``[rows, inputs]`` bfloat16; rows behind the last run give anything.
        matrices: One for each run.
        group_ends: ``[matrices]`` int64 on the NPU: where the runs end.

    Returns:
        ``[rows, outputs]`` bfloat16.
    """
    import torch_npu

    scales = [matrix.scale for matrix in matrices]
    offsets = [matrix.offset for matrix in matrices]
    is_quantized = scales[0] is not None
    results: list[torch.Tensor] = torch_npu.npu_grouped_matmul(
        [x],
        [matrix.weight for matrix in matrices],
        antiquant_scale=scales if is_quantized else None,
        antiquant_offset=offsets if is_quantized else None,
        group_list=group_ends,
        split_item=_ONE_RESULT,
        group_type=_ROWS_ARE_GROUPED,
        group_list_type=_ENDS,
    )
    return results[0]
