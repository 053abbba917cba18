"""Steps of decoding from a graph: the answers of the host alone, whatever happens between."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import kt_core
from kt_core.engine import Engine, accelerators
from sim.target import NAME

pytestmark = pytest.mark.sim

STORIES = Path(__file__).parents[1] / "data" / "stories-moe"
PROMPT = "Once upon a time"
GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 40, "raw": True}
# So that host and device compute the same numbers, but for the order of sums.
EXACT: dict[str, Any] = {"format": "bf16", "threads": 1, "dtype": torch.float32}


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where statistics are kept; there are none of earlier runs."""
    file = tmp_path / "statistics.json"
    monkeypatch.setattr(accelerators, "statistics_file", lambda directory: file)
    return file


@pytest.fixture(scope="module")
def alone() -> Iterator[Engine]:
    with kt_core.load(STORIES, device="cpu", precision="float32", **EXACT) as engine:
        yield engine


def load(device: str = NAME, **options: Any) -> Engine:
    return kt_core.load(STORIES, device=device, precision="float32", **(EXACT | options))


@pytest.mark.parametrize("hot", ["0%", "30%", "100%"])
def test_a_step_is_replayed(alone: Engine, hot: str) -> None:
    want = alone.generate(PROMPT, **GREEDY)
    with load(hot_experts=hot, placement="random") as engine:
        got = engine.generate(PROMPT, **GREEDY)
        decode = engine.stats().decode
    assert got.token_ids == want.token_ids
    assert decode.why_eager is None
    # The first step is run, so that what is made once is made; the others are replayed.
    assert (decode.eager, decode.captures, decode.from_graphs) == (1, 1, got.timing.new_tokens - 2)
