"""compressed-tensors: integers in words or bytes, fp8, MXFP4, MXFP8 and NVFP4.

As ``compressors`` of compressed-tensors 0.20 writes it:

* ``weight_packed`` int32: codes of any number of bits, the first in the lowest bits, with
  ``weight_scale`` ``[out, groups]``, ``weight_shape`` int64, and, unless symmetric,
  ``weight_zero_point`` int32 packed along the outputs; a group's inputs may be listed in
  ``weight_g_idx``;
* ``weight_packed`` uint8: two fp4, with ``weight_scale`` e4m3 and ``weight_global_scale``, which
  divides, or with ``weight_scale`` uint8, a power of two;
* ``weight`` int8 or e4m3 with ``weight_scale``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from kt_checkpoints.floats import FP8, as_block, float_matrix
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

_SPARSE = ("sparse-bitmask", "sparse-24-bitmask", "marlin-24")
_UNREAD = (
    "input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point",
)  # fmt: skip


class CompressedTensors(CheckpointFormat):
    """``quant_method`` compressed-tensors."""

    name = "compressed-tensors"

    def matrices(
        self, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], read: ReadTensor
    ) -> Iterator[StoredMatrix]:
        """See ``CheckpointFormat.matrices``."""
        del read
        formats = {config.get("format"), (config.get("sparsity_config") or {}).get("format")}
        if found := formats.intersection(_SPARSE):
            msg = f"sparse weights ({', '.join(map(str, found))}) are not read"
            raise UnsupportedFormatError(msg)
        for name, info in tensors.items():
            owner, _, leaf = name.rpartition(".")
            is_packed = leaf == "weight_packed"
            if not is_packed and not (leaf == "weight" and info.dtype in {"I8", FP8}):
                continue
            scale = f"{owner}.weight_scale"
            if scale not in tensors:
                msg = f"{name} has no {scale}. A shard may be missing: download it again."
                raise CheckpointError(msg)
            weights = _scheme(config, owner)
            if info.dtype in {"I32", "I8"}:
                yield _integers(owner, name, tensors, weights)
            else:
                second = f"{owner}.weight_global_scale"
                yield float_matrix(
                    f"{owner}.weight",
                    name,
                    scale,
                    tensors,
                    output_scale=second if second in tensors else None,
                    divides=True,
                    block=as_block(weights.get("block_structure")),
                    unread=_present(owner, _UNREAD, tensors),
                )


def _present(owner: str, leaves: tuple[str, ...], tensors: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(name for leaf in leaves if (name := f"{owner}.{leaf}") in tensors)


def _scheme(config: Mapping[str, Any], owner: str) -> Mapping[str, Any]:
    """Return what config.json says about the weights of a module.

    Raises:
        CheckpointError: It says nothing.
    """
    groups = [group for group in config["config_groups"].values() if group.get("weights")]
    by_name = [g for g in groups if any(_names(target, owner) for target in g["targets"])]
    # A target that names no module names a class of them, such as Linear.
    found = by_name or [g for g in groups if any(not _is_path(t) for t in g["targets"])]
    if not found:
        msg = f"{owner} is quantised, but no group of quantization_config names it"
        raise CheckpointError(msg)
    weights: Mapping[str, Any] = found[0]["weights"]
    return weights


def _is_path(target: str) -> bool:
    return target.startswith("re:") or "." in target


def _names(target: str, owner: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), owner) is not None
    return "." in target and (owner == target or owner.endswith(f".{target}"))


def _integers(
    owner: str, codes: str, tensors: Mapping[str, TensorInfo], weights: Mapping[str, Any]
) -> StoredMatrix:
    info, scale = tensors[codes], f"{owner}.weight_scale"
    bits = int(weights["num_bits"])
    if len(info.shape) != 2 or not 1 <= bits <= 8:
        msg = f"{codes} is {list(info.shape)} of {bits} bits; matrices of 1 to 8 bits are read"
        raise UnsupportedFormatError(msg)
    is_packed = info.dtype == "I32"
    size = weights.get("group_size")
    size = int(size) if size and int(size) > 0 else None
    out_features, in_features = info.shape
    if is_packed:
        in_features = in_features * 32 // bits
        if size:  # words may end in bits that are no code
            in_features = min(in_features, tensors[scale].shape[-1] * size)
    parts = {"codes": codes, "scales": scale}
    if not weights.get("symmetric", True):
        parts["zeros"] = f"{owner}.weight_zero_point"
    optional = {"group": f"{owner}.weight_g_idx", "shape": f"{owner}.weight_shape"}
    parts |= {part: name for part, name in optional.items() if name in tensors}
    numbers = Integers(
        bits=bits,
        in_features=in_features,
        scale=scale_type(scale, tensors),
        group_size=size,
        has_zero_points="zeros" in parts,
        is_permuted="group" in parts,
    )
    unread = _UNREAD if "zeros" in parts else (*_UNREAD, "weight_zero_point")
    return StoredMatrix(
        name=f"{owner}.weight",
        shape=(out_features, in_features),
        parts=parts,
        decode=_decoder(numbers, is_packed=is_packed),
        weight_format=numbers.weight_format,
        nearest=numbers.nearest,
        unread=_present(owner, unread, tensors),
    )


def _decoder(numbers: Integers, *, is_packed: bool) -> Decode:
    middle = 1 << (numbers.bits - 1)

    def decode(parts: Mapping[str, torch.Tensor]) -> QuantizedTensor | torch.Tensor:
        import torch

        stored, zeros = parts["codes"], parts.get("zeros")
        out_features = len(stored)
        if is_packed:
            codes = unpack(stored, numbers.bits)[:, : numbers.in_features]
        else:
            codes = (stored.short() + middle).to(torch.uint8)
        if "shape" in parts and parts["shape"].tolist() != [out_features, numbers.in_features]:
            msg = f"its shape should be {parts['shape'].tolist()}, it is {list(codes.shape)}"
            raise ValueError(msg)
        scales = parts["scales"].reshape(-1, max(parts["scales"].shape[-1:] or (1,)))
        scales = scales.expand(out_features, -1)
        if zeros is not None and zeros.dtype is torch.int32:
            zeros = unpack(zeros.T, numbers.bits)[:, :out_features].T
        elif zeros is not None:
            zeros = (zeros.short() + middle).expand(out_features, -1)
        return numbers.matrix(codes, scales, zeros, parts.get("group"))

    return decode
