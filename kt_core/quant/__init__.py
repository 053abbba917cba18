"""The built-in weight formats, registered as a plug-in like any other."""

from __future__ import annotations

from kt_core.hookspecs import Register, hookimpl
from kt_core.interfaces import WeightFormat
from kt_core.quant.formats import BUILT_IN_FORMATS, ReferenceFormat

__all__ = ["BUILT_IN_FORMATS", "ReferenceFormat", "kt_register_formats"]


@hookimpl
def kt_register_formats(register: Register[WeightFormat]) -> None:
    """Register the table."""
    for weight_format in BUILT_IN_FORMATS:
        register(weight_format)
