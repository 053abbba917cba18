"""The contract that every backend keeps, by both simulated devices."""

from __future__ import annotations

import pytest

from kt_core.testing import BackendContract
from sim import target

pytestmark = pytest.mark.sim


class TestAccelerator(BackendContract):
    backend = target.BACKEND
    device = "sim:1" if target.IS_SIM else None
