"""What the tests of the engine share: tiny checkpoints, each written once per run."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import tiny
import torch
import transformers

SaveTiny = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def _quiet_and_single_threaded() -> None:
    torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> SaveTiny:
    """Return where the tiny checkpoint of a family is. Tests that change files work on a copy."""

    @cache
    def save(family: str, dtype: torch.dtype = torch.float32) -> Path:
        directory = tmp_path_factory.mktemp(family)
        tiny.save_tiny(family, directory, dtype=dtype)
        return directory

    return save
