"""What all contract suites share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch


@contextmanager
def refuses(what: str) -> Iterator[None]:
    """Fail unless the block raises a ``ValueError`` with a message."""
    message = None
    try:
        yield
    except ValueError as error:
        message = str(error)
    assert message is not None, f"{what} must raise ValueError"
    assert message.strip(), f"{what} is refused without a word"


class OneTorchThread:
    """Base of the suites."""

    @pytest.fixture(autouse=True)
    def _one_torch_thread(self) -> Iterator[None]:
        """The tensors are tiny: more threads only wait for each other."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)
