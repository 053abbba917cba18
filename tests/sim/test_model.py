"""A whole model of transformers on a simulated device: the same tokens as on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import build_tiny
from transformers import StaticCache

from kt_core.hardware.graphs import capture
from kt_core.interfaces import ExpertDevice, ExpertWeights
from kt_core.moe.hybrid_experts import HybridExperts
from kt_core.quant import BUILT_IN_FORMATS
from kt_core.types import MoeSpec
from sim import target
from sim.target import WHERE

pytestmark = pytest.mark.sim

PROMPT = torch.tensor([[5, 17, 42, 99, 7]])


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_the_same_tokens(family: str) -> None:
    model = build_tiny(family)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    with torch.no_grad():
        want = model.generate(PROMPT, **options)
        model.to(WHERE)
        got = model.generate(PROMPT.to(WHERE), **options)
    assert got.device == torch.device(WHERE)
    assert got.tolist() == want.tolist()
    assert want.shape == (1, 13)


@target.only_sim
def test_the_same_logits() -> None:
    model = build_tiny("qwen3_moe")
    model.set_attn_implementation("eager")  # the CPU has one of its own for attention
    with torch.no_grad():
        want = model(PROMPT).logits
        got = model.to("sim:1")(PROMPT.to("sim:1")).logits
    assert got.device == torch.device("sim:1")
    assert torch.equal(got.cpu(), want), "the same operators in the same order: the same bits"


def pack_experts(model: Any, device: ExpertDevice) -> None:
    """Put all experts into kernels of the device, in bf16, which loses nothing of a tiny model."""
    for layer in model.model.layers:
        experts = getattr(layer.mlp, "experts", None)
        if experts is None:
            continue
        num_experts, both, hidden = experts.gate_up_proj.shape
        spec = MoeSpec(num_experts=num_experts, hidden_size=hidden, intermediate_size=both // 2)
        kernel = device.expert_kernel(spec, BUILT_IN_FORMATS[0].descriptor)
        for index in range(num_experts):
            gate, up = experts.gate_up_proj[index].detach().chunk(2)
            down = experts.down_proj[index].detach()
            kernel.load(index, ExpertWeights(gate=gate, up=up, down=down))
        layer.mlp.experts = HybridExperts(spec, [kernel])


def test_a_step_of_decoding_is_one_graph() -> None:
    """Router, experts, attention, cache and the choice of the token: nothing waits for the host."""
    model: Any = build_tiny("qwen3_moe")
    want = model.generate(PROMPT, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    with torch.no_grad(), target.opened() as device:
        pack_experts(model, device)
        model.to(WHERE)
        cache = StaticCache(config=model.config, max_cache_len=32)
        token = model(PROMPT.to(WHERE), past_key_values=cache).logits[:, -1:].argmax(-1)
        position = torch.full((1, 1), PROMPT.shape[1], device=WHERE)

        def step() -> None:
            logits = model(token, past_key_values=cache, position_ids=position).logits
            token.copy_(logits[:, -1:].argmax(-1))
            position.add_(1)

        tokens = [token.item()]
        step()  # what is made once is made here
        tokens.append(token.item())
        with capture(torch.device(WHERE)) as graph:
            step()
        for _ in range(6):
            graph.replay()
            torch.accelerator.synchronize()
            tokens.append(token.item())
    assert BUILT_IN_FORMATS[0].descriptor.name == "bf16"
    assert [*PROMPT[0].tolist(), *tokens] == want[0].tolist()
