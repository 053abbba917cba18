"""Packed bytes to numbers and back, in torch, on whatever device the tensors lie.

Nothing here rounds or is approximate: ``unpack`` gives the stored numbers, ``pack`` the bytes that
every backend makes of them. Only views, bit operations and indexing, so that a device that has
little else can do it. Bytes are little-endian, as is every machine that kt runs on.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from kt_core.interfaces import ExpertWeights, QuantizedTensor
from kt_core.packed.layout import PANEL, ExpertLayout, LinearLayout, MatrixLayout
from kt_core.types import Element, Format, LinearSpec, MoeSpec, ScaleType

# Bit 7 of an int8 is flipped: instructions multiply unsigned bytes by signed ones.
_INT8_FLIP = 0x80
# The nibble that stands for 0 where int4 is symmetric.
_INT4_ZERO = 8
# Bytes of a lane in the order of their inputs.
_FP8_ORDER = (0, 2, 1, 3)
# An e5m3 has bias 10: its bits, shifted into a float32, lack 127 - 10 in the exponent.
_E5M3_BIAS = (127 - 10) << 3
_MANTISSA_BITS = 23


def unpack(packed: torch.Tensor, spec: MoeSpec, weight_format: Format) -> ExpertWeights:
    """Return the numbers of a packed expert: ``QuantizedTensor`` matrices and float32 biases.

    Args:
        packed: ``[bytes]`` uint8, as ``ExpertKernel.packed`` returns it; not kept.
        spec: The expert's layer.
        weight_format: The layer's format.

    Raises:
        ValueError: ``packed`` is not ``[bytes]`` uint8 of such an expert.
    """
    layout = ExpertLayout.of(spec, weight_format)
    check_packed(packed, layout)
    upper = packed[: layout.down_offset].view(layout.up.panels, -1, layout.up.panel_bytes)
    down = packed[layout.down_offset : layout.bias_offset]
    up_bias, down_bias = spec.intermediate_size, spec.hidden_size

    def bias(offset: int, size: int) -> torch.Tensor | None:
        if not layout.has_bias:
            return None
        return packed[offset : offset + size * 4].clone().view(torch.float32)

    return ExpertWeights(
        gate=unpack_matrix(upper[:, 0], layout.up) if layout.has_gate else None,
        up=unpack_matrix(upper[:, -1], layout.up),
        down=unpack_matrix(down.view(layout.down.panels, -1), layout.down),
        gate_bias=bias(layout.gate_bias_at, up_bias) if layout.has_gate else None,
        up_bias=bias(layout.up_bias_at, up_bias),
        down_bias=bias(layout.down_bias_at, down_bias),
    )


def pack(weights: ExpertWeights, spec: MoeSpec, weight_format: Format) -> torch.Tensor:
    """Return the ``[bytes]`` uint8 that every backend makes of quantised matrices.

    Args:
        weights: ``QuantizedTensor`` matrices of ``weight_format``, in the shapes of ``spec``, all
            numbers finite and representable; biases of any floating type.
        spec: The expert's layer.
        weight_format: The layer's format.

    Raises:
        ValueError: A matrix is not quantised, or in another format or shape.
    """
    layout = ExpertLayout.of(spec, weight_format)
    upper = [_panels("up", weights.up, layout.up)]
    biases = [(weights.up_bias, layout.up), (weights.down_bias, layout.down)]
    if layout.has_gate:
        upper.insert(0, _panels("gate", weights.gate, layout.up))
        biases.insert(0, (weights.gate_bias, layout.up))
    parts = [torch.stack(upper, dim=1).flatten()]
    parts.append(_panels("down", weights.down, layout.down).flatten())
    if layout.has_bias:
        for bias, matrix in biases:
            parts.append(padded_bias(bias, matrix))
    packed = torch.cat(parts)
    return functional.pad(packed, (0, layout.size_bytes - packed.numel()))


def unpack_linear(
    packed: torch.Tensor, spec: LinearSpec, weight_format: Format
) -> tuple[QuantizedTensor, torch.Tensor | None]:
    """Return the numbers of a packed dense layer: its matrix, and its float32 bias.

    Args:
        packed: ``[bytes]`` uint8; not kept.
        spec: The layer.
        weight_format: Its format.

    Raises:
        ValueError: ``packed`` is not ``[bytes]`` uint8 of such a layer.
    """
    layout = LinearLayout.of(spec, weight_format)
    check_packed(packed, layout)
    panels = packed[: layout.bias_offset].view(layout.weight.panels, -1)
    return unpack_matrix(panels, layout.weight), unpack_bias(packed, layout)


def unpack_bias(packed: torch.Tensor, layout: LinearLayout) -> torch.Tensor | None:
    """Return the float32 bias of a packed dense layer, ``[out_features]``; None without one.

    Args:
        packed: ``[bytes]`` uint8 of the layer; not kept.
        layout: The layer's.
    """
    if not layout.has_bias:
        return None
    return packed[layout.bias_offset :].clone().view(torch.float32)[: layout.weight.rows]


def pack_linear(
    weight: QuantizedTensor, bias: torch.Tensor | None, spec: LinearSpec, weight_format: Format
) -> torch.Tensor:
    """Return the ``[bytes]`` uint8 that every backend makes of a quantised dense layer.

    Args:
        weight: Of ``weight_format``, in the shape of ``spec``, all numbers finite.
        bias: Of any floating type; None where ``spec`` has none.
        spec: The layer.
        weight_format: Its format.

    Raises:
        ValueError: The matrix is in another format or shape.
    """
    layout = LinearLayout.of(spec, weight_format)
    parts = [_panels("weight", weight, layout.weight).flatten()]
    if layout.has_bias:
        parts.append(padded_bias(bias, layout.weight))
    packed = torch.cat(parts)
    return functional.pad(packed, (0, layout.size_bytes - packed.numel()))


def check_packed(packed: torch.Tensor, layout: ExpertLayout | LinearLayout, count: int = 1) -> None:
    """Refuse what cannot be the bytes of such an expert, or dense layer, or of ``count`` of them.

    Raises:
        ValueError: ``packed`` is not ``[count * bytes]`` uint8 in one piece.
    """
    if packed.shape == (count * layout.size_bytes,) and packed.dtype is torch.uint8:
        if packed.is_contiguous():
            return
        msg = "packed bytes must be in one piece: call contiguous() on them"
        raise ValueError(msg)
    got = f"{list(packed.shape)} {packed.dtype}"
    if isinstance(layout, LinearLayout):
        what = f"a packed {layout.weight.weight_format.name} layer of this shape"
    else:
        what = f"a packed {layout.up.weight_format.name} expert of this layer"
    times = "" if count == 1 else f"{count} * "
    msg = f"{what} is [{times}{layout.size_bytes}] torch.uint8, got {got}"
    raise ValueError(msg)


def unpack_matrix(panels: torch.Tensor, layout: MatrixLayout) -> QuantizedTensor:
    """Return the numbers of ``[panels, panel_bytes]`` uint8, padding taken off."""
    weight_format = layout.weight_format
    blocks = _padded_blocks(panels[:, layout.front_bytes :], layout)
    header, lanes = blocks[..., : layout.header_bytes], blocks[..., layout.header_bytes :]
    lanes = lanes.reshape(layout.panels, -1, PANEL, 4)  # [panels, rows of 64 bytes, outputs, 4]
    values = _values(lanes, weight_format)  # [panels, rows, outputs, inputs of a lane]
    values = values.transpose(1, 2).reshape(layout.padded_rows, -1)
    codes = values[: layout.rows, : layout.cols].contiguous()
    if weight_format.scale is None:
        return QuantizedTensor(weight_format=weight_format, codes=codes)

    def of_groups(first: int, size: int) -> torch.Tensor:
        """``[outputs, groups, bytes]`` of what is stored once a group."""
        raw = header[..., first : first + layout.block_groups * size]
        raw = raw.reshape(layout.panels, -1, PANEL, size // PANEL).transpose(1, 2)
        raw = raw.reshape(layout.padded_rows, -1, size // PANEL)
        raw = raw[: layout.rows, : weight_format.num_groups(layout.cols)]
        # contiguous() leaves strides of dimensions of 1 as they are, which no view may have.
        return raw.clone(memory_format=torch.contiguous_format)

    offsets = layout.block_groups * layout.scale_bytes
    zeros = minimums = outputs = None
    if weight_format.has_zero_point:
        zeros = of_groups(offsets, layout.offset_bytes).squeeze(-1)
    if weight_format.has_minimum:
        minimums = _read_scales(of_groups(offsets, layout.offset_bytes), weight_format.scale)
    if weight_format.has_output_scale:
        front = panels[:, : layout.front_bytes].reshape(-1, 4).view(torch.float32)
        outputs = front.flatten()[: layout.rows].clone()
    return QuantizedTensor(
        weight_format=weight_format,
        codes=codes,
        scales=_read_scales(of_groups(0, layout.scale_bytes), weight_format.scale),
        zero_points=zeros,
        minimums=minimums,
        output_scales=outputs,
    )


def pack_matrix(quantized: QuantizedTensor, layout: MatrixLayout) -> torch.Tensor:
    """Return ``[panels, panel_bytes]`` uint8."""
    weight_format = layout.weight_format
    codes = _padded_codes(quantized, layout).reshape(layout.panels, PANEL, -1)
    lanes = _lanes(codes, weight_format)  # [panels, outputs, rows of 64 bytes, 4]
    weights = lanes.transpose(1, 2).reshape(layout.panels, layout.groups, layout.group_bytes)
    missing = layout.blocks * layout.block_groups - layout.groups
    weights = functional.pad(weights, (0, 0, 0, missing))
    parts = []
    for numbers, size in (
        (quantized.scales, layout.scale_bytes),
        (quantized.zero_points, layout.offset_bytes),
        (quantized.minimums, layout.offset_bytes),
    ):
        if numbers is None or weight_format.scale is None:
            continue
        raw = numbers[..., None]
        if numbers.dtype is not torch.uint8:
            raw = _write_scales(numbers.contiguous(), weight_format.scale)
        groups = layout.blocks * layout.block_groups
        rows = layout.padded_rows - layout.rows
        raw = functional.pad(raw, (0, 0, 0, groups - raw.shape[1], 0, rows))
        raw = raw.reshape(layout.panels, PANEL, layout.blocks, layout.block_groups, size // PANEL)
        parts.append(raw.permute(0, 2, 3, 1, 4).reshape(layout.panels, layout.blocks, -1))
    blocks = weights.reshape(layout.panels, layout.blocks, -1)
    if parts:
        header = torch.cat(parts, dim=-1)
        header = functional.pad(header, (0, layout.header_bytes - header.shape[-1]))
        blocks = torch.cat([header, blocks], dim=-1)
    panels = blocks.flatten(1)[:, : layout.panel_bytes - layout.front_bytes]
    if quantized.output_scales is None:
        return panels
    outputs = functional.pad(quantized.output_scales, (0, layout.padded_rows - layout.rows))
    return torch.cat([outputs.contiguous().view(torch.uint8).view(layout.panels, -1), panels], 1)


def _panels(
    name: str, matrix: torch.Tensor | QuantizedTensor | None, layout: MatrixLayout
) -> torch.Tensor:
    shape = (layout.rows, layout.cols)
    if not isinstance(matrix, QuantizedTensor) or matrix.weight_format != layout.weight_format:
        got = matrix.weight_format.name if isinstance(matrix, QuantizedTensor) else type(matrix)
        msg = f"{name} must be quantised to {layout.weight_format.name!r}, got {got}"
        raise ValueError(msg)
    if tuple(matrix.codes.shape) != shape:
        msg = f"{name} must be {list(shape)}, got {list(matrix.codes.shape)}"
        raise ValueError(msg)
    return pack_matrix(matrix, layout)


def padded_bias(bias: torch.Tensor | None, matrix: MatrixLayout) -> torch.Tensor:
    """Return the bytes of a bias, of any floating type, behind the panels of its matrix.

    Raises:
        ValueError: It is not one number for each output.
    """
    if bias is None or bias.shape != (matrix.rows,):
        got = None if bias is None else list(bias.shape)
        msg = f"a bias must be [{matrix.rows}], got {got}"
        raise ValueError(msg)
    padded = functional.pad(bias.float(), (0, matrix.padded_rows - matrix.rows))
    return padded.view(torch.uint8)


def _padded_blocks(raw: torch.Tensor, layout: MatrixLayout) -> torch.Tensor:
    """``[panels, blocks, block_bytes]``: the last block filled up."""
    missing = layout.blocks * layout.block_bytes - raw.shape[1]
    if missing:
        raw = functional.pad(raw, (0, missing))
    return raw.reshape(layout.panels, layout.blocks, layout.block_bytes)


# ---------------------------------------------------------------- weights


def _values(lanes: torch.Tensor, weight_format: Format) -> torch.Tensor:
    """``[..., 4]`` bytes of a lane to its 2, 4 or 8 codes, in canonical form."""
    match weight_format.element:
        case Element.BF16:
            return lanes.contiguous().view(torch.bfloat16)
        case Element.INT8:
            return (lanes ^ _INT8_FLIP).view(torch.int8)
        case Element.FP8:
            ordered = torch.stack([lanes[..., byte] for byte in _FP8_ORDER], dim=-1)
            return ordered.view(torch.float8_e4m3fn)
        case Element.INT4:  # the low nibbles are inputs 0..3, the high ones 4..7
            codes = torch.cat([lanes & 15, lanes >> 4], dim=-1)
            return (
                (codes.view(torch.int8) - _INT4_ZERO) if weight_format.has_signed_codes else codes
            )
        case Element.FP4:  # nibbles of the low half are even inputs, those of the high half odd
            nibbles = torch.stack([lanes & 15, lanes >> 4], dim=-1).flatten(-2)
            halves = nibbles.reshape(*nibbles.shape[:-1], 2, 4)
            return halves.transpose(-1, -2).flatten(-2)


def _lanes(codes: torch.Tensor, weight_format: Format) -> torch.Tensor:
    """``[..., inputs]`` codes to ``[..., rows, 4]`` bytes: ``_values`` undone."""
    outer = codes.shape[:-1]
    match weight_format.element:
        case Element.BF16:
            return codes.view(torch.uint8).reshape(*outer, -1, 4)
        case Element.INT8:
            return (codes.view(torch.uint8) ^ _INT8_FLIP).reshape(*outer, -1, 4)
        case Element.FP8:
            lanes = codes.view(torch.uint8).reshape(*outer, -1, 4)
            return torch.stack([lanes[..., byte] for byte in _FP8_ORDER], dim=-1)
        case Element.INT4:
            if weight_format.has_signed_codes:
                codes = (codes + _INT4_ZERO).view(torch.uint8)
            eight = codes.reshape(*outer, -1, 2, 4)
            return eight[..., 0, :] | eight[..., 1, :] << 4
        case Element.FP4:
            eight = codes.reshape(*outer, -1, 4, 2).transpose(-1, -2).flatten(-2)
            return eight[..., 0::2] | eight[..., 1::2] << 4


def _padded_codes(quantized: QuantizedTensor, layout: MatrixLayout) -> torch.Tensor:
    """``[padded_rows, padded_cols]``, with codes that stand for 0 or are met by zeros."""
    weight_format, codes = layout.weight_format, quantized.codes
    if weight_format.element is Element.FP8:
        codes = codes.view(torch.uint8)  # what a device has no arithmetic for
    rows, cols = layout.padded_rows - layout.rows, layout.padded_cols - layout.cols
    padded = functional.pad(codes, (0, cols, 0, rows))
    if quantized.scales is None:
        return padded
    group, groups = layout.group_cols, quantized.scales.shape[1]
    if weight_format.scale is ScaleType.E4M3:  # an e5m3 of 0 has no other way to say so
        is_zero = (quantized.scales == 0).repeat_interleave(group, dim=1)
        is_zero = functional.pad(is_zero, (0, layout.padded_cols - is_zero.shape[1], 0, rows))
        padded = torch.where(is_zero, torch.zeros_like(padded), padded)
    # Inputs behind the last, as far as the last group goes.
    last = slice(layout.cols, groups * group)
    if quantized.zero_points is not None:
        padded[: layout.rows, last] = quantized.zero_points[:, -1:].clamp(max=15)
    if quantized.minimums is not None:
        scale, minimum = quantized.scales[:, -1:], quantized.minimums[:, -1:]
        nearest = torch.where(scale > 0, minimum / scale, torch.zeros_like(scale))
        padded[: layout.rows, last] = nearest.clamp(0, 15).round().to(torch.uint8)
    return padded


# ---------------------------------------------------------------- scales

_SCALE_DTYPES = {
    ScaleType.FLOAT32: torch.float32,
    ScaleType.BF16: torch.bfloat16,
    ScaleType.FLOAT16: torch.float16,
}


def _read_scales(raw: torch.Tensor, scale: ScaleType) -> torch.Tensor:
    """``[outputs, groups, bytes]`` to ``[outputs, groups]`` float32."""
    if scale in _SCALE_DTYPES:
        return raw.view(_SCALE_DTYPES[scale]).squeeze(-1).float()
    byte = raw.squeeze(-1).to(torch.int32)
    if scale is ScaleType.E8M0:  # 2^-127 is subnormal: its bits, so that no device flushes it
        bits = torch.where(byte == 0, 1 << (_MANTISSA_BITS - 1), byte << _MANTISSA_BITS)
    else:
        bits = torch.where(byte == 0, 0, (byte + _E5M3_BIAS) << (_MANTISSA_BITS - 3))
    return bits.to(torch.int32).view(torch.float32)


def _write_scales(scales: torch.Tensor, scale: ScaleType) -> torch.Tensor:
    """``[outputs, groups]`` float32 to ``[outputs, groups, bytes]`` uint8."""
    if scale in _SCALE_DTYPES:
        return scales.to(_SCALE_DTYPES[scale])[..., None].view(torch.uint8)
    bits = scales.view(torch.int32)
    if scale is ScaleType.E8M0:
        return (bits >> _MANTISSA_BITS).to(torch.uint8)[..., None]
    byte = torch.where(scales > 0, (bits >> (_MANTISSA_BITS - 3)) - _E5M3_BIAS, 0)
    return byte.to(torch.uint8)[..., None]
