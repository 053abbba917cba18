"""The small trained model that tests of whole engines load, so that its numbers can be compared."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import kt_core
from kt_core.engine import Engine, accelerators

STORIES = Path(__file__).parents[1] / "data" / "stories-moe"
PROMPT = "Once upon a time"
# So that host and device compute the same numbers, but for the order of sums.
EXACT: dict[str, Any] = {
    "format": "bf16",
    "threads": 1,
    "dtype": torch.float32,
    "precision": "float32",
}
# Logits of two orders of float32 sums; the model has some 2^8 of them one behind the other.
TOLERANCE = 2**8 * 2**-24


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where statistics are kept; there are none of earlier runs."""
    file = tmp_path / "statistics.json"
    monkeypatch.setattr(accelerators, "statistics_file", lambda directory: file)
    return file


@pytest.fixture(scope="module")
def alone() -> Iterator[Engine]:
    """What the host answers by itself."""
    with kt_core.load(STORIES, device="cpu", **EXACT) as engine:
        yield engine
