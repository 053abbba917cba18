"""What NVIDIA's Model Optimizer exports: NVFP4, fp8 and their relatives.

As ``entrypoints/convert/converters/modelopt_nvfp4.py`` of compressed-tensors 0.20 reads it:
``weight`` uint8, ``weight_scale`` e4m3 for 16 inputs, ``weight_scale_2`` a float32 that multiplies
them; or ``weight`` e4m3 and ``weight_scale``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kt_checkpoints.floats import float_matrix, is_codes
from kt_core.errors import CheckpointError, UnsupportedFormatError
from kt_core.interfaces import CheckpointFormat, ReadTensor, StoredMatrix, TensorInfo


class ModelOpt(CheckpointFormat):
    """``quant_method`` modelopt."""

    name = "modelopt"
    aliases = ("modelopt_fp4",)

    def matrices(
        self, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], read: ReadTensor
    ) -> Iterator[StoredMatrix]:
        """See ``CheckpointFormat.matrices``."""
        del config, read
        for name, info in tensors.items():
            owner = name.removesuffix(".weight")
            if owner == name or not is_codes(info):
                continue
            if f"{owner}.pre_quant_scale" in tensors:
                msg = f"{name} has a pre_quant_scale for its inputs, which is not read"
                raise UnsupportedFormatError(msg)
            scale, second = f"{owner}.weight_scale", f"{owner}.weight_scale_2"
            if scale not in tensors:
                msg = f"{name} has no {scale}. A shard may be missing: download it again."
                raise CheckpointError(msg)
            yield float_matrix(
                name,
                name,
                scale,
                tensors,
                output_scale=second if second in tensors else None,
                unread=tuple(n for n in (f"{owner}.input_scale",) if n in tensors),
            )
