"""The contract that every backend keeps, by both simulated devices."""

from __future__ import annotations

import pytest

from kt_core.testing import BackendContract
from kt_sim import SimBackend

pytestmark = pytest.mark.sim


class TestSim(BackendContract):
    backend = SimBackend()
    device = "sim:1"
