"""What a profile says of a run: spans that lie where they must, whoever computed, and figures."""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import build_tiny

import kt_core
from kt_core.cli.chat import Chat
from kt_core.cli.main import run_cli
from kt_core.engine import Engine, accelerators
from kt_core.engine.profiler import LAUNCHES, STEPS, Profiler
from kt_core.moe.timeline import Kind, Label, Span, Timeline
from kt_sim.native import NativeDevice
from kt_sim.settings import parse
from sim import target
from sim.stories import STORIES
from sim.target import only_sim

pytestmark = [pytest.mark.sim, only_sim]

PROMPT = "Once upon a time there was"
GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 4, "raw": True}
LAYERS, TOKENS = 4, GREEDY["max_new_tokens"]
SIM = "sim:0"  # torch knows the word once the device is in use
LABEL = Label(Kind.HOT, "sim:0", "something")


@pytest.fixture(autouse=True)
def _forgetful(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerators, "statistics_file", lambda _: tmp_path / "statistics.json")


def load(device: str = "sim", **options: Any) -> Engine:
    chosen = {"hot_experts": "50%", "placement": "random", "threads": 1} | options
    engine = kt_core.load(STORIES, device=device, format="bf16", dtype=torch.float32, **chosen)
    if engine.accelerators:  # the link takes no time here, so that everything would be streamed
        engine.accelerators.hybrid.streamed.rates = None
    return engine


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with load() as loaded:
        yield loaded


def profile_of(engine: Engine) -> Profiler:
    engine.generate("Another story", **GREEDY)  # so that nothing happens for the first time
    with Profiler(engine) as profiler:
        engine.generate(PROMPT, **GREEDY)
    return profiler


def spans_of(profiler: Profiler, kind: Kind) -> list[Span]:
    found = [span for span in profiler.timeline.spans if span.kind is kind]
    return sorted(found, key=lambda span: span.begin_ns)


def lies_within(inner: Span, outer: Span, allowed_ns: int = 0) -> bool:
    begins = outer.begin_ns - allowed_ns <= inner.begin_ns
    return begins and inner.end_ns <= outer.end_ns + allowed_ns


# ---------------------------------------------------------------- the clocks


def test_a_stream_is_placed_on_the_clock_of_the_host() -> None:
    timeline = Timeline([torch.device(SIM)])
    stream = torch.accelerator.current_stream(SIM)
    timeline.begin_step()
    for _ in range(3):
        before = time.perf_counter_ns()
        with timeline.span(stream, LABEL):
            torch.zeros(4, device=SIM).add_(1)
        torch.accelerator.synchronize(SIM)
        after = time.perf_counter_ns()
        (span,) = timeline.settle()
        allowed = timeline.uncertainty_ns
        assert before - allowed <= span.begin_ns <= span.end_ns <= after + allowed


def test_a_span_takes_as_long_as_the_device(device: NativeDevice) -> None:
    """A copy of a MB over a link of 0.1 GB/s."""
    device.configure(**parse("devices=2,memory_gib=0.25,link_gb_s=0.1,link_latency_us=0").native())
    timeline = Timeline([torch.device(SIM)])
    timeline.begin_step()
    source = torch.zeros(1_000_000, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(1_000_000, dtype=torch.uint8, device=SIM)
    with timeline.span(torch.accelerator.current_stream(SIM), LABEL):
        target.copy_(source, non_blocking=True)
    torch.accelerator.synchronize(SIM)
    (span,) = timeline.settle()
    assert span.seconds >= 0.01


def test_what_the_stream_has_not_passed_is_settled_later() -> None:
    from sim.host_calls import Note

    timeline, note = Timeline([torch.device(SIM)]), Note()
    timeline.begin_step()
    stream = torch.accelerator.current_stream(SIM)
    note.gate.clear()
    with timeline.span(stream, LABEL):
        note.launch(stream)
    timeline.add(1, 2, LABEL)
    assert [span.begin_ns for span in timeline.settle()] == [1]
    note.gate.set()
    torch.accelerator.synchronize(SIM)
    assert len(timeline.settle()) == 1
    assert len(timeline.spans) == 2
    assert timeline.settle() == []


# ---------------------------------------------------------------- a run


def test_every_layer_of_every_step_is_there(engine: Engine) -> None:
    profiler = profile_of(engine)
    steps = [*spans_of(profiler, Kind.PREFILL), *spans_of(profiler, Kind.DECODE)]
    assert [step.kind for step in steps] == [Kind.PREFILL] + [Kind.DECODE] * (TOKENS - 1)
    assert [step.step for step in steps] == list(range(TOKENS))
    wanted = [(step, layer) for step in range(TOKENS) for layer in range(LAYERS)]
    for kind in (Kind.LAYER, Kind.HOT, Kind.COLD, Kind.JOIN, Kind.LAUNCH):
        spans = spans_of(profiler, kind)
        assert [(span.step, span.label.layer) for span in spans] == wanted, kind
    assert len(spans_of(profiler, Kind.COPY)) == 2 * len(wanted)


def test_spans_lie_where_they_must(engine: Engine) -> None:
    profiler = profile_of(engine)
    allowed = 2 * profiler.timeline.uncertainty_ns  # each of two steps' clocks may be off
    steps = {s.step: s for k in (Kind.PREFILL, Kind.DECODE) for s in spans_of(profiler, k)}
    layers = spans_of(profiler, Kind.LAYER)
    for before, after in itertools.pairwise(layers):
        assert before.end_ns <= after.begin_ns + allowed
    parts = {kind: spans_of(profiler, kind) for kind in (Kind.HOT, Kind.COLD, Kind.JOIN)}
    for index, layer in enumerate(layers):
        assert lies_within(layer, steps[layer.step])
        for kind, spans in parts.items():
            exact = 0 if kind is not Kind.COLD else allowed
            assert lies_within(spans[index], layer, exact), kind
        assert parts[Kind.HOT][index].end_ns <= parts[Kind.JOIN][index].begin_ns


def test_the_stream_has_no_gaps(engine: Engine) -> None:
    """Layers and what lies between them make a step."""
    profiler = profile_of(engine)
    whole = sum(s.seconds for k in (Kind.PREFILL, Kind.DECODE) for s in spans_of(profiler, k))
    parts = sum(s.seconds for k in (Kind.LAYER, Kind.DENSE) for s in spans_of(profiler, k))
    assert parts == pytest.approx(whole, rel=1e-9)


def test_nothing_is_left_behind(engine: Engine) -> None:
    assert engine.accelerators is not None
    layers = engine.accelerators.hybrid.layers
    before = [layer.kernels for layer in layers]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in engine.model.modules()]
    want = engine.generate(PROMPT, **GREEDY).token_ids
    with Profiler(engine) as profiler:
        assert engine.generate(PROMPT, **GREEDY).token_ids == want
        assert [layer.kernels for layer in layers] != before
    seen = len(profiler.timeline.spans)
    assert engine.generate(PROMPT, **GREEDY).token_ids == want
    assert len(profiler.timeline.spans) == seen
    assert [layer.kernels for layer in layers] == before
    after = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in engine.model.modules()]
    assert after == hooks
    assert all(not layer.kernels[0].take_times() for layer in layers)  # type: ignore[attr-defined]
    assert (
        engine.accelerators.mover.timeline is engine.accelerators.hybrid.streamed.timeline is None
    )


def test_shared_experts_have_a_row(tmp_path: Path) -> None:
    build_tiny("deepseek_v3").save_pretrained(tmp_path / "model")
    with kt_core.load(tmp_path / "model", device="sim", format="bf16", threads=1) as engine:
        assert engine.accelerators is not None
        layers = len(engine.accelerators.hybrid.layers)
        with Profiler(engine) as profiler, torch.inference_mode():
            engine.model(input_ids=torch.tensor([[1, 2]]).to(SIM))
    assert len(spans_of(profiler, Kind.BESIDE)) == layers > 0


def test_while_it_follows_nothing_is_replayed_and_stats_say_why() -> None:
    with load() as engine:
        profile_of(engine)
        assert "has hooks" in (engine.stats().decode.why_eager or "")
        engine.generate(PROMPT, **GREEDY)
        decode = engine.stats().decode
    assert decode.why_eager is None
    assert decode.from_graphs > 0


def test_two_devices_have_a_row_each() -> None:
    with load("sim:0,1") as engine:
        profiler = profile_of(engine)
    rows = {span.label.row for span in spans_of(profiler, Kind.HOT)}
    assert rows == set(profiler.devices) == {"sim:0", "sim:1"}
    times = profiler.report()["time_by_device"]
    assert list(times) == ["cpu", "sim:0", "sim:1"]
    assert all(time["experts_s"] > 0 and time["idle_s"] > 0 for time in times.values())


def test_moves_and_streamed_layers_are_there() -> None:
    with load(placement="adaptive", hot_experts="25%") as engine:
        assert engine.accelerators is not None
        with Profiler(engine) as profiler:
            engine.generate(PROMPT, **(GREEDY | {"max_new_tokens": 60}))
        moved = engine.accelerators.mover
        assert (
            len(spans_of(profiler, Kind.MOVE))
            == (moved.bytes_to_device + moved.bytes_to_host) // engine.kernels[0].bytes_per_expert
        )
        assert spans_of(profiler, Kind.MOVE)
    with kt_core.load(STORIES, device="sim", format="bf16", hot_experts="25%") as engine:
        assert engine.accelerators is not None
        streamed = engine.accelerators.hybrid.streamed
        target.stream_from_a_pair_for_each_expert_on(streamed)
        with Profiler(engine) as profiler:
            engine.generate("The little dog ran to the tree. " * 16, **GREEDY)
        # Small layers: each is one copy.
        assert len(spans_of(profiler, Kind.STREAMED)) == streamed.streamed > 0


def test_what_is_put_off_is_drawn_where_the_host_computes_it() -> None:
    with load(defer=1, hot_experts="10%") as engine:
        profiler = profile_of(engine)
    cold = spans_of(profiler, Kind.COLD)
    # The last layer puts nothing off.
    assert len(cold) == TOKENS * (2 * LAYERS - 1)
    for before, after in itertools.pairwise(cold):
        assert before.begin_ns <= after.begin_ns


def test_a_host_alone_has_layers_and_steps() -> None:
    with load("cpu") as engine:
        profiler = profile_of(engine)
    assert {span.label.row for span in profiler.timeline.spans} == {STEPS, "cpu"}
    assert len(spans_of(profiler, Kind.LAYER)) == TOKENS * LAYERS
    times = profiler.report()["time_by_device"]
    assert list(times) == ["cpu"]
    assert times["cpu"]["experts_s"] > 0
    assert times["cpu"]["idle_s"] is None  # torch computes with the same cores


def test_a_lost_device_ends_the_profile_and_not_more(
    device: NativeDevice, caplog: pytest.LogCaptureFixture
) -> None:
    with load() as engine:
        engine.generate(PROMPT, **GREEDY)
        profiler = Profiler(engine)

        def lose_it() -> None:
            with profiler:
                engine.generate(PROMPT, **GREEDY)
                device.lose(0, "it fell off the bus")
                engine.generate(PROMPT, **GREEDY)

        with pytest.raises(RuntimeError, match="fell off the bus"):
            lose_it()
        device.revive(0)
        assert "the last step is not in the profile" in caplog.text
        assert spans_of(profiler, Kind.DECODE)


# ---------------------------------------------------------------- the command line

MODEL = ["run", str(STORIES), PROMPT, "--raw", "--temperature", "0", "--max-new-tokens", "4"]
ON_SIM = ["--device", "sim", "--hot-experts", "50%", "--threads", "1"]


def complete_events(file: Path) -> list[dict[str, Any]]:
    trace = json.loads(file.read_text(encoding="utf-8"))
    return [event for event in trace["traceEvents"] if event["ph"] == "X"]


def is_nested(events: Sequence[dict[str, Any]]) -> bool:
    """Whether events of one row lie next to each other or within, as viewers need it."""
    open_until: list[int] = []
    for event in events:  # as written: what encloses others comes first
        begin, length = round(1000 * event["ts"]), round(1000 * event["dur"])  # ns
        while open_until and open_until[-1] <= begin:
            open_until.pop()
        end = begin + length
        if open_until and end > open_until[-1]:
            return False
        open_until.append(end)
    return True


def test_the_command_writes_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.json"
    assert run_cli([*MODEL, *ON_SIM, "--json", "--profile", str(file)]) == 0
    report = json.loads(capsys.readouterr().out)
    trace = json.loads(file.read_text(encoding="utf-8"))
    rows = {
        event["tid"]: event["args"]["name"]
        for event in trace["traceEvents"]
        if event["name"] == "thread_name"
    }
    assert list(rows.values())[:4] == [STEPS, LAUNCHES, "cpu", "sim:0"]
    events = complete_events(file)
    assert min(event["ts"] for event in events) == 0
    for row, name in rows.items():
        assert is_nested([event for event in events if event["tid"] == row]), name
    assert {event["cat"] for event in events} >= {"prefill", "decode", "layer", "hot", "dense"}
    assert trace["otherData"]["overlap"] == report["overlap"]
    assert not list(tmp_path.glob(".run*"))


def test_json_has_the_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*MODEL, *ON_SIM, "--json"]
    assert run_cli([*command, "--profile", str(tmp_path / "run.json")]) == 0
    report = json.loads(capsys.readouterr().out)
    decode = report["overlap"]["decode"]
    for figures in (decode, *decode["layers"]):
        assert 0 < figures["host_s"] <= figures["time_s"]
        assert 0 < figures["accelerator_s"] <= figures["time_s"]
        assert figures["ratio"] >= 1
    assert [layer["layer"] for layer in decode["layers"]] == list(range(LAYERS))
    assert set(report["time_by_device"]) == {"cpu", "sim:0"}
    assert run_cli(command) == 0
    without = json.loads(capsys.readouterr().out)
    assert report.keys() - without.keys() == {"overlap"}
    assert without["accelerators"]["hit_rate"] is not None
    times, steps_s = without["time_by_device"], without["steps_s"]
    assert set(times) == {"cpu", "sim:0"}
    assert 0 < times["cpu"]["experts_s"] < steps_s
    assert times["cpu"]["experts_s"] + times["cpu"]["idle_s"] == pytest.approx(steps_s)
    assert 0 < times["sim:0"]["idle_s"] < steps_s
    assert times["sim:0"]["experts_s"] is None  # without a profile there are no events


def test_the_chat_says_what_devices_did(capsys: pytest.CaptureFixture[str]) -> None:
    options = {"temperature": 0.0, "max_new_tokens": 8}
    with load() as engine:
        chat = Chat(engine, system=None, raw=True, options=options)
        chat.handle(PROMPT)
        chat.handle("/stats")
    lines = capsys.readouterr().err.splitlines()
    assert any(re.search(r"cpu computed experts for .* s, sim:0 waited for them", x) for x in lines)
    assert any(re.search(r"experts moved, .* MB to accelerators and .* back", x) for x in lines)


def test_the_status_line_names_all_devices(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli([*MODEL, *ON_SIM]) == 0
    line = capsys.readouterr().err.splitlines()[-1]
    assert "on cpu (" in line
    assert "1 threads) and sim:0 (" in line
    assert "% of the experts' work), peak" in line
