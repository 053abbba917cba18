"""Ways of storing a matrix, each written and read by somebody else's code.

``store`` gives the tensors that stand in a checkpoint in the place of one weight, and the numbers
that an independent decoder says they are. Where no package that writes a layout can be installed
beside a CPU build of torch (GPTQ, AWQ), the bytes are assembled here, by loops that follow the
published layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from compressed_tensors.entrypoints.convert.converters.fp8block_dequantizer import (
    FP8BlockDequantizer,
)
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.utils.helpers import calculate_qparams, generate_gparam
from torch.nn import functional

Tensors: TypeAlias = dict[str, torch.Tensor]
Stored: TypeAlias = tuple[Tensors, torch.Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Scheme:
    """A way of storing a matrix.

    Attributes:
        name: For the test's id and the table.
        oracle: Who says what the bytes mean.
        config: ``quantization_config`` of config.json.
        store: Gives the tensors, by what follows the module's name, and the numbers ``[out, in]``.
        packed: The format that kt holds them in.
        is_exact: Whether that changes no number.
    """

    name: str
    oracle: str
    config: Mapping[str, Any]
    store: Callable[[torch.Tensor], Stored]
    packed: str
    is_exact: bool = True


# --- fp8 -----------------------------------------------------------------------------------------


def _blocks(weight: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Largest magnitude of each block, ``[out blocks, in blocks]``."""
    padding = (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows)
    padded = functional.pad(weight, padding)
    grid = padded.reshape(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
    return grid.abs().amax(dim=(1, 3))


def _spread(scales: torch.Tensor, rows: int, columns: int, shape: torch.Size) -> torch.Tensor:
    return scales.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: shape[0], : shape[1]]


def _fp8_block(scale_dtype: torch.dtype, leaf: str) -> Callable[[torch.Tensor], Stored]:
    def store(weight: torch.Tensor) -> Stored:
        scales = _blocks(weight, 128, 128) / 448
        if scale_dtype is torch.float8_e8m0fnu:
            scales = scales.log2().ceil().exp2()
        stored = scales.to(scale_dtype)
        spread = _spread(stored.float(), 128, 128, weight.shape)
        codes = (weight / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
        reader = FP8BlockDequantizer(weight_block_size=(128, 128), dtype=torch.float32)
        numbers = reader.process({"m.weight": codes, "m.weight_scale_inv": stored})["m.weight"]
        return {"weight": codes, leaf: stored}, numbers

    return store


_FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}


# --- compressed-tensors --------------------------------------------------------------------------


def _range(weight: torch.Tensor, weights: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest number of what shares a scale."""
    rows, columns = weight.shape
    strategy = str(weights.strategy)
    if strategy == "block":
        structure = weights.block_structure
        assert structure is not None
        high = _blocks(weight, *structure)
        return -high, high
    if strategy == "tensor":
        return weight.min().view(1), weight.max().view(1)
    size = weights.group_size if "group" in strategy else columns
    groups = weight.view(rows, -1, size or columns)
    return groups.amin(-1), groups.amax(-1)


def _compressed(name: str, stored_dtype: torch.dtype | None = None, **arguments: Any) -> Scheme:
    """Return a scheme that the package itself writes and reads."""
    packed = arguments.pop("packed")
    is_exact = arguments.pop("is_exact", True)
    weights = QuantizationArgs(**arguments)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format=name)
    compressor: Any = BaseCompressor.get_value_from_registry(name)

    def store(weight: torch.Tensor) -> Stored:
        strategy = str(weights.strategy)
        rows, columns = weight.shape
        low, high = _range(weight, weights)
        state: Tensors = {"weight": weight}
        factor = None
        if strategy == "tensor_group":
            # A power of two: that it divides, and we multiply with its reciprocal, rounds nothing.
            factor = (
                generate_gparam(weight.min().view(1), weight.max().view(1)).log2().floor().exp2()
            )
            state["weight_global_scale"] = factor
        scale, zero = calculate_qparams(low, high, weights, global_scale=factor)
        if stored_dtype is not None:
            scale = scale.to(stored_dtype)
        state |= {"weight_scale": scale, "weight_zero_point": zero}
        written = compressor.compress(state, scheme)
        read = compressor.decompress(
            {n: t.float() if t.dtype is stored_dtype else t for n, t in written.items()}, scheme
        )
        numbers = read["weight"].float()
        if strategy == "tensor_group":  # which the compressor reads in bf16
            packed_codes = written["weight_packed"]
            numbers = dequantize(
                unpack_fp4_from_uint8(packed_codes, rows, columns, torch.float32),
                written["weight_scale"].float(),
                args=weights,
                global_scale=factor,
                dtype=torch.float32,
            )
        return {n: t.contiguous() for n, t in written.items()}, numbers

    group = {"targets": ["Linear"], "weights": weights.model_dump(mode="json"), "format": name}
    config = {"quant_method": "compressed-tensors", "format": name, "config_groups": {"g": group}}
    words = [name, f"{weights.num_bits} bits", str(weights.strategy)]
    words += [str(weights.group_size)] if weights.group_size else []
    words += [] if weights.symmetric else ["asymmetric"]
    return Scheme(
        name=" ".join(words),
        oracle="compressed-tensors writes and reads",
        config=config,
        store=store,
        packed=packed,
        is_exact=is_exact,
    )


# --- GPTQ and AWQ --------------------------------------------------------------------------------


def _integers(
    weight: torch.Tensor, bits: int, size: int, *, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes ``[out, in]``, scales float16 and zero points ``[out, groups]``: rounded to nearest."""
    largest = (1 << bits) - 1
    groups = weight.view(len(weight), -1, size)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scale = ((high - low) / largest).half()
    zero = (-low / scale).round().clamp(0, largest)
    if symmetric:
        zero = torch.full_like(zero, 1 << (bits - 1))
    codes = (groups / scale[..., None] + zero[..., None]).round().clamp(0, largest)
    return codes.flatten(1).int(), scale, zero.int()


def _words(values: list[int], bits: int) -> list[int]:
    """Pack numbers into signed 32-bit words, the first in the lowest bits."""
    per_word = 32 // bits
    words = []
    for start in range(0, len(values), per_word):
        word = sum(value << (bits * i) for i, value in enumerate(values[start : start + per_word]))
        words.append(word - (1 << 32) if word >= 1 << 31 else word)
    return words


def _gptq(
    bits: int, size: int, *, symmetric: bool, stored_less: int = 1, permuted: bool = False
) -> Callable[[torch.Tensor], Stored]:
    def store(weight: torch.Tensor) -> Stored:
        columns = weight.shape[1]
        order = torch.arange(columns)
        if permuted:
            order = torch.randperm(columns, generator=torch.Generator().manual_seed(columns))
        # Groups are made of the inputs in this order, and stored where the inputs are.
        codes, scale, zero = _integers(weight[:, order], bits, size, symmetric=symmetric)
        group_of_input = torch.empty(columns, dtype=torch.int32)
        group_of_input[order] = (torch.arange(columns) // size).int()
        in_place = torch.empty_like(codes)
        in_place[:, order] = codes
        qweight = torch.tensor([_words(row, bits) for row in in_place.tolist()]).int().T
        less = ((zero - stored_less) % (1 << bits)).T
        qzeros = torch.tensor([_words(row, bits) for row in less.tolist()]).int()
        numbers = torch.empty_like(weight)
        for i, group in enumerate(group_of_input.tolist()):
            numbers[:, i] = (in_place[:, i] - zero[:, group]) * scale[:, group].float()
        return {
            "qweight": qweight.contiguous(),
            "qzeros": qzeros.contiguous(),
            "scales": scale.T.contiguous(),
            "g_idx": group_of_input,
        }, numbers

    return store


def _awq(size: int) -> Callable[[torch.Tensor], Stored]:
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def packed(values: torch.Tensor) -> torch.Tensor:
        """``[rows, out]`` to ``[rows, out / 8]``."""
        shuffled = values.view(len(values), -1, 8)[..., order].flatten(1)
        return torch.tensor([_words(row, 4) for row in shuffled.tolist()]).int()

    def store(weight: torch.Tensor) -> Stored:
        codes, scale, zero = _integers(weight, 4, size, symmetric=False)
        tensors = {
            "qweight": packed(codes.T),
            "qzeros": packed(zero.T),
            "scales": scale.T.contiguous(),
        }
        # compressed-tensors unpacks what autoawq writes
        read = AutoAWQConverter(group_size=size)._convert_gemm_module(
            tensors["qweight"], tensors["scales"], tensors["qzeros"]
        )
        theirs, their_scale, their_zero = read
        difference = theirs.float() - their_zero.float().repeat_interleave(size, 1)
        return tensors, difference * their_scale.float().repeat_interleave(size, 1)

    return store


def _modelopt(weight: torch.Tensor) -> Stored:
    (nvfp4,) = (scheme for scheme in _COMPRESSED if scheme.packed == "nvfp4")
    written, numbers = nvfp4.store(weight)
    second = 1 / written["weight_global_scale"]
    return {
        "weight": written["weight_packed"],
        "weight_scale": written["weight_scale"],
        "weight_scale_2": second.reshape(()),
        "input_scale": torch.ones(()),
    }, numbers


def _gptq_config(bits: int, size: int, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": False, **more}


_COMPRESSED = (
    _compressed("float-quantized", num_bits=8, type="float", strategy="channel",
                packed="fp8-channel"),
    _compressed("float-quantized", num_bits=8, type="float", strategy="tensor",
                packed="fp8-channel"),
    _compressed("float-quantized", num_bits=8, type="float", strategy="block",
                block_structure=[128, 128], packed="fp8"),
    _compressed("int-quantized", num_bits=8, strategy="channel", packed="int8"),
    _compressed("pack-quantized", torch.bfloat16, num_bits=4, strategy="group", group_size=32,
                packed="int4-g32"),
    _compressed("pack-quantized", torch.float16, num_bits=4, strategy="group", group_size=64,
                packed="int4-g64-f16"),
    _compressed("pack-quantized", torch.bfloat16, num_bits=4, strategy="channel",
                packed="int4-g128"),
    _compressed("pack-quantized", torch.bfloat16, num_bits=4, strategy="group", group_size=32,
                symmetric=False, packed="int4-g32-asym"),
    _compressed("pack-quantized", torch.bfloat16, num_bits=8, strategy="group", group_size=64,
                packed="int8-g64"),
    _compressed("pack-quantized", torch.bfloat16, num_bits=8, strategy="channel", packed="int8"),
    _compressed("pack-quantized", torch.bfloat16, num_bits=8, strategy="group", group_size=32,
                symmetric=False, packed="int8-g32", is_exact=False),
    _compressed("pack-quantized", torch.bfloat16, num_bits=3, strategy="group", group_size=32,
                packed="int4-g32"),
    _compressed("pack-quantized", torch.bfloat16, num_bits=6, strategy="group", group_size=32,
                packed="int8-g32"),
    _compressed("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32,
                scale_dtype="uint8", zp_dtype="uint8", packed="mxfp4"),
    _compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group",
                group_size=16, scale_dtype="float8_e4m3fn", packed="nvfp4"),
    _compressed("mxfp8-quantized", num_bits=8, type="float", strategy="group", group_size=32,
                scale_dtype="uint8", zp_dtype="uint8", packed="mxfp8"),
)  # fmt: skip

SCHEMES = (
    Scheme(
        name="fp8 128x128 float32",
        oracle="compressed-tensors reads",
        config=_FP8,
        store=_fp8_block(torch.float32, "weight_scale_inv"),
        packed="fp8",
    ),
    Scheme(
        name="fp8 128x128 bf16",
        oracle="compressed-tensors reads",
        config=_FP8,
        store=_fp8_block(torch.bfloat16, "weight_scale_inv"),
        packed="fp8",
    ),
    Scheme(
        name="fp8 128x128 e8m0",
        oracle="compressed-tensors reads",
        config=_FP8,
        store=_fp8_block(torch.float8_e8m0fnu, "scale"),
        packed="fp8",
    ),
    *_COMPRESSED,
    Scheme(
        name="gptq 4 bits 64",
        oracle="assembled here",
        config=_gptq_config(4, 64, sym=True),
        store=_gptq(4, 64, symmetric=True),
        packed="int4-g64-f16",
    ),
    Scheme(
        name="gptq 4 bits 32 asymmetric",
        oracle="assembled here",
        config=_gptq_config(4, 32, sym=False),
        store=_gptq(4, 32, symmetric=False),
        packed="int4-g32-f16-asym",
    ),
    Scheme(
        name="gptq_v2 4 bits 32 asymmetric",
        oracle="assembled here",
        config=_gptq_config(4, 32, sym=False, checkpoint_format="gptq_v2"),
        store=_gptq(4, 32, symmetric=False, stored_less=0),
        packed="int4-g32-f16-asym",
    ),
    Scheme(
        name="gptq 4 bits 32 desc_act",
        oracle="assembled here",
        config=_gptq_config(4, 32, sym=True) | {"desc_act": True},
        store=_gptq(4, 32, symmetric=True, permuted=True),
        packed="int8-g32",
        is_exact=False,
    ),
    Scheme(
        name="gptq 8 bits 64",
        oracle="assembled here",
        config=_gptq_config(8, 64, sym=True),
        store=_gptq(8, 64, symmetric=True),
        packed="int8-g32-f16",
    ),
    Scheme(
        name="gptq 2 bits 64 asymmetric",
        oracle="assembled here",
        config=_gptq_config(2, 64, sym=False),
        store=_gptq(2, 64, symmetric=False),
        packed="int4-g64-f16-asym",
    ),
    Scheme(
        name="awq 64",
        oracle="compressed-tensors reads",
        config={
            "quant_method": "awq",
            "bits": 4,
            "group_size": 64,
            "zero_point": True,
            "version": "gemm",
        },
        store=_awq(64),
        packed="int4-g64-f16-asym",
    ),
    Scheme(
        name="modelopt nvfp4",
        oracle="compressed-tensors writes and reads",
        config={"quant_method": "modelopt", "quant_algo": "NVFP4"},
        store=_modelopt,
        packed="nvfp4",
    ),
)
