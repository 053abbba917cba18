"""How far are predictions from what others published about KTransformers? Prints Markdown.

The roofline is ours, the program that was measured is not: six numbers that say what part of the
hardware it reaches are fitted, for every set-up on the *other* set-ups alone, so that no row is
predicted with constants that have seen it. docs/planning.md has the result and what it is worth.

Sources: kvcache-ai/ktransformers at 15c624d, doc/en/kt-kernel/{MiniMax-M2.1, Qwen3-Coder-Next,
experts-sched}-Tutorial.md and Kimi-K2-Thinking-Native.md; doc/en/DeepseekR1_V3_tutorial.md.
Hardware from vendors' sheets: Intel ARK (Xeon Gold 6454S, 8 channels of DDR5-4800 a socket; the
Platinum 8488C is not in it, its platform has the same), AMD (EPYC 9355, 12 channels; the tutorial
says DDR5-5600), NVIDIA (RTX 4090 and 4090 D 1008 GB/s, RTX 5090 1792 GB/s; dense bf16 165, 147 and
209 TFLOP/s), PCIe 4.0 and 5.0 x16.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

from kt_core import plugins
from kt_core.engine.outline import outline_model
from kt_core.plan import Card, CardEfficiency, Formats, Machine, ModelOutline, Speed
from kt_core.plan.machine import described_expert_rates, described_rates
from kt_core.plan.roofline import decode_times, prefill_times

_SOCKET_XEON, _SOCKET_EPYC = 8 * 4800e6 * 8, 12 * 5600e6 * 8
_PCIE4, _PCIE5 = 31.5e9, 63.0e9


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One machine with one model.

    Attributes:
        name: For the table.
        group: What is left out together when constants are fitted for one of it.
        model: Name of a config.
        experts: Format of the routed experts.
        dense: Format of the linear layers of the rest; None for bf16.
        sockets_bytes_per_s: Of all sockets together, by the sheet.
        cores: Of all sockets.
        card: The accelerators.
        hot_fraction: Experts on them, as published, or as many as leave 12 GB of each free.
        top_k: Where it is not the model's.
        decode: Tokens per second by context.
        stream_from: Tokens from which the tutorial streams weights to the accelerator.
        prefill: Tokens per second by prompt.
    """

    name: str
    group: str
    model: str
    experts: str
    dense: str | None
    sockets_bytes_per_s: float
    cores: int
    card: Card
    hot_fraction: float = 0.0
    top_k: int | None = None
    stream_from: int = 1 << 30
    decode: tuple[tuple[int, float], ...] = ()
    prefill: tuple[tuple[int, float], ...] = ()


def _card(count: int, gigabytes: float, read: float, teraflops: float, link: float) -> Card:
    return Card(
        count=count, memory_bytes=int(gigabytes * 2**30), read_bytes_per_s=read * 1e9,
        ops_per_s=teraflops * 1e12, link_bytes_per_s=link,
    )  # fmt: skip


def _minimax(cards: int, is_epyc: bool, hot: float, *rows: tuple[int, float, float]) -> Setup:
    card = _card(cards, 32, 1792, 209, _PCIE5) if is_epyc else _card(cards, 48, 1008, 165, _PCIE4)
    name = "5090, 2 x EPYC 9355" if is_epyc else "4090, 2 x Xeon 8488C"
    return Setup(
        name=f"MiniMax-M2.1 FP8, {cards} x {name}", group=f"minimax {name}", model="minimax-m2",
        experts="fp8", dense="fp8",
        sockets_bytes_per_s=2 * (_SOCKET_EPYC if is_epyc else _SOCKET_XEON),
        cores=64 if is_epyc else 96, card=card, hot_fraction=hot, stream_from=4096,
        decode=tuple((n, decode) for n, _, decode in rows),
        prefill=tuple((n, prefill) for n, prefill, _ in rows),
    )  # fmt: skip


def _kimi(cards: int, hot: int, *rows: tuple[int, float]) -> Setup:
    return Setup(
        name=f"Kimi-K2-Thinking INT4, {cards} x 4090, 2 x Xeon 8488C", group="kimi",
        model="kimi-k2", experts="int4", dense=None, sockets_bytes_per_s=2 * _SOCKET_XEON,
        cores=96, card=_card(cards, 48, 1008, 165, _PCIE4), hot_fraction=hot / 384, stream_from=400,
        prefill=rows,
    )  # fmt: skip


def _deepseek(sockets: int, top_k: int, decode: float, prefill: float) -> Setup:
    return Setup(
        name=f"DeepSeek-V3 Q4_K_M, {top_k} experts, 4090D, {sockets} x Xeon 6454S",
        group="deepseek", model="deepseek-v3", experts="int4", dense="int4",
        sockets_bytes_per_s=sockets * _SOCKET_XEON, cores=32 * sockets,
        card=_card(1, 24, 1008, 147, _PCIE4), top_k=top_k, decode=((500, decode),),
        prefill=((500, prefill),),
    )  # fmt: skip


SETUPS = (
    _minimax(1, False, 0.16, (2048, 129, 21.8), (8192, 669, 20.9), (32768, 1385, 18.5)),
    _minimax(2, False, 0.37, (2048, 139, 23.6), (8192, 1013, 23.3), (32768, 2269, 21.6)),
    _minimax(1, True, 0.07, (2048, 408, 32.1), (8192, 1196, 31.4), (32768, 2540, 27.6)),
    _minimax(2, True, 0.20, (2048, 414, 35.9), (8192, 1847, 35.5), (32768, 4007, 33.1)),
    Setup(
        name="Qwen3-Coder-Next FP8, 1 x 5090, 2 x EPYC 9355", group="qwen",
        model="qwen3-next-80b-a3b", experts="fp8", dense="fp8",
        sockets_bytes_per_s=2 * _SOCKET_EPYC, cores=64, card=_card(1, 32, 1792, 209, _PCIE5),
        hot_fraction=100 / 512, stream_from=2048,
        decode=((64, 75.9), (2048, 75.6), (8192, 69.1), (32768, 51.7)),
        prefill=((64, 362), (2048, 1746), (8192, 2407), (32768, 6233)),
    ),
    _kimi(1, 0, (2048, 53), (8192, 184), (30000, 290)),
    _kimi(2, 8, (2048, 85), (8192, 294), (32768, 529)),
    _kimi(4, 30, (2048, 118), (8192, 415), (32768, 818)),
    _kimi(8, 80, (2048, 130), (8192, 435), (32768, 1055)),
    _deepseek(1, 8, 8.73, 54.21),
    _deepseek(1, 6, 10.303, 65.14),
    _deepseek(2, 8, 12.208, 82.94),
    _deepseek(2, 6, 13.69, 97.32),
)  # fmt: skip
KINDS = ("decode", "prompt on the host", "streamed prompt")
# Qwen3-Next-80B-A3B FP8 on 4 x 4090 and Xeon 6454S, strategy "random", tokens/s of ShareGPT by the
# share of experts on the accelerator.
BY_HOT_SHARE = (
    53.01, 56.63, 58.75, 62.86, 66.81, 70.38, 71.33, 74.40, 79.71, 88.82, 112.61,
)  # fmt: skip


@dataclass(frozen=True)
class Constants:
    """What part of the hardware a program reaches.

    Attributes:
        experts: By what the host's time for experts is longer than our kernels would take, with
            one token.
        prompt_experts: The same with many.
        layer_s: Seconds per layer for starting and meeting.
        link: Part of the link's bandwidth.
        host_read: Part of host memory's bandwidth, while streaming.
        operations: Part of the accelerator's peak.
    """

    experts: float
    prompt_experts: float
    layer_s: float
    link: float
    host_read: float
    operations: float


class Predictor:
    """Predictions of every row, with constants that are given."""

    def __init__(self) -> None:
        """Read the models."""
        self._registry = plugins.load()
        self._outlines: dict[tuple[str, int | None], ModelOutline] = {}
        backend, info = self._registry.find_device("cpu")
        self._device = backend.open(info.name)

    def outline(self, setup: Setup) -> ModelOutline:
        """Return the model of a set-up, with its number of experts per token."""
        key = (setup.model, setup.top_k)
        if key not in self._outlines:
            outline = outline_model(setup.model, self._registry)
            if setup.top_k:
                layers = (replace(layer, top_k=setup.top_k) for layer in outline.expert_layers)
                outline = replace(outline, expert_layers=tuple(layers))
            self._outlines[key] = outline
        return self._outlines[key]

    def seconds(self, setup: Setup, constants: Constants, kind: str, tokens: int) -> float:
        """Return the seconds of a token or of a prompt."""
        outline = self.outline(setup)
        formats = Formats(
            experts=self._registry.formats.get(setup.experts).descriptor,
            dense=self._registry.formats.get(setup.dense).descriptor if setup.dense else None,
        )
        host = described_rates(read_bytes_per_s=setup.sockets_bytes_per_s, cores=setup.cores)
        speed = Speed(
            machine=Machine(memory_bytes=1 << 50, cores=setup.cores, host=host, card=setup.card),
            experts=described_expert_rates(host, formats.experts),
            packed=tuple(
                self._device.expert_bytes(layer.spec, formats.experts)
                for layer in outline.expert_layers
            ),
            dense_format=formats.dense,
            hot_fraction=setup.hot_fraction,
            card=CardEfficiency(
                link=constants.link,
                host_read=constants.host_read,
                operations=constants.operations,
                layer_s=constants.layer_s,
                recomputes_cache=False,
            ),
            stream_from=setup.stream_from,
            expert_time_factor=constants.experts if kind == "decode" else constants.prompt_experts,
        )
        if kind == "decode":
            return decode_times(outline, speed, tokens).total_s
        return prefill_times(outline, speed, tokens).total_s / tokens


def rows_of(setups: Sequence[Setup], kind: str) -> Iterator[tuple[Setup, int, float]]:
    """Yield set-up, tokens and published tokens per second of one of ``KINDS``."""
    for setup in setups:
        for tokens, speed in setup.decode if kind == "decode" else setup.prefill:
            is_streamed = tokens >= setup.stream_from
            if kind == "decode" or is_streamed == (kind == "streamed prompt"):
                yield setup, tokens, speed


def fit(predictor: Predictor, setups: Sequence[Setup]) -> Constants:
    """Return the constants of the least mean absolute log error, kind by kind."""

    def error(constants: Constants, kind: str) -> float:
        return fmean(
            abs(math.log(predictor.seconds(setup, constants, kind, tokens) * speed))
            for setup, tokens, speed in rows_of(setups, kind)
        )

    best = Constants(1.0, 1.0, 0.0, 0.5, 0.5, 0.5)
    factors = [1.2**k for k in range(14)]
    grids: dict[str, list[dict[str, float]]] = {
        "decode": [
            {"experts": experts, "layer_s": micros * 1e-6}
            for experts in factors
            for micros in (10, 20, 40, 60, 80, 120, 160, 200, 250, 300)
        ],
        "prompt on the host": [{"prompt_experts": experts} for experts in factors],
        "streamed prompt": [
            {"link": 0.1 * link, "host_read": 0.02 * 1.4**read, "operations": 0.05 * part}
            for link in range(2, 11)
            for read in range(12)
            for part in range(1, 15, 2)
        ],
    }
    for kind, grid in grids.items():
        candidates = [replace(best, **values) for values in grid]
        best = min(candidates, key=lambda constants: error(constants, kind))
    return best


def main() -> int:
    """Print the tables."""
    predictor = Predictor()
    groups = sorted({setup.group for setup in SETUPS})
    fitted = {
        group: fit(predictor, [setup for setup in SETUPS if setup.group != group])
        for group in groups
    }
    own = CardEfficiency()
    ours = Constants(1.0, 1.0, own.layer_s, own.link, own.host_read, own.operations)
    write = sys.stdout.write
    everything: list[float] = []
    for kind in KINDS:
        write(f"\n| {kind} | tokens | published | predicted | error | kt's own constants |\n")
        write("|---|---|---|---|---|---|\n")
        errors: list[float] = []
        for setup, tokens, speed in rows_of(SETUPS, kind):
            constants = fitted[setup.group]
            predicted = 1 / predictor.seconds(setup, constants, kind, tokens)
            bound = 1 / predictor.seconds(setup, ours, kind, tokens)
            errors.append(abs(predicted / speed - 1))
            write(
                f"| {setup.name} | {tokens} | {speed:.4g} | {predicted:.4g} | "
                f"{predicted / speed - 1:+.0%} | {bound:.4g} |\n"
            )
        everything += errors
        write(f"\nmedian error {median(errors):.0%}, largest {max(errors):.0%}\n")
    write(f"\nmedian error of all {len(everything)}: {median(everything):.0%}\n")
    write("\n| share on the accelerator | published | predicted | error |\n|---|---|---|---|\n")
    slow, fast = 1 / BY_HOT_SHARE[0], 1 / BY_HOT_SHARE[-1]
    for tenth, speed in list(enumerate(BY_HOT_SHARE))[1:-1]:
        predicted = 1 / (fast + (slow - fast) * (1 - tenth / 10))
        write(f"| {tenth / 10:.0%} | {speed} | {predicted:.1f} | {predicted / speed - 1:+.0%} |\n")
    for group, constants in fitted.items():
        write(f"\n{group}: {constants}")
    write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
