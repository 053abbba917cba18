"""The suite that every backend passes, on Triton's interpreter."""

from __future__ import annotations

import pytest

from gpu.interpreted import InterpretedBackend
from kt_core.testing import BackendContract


@pytest.mark.triton
class TestInterpreted(BackendContract):
    """The kernels that suit: both kinds are met."""

    backend = InterpretedBackend()
