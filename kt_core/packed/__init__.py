"""The bytes of one packed expert, or dense layer: the same on every device, in every file.

``layout`` says where they lie and knows no torch; ``codec`` reads and writes them.
"""

from __future__ import annotations

from kt_core.packed.layout import ExpertLayout, LinearLayout, MatrixLayout

__all__ = ["ExpertLayout", "LinearLayout", "MatrixLayout"]
