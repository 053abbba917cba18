"""Do host and accelerator work at the same time, on one layer?

``python bench/overlap.py`` makes a model of random weights with a few layers like those of
Qwen3-235B-A22B, loads it on a simulated device, and prints a table in Markdown, then JSON: for
shares of hot experts and numbers of tokens, how long the experts of a layer take, and what they may
take at most: 1.10 x max(host's part, accelerator's part) + the cost of launching. Ends with 1 where
one takes longer.

All four are of passes of the same model with the same tokens, by turns: with all pairs; with those
of cold experts alone; with those of hot experts alone; with none. So the parts are what each side
takes when it has the machine to itself. Of a layer's passes the lower quartile counts, since what
else the machine does only adds; of the layers, the median.

A simulated device computes on the host's cores, which the host's experts want. Here it does not:
the kernel of its experts takes the time that a device would, from the bytes and operations of the
experts that are asked for, and computes nothing (``ClockedKernel``). Rates are of a data sheet
(``kt_sim.settings``: GeForce RTX 4090); ``--slower`` divides them, so that both parts are of one
length, which is where waiting costs most. Attention and routers are computed for real, on the host,
before and after. Its streams are threads, and Python launches: they get a core of their own, which
the host's experts do not use, as they would on a machine with a real device.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command line: kt_core.cli.main

import torch
from torch import nn

import kt_core
from kt_core import hardware, plugins
from kt_core.engine.engine import Engine
from kt_core.engine.overlap import LayerCall, layer_calls
from kt_core.engine.profiler import Profiler
from kt_core.hookspecs import hookimpl
from kt_core.interfaces import Backend
from kt_core.moe.hybrid_experts import HybridExperts
from kt_core.packed import ExpertLayout
from kt_core.types import ActivationPrecision, Format, MoeSpec
from kt_sim.backend import SimBackend, SimDevice
from kt_sim.device import launch, start
from kt_sim.kernel import SimExpertKernel
from kt_sim.settings import Settings

ALLOWED = 1.10
DEVICE = "clocked:0"
# Qwen3-235B-A22B (config.json): hidden 4096, experts of 1536, 8 per token; 16 of its 128 experts,
# so that a few layers fit anywhere. Attention is small: it is computed by the host.
LAYERS, EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, VOCABULARY = 3, 16, 8, 4096, 1536, 512


@dataclass(frozen=True, slots=True)
class _Cost:
    """What a device would move and compute for some pairs; it computes nothing."""

    spec: MoeSpec
    weight_format: Format
    is_16_bit: bool

    def __call__(
        self,
        hidden: torch.Tensor,
        expert_ids: torch.Tensor,
        table: torch.Tensor,
        out: torch.Tensor,
    ) -> tuple[float, float, bool]:
        """See ``kt_sim.device.launch``."""
        ids = expert_ids[expert_ids >= 0].to(torch.int64)
        here = ids[table[ids] != 0]
        experts = len(set(here.tolist()))
        packed_bytes = ExpertLayout.of(self.spec, self.weight_format).size_bytes
        moved = experts * packed_bytes + hidden.nbytes + out.nbytes
        out.zero_()
        return float(moved), 2.0 * here.numel() * self.spec.weights_per_expert, self.is_16_bit


class ClockedKernel(SimExpertKernel):
    """Holds experts as the simulated device does, and takes its time without computing."""

    def compute(
        self,
        hidden: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        precision: ActivationPrecision,
    ) -> torch.Tensor:
        """See ``PackedExpertKernel.compute``; the result is zeros."""
        del weights
        out = torch.empty(hidden.shape, dtype=hidden.dtype, device=self.device)
        cost = _Cost(self.spec, self.weight_format, precision is ActivationPrecision.BF16)
        launch(cost, [hidden, expert_ids, self.table, out], "experts")
        return out


class _ClockedDevice(SimDevice):
    def expert_kernel(
        self,
        spec: MoeSpec,
        weight_format: Format,
        *,
        precision: ActivationPrecision = ActivationPrecision.AUTO,
    ) -> SimExpertKernel:
        where = torch.device(self.info.torch_device)
        return ClockedKernel(where, spec, weight_format, precision, self._decoded)


class _ClockedBackend(SimBackend):
    name = "clocked"

    def open(self, device: str, *, threads: int | None = None) -> SimDevice:
        opened = super().open(device, threads=threads)
        return _ClockedDevice(opened.info, opened.capabilities)


class _Plugin:
    @hookimpl
    def kt_register_backends(self, register: Callable[[Backend], None]) -> None:
        register(_ClockedBackend())


def make_model(directory: Path) -> None:
    """Write the model."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "moe_intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": VOCABULARY,
    }
    config = Qwen3MoeConfig(**sizes, dtype="bfloat16")
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    Qwen3MoeForCausalLM(config).save_pretrained(directory)
    torch.set_default_dtype(torch.float32)


@contextmanager
def only(layers: Sequence[HybridExperts], *, hot: bool, cold: bool) -> Iterator[None]:
    """Let layers compute the pairs of some experts only; the others become nobody's."""

    def hook(wanted: torch.Tensor, _: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, ids, weights = arguments
        return hidden, torch.where(wanted[ids], ids, -1), weights

    handles = []
    for layer in layers:
        # Copied here: in the hook, Python would wait for the stream in every layer.
        wanted = [hot if is_hot else cold for is_hot in layer.is_moved()]
        mask = torch.tensor(wanted).to(layer.device)
        handles.append(layer.register_forward_pre_hook(partial(hook, mask)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


COLUMNS = ("host_ms", "accelerator_ms", "launch_ms", "layer_ms", "ratio", "of_allowed")
PASSES = {
    "all": {"hot": True, "cold": True},
    "cold": {"hot": False, "cold": True},
    "hot": {"hot": True, "cold": False},
    "none": {"hot": False, "cold": False},
}


def measure(engine: Engine, tokens: int, repeats: int) -> dict[str, list[LayerCall]]:
    """Return the calls of each kind of pass, warmed up."""
    assert engine.accelerators is not None
    layers = engine.accelerators.hybrid.layers
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(VOCABULARY, (1, tokens), generator=generator).to(engine.model.device)
    kinds: list[str] = []
    spans = []
    for _ in range(repeats + 1):
        for kind, which in PASSES.items():
            with only(layers, **which), Profiler(engine) as profiler, torch.inference_mode():
                engine.model(input_ids=ids, use_cache=False)
            step = len(kinds)
            kinds.append(kind)
            spans += [replace(span, step=step) for span in profiler.timeline.spans]
    found: dict[str, list[LayerCall]] = {kind: [] for kind in PASSES}
    by_step = {step: kind for step, kind in enumerate(kinds) if step >= len(PASSES)}
    for step, kind in by_step.items():
        found[kind] += layer_calls([span for span in spans if span.step == step])
    return found


def row(engine: Engine, tokens: int, repeats: int) -> dict[str, Any]:
    """Return what one line of the table says, in milliseconds: medians over layers."""
    calls = measure(engine, tokens, repeats)
    layers = [one_layer(calls, layer) for layer in range(LAYERS)]
    found = {name: median(layer[name] for layer in layers) for name in layers[0]}
    return {"tokens": tokens, **found, "worst": max(layer["of_allowed"] for layer in layers)}


def one_layer(calls: dict[str, list[LayerCall]], layer: int) -> dict[str, float]:
    """Return the lower quartiles of a layer's passes, in milliseconds, and how they compare."""

    def middle(kind: str, name: str) -> float:
        found: list[float] = [
            1e3 * getattr(call, name) for call in calls[kind] if call.layer == layer
        ]
        return quantiles(found, n=4)[0] if len(found) > 1 else sum(found)

    host, accelerator = middle("cold", "host_s"), middle("hot", "accelerator_s")
    launching, time_ms = middle("none", "time_s"), middle("all", "time_s")
    longer = max(host, accelerator)
    return {
        "host_ms": host,
        "accelerator_ms": accelerator,
        "launch_ms": launching,
        "layer_ms": time_ms,
        "ratio": time_ms / longer,
        "of_allowed": time_ms / (ALLOWED * longer + launching),
    }


@contextmanager
def on_cores(cores: Sequence[int]) -> Iterator[None]:
    """Let threads that start in the block, and this one until its end, run on these cores only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def call_host(engine: Engine) -> None:
    """Make a call of the host's experts, and with it the thread that computes them."""
    kernel = engine.kernels[0]
    hidden = torch.zeros(1, HIDDEN)
    ids = torch.full((1, 1), -1)
    kernel.host_call(hidden, ids, torch.zeros(1, 1), torch.empty_like(hidden))


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure all lines, with cores for the host's experts, and others for all else."""
    cores = sorted(os.sched_getaffinity(0))
    own, others = cores[-options.threads :], cores[: -options.threads]
    if not others:
        sys.exit(f"{len(cores)} cores: --threads {options.threads} leaves none for the device")
    os.sched_setaffinity(0, others)
    start(Settings())
    torch.zeros(1, device="sim:0").cpu()  # the stream's thread starts here, on these cores
    registry = plugins.load(_Plugin())
    rows = []
    with tempfile.TemporaryDirectory(prefix="kt-overlap-") as directory:
        make_model(Path(directory))
        for hot in options.hot:
            with on_cores(own):
                loaded = kt_core.load(
                    directory,
                    device=DEVICE,
                    format="int4",
                    hot_experts=f"{hot}%",
                    placement="random",
                    threads=options.threads,
                    registry=registry,
                )
            with loaded as engine:
                with on_cores(own):
                    call_host(engine)
                assert engine.accelerators is not None
                engine.accelerators.hybrid.streamed.rates = None  # no layer streams
                for slower in options.slower:
                    start(slowed(Settings(), slower))
                    for tokens in options.tokens:
                        found = row(engine, tokens, options.repeats)
                        rows.append({"hot_percent": hot, "slower": slower, **found})
                        sys.stderr.write(json.dumps(rows[-1]) + "\n")
    return rows


def slowed(settings: Settings, factor: float) -> Settings:
    """Return a device whose memory and arithmetic are slower; the link stays."""
    return replace(
        settings,
        memory_gb_s=settings.memory_gb_s / factor,
        float32_tflops=settings.float32_tflops / factor,
        float16_tflops=settings.float16_tflops / factor,
    )


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows in Markdown."""
    lines = [
        "| hot | device | tokens | host ms | accelerator ms | launch ms | layer ms | ratio |"
        " of what is allowed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for line in rows:
        numbers = [line[name] for name in COLUMNS]
        lines.append(
            f"| {line['hot_percent']} % | 1/{line['slower']:g} | {line['tokens']} | "
            + " | ".join(f"{number:.2f}" for number in numbers)
            + " |"
        )
    return "\n".join(lines) + "\n"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    cores = hardware.detect(with_accelerators=False).cpu.physical_cores
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--hot", type=int, nargs="+", default=[25, 50, 75], help="per cent")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--slower", type=float, nargs="+", default=[1, 96])
    parser.add_argument("--repeats", type=int, default=5, help="passes over all layers")
    parser.add_argument("--threads", type=int, default=max(1, len(cores) - 1))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and say whether every line is within what is allowed."""
    options = parse(arguments)
    rows = run(options)
    sys.stdout.write(table(rows))
    report = {"cpu": hardware.detect().cpu.name, "rows": rows}
    sys.stdout.write(json.dumps(report, indent=2) + "\n")
    return int(any(line["of_allowed"] > 1 for line in rows))


if __name__ == "__main__":
    sys.exit(main())
