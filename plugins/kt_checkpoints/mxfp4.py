"""fp4 experts of one layer in one tensor, with a power of two for 32 inputs.

As transformers' ``integrations/mxfp4.py`` reads it: ``NAME_blocks`` uint8 ``[experts, out, in / 32,
16]``, the first of two codes in the low bits; ``NAME_scales`` uint8 ``[experts, out, in / 32]``,
``2^(byte - 127)``. The parameter ``NAME`` of the model is ``[experts, in, out]``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from kt_checkpoints.floats import to_float, unpack_fp4
from kt_core.errors import CheckpointError
from kt_core.interfaces import (
    CheckpointFormat,
    QuantizedTensor,
    ReadTensor,
    StoredMatrix,
    TensorInfo,
)
from kt_core.quant.exact import format_named, quantized

if TYPE_CHECKING:
    import torch

_GROUP = 32


class Mxfp4(CheckpointFormat):
    """``quant_method`` mxfp4."""

    name = "mxfp4"

    def matrices(
        self, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], read: ReadTensor
    ) -> Iterator[StoredMatrix]:
        """See ``CheckpointFormat.matrices``."""
        del config, read
        for blocks, info in tensors.items():
            name = blocks.removesuffix("_blocks")
            if name == blocks:
                continue
            scales = f"{name}_scales"
            if scales not in tensors:
                msg = f"{blocks} has no {scales}. A shard may be missing: download it again."
                raise CheckpointError(msg)
            wanted = (*info.shape[:3], _GROUP // 2)
            is_whole = len(info.shape) == 4 and info.shape == wanted
            dtypes = {info.dtype, tensors[scales].dtype}
            if not is_whole or tensors[scales].shape != wanted[:3] or dtypes != {"U8"}:
                msg = (
                    f"{blocks} is {info.dtype} {list(info.shape)} with scales "
                    f"{tensors[scales].dtype} {list(tensors[scales].shape)}; U8 [experts, out, "
                    "blocks, 16] and U8 [experts, out, blocks] are read"
                )
                raise CheckpointError(msg)
            experts, out_features, groups, _ = info.shape
            yield StoredMatrix(
                name=name,
                shape=(experts, groups * _GROUP, out_features),
                parts={"blocks": blocks, "scales": scales},
                decode=_decode,
                weight_format=format_named("mxfp4"),
                is_transposed=True,
            )


def _decode(parts: Mapping[str, torch.Tensor]) -> QuantizedTensor:
    codes = unpack_fp4(parts["blocks"].flatten(1))
    return quantized(format_named("mxfp4"), codes, to_float(parts["scales"]), group_size=_GROUP)
