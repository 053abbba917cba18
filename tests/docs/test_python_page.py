# ruff: noqa: T201 - the examples print, as their readers will
"""The example on docs/python.md, which includes it from here, on a small model of our own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

STORIES = Path(__file__).parents[1] / "data" / "stories-moe"


def test_example(capsys: pytest.CaptureFixture[str]) -> None:
    model = STORIES
    # --8<-- [start:load]
    import torch

    import kt_core

    with kt_core.load(model, format="int4") as engine:
        answer = engine.generate("Tell me a story.", temperature=0, max_new_tokens=40)
        print(answer.text)
        print(f"{answer.timing.decode_tokens_per_s:.1f} tokens/s as {engine.stats().format}")

        for event in engine.stream("And another one.", seed=7, max_new_tokens=40):
            print(event.text, end="", flush=True)

        input_ids = torch.tensor([engine.encode("Hello")])
        with torch.no_grad():
            logits = engine.model(input_ids=input_ids).logits  # the transformers model
    # --8<-- [end:load]
    assert logits.isfinite().all()
    assert re.search(r"^\d+\.\d tokens/s as int4-g32$", capsys.readouterr().out, re.MULTILINE)
