"""fp8 with scales for blocks of 128 x 128, or for each output; and fp4 experts beside them.

As transformers' ``integrations/finegrained_fp8.py`` reads it: the scale is called
``weight_scale_inv`` and multiplies nevertheless. Blocks at the edges may be partial.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kt_checkpoints.floats import FP8, as_block, float_matrix, is_codes
from kt_core.errors import CheckpointError, UnsupportedFormatError
from kt_core.interfaces import CheckpointFormat, ReadTensor, StoredMatrix, TensorInfo

_SCALES = ("_scale_inv", "_scale", "_qscale_weight")
_UNREAD = ("_activation_scale", "_input_scale")


class Fp8(CheckpointFormat):
    """``quant_method`` fp8, and its relative with one scale for each output."""

    name = "fp8"
    aliases = ("fbgemm_fp8",)

    def matrices(
        self, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], read: ReadTensor
    ) -> Iterator[StoredMatrix]:
        """See ``CheckpointFormat.matrices``."""
        del read
        block = as_block(config.get("weight_block_size"))
        for name, info in tensors.items():
            if info.dtype == "F8_E5M2":
                msg = f"{name} is stored as F8_E5M2, which is not read; F8_E4M3 is"
                raise UnsupportedFormatError(msg)
            if not is_codes(info) or name.endswith(_SCALES):
                continue
            owner = name.removesuffix(".weight")
            scales = [f"{name}{suffix}" for suffix in _SCALES]
            if owner != name:
                scales += [f"{owner}.{suffix.lstrip('_')}" for suffix in _SCALES]
            scale = next((s for s in scales if s in tensors), None)
            if scale is not None:
                unread = tuple(n for s in _UNREAD if (n := f"{owner}.{s.lstrip('_')}") in tensors)
                yield float_matrix(name, name, scale, tensors, block=block, unread=unread)
            elif info.dtype == FP8 or owner != name:  # bytes are no weights by themselves
                msg = (
                    f"{name} is {info.dtype}, but its scales ({scales[0]}) are in no file. A shard "
                    "may be missing: download the checkpoint again."
                )
                raise CheckpointError(msg)
