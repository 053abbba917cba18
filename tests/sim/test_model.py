"""A whole model of transformers on a simulated device: the same tokens as on the CPU."""

from __future__ import annotations

import pytest
import torch
from tiny import build_tiny

pytestmark = pytest.mark.sim

PROMPT = torch.tensor([[5, 17, 42, 99, 7]])


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_the_same_tokens(family: str) -> None:
    model = build_tiny(family)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    with torch.no_grad():
        want = model.generate(PROMPT, **options)
        model.to("sim")
        got = model.generate(PROMPT.to("sim"), **options)
    assert got.device.type == "sim"
    assert got.tolist() == want.tolist()
    assert want.shape == (1, 13)


def test_the_same_logits() -> None:
    model = build_tiny("qwen3_moe")
    model.set_attn_implementation("eager")  # the CPU has one of its own for attention
    with torch.no_grad():
        want = model(PROMPT).logits
        got = model.to("sim:1")(PROMPT.to("sim:1")).logits
    assert got.device == torch.device("sim:1")
    assert torch.equal(got.cpu(), want), "the same operators in the same order: the same bits"
