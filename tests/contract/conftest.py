"""For the tests beside the suites; the suites do this themselves."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
