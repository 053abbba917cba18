"""AWQ: 4-bit integers with zero points, eight outputs in a word.

As ``awq/utils/packing_utils.py`` and ``modules/linear/gemm.py`` of autoawq 0.2.9 write it:
``qweight`` int32 ``[in, out / 8]``, ``qzeros`` int32 ``[groups, out / 8]``, ``scales`` float16
``[groups, out]``. Bits ``4 i`` of a word hold output ``(0, 2, 4, 6, 1, 3, 5, 7)[i]``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from kt_checkpoints.integers import Integers, scale_type, unpack
from kt_core.errors import CheckpointError, UnsupportedFormatError
from kt_core.interfaces import (
    CheckpointFormat,
    Decode,
    QuantizedTensor,
    ReadTensor,
    StoredMatrix,
    TensorInfo,
)

if TYPE_CHECKING:
    import torch

_BITS = 4
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word each output lies."""


class Awq(CheckpointFormat):
    """``quant_method`` awq."""

    name = "awq"

    def matrices(
        self, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], read: ReadTensor
    ) -> Iterator[StoredMatrix]:
        """See ``CheckpointFormat.matrices``."""
        del read
        bits = int(config.get("bits", config.get("w_bit", _BITS)))
        version = str(config.get("version") or "gemm").lower()
        if bits != _BITS or version != "gemm":
            msg = f"AWQ of {bits} bits, version {version!r}, is not read; 4 bits, 'gemm', is"
            raise UnsupportedFormatError(msg)
        size = int(config.get("group_size", config.get("q_group_size", 128)))
        for name, info in tensors.items():
            owner = name.removesuffix(".qweight")
            if owner == name:
                continue
            parts = {part: f"{owner}.{part}" for part in ("qweight", "qzeros", "scales")}
            if missing := [part for part in parts.values() if part not in tensors]:
                msg = f"{owner} has no {missing[0]}. A shard may be missing: download it again."
                raise CheckpointError(msg)
            if info.dtype != "I32" or len(info.shape) != 2:
                msg = f"{name} is {info.dtype} {list(info.shape)}; words of AWQ are an I32 matrix"
                raise CheckpointError(msg)
            in_features, words = info.shape
            numbers = Integers(
                bits=_BITS,
                in_features=in_features,
                scale=scale_type(parts["scales"], tensors),
                group_size=size if size > 0 else None,
                has_zero_points=True,
            )
            yield StoredMatrix(
                name=f"{owner}.weight",
                shape=(words * 8, in_features),
                parts=parts,
                decode=_decoder(numbers),
                weight_format=numbers.weight_format,
                nearest=numbers.nearest,
            )


def _decoder(numbers: Integers) -> Decode:
    def decode(parts: Mapping[str, torch.Tensor]) -> QuantizedTensor | torch.Tensor:
        codes, zeros = (
            unpack(parts[part], _BITS).view(len(parts[part]), -1, 8)[..., _PLACES].flatten(1).T
            for part in ("qweight", "qzeros")
        )
        return numbers.matrix(codes, parts["scales"].T, zeros)

    return decode
