# --8<-- [start:format]
"""The format ``int4-row``: int4 with one float32 scale for each output, and no groups."""

from __future__ import annotations

from kt_core.interfaces import WeightFormat
from kt_core.quant import ReferenceFormat
from kt_core.types import Element, Format, ScaleType

INT4_ROW: WeightFormat = ReferenceFormat(
    Format(name="int4-row", element=Element.INT4, scale=ScaleType.FLOAT32)
)
# --8<-- [end:format]
