"""Where the bytes of one packed expert lie, computed from its shape and its format.

The drawing is in csrc/format/layout.hpp, byte by byte in docs/packed-format.md; names here are
those there. All offsets and sizes are in bytes, and multiples of 64.
"""

from __future__ import annotations

from dataclasses import dataclass

from kt_core.types import ELEMENT_BITS, SCALE_BITS, Format, LinearSpec, MoeSpec

PANEL = 16
"""Outputs whose weights lie together."""
ROW_BYTES = 64
"""4 bytes of each output of a panel."""
COLUMN_PAD = 64
"""Inputs are padded to a multiple of it, with zeros."""


@dataclass(frozen=True, slots=True)
class MatrixLayout:
    """A matrix ``[rows = outputs, cols = inputs]``: panels of 16 outputs, each in one piece.

    A panel is ``front_bytes``, then blocks; a block is the scales and offsets of ``block_groups``
    groups of inputs, ``header_bytes``, then the weights of these groups. The last block has a whole
    header, and fewer groups of weights where they do not fill it.

    Attributes:
        weight_format: How numbers are stored.
        rows: Outputs.
        cols: Inputs.
        padded_cols: Inputs with padding.
        panels: Panels of the matrix.
        group_cols: Inputs of a group; all of them where there is one scale per output, or none.
        groups: Groups of an output, padding included.
        front_bytes: Scales of a panel's outputs, where group scales are e4m3; else 0.
        block_groups: Groups of a block.
        scale_bytes: 16 scales.
        offset_bytes: 16 zero points or minimums.
        header_bytes: Scales and offsets of a block.
        group_bytes: Weights of a group.
        panel_bytes: A panel.
    """

    weight_format: Format
    rows: int
    cols: int
    padded_cols: int
    panels: int
    group_cols: int
    groups: int
    front_bytes: int
    block_groups: int
    scale_bytes: int
    offset_bytes: int
    header_bytes: int
    group_bytes: int
    panel_bytes: int

    @classmethod
    def of(cls, weight_format: Format, rows: int, cols: int) -> MatrixLayout:
        """Compute the layout of a matrix, ``rows >= 1`` and ``cols >= 1``."""
        group = weight_format.group_size
        padded_cols = _round_up(cols, max(group or 0, COLUMN_PAD))
        group_cols = group or padded_cols
        groups = padded_cols // group_cols
        scale = weight_format.scale
        scale_bytes = 0 if scale is None else PANEL * SCALE_BITS[scale] // 8
        offset_bytes = PANEL if weight_format.has_zero_point else 0
        if weight_format.has_minimum:
            offset_bytes = scale_bytes
        block_groups = 1
        while group and block_groups * (scale_bytes + offset_bytes) % ROW_BYTES:
            block_groups *= 2
        header_bytes = _round_up(block_groups * (scale_bytes + offset_bytes), ROW_BYTES)
        group_bytes = group_cols * PANEL * ELEMENT_BITS[weight_format.element] // 8
        front_bytes = PANEL * 4 if weight_format.has_output_scale else 0
        blocks = -(-groups // block_groups)
        return cls(
            weight_format=weight_format,
            rows=rows,
            cols=cols,
            padded_cols=padded_cols,
            panels=-(-rows // PANEL),
            group_cols=group_cols,
            groups=groups,
            front_bytes=front_bytes,
            block_groups=block_groups,
            scale_bytes=scale_bytes,
            offset_bytes=offset_bytes,
            header_bytes=header_bytes,
            group_bytes=group_bytes,
            panel_bytes=front_bytes + blocks * header_bytes + groups * group_bytes,
        )

    @property
    def padded_rows(self) -> int:
        """Outputs with padding."""
        return self.panels * PANEL

    @property
    def blocks(self) -> int:
        """Blocks of a panel."""
        return -(-self.groups // self.block_groups)

    @property
    def block_bytes(self) -> int:
        """A block that is full."""
        return self.header_bytes + self.block_groups * self.group_bytes

    def scales_at(self, group: int) -> int:
        """Offset from a panel's first byte to the 16 scales of a group."""
        return self._block_at(group) + group % self.block_groups * self.scale_bytes

    def offsets_at(self, group: int) -> int:
        """Offset from a panel's first byte to the 16 zero points or minimums of a group."""
        scales = self.block_groups * self.scale_bytes
        return self._block_at(group) + scales + group % self.block_groups * self.offset_bytes

    def weights_at(self, group: int) -> int:
        """Offset from a panel's first byte to the weights of a group."""
        within = group % self.block_groups * self.group_bytes
        return self._block_at(group) + self.header_bytes + within

    def _block_at(self, group: int) -> int:
        return self.front_bytes + group // self.block_groups * self.block_bytes


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """An expert: gate and up panels in turn, the down panels, the biases.

    Attributes:
        has_gate: Whether there are gate panels; else up panels stand alone.
        has_bias: Whether biases follow, float32, each padded to whole panels.
        up: Of the gate too, ``[intermediate, hidden]``.
        down: ``[hidden, intermediate]``.
        up_stride: From an up panel to the next.
        down_offset: First down panel.
        bias_offset: First bias; the end, before padding, where there is none.
        size_bytes: The expert.
    """

    has_gate: bool
    has_bias: bool
    up: MatrixLayout
    down: MatrixLayout
    up_stride: int
    down_offset: int
    bias_offset: int
    size_bytes: int

    @classmethod
    def of(cls, spec: MoeSpec, weight_format: Format) -> ExpertLayout:
        """Compute the layout of one expert of a layer."""
        has_gate = spec.activation.is_gated
        up = MatrixLayout.of(weight_format, spec.intermediate_size, spec.hidden_size)
        down = MatrixLayout.of(weight_format, spec.hidden_size, spec.intermediate_size)
        up_stride = up.panel_bytes * (2 if has_gate else 1)
        down_offset = up.panels * up_stride
        bias_offset = down_offset + down.panels * down.panel_bytes
        biases = (up.padded_rows * (2 if has_gate else 1) + down.padded_rows) * 4
        return cls(
            has_gate=has_gate,
            has_bias=spec.has_bias,
            up=up,
            down=down,
            up_stride=up_stride,
            down_offset=down_offset,
            bias_offset=bias_offset,
            size_bytes=bias_offset + (_round_up(biases, ROW_BYTES) if spec.has_bias else 0),
        )

    @property
    def gate_bias_at(self) -> int:
        """Offset to the bias of the gate, of ``up.padded_rows`` float32."""
        return self.bias_offset

    @property
    def up_bias_at(self) -> int:
        """Offset to the bias of up, of ``up.padded_rows`` float32."""
        return self.bias_offset + (self.up.padded_rows * 4 if self.has_gate else 0)

    @property
    def down_bias_at(self) -> int:
        """Offset to the bias of down, of ``down.padded_rows`` float32."""
        return self.up_bias_at + self.up.padded_rows * 4


@dataclass(frozen=True, slots=True)
class LinearLayout:
    """A dense layer: the panels of its matrix, then the bias.

    Attributes:
        weight: ``[out_features, in_features]``.
        has_bias: Whether a bias follows, float32, padded to whole panels.
        bias_offset: Where it begins; the end where there is none.
        size_bytes: The layer.
    """

    weight: MatrixLayout
    has_bias: bool
    bias_offset: int
    size_bytes: int

    @classmethod
    def of(cls, spec: LinearSpec, weight_format: Format) -> LinearLayout:
        """Compute the layout of a layer."""
        weight = MatrixLayout.of(weight_format, spec.out_features, spec.in_features)
        end = weight.panels * weight.panel_bytes
        return cls(
            weight=weight,
            has_bias=spec.has_bias,
            bias_offset=end,
            size_bytes=end + (_round_up(weight.padded_rows * 4, ROW_BYTES) if spec.has_bias else 0),
        )


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
