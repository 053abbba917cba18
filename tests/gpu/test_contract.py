"""The suite that every backend passes, by the Triton kernels."""

from __future__ import annotations

import pytest

from gpu.kernels import KernelsBackend
from kt_core.quant import BUILT_IN_FORMATS
from kt_core.testing import BackendContract

# One of each element, and each kind of offset and of scale: test_numbers has them all.
NAMES = ("bf16", "int8-g32", "int4-g32-asym", "int4-g32-f32-min", "fp8", "nvfp4")


@pytest.mark.triton
class TestKernels(BackendContract):
    """The kernels that suit: both kinds are met."""

    backend = KernelsBackend()
    formats = tuple(f for f in BUILT_IN_FORMATS if f.descriptor.name in NAMES)
