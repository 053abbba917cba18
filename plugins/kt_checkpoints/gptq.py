"""GPTQ: integers of 2, 4 or 8 bits, 16, 8 or 4 consecutive inputs in a word.

As ``nn_modules/qlinear`` of gptqmodel 7.7 writes it: ``qweight`` int32 ``[in * bits / 32, out]``,
``qzeros`` int32 ``[groups, out * bits / 32]``, ``scales`` ``[groups, out]``, ``g_idx`` int32
``[in]``. Zero points are stored less one, unless ``checkpoint_format`` is ``gptq_v2``. With
``desc_act`` the inputs of a group lie apart.
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

_BITS = (2, 4, 8)
_LAYOUTS = {"gptq": 1, "gptq_v2": 0}
"""What is to be added to a stored zero point."""


class Gptq(CheckpointFormat):
    """``quant_method`` gptq."""

    name = "gptq"

    def matrices(
        self, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], read: ReadTensor
    ) -> Iterator[StoredMatrix]:
        """See ``CheckpointFormat.matrices``. Reads each ``g_idx`` where groups may be permuted."""
        layout = str(config.get("checkpoint_format") or config.get("format") or "gptq")
        if layout not in _LAYOUTS:
            msg = (
                f"checkpoints of GPTQ with checkpoint_format {layout!r} are not read; "
                f"{', '.join(_LAYOUTS)} are"
            )
            raise UnsupportedFormatError(msg)
        for name in tensors:
            owner = name.removesuffix(".qweight")
            if owner == name:
                continue
            parts = {part: f"{owner}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")}
            if parts["g_idx"] not in tensors:
                del parts["g_idx"]
            if missing := [part for part in parts.values() if part not in tensors]:
                msg = f"{owner} has no {missing[0]}. A shard may be missing: download it again."
                raise CheckpointError(msg)
            numbers = _numbers(config, parts, tensors, read)
            yield StoredMatrix(
                name=f"{owner}.weight",
                shape=(tensors[name].shape[1], numbers.in_features),
                parts=parts,
                decode=_decoder(numbers, _LAYOUTS[layout]),
                weight_format=numbers.weight_format,
                nearest=numbers.nearest,
            )


def _numbers(
    config: Mapping[str, Any],
    parts: Mapping[str, str],
    tensors: Mapping[str, TensorInfo],
    read: ReadTensor,
) -> Integers:
    qweight, scales = tensors[parts["qweight"]], tensors[parts["scales"]]
    if qweight.dtype != "I32" or len(qweight.shape) != 2 or len(scales.shape) != 2:
        msg = (
            f"{parts['qweight']} is {qweight.dtype} {list(qweight.shape)} with scales "
            f"{list(scales.shape)}; words of GPTQ are I32, both are matrices"
        )
        raise CheckpointError(msg)
    bits, words = int(config["bits"]), qweight.shape[0]
    in_features = words * 32 // bits
    if "g_idx" in parts:  # single layers may have other bits
        (in_features,) = tensors[parts["g_idx"]].shape
        bits = words * 32 // max(in_features, 1)
    if bits not in _BITS or words * 32 != in_features * bits:
        msg = f"{parts['qweight']} holds codes of {bits} bits; GPTQ is read with {_BITS} bits"
        raise UnsupportedFormatError(msg)
    groups = scales.shape[0]
    size: int | None = int(config.get("group_size") or -1)
    if groups == 1 and size == -1:
        size = None
    elif size is None or size < 1 or -(-in_features // size) != groups:
        if in_features % groups:
            msg = f"{parts['scales']} has {groups} groups, which do not divide {in_features} inputs"
            raise CheckpointError(msg)
        size = in_features // groups
    is_permuted = False
    if config.get("desc_act") and "g_idx" in parts and groups > 1:
        group_of_input = read(parts["g_idx"]).tolist()
        is_permuted = group_of_input != [i // (size or in_features) for i in range(in_features)]
    return Integers(
        bits=bits,
        in_features=in_features,
        scale=scale_type(parts["scales"], tensors),
        group_size=size,
        has_zero_points=not config.get("sym", False),
        is_permuted=is_permuted,
    )


def _decoder(numbers: Integers, zero_offset: int) -> Decode:
    def decode(parts: Mapping[str, torch.Tensor]) -> QuantizedTensor | torch.Tensor:
        codes = unpack(parts["qweight"].T, numbers.bits)
        zeros = unpack(parts["qzeros"], numbers.bits)[:, : codes.shape[0]].T
        zeros = (zeros + zero_offset) & ((1 << numbers.bits) - 1)  # 0 is stored as the largest
        return numbers.matrix(codes, parts["scales"].T, zeros, parts.get("g_idx"))

    return decode
