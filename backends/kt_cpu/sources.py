"""Where csrc/ finds a matrix or a bias: addresses of tensors that were checked."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias, TypedDict

import torch

from kt_core.interfaces import QuantizedTensor, stored_parts
from kt_core.types import ELEMENT_BITS, ActivationPrecision, Element, Format, ScaleType
from kt_cpu import _kernels

DTYPES = {
    torch.float32: _kernels.DType.float32,
    torch.bfloat16: _kernels.DType.bfloat16,
    torch.float16: _kernels.DType.float16,
}

_SCALE_TYPES = {
    ScaleType.BF16: torch.bfloat16,
    ScaleType.FLOAT16: torch.float16,
    ScaleType.E8M0: torch.float8_e8m0fnu,
    ScaleType.E4M3: torch.float8_e4m3fn,
}

# Address, type, strides of rows and columns in elements, addresses of scales, zero points, minimums
# and scales of outputs.
Addresses: TypeAlias = tuple[int, _kernels.DType, int, int, int, int, int, int]


class Source(NamedTuple):
    """A matrix for csrc/, and the tensors that must stay alive until it has been read."""

    addresses: Addresses
    tensors: tuple[torch.Tensor, ...]


def matrix_source(
    name: str,
    tensor: torch.Tensor | QuantizedTensor,
    shape: tuple[int, int],
    weight_format: Format,
) -> Source:
    """Return where csrc/ finds a matrix that becomes ``weight_format``.

    Raises:
        ValueError: A shape, type, device, format or number does not fit.
    """
    if isinstance(tensor, QuantizedTensor):
        return _quantized_source(name, tensor, shape, weight_format)
    if tuple(tensor.shape) != shape:
        msg = f"{name} must be {list(shape)}, got {list(tensor.shape)}"
        raise ValueError(msg)
    if tensor.dtype not in DTYPES:
        msg = f"{name} must be float32, bfloat16 or float16, got {tensor.dtype}"
        raise ValueError(msg)
    check_on_cpu(name, tensor)
    rows, cols = tensor.stride()
    return Source((tensor.data_ptr(), DTYPES[tensor.dtype], rows, cols, 0, 0, 0, 0), (tensor,))


def _quantized_source(
    name: str, tensor: QuantizedTensor, shape: tuple[int, int], weight_format: Format
) -> Source:
    if tensor.weight_format != weight_format:
        msg = f"{name} is {tensor.weight_format.name!r}, this layer {weight_format.name!r}"
        raise ValueError(msg)
    if tensor.scales is None:
        return matrix_source(name, tensor.codes, shape, weight_format)
    addresses: dict[str, int] = {}
    kept = []
    for part, want in stored_parts(weight_format, *shape).items():
        value: torch.Tensor | None = getattr(tensor, part)
        got = None if value is None else (tuple(value.shape), value.dtype)
        if got != want:
            msg = f"{part} of {name} must be {_drawn(want)}, got {_drawn(got)}"
            raise ValueError(msg)
        if value is None:
            addresses[part] = 0
            continue
        check_on_cpu(f"{part} of {name}", value)
        _check_range(f"{part} of {name}", part, value, weight_format)
        kept.append(value.contiguous())
        addresses[part] = kept[-1].data_ptr()
    source = (
        addresses["codes"], _kernels.DType.float32, 0, 0,
        addresses["scales"], addresses["zero_points"], addresses["minimums"],
        addresses["output_scales"],
    )  # fmt: skip
    return Source(source, tuple(kept))


def bias_source(name: str, bias: torch.Tensor | None, size: int) -> torch.Tensor | None:
    """Return a bias as csrc/ reads it.

    Raises:
        ValueError: A shape, device or number does not fit.
    """
    if bias is None:
        return None
    if tuple(bias.shape) != (size,):
        msg = f"{name} must be [{size}], got {list(bias.shape)}"
        raise ValueError(msg)
    check_on_cpu(name, bias)
    stored = bias.to(torch.float32).contiguous()
    if not torch.isfinite(stored).all():
        msg = f"{name} holds a NaN or an infinity"
        raise ValueError(msg)
    return stored


def check_on_cpu(name: str, tensor: torch.Tensor) -> None:
    """Refuse a tensor that lies elsewhere."""
    if tensor.device.type != "cpu":
        msg = f"{name} must be on the cpu, got {tensor.device}"
        raise ValueError(msg)


def _drawn(part: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return "absent" if part is None else f"{list(part[0])} {part[1]}"


def _check_range(name: str, part: str, values: torch.Tensor, weight_format: Format) -> None:
    """Refuse what its packed form cannot hold: it would become another number."""
    if part in {"codes", "zero_points"} and ELEMENT_BITS[weight_format.element] == 4:
        low, high = (-8, 7) if values.dtype is torch.int8 else (0, 15)
        # GPTQ stores zero points less one: 16 is what its 15 stands for.
        high += part == "zero_points"
        for value in values.aminmax():
            if not low <= int(value) <= high:
                msg = f"{name} must be in {low}..{high}, got {int(value)}"
                raise ValueError(msg)
    stored_type = _SCALE_TYPES.get(weight_format.scale or ScaleType.FLOAT32)
    if part in {"scales", "minimums"} and stored_type is not None:
        kept = values.to(stored_type).float()
        if weight_format.scale is ScaleType.E4M3:
            kept = kept.where(kept >= 0, float("nan"))
        # What is infinite, or becomes it, is refused by csrc/, in the words for NaN.
        is_checked = torch.isfinite(values) & ~torch.isinf(kept)
        if not torch.equal(kept[is_checked], values[is_checked]):
            msg = f"{name} must be numbers of the type {weight_format.scale}"
            raise ValueError(msg)


class Stored(TypedDict):
    """How weights are stored, in the words of csrc/."""

    element: _kernels.Element
    scale: _kernels.ScaleType
    offset: _kernels.Offset
    group: int


def stored(weight_format: Format) -> Stored:
    """Return how a format's weights are stored."""
    offset = _kernels.Offset.none
    if weight_format.has_zero_point:
        offset = _kernels.Offset.zero_point
    elif weight_format.has_minimum:
        offset = _kernels.Offset.minimum
    scale = weight_format.scale.value if weight_format.scale else "none"
    return {
        "element": getattr(_kernels.Element, weight_format.element.value),
        "scale": getattr(_kernels.ScaleType, scale),
        "offset": offset,
        "group": weight_format.group_size or 0,
    }


def address(tensor: torch.Tensor | None) -> int:
    """Return where a tensor is; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def compute_precision(
    precision: ActivationPrecision, weight_format: Format, dtype: torch.dtype
) -> _kernels.Precision:
    """Return what activations of this type are turned into."""
    if precision is not ActivationPrecision.AUTO:
        named: _kernels.Precision = getattr(_kernels.Precision, precision.value)
        return named
    if weight_format.element.is_integer:
        return _kernels.Precision.int8
    is_exact = weight_format.element is Element.BF16 and dtype is torch.float32
    return _kernels.Precision.float32 if is_exact else _kernels.Precision.bf16


def training_precision(
    precision: ActivationPrecision, weight_format: Format, dtype: torch.dtype
) -> _kernels.Precision:
    """Return what a gradient is taken of: where it is our choice, nothing is quantised."""
    if precision is not ActivationPrecision.AUTO:
        return compute_precision(precision, weight_format, dtype)
    wide = dtype is torch.float32
    return _kernels.Precision.float32 if wide else _kernels.Precision.bf16
