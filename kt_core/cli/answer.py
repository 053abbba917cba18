"""Print what an engine answers, and what it took."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kt_core.cli.output import print_json, progress_bar, remark, write
from kt_core.cli.profile import profiled

if TYPE_CHECKING:
    from kt_core.engine import Completion, Engine, EngineStats, Timing, TokenEvent


def answer(
    engine: Engine,
    prompt: Any,
    *,
    raw: bool,
    options: dict[str, Any],
    profile: Path | None = None,
) -> None:
    """Print one answer as it comes, then its statistics on stderr."""
    with profiled(engine, profile):
        try:
            for event in show_waiting(engine.stream(prompt, raw=raw, **options)):
                write(event.text)
        except KeyboardInterrupt:
            write("\n")
            raise
        write("\n")
    assert event.timing is not None
    if event.finish_reason == "length":
        remark(why_cut(event.timing, options))
    remark(f"{speed(event.timing)}; {loading(engine.stats())}")


def answer_json(
    engine: Engine,
    prompt: Any,
    *,
    raw: bool,
    options: dict[str, Any],
    profile: Path | None = None,
) -> None:
    """Print one answer with its statistics as JSON."""
    with profiled(engine, profile) as profiler, progress_bar("answering"):
        completion = engine.generate(prompt, raw=raw, **options)
    report = _report(completion, engine.stats())
    if profiler is not None:
        report |= profiler.report()
    print_json(report)


def show_waiting(events: Iterator[TokenEvent]) -> Iterator[TokenEvent]:
    """Yield the events; on a terminal, show that the prompt is being read until the first."""
    with progress_bar("reading the prompt"):
        first = next(events)
    yield first
    yield from events


def why_cut(timing: Timing, options: dict[str, Any]) -> str:
    """Say why an answer ended before the model ended it."""
    if timing.new_tokens < options["max_new_tokens"]:
        return "(cut: the model's context is full)"
    return f"(cut after {timing.new_tokens} tokens: --max-new-tokens allows more)"


def speed(timing: Timing) -> str:
    """Describe one answer."""
    plural = "" if timing.prompt_tokens == 1 else "s"
    prompt = f"{timing.prompt_tokens} prompt token{plural} at {timing.prefill_tokens_per_s:.1f}/s"
    new = f"{timing.new_tokens} new"
    if timing.new_tokens > 1:
        new += f" at {timing.decode_tokens_per_s:.1f}/s"
    return f"{prompt}, {new}, first after {timing.ttft_s:.2f} s"


def loading(stats: EngineStats) -> str:
    """Describe how the model was loaded, and who computes."""
    isa = "" if stats.isa is None else f"{stats.isa}, "
    dense = "" if stats.dense_format == "none" else f", dense layers as {stats.dense_format},"
    return (
        f"loaded in {stats.load_s:.1f} s as {stats.format}{dense} on {stats.device} "
        f"({isa}{stats.threads} threads){_beside(stats)}, "
        f"peak {stats.peak_memory_bytes / 1e9:.2f} GB"
    )


def at_work(stats: EngineStats) -> list[str]:
    """Describe what host and accelerators have done together; nothing where there are none."""
    if (done := stats.accelerators) is None:
        return []
    host, first = stats.device, done.devices[0]
    host_s, idle_s = stats.time_by_device[host].experts_s, stats.time_by_device[first].idle_s
    moved = (
        f"{done.moved_experts} experts moved, {_megabytes(done.link_bytes_to_device)} to "
        f"accelerators and {_megabytes(done.link_bytes_to_host)} back; {done.streamed_layers} "
        f"layers streamed, {_megabytes(done.link_bytes_streamed)}"
    )
    if host_s is None or idle_s is None:
        return [moved]
    return [
        f"of {stats.steps_s:.2f} s, {host} computed experts for {host_s:.2f} s, {first} waited "
        f"for them {idle_s:.2f} s",
        moved,
    ]


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def _beside(stats: EngineStats) -> str:
    """Name the accelerators, and the share of the experts' work that was theirs."""
    if stats.accelerators is None:
        return ""
    rate = stats.accelerators.hit_rate
    share = "" if rate is None else f" ({rate:.0%} of the experts' work)"
    return f" and {', '.join(stats.accelerators.devices)}{share}"


def _report(completion: Completion, stats: EngineStats) -> dict[str, Any]:
    timing = completion.timing
    return {
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "prompt_tokens": timing.prompt_tokens,
        "new_tokens": timing.new_tokens,
        "prefill_tokens_per_s": timing.prefill_tokens_per_s,
        "decode_tokens_per_s": timing.decode_tokens_per_s,
        "ttft_s": timing.ttft_s,
        **asdict(stats),
    }
