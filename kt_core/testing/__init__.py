"""Contract suites for those who write a plug-in, and the slow truth behind them. Needs pytest.

Subclass a suite in a test file, name what is to be tested, and pytest does the rest::

    from kt_core.testing import BackendContract

    class TestMyBackend(BackendContract):
        backend = MyBackend()

See docs/add-a-backend.md, docs/add-a-model.md, docs/add-a-format.md and docs/placement.md.
"""

from __future__ import annotations

import pytest

# So that a failed assertion shows its values, and holds under `python -O` too.
pytest.register_assert_rewrite(
    "kt_core.testing.backend",
    "kt_core.testing.backend_dense",
    "kt_core.testing.backend_harness",
    "kt_core.testing.backend_numbers",
    "kt_core.testing.backend_rules",
    "kt_core.testing.common",
    "kt_core.testing.model_adapter",
    "kt_core.testing.placement",
    "kt_core.testing.weight_format",
)

from kt_core.testing.backend import BackendContract  # noqa: E402
from kt_core.testing.backend_harness import ACTIVATIONS  # noqa: E402
from kt_core.testing.model_adapter import ModelAdapterContract  # noqa: E402
from kt_core.testing.placement import PlacementPolicyContract  # noqa: E402
from kt_core.testing.reference_kernel import (  # noqa: E402
    ExactKernel,
    FinishedTicket,
    ReferenceBackend,
    ReferenceDevice,
    ReferenceKernel,
)
from kt_core.testing.reference_linear import ReferenceLinear  # noqa: E402
from kt_core.testing.weight_format import WeightFormatContract  # noqa: E402

__all__ = [
    "ACTIVATIONS",
    "BackendContract",
    "ExactKernel",
    "FinishedTicket",
    "ModelAdapterContract",
    "PlacementPolicyContract",
    "ReferenceBackend",
    "ReferenceDevice",
    "ReferenceKernel",
    "ReferenceLinear",
    "WeightFormatContract",
]
