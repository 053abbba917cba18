"""Modules that blocks call beside their experts: run meanwhile where that changes nothing."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import build_tiny
from torch import nn

import kt_core
from kt_core.engine import accelerators
from kt_core.engine.shared_experts import run_shared_beside
from kt_core.interfaces import ExpertWeights
from kt_core.moe.beside import BesideStream, Order, run_beside_experts
from kt_core.moe.hybrid_experts import HybridExperts
from kt_core.quant import BUILT_IN_FORMATS
from kt_core.types import ActivationPrecision, MoeSpec
from kt_sim import SimBackend
from sim.host_calls import Note
from sim.target import only_sim

pytestmark = [pytest.mark.sim, only_sim]

SIM = "sim:0"
SPEC = MoeSpec(num_experts=4, hidden_size=32, intermediate_size=32)
BF16 = next(f.descriptor for f in BUILT_IN_FORMATS if f.descriptor.name == "bf16")
PROMPT = torch.tensor([[5, 17, 42, 99, 7]])


class Block(nn.Module):
    """A block of which a test writes what it does with its experts and its other module."""

    def __init__(self, steps: Callable[[Block, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        kernel = (
            SimBackend().open(SIM).expert_kernel(SPEC, BF16, precision=ActivationPrecision.FLOAT32)
        )
        generator = torch.Generator().manual_seed(0)
        for expert in range(SPEC.num_experts):
            made = [torch.randn(32, 32, generator=generator) for _ in range(3)]
            kernel.load(expert, ExpertWeights(gate=made[0], up=made[1], down=made[2]))
        self.experts = HybridExperts(SPEC, [kernel], device=torch.device(SIM))
        self.shared = nn.Sequential(nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 32))
        self.steps = steps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.steps(self, hidden)

    def routed(self, hidden: torch.Tensor) -> torch.Tensor:
        ids = torch.arange(2 * len(hidden), device=SIM).view(-1, 2) % SPEC.num_experts
        out: torch.Tensor = self.experts(hidden, ids, torch.ones(len(hidden), 2, device=SIM))
        return out


def after(block: Block, hidden: torch.Tensor) -> torch.Tensor:
    return block.routed(hidden) + block.shared(hidden)


def before(block: Block, hidden: torch.Tensor) -> torch.Tensor:
    shared = block.shared(hidden)
    return block.routed(hidden) + shared


def reads_it_first(block: Block, hidden: torch.Tensor) -> torch.Tensor:
    shared = block.shared(hidden)
    return block.routed(hidden + shared)


def writes_before_it(block: Block, hidden: torch.Tensor) -> torch.Tensor:
    own = hidden.clone()
    routed = block.routed(own)
    return routed + block.shared(own.mul_(2))


def writes_behind_it(block: Block, hidden: torch.Tensor) -> torch.Tensor:
    own = hidden.clone()
    shared = block.shared(own)
    return block.routed(own.mul_(2)) + shared


def needs_the_experts(block: Block, hidden: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = block.shared(block.routed(hidden))
    return out


def twice(block: Block, hidden: torch.Tensor) -> torch.Tensor:
    return block.shared(hidden) + block.routed(hidden) + block.shared(hidden)


CASES = [
    (after, Order.AFTER),
    (before, Order.BEFORE),
    (reads_it_first, None),
    (writes_before_it, None),
    (writes_behind_it, None),
    (needs_the_experts, None),
    (twice, None),
]


def ready(steps: Any) -> tuple[Block, BesideStream | None]:
    torch.manual_seed(0)
    block = Block(steps).to(SIM).eval()
    hidden = torch.randn(2, 32).to(SIM)
    return block, run_beside_experts(block, torch.device(SIM), lambda: block(hidden))


@pytest.mark.parametrize(("steps", "order"), CASES, ids=[steps.__name__ for steps, _ in CASES])
@pytest.mark.parametrize("is_inference", [True, False])
def test_what_is_moved_and_that_it_changes_nothing(
    steps: Any, order: Order | None, is_inference: bool
) -> None:
    block, beside = ready(steps)
    assert (beside and beside.orders[block.shared]) is order
    plain = Block(steps).to(SIM).eval()
    plain.load_state_dict(block.state_dict())
    with torch.inference_mode(mode=is_inference), torch.no_grad():
        for tokens in (3, 1, 3, 9):
            hidden = torch.randn(tokens, 32).to(SIM)
            assert torch.equal(block(hidden).cpu(), plain(hidden).cpu())


@pytest.mark.parametrize("steps", [after, before])
def test_neither_waits_for_the_other(steps: Any) -> None:
    """The one that the block calls first stands still; the other one gets through."""
    block, _ = ready(steps)
    first, second = Note(), Note()
    notes = (first, second) if steps is after else (second, first)
    for module, note in zip((block.experts, block.shared), notes, strict=True):
        module.register_forward_pre_hook(
            lambda *_, note=note: note.launch(torch.accelerator.current_stream(SIM))
        )
    first.gate.clear()
    with torch.no_grad():
        out = block(torch.randn(3, 32).to(SIM))
    deadline = time.monotonic() + 60
    while not second.calls and time.monotonic() < deadline:
        time.sleep(0.001)
    assert (first.calls, second.calls) == (0, 1)
    first.gate.set()
    assert out.cpu().isfinite().all()


@pytest.mark.parametrize("steps", [after, before])
def test_a_captured_block_has_both_streams(steps: Any) -> None:
    block, _ = ready(steps)
    hidden, stream = torch.randn(3, 32).to(SIM), torch.Stream(SIM)
    with torch.no_grad():
        graph = torch.accelerator.Graph()
        torch.accelerator.synchronize(SIM)
        with stream, graph:
            out = block(hidden)
        for _ in range(3):
            hidden.copy_(torch.randn(3, 32))
            want = block(hidden).cpu()
            with stream:
                graph.replay()
            stream.synchronize()
            assert torch.equal(out.cpu(), want)


def test_a_model_that_cannot_be_tried_stays_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    model = build_tiny("deepseek_v3")
    model.forward = lambda **_: 1 / 0
    for layer in model.model.layers[1:]:
        layer.mlp.experts = Block(after).experts
    assert run_shared_beside(model, torch.device(SIM)) is None
    assert "ZeroDivisionError" in caplog.text


def test_nothing_outlives_its_last_user() -> None:
    gc.collect()
    gc.disable()
    try:
        block, beside = ready(after)
        with torch.no_grad():
            block(torch.randn(3, 32).to(SIM))
        gone = [weakref.ref(thing) for thing in (block, block.shared, block.experts, beside)]
        del block, beside
        assert not any(thing() for thing in gone)
    finally:
        gc.enable()


def test_with_gradients_everything_stays() -> None:
    block, _ = ready(after)
    streams = []
    block.shared.register_forward_pre_hook(
        lambda *_: streams.append(torch.accelerator.current_stream(SIM))
    )
    hidden = torch.randn(3, 32).to(SIM)
    block.requires_grad_(requires_grad=False)
    block(hidden)
    with torch.no_grad():
        block(hidden)
    assert streams[0] == torch.accelerator.current_stream(SIM) != streams[1]


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_in_it_leaves_no_trace(error: type[BaseException]) -> None:
    """Of Ctrl-C, from the next pass on."""
    block, _ = ready(after)
    stream = torch.accelerator.current_stream(SIM)

    def fail(*_: Any) -> None:
        raise error

    with torch.no_grad():
        hidden = torch.randn(3, 32).to(SIM)
        want = block(hidden).cpu()
        handle = block.shared[1].register_forward_pre_hook(fail)
        with pytest.raises(error):
            block(hidden)
        handle.remove()
        assert torch.equal(block(hidden).cpu(), want)
    assert torch.accelerator.current_stream(SIM) == stream


@pytest.mark.parametrize(
    ("family", "order"), [("deepseek_v3", Order.AFTER), ("qwen2_moe", Order.BEFORE)]
)
def test_shared_experts_of_families(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, order: Order
) -> None:
    monkeypatch.setattr(accelerators, "statistics_file", lambda _: tmp_path / "statistics.json")
    build_tiny(family).save_pretrained(tmp_path / "model")
    logits = []
    options: dict[str, Any] = {"format": "bf16", "precision": "float32", "dtype": torch.float32}
    for device in ("cpu", "sim"):
        with (
            kt_core.load(
                tmp_path / "model", device=device, hot_experts="50%", threads=1, **options
            ) as engine,
            torch.inference_mode(),
        ):
            if engine.accelerators is not None:
                assert not any(map(any, engine.accelerators.statistics().counts))
                beside = engine.accelerators.hybrid.beside
                assert beside is not None
                assert set(beside.orders.values()) == {order}
            logits.append(engine.model(input_ids=PROMPT.to(engine.model.device)).logits.cpu())
    # Some 2^8 sums of float32 one behind the other, in another order on the two devices.
    assert float((logits[0] - logits[1]).abs().max()) <= 2**-16 * float(logits[0].abs().max())
