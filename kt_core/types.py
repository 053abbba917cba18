"""Values that cross a boundary of the framework. Frozen, checked when made, free of torch.

Everything a kernel must know about a layer is here; no model and no vendor is named.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum


class ActivationKind(StrEnum):
    """What stands between the up and the down projection; ``g`` is the gate, ``u`` the up output.

    The first five also exist without a gate, as ``f(u)``: see ``Activation.is_gated``.
    """

    SILU = "silu"
    """``g * sigmoid(g) * u`` (SwiGLU: Shazeer 2020, arXiv:2002.05202)."""
    GELU = "gelu"
    """``g * Phi(g) * u`` with the Gaussian distribution function Phi, by erf."""
    GELU_TANH = "gelu_tanh"
    """The tanh approximation of gelu: ``0.5 g (1 + tanh(sqrt(2/pi) (g + 0.044715 g^3))) * u``."""
    RELU = "relu"
    """``max(g, 0) * u``."""
    RELU2 = "relu2"
    """``max(g, 0)^2 * u`` (Primer: arXiv:2109.08668)."""
    SWIGLU_CLAMP = "swiglu_clamp"
    """``silu(min(g, limit)) * clamp(u, -limit, limit)`` (DeepSeek-V4)."""
    SWIGLU_CLAMP_AFTER = "swiglu_clamp_after"
    """``min(silu(g), limit) * clamp(u, -limit, limit)`` (Step-3)."""
    SWIGLU_OAI = "swiglu_oai"
    """``h sigmoid(alpha h) (clamp(u, -limit, limit) + 1)`` with ``h = min(g, limit)`` (gpt-oss)."""
    SWIGLU_SOFTCAP = "swiglu_softcap"
    """``cap(g, limit) sigmoid(g) cap(u, up_limit)``, ``cap(x, c) = c tanh(x / c)`` (Inkling 2)."""


UNGATED_KINDS = frozenset(
    {
        ActivationKind.SILU,
        ActivationKind.GELU,
        ActivationKind.GELU_TANH,
        ActivationKind.RELU,
        ActivationKind.RELU2,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation:
    """An activation with its parameters.

    Attributes:
        kind: The formula.
        alpha: Slope of the sigmoid; only ``SWIGLU_OAI`` reads it.
        limit: Bound on the gate (and on ``u``, unless ``up_limit`` is read); infinite where unused.
        up_limit: Bound on ``u``; only ``SWIGLU_SOFTCAP`` reads it.
        is_gated: False for ``f(u)``: the expert then has no gate projection.
    """

    kind: ActivationKind
    alpha: float = 1.0
    limit: float = math.inf
    up_limit: float = math.inf
    is_gated: bool = True

    def __post_init__(self) -> None:
        if not self.is_gated and self.kind not in UNGATED_KINDS:
            msg = f"activation {self.kind.value!r} needs a gate, got is_gated=False"
            raise ValueError(msg)
        if not (self.limit > 0 and self.up_limit > 0):
            msg = f"limit and up_limit must be > 0, got {self.limit} and {self.up_limit}"
            raise ValueError(msg)
        if not math.isfinite(self.alpha):
            msg = f"alpha must be finite, got {self.alpha}"
            raise ValueError(msg)
        if self.kind is ActivationKind.SWIGLU_SOFTCAP and math.isinf(self.limit + self.up_limit):
            msg = "swiglu_softcap needs a finite limit and up_limit"
            raise ValueError(msg)


SILU = Activation(kind=ActivationKind.SILU)


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeSpec:
    """Shape and arithmetic of the routed experts of one layer.

    Attributes:
        num_experts: E, routed experts in the layer.
        hidden_size: H, elements of one token's hidden state.
        intermediate_size: I, elements between the up and the down projection of one expert.
        activation: What is computed between the two.
        has_bias: Whether every projection adds a bias.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    activation: Activation = SILU
    has_bias: bool = False

    def __post_init__(self) -> None:
        for field in ("num_experts", "hidden_size", "intermediate_size"):
            value = getattr(self, field)
            if value < 1:
                msg = f"{field} must be >= 1, got {value}"
                raise ValueError(msg)

    @property
    def weights_per_expert(self) -> int:
        """Number of weight elements of one expert, biases not counted."""
        projections = 3 if self.activation.is_gated else 2
        return projections * self.hidden_size * self.intermediate_size


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearSpec:
    """Shape of one dense layer, ``y = x W^T + b``.

    Attributes:
        in_features: Elements of a row of ``x``.
        out_features: Elements of a row of ``y``.
        has_bias: Whether there is a ``b``.
    """

    in_features: int
    out_features: int
    has_bias: bool = False

    def __post_init__(self) -> None:
        for field in ("in_features", "out_features"):
            value = getattr(self, field)
            if value < 1:
                msg = f"{field} must be >= 1, got {value}"
                raise ValueError(msg)


class Element(StrEnum):
    """What one stored weight is."""

    BF16 = "bf16"
    FP8 = "fp8"
    """e4m3 without infinities, largest 448 (OCP 8-bit Floating Point 1.0)."""
    INT8 = "int8"
    INT4 = "int4"
    FP4 = "fp4"
    """e2m1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives (OCP Microscaling Formats 1.0)."""

    @property
    def is_integer(self) -> bool:
        """Whether codes are integers, which int8 activations can be multiplied with."""
        return self in {Element.INT8, Element.INT4}


class ScaleType(StrEnum):
    """What one stored scale is."""

    FLOAT32 = "float32"
    BF16 = "bf16"
    FLOAT16 = "float16"
    """At most 65504; below 2^-14 it has fewer digits, and nothing below 2^-25."""
    E8M0 = "e8m0"
    """A power of two, 2^-127 (which counts as 0) to 2^127 (OCP Microscaling Formats 1.0)."""
    E4M3 = "e4m3"
    """Not negative; a float32 scale for each output multiplies those of its groups (NVFP4)."""


ELEMENT_BITS = {
    Element.BF16: 16,
    Element.FP8: 8,
    Element.INT8: 8,
    Element.INT4: 4,
    Element.FP4: 4,
}
SCALE_BITS = {
    ScaleType.FLOAT32: 32,
    ScaleType.BF16: 16,
    ScaleType.FLOAT16: 16,
    ScaleType.E8M0: 8,
    ScaleType.E4M3: 8,
}
SMALLEST_GROUP = {Element.FP8: 16, Element.INT8: 16, Element.INT4: 32, Element.FP4: 16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """How a matrix ``[out_features, in_features]`` is stored: ``weight = scale * (code - zero)``.

    With a minimum, ``weight = scale * code - minimum``. Where scales are e4m3, ``scale`` is the
    group's times the output's.

    Attributes:
        name: The word the user types, such as ``int4-g32``.
        element: Type of a code. ``bf16`` codes are the weights themselves.
        scale: Type of a scale; None if and only if the element is ``bf16``.
        group_size: Consecutive input features that share a scale; None for one scale per output.
        has_zero_point: Whether each group stores a zero point, an integer in 0..2^bits. Codes then
            are 0..2^bits-1; else they are signed and the zero is 0.
        has_minimum: Whether each group stores a minimum, of the scales' type, instead. Codes are
            0..2^bits-1 too, but no code need stand for a weight of exactly 0.
    """

    name: str
    element: Element
    scale: ScaleType | None = None
    group_size: int | None = None
    has_zero_point: bool = False
    has_minimum: bool = False

    def __post_init__(self) -> None:
        if (self.scale is None) != (self.element is Element.BF16):
            msg = f"format {self.name!r}: every element has scales, except bf16, which has none"
            raise ValueError(msg)
        if self.scale is None and self.group_size is not None:
            msg = f"format {self.name!r}: without scales there are no groups"
            raise ValueError(msg)
        sizes = [n for n in (16, 32, 64, 128) if n >= SMALLEST_GROUP.get(self.element, 0)]
        if self.group_size is not None and self.group_size not in sizes:
            known = ", ".join(map(str, sizes))
            msg = f"format {self.name!r}: group_size must be one of {known}, got {self.group_size}"
            raise ValueError(msg)
        if self.scale in {ScaleType.E8M0, ScaleType.E4M3} and self.element.is_integer:
            msg = (
                f"format {self.name!r}: integers have float32, bf16 or float16 scales, "
                f"not {self.scale}"
            )
            raise ValueError(msg)
        self._check_offset()

    def _check_offset(self) -> None:
        if self.has_zero_point and self.has_minimum:
            msg = f"format {self.name!r}: a group has a zero point or a minimum, not both"
            raise ValueError(msg)
        if (self.has_zero_point or self.has_minimum) and self.element is not Element.INT4:
            msg = f"format {self.name!r}: only int4 has zero points or minimums"
            raise ValueError(msg)

    @property
    def has_signed_codes(self) -> bool:
        """Whether codes are integers on both sides of 0."""
        return self.element.is_integer and not (self.has_zero_point or self.has_minimum)

    @property
    def has_output_scale(self) -> bool:
        """Whether each output has a float32 scale besides those of its groups."""
        return self.scale is ScaleType.E4M3

    def num_groups(self, in_features: int) -> int:
        """Number of scales of one output; the last group may be partial."""
        return 1 if self.group_size is None else -(-in_features // self.group_size)

    def bits_per_weight(self, in_features: int) -> float:
        """Stored bits per weight of a matrix with that many input features, padding not counted."""
        if self.scale is None:
            return float(ELEMENT_BITS[self.element])
        per_group = SCALE_BITS[self.scale] * (2 if self.has_minimum else 1)
        per_group += 8 if self.has_zero_point else 0
        scale_bits = per_group * self.num_groups(in_features) + (32 if self.has_output_scale else 0)
        return ELEMENT_BITS[self.element] + scale_bits / in_features


class ActivationPrecision(StrEnum):
    """What the hidden states are turned into before they meet the weights."""

    AUTO = "auto"
    """The device's own choice for the format and the type of the hidden states."""
    INT8 = "int8"
    """Dynamic int8, a scale for 64 inputs of a token; for 32 of what is between up and down, and of
    the inputs of a dense layer."""
    BF16 = "bf16"
    """bf16 products summed in float32."""
    FLOAT32 = "float32"
    """Weights and hidden states in float32: the accurate mode, which every backend has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceInfo:
    """A device a backend can compute experts on.

    Attributes:
        name: What the user types for ``--device``: ``cpu``, ``cuda:0``.
        description: Model name of the hardware.
        torch_device: Where hidden states must lie when they are submitted.
        memory_bytes: Memory that expert weights can use in all, in bytes.
        remarks: What keeps the device from its best, each with what to do about it.
    """

    name: str
    description: str
    torch_device: str
    memory_bytes: int
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a backend can do on one device. Core asks this, never the backend's name.

    Attributes:
        elements: Elements it computes in every grouping, so that a new format of one of them needs
            no edit of the backend.
        formats: Names of single formats it computes besides.
        instruction_set: Kernel variant in use, such as ``avx512_bf16``; None where there is one.
        instruction_sets: Every variant this machine can run, best first.
        trains: Whether its kernels compute gradients: see ``ExpertKernel.backward``.
        computes_dense: Whether it packs and computes dense layers too, in the same formats: see
            ``ExpertDevice.linear_kernel``.
    """

    elements: frozenset[Element] = frozenset()
    formats: frozenset[str] = frozenset()
    instruction_set: str | None = None
    instruction_sets: tuple[str, ...] = ()
    trains: bool = False
    computes_dense: bool = False

    def computes(self, weight_format: Format) -> bool:
        """Whether experts of this format can be computed."""
        return weight_format.element in self.elements or weight_format.name in self.formats


@dataclass(frozen=True, slots=True, kw_only=True)
class HostUsage:
    """What the threads of a device have done since it was opened.

    Attributes:
        busy_s: Seconds in which there was work for them.
        awaited_s: Seconds for which streams of accelerators stood still, waiting for it.
    """

    busy_s: float
    awaited_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What no kernel can exceed on a device, as measured there: see ``ExpertDevice``.

    Attributes:
        read_bytes_per_s: Sequential reads of memory, all threads together.
        int8_ops_per_s: Products of int8 on registers; a multiply-add is two operations.
        bf16_ops_per_s: Products of bf16; float32 multiply-adds where there is no instruction.
    """

    read_bytes_per_s: float
    int8_ops_per_s: float
    bf16_ops_per_s: float
