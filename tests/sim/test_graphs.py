"""Graphs: what was captured is what is replayed, host functions included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from kt_sim.native import NativeDevice
from sim.host_calls import Note
from sim.target import only_sim

pytestmark = [pytest.mark.sim, only_sim]


def capture(step: object, *, stream: torch.Stream | None = None) -> torch.accelerator.Graph:
    graph = torch.accelerator.Graph()
    with stream or torch.Stream("sim"), graph:
        assert callable(step)
        step()
    return graph


def replay(graph: torch.accelerator.Graph) -> None:
    graph.replay()
    torch.accelerator.synchronize()


def test_replays_compute_anew_with_host_functions_in_order() -> None:
    given, answer = (torch.zeros(2, 2).pin_memory() for _ in range(2))
    x, weight = torch.zeros(2, 2, device="sim"), (2 * torch.eye(2)).to("sim")
    note, stream = Note(), torch.Stream("sim")

    def step() -> None:
        x.copy_(given, non_blocking=True)
        answer.copy_(torch.softmax(x @ weight, dim=-1) * 3, non_blocking=True)
        note.launch(stream, 9)

    graph = capture(step, stream=stream)
    assert note.calls == 0
    assert bool((answer == 0).all())
    for value in (1.0, -2.0):
        given.copy_(torch.tensor([[value, 0], [0, value]]))
        replay(graph)
        want = torch.softmax(2 * given, dim=-1) * 3
        assert torch.equal(answer, want)
    assert note.arguments == [9, 9]


def test_a_whole_module_is_captured() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0).eval()
    x = torch.randn(1, 5, 16)
    with torch.no_grad():
        want = model(x)
        model.to("sim")
        given, out = x.to("sim"), torch.empty(1, 5, 16, device="sim")
        model(given)
        torch.accelerator.synchronize()
        graph = capture(lambda: out.copy_(model(given)))
        replay(graph)
    torch.testing.assert_close(out.cpu(), want)


def test_memory_of_a_graph_is_its_own() -> None:
    """A temporary of the graph may not be given to anybody: the next replay writes to it."""
    x = torch.ones(50_000, device="sim")
    out = torch.zeros(50_000, device="sim")
    graph = capture(lambda: out.copy_((x + 1) * 2))
    others = [torch.full((50_000,), 5.0, device="sim") for _ in range(20)]
    replay(graph)
    assert out[0].item() == 4
    assert all(bool((other == 5).all()) for other in others)


def test_memory_of_a_graph_is_given_back_with_it() -> None:
    torch.accelerator.synchronize()
    torch.accelerator.empty_cache()
    before = torch.accelerator.memory_reserved(0)
    graph = capture(lambda: torch.ones(50_000, device="sim") * 2)
    graph.reset()
    torch.accelerator.empty_cache()
    assert torch.accelerator.memory_reserved(0) == before


def test_streams_fork_and_join() -> None:
    x = torch.ones(4, device="sim")
    out = torch.zeros(4, device="sim")
    first, second = torch.Stream("sim"), torch.Stream("sim")

    def step() -> None:
        second.wait_stream(first)
        with second:
            half = x * 10
        other = x + 1
        first.wait_stream(second)
        out.copy_(half + other)

    graph = capture(step, stream=first)
    for value in (1.0, 3.0):
        x.fill_(value)
        replay(graph)
        assert out.tolist() == [value * 11 + 1] * 4


def test_a_stream_that_does_not_join_spoils_the_graph() -> None:
    x = torch.ones(4, device="sim")
    first, second = torch.Stream("sim"), torch.Stream("sim")

    def step() -> None:
        second.wait_stream(first)
        with second:
            x.add_(1)

    graph = capture(step, stream=first)
    with pytest.raises(RuntimeError, match="not waited for before the capture ended"):
        graph.replay()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda x: x.sum().item(), r"reading a number .* cannot be captured"),
        (lambda x: x.cpu(), r"a copy that the host waits for .* cannot be captured"),
        (lambda x: x.copy_(torch.ones(4)), r"a copy that the host waits for .* cannot be captured"),
        (lambda x: x.nonzero(), r"operator aten::nonzero .* cannot be captured"),
        (lambda _: torch.accelerator.synchronize(), r"synchronising the device cannot be captured"),
        (lambda _: torch.accelerator.current_stream().synchronize(), r"synchronising its stream"),
    ],
)
def test_what_the_host_waits_for_is_refused(what: object, message: str) -> None:
    x = torch.ones(4, device="sim")
    torch.accelerator.synchronize()
    graph = torch.accelerator.Graph()
    assert callable(what)
    with pytest.raises(RuntimeError, match=message), torch.Stream("sim"), graph:
        what(x)
    with pytest.raises(RuntimeError, match="cannot be replayed, its capture failed"):
        graph.replay()
    assert x.sum().item() == 4  # and the device goes on


def test_the_default_stream_cannot_be_captured() -> None:
    with pytest.raises(RuntimeError, match="default stream cannot be captured"):
        torch.accelerator.Graph().capture_begin()


def test_random_numbers_are_new_in_every_replay() -> None:
    out = torch.zeros(8, device="sim")
    graph = capture(out.normal_)
    replay(graph)
    first = out.cpu()
    replay(graph)
    assert not torch.equal(out.cpu(), first)


def test_replays_leave_nothing_behind() -> None:
    x, out = torch.ones(1000, device="sim"), torch.zeros(1000, device="sim")
    note, stream = Note(), torch.Stream("sim")

    def step() -> None:
        out.copy_(x * 2 + 1)
        note.launch(stream)

    graph = capture(step, stream=stream)
    replay(graph)
    before = torch.accelerator.memory_allocated(0), torch.accelerator.memory_reserved(0)
    for _ in range(50):
        replay(graph)
    assert note.calls == 51
    assert before == (torch.accelerator.memory_allocated(0), torch.accelerator.memory_reserved(0))


def test_a_lost_device_replays_nothing(device: NativeDevice) -> None:
    x = torch.ones(4, device="sim")
    graph = capture(lambda: x.add_(1))
    device.lose(0, "it fell off the bus")
    with pytest.raises(RuntimeError, match="sim:0 is lost: it fell off the bus"):
        graph.replay()
    device.revive(0)
    replay(graph)
    assert x.tolist() == [2, 2, 2, 2]


def test_a_graph_can_be_printed(tmp_path: Path) -> None:
    x = torch.ones(4, device="sim")
    graph = capture(lambda: x.add_(1))
    graph.debug_dump(str(tmp_path / "graph"))
    assert (tmp_path / "graph").read_text(encoding="utf-8") == "lane 0: operator aten::add\n"
