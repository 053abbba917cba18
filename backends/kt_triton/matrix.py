"""What a Triton kernel must know about one packed matrix: constants that it is compiled with."""

from __future__ import annotations

from dataclasses import dataclass

from kt_core.packed import MatrixLayout

_VALUES_PER_WORD = {"bf16": 2, "int8": 4, "fp8": 4, "int4": 8, "fp4": 8}


@dataclass(frozen=True)
class Matrix:
    """One matrix ``[outputs, inputs]`` of what is packed: a ``MatrixLayout`` and its place.

    Plain words and numbers, because Triton makes keys of its cache from how they are printed.

    Attributes:
        element: An ``Element``.
        scale: A ``ScaleType``, or ``none``.
        offset: ``none``, ``zero_point`` or ``minimum``.
        outputs: Rows, padding not counted.
        inputs: Columns, padding not counted.
        panels: Runs of 16 outputs, the last one padded.
        padded_inputs: Columns with their padding.
        is_grouped: Whether an output has more scales than one.
        group: Inputs of a group; all of them where there is one.
        block_groups: Groups whose scales stand together.
        front: Bytes of the scales of outputs, at a panel's first byte.
        header: Bytes of the scales and offsets of a block.
        scale_bytes: Bytes of the scales of a group.
        offset_bytes: Bytes of the zero points or minimums of a group.
        group_bytes: Bytes of the weights of a group.
        start: First byte of the first panel, from the first of the expert or the dense layer.
        stride: Bytes from a panel to the next one of this matrix.
    """

    element: str
    scale: str
    offset: str
    outputs: int
    inputs: int
    panels: int
    padded_inputs: int
    is_grouped: bool
    group: int
    block_groups: int
    front: int
    header: int
    scale_bytes: int
    offset_bytes: int
    group_bytes: int
    start: int
    stride: int

    @classmethod
    def of(cls, layout: MatrixLayout, start: int, stride: int) -> Matrix:
        """Describe the matrix whose panels stand ``stride`` bytes apart, from ``start`` on."""
        stored = layout.weight_format
        offset = "zero_point" if stored.has_zero_point else "none"
        return cls(
            element=stored.element.value,
            scale="none" if stored.scale is None else stored.scale.value,
            offset="minimum" if stored.has_minimum else offset,
            outputs=layout.rows,
            inputs=layout.cols,
            panels=layout.panels,
            padded_inputs=layout.padded_cols,
            is_grouped=stored.group_size is not None,
            group=layout.group_cols,
            block_groups=layout.block_groups,
            front=layout.front_bytes,
            header=layout.header_bytes,
            scale_bytes=layout.scale_bytes,
            offset_bytes=layout.offset_bytes,
            group_bytes=layout.group_bytes,
            start=start,
            stride=stride,
        )

    @property
    def values_per_word(self) -> int:
        """Inputs in the four bytes of one output."""
        return _VALUES_PER_WORD[self.element]

    @property
    def block_bytes(self) -> int:
        """Bytes of a whole block."""
        return self.header + self.block_groups * self.group_bytes

    @property
    def folds_scale(self) -> bool:
        """Whether ``code * scale`` of a group is a bfloat16, exactly.

        So it is for powers of two, and for an e4m3 of four bits times an e2m1 of two. Others
        multiply sums instead: a weight that is rounded to bfloat16 is another weight.
        """
        return self.scale in {"e8m0", "e4m3"}

    @property
    def scales_sums(self) -> bool:
        """Whether the sum over a group is multiplied by the group's scale, group by group."""
        per_group = self.is_grouped or self.offset == "minimum"
        return self.scale != "none" and not self.folds_scale and per_group

    @property
    def scales_outputs(self) -> bool:
        """Whether the sum over all inputs is multiplied by one scale, at the end."""
        return self.front > 0 or not (self.scale == "none" or self.folds_scale or self.scales_sums)
