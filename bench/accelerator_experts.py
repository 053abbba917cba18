"""Time the experts of one layer on an accelerator, against what its memory and its units allow.

Run it where there is one: ``python bench/accelerator_experts.py --device cuda``. Each row is the
median over replays of a graph of several calls, over several layers with routing of their own, so
that weights come from memory and nothing but the kernels is timed.

The limit of a call is the longer of two times: reading the packed bytes of the experts that are
active, at the rate of a large copy on the device (bytes read and bytes written both count), and the
operations at the rate of a large product of bfloat16 matrices. Both are measured first.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from kt_core import plugins
from kt_core.hardware.graphs import capture
from kt_core.interfaces import ExpertDevice, ExpertKernel
from kt_core.testing.backend_harness import random_layer
from kt_core.types import ActivationPrecision, MoeSpec

SHAPES = {
    "qwen3-30b-a3b": (MoeSpec(num_experts=128, hidden_size=2048, intermediate_size=768), 8),
    "deepseek-v3": (MoeSpec(num_experts=256, hidden_size=7168, intermediate_size=2048), 8),
    "mixtral-8x7b": (MoeSpec(num_experts=8, hidden_size=4096, intermediate_size=14336), 2),
}
FORMATS = ("bf16", "int8-g128", "int4-g128", "int4-g32", "fp8", "mxfp4", "nvfp4")
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
# Packed once, and copied to all experts: bytes of an expert are like those of any other.
DISTINCT = 2
CALLS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One format with one number of tokens."""

    format: str
    tokens: int
    us_per_layer: float
    gb_per_s: float
    tflop_per_s: float
    percent_of_limit: float


def say(line: str) -> None:
    """Print at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def event() -> torch.Event:
    """Make an event that notes the time."""
    return torch.Event(device=torch.accelerator.current_accelerator(), enable_timing=True)


def seconds_of(run: Any, repeats: int) -> float:
    """Return the median of the device's time for ``run()``."""
    times = []
    for _ in range(repeats):
        begin, end = event(), event()
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return median(times)


def limits(device: torch.device) -> tuple[float, float]:
    """Return bytes per second of a large copy, and operations per second of a large product."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device=device).bfloat16() for _ in range(2))
    target.copy_(source)
    torch.mm(a, b)
    copy_s = seconds_of(lambda: target.copy_(source), 10)
    product_s = seconds_of(lambda: torch.mm(a, b), 10)
    return 2 * source.numel() / copy_s, 2 * 8192**3 / product_s


def loaded(
    opened: ExpertDevice, spec: MoeSpec, format_name: str, layers: int
) -> list[ExpertKernel]:
    """Make kernels that hold all experts of their layers."""
    descriptor = plugins.load().formats.get(format_name).descriptor
    one = MoeSpec(
        num_experts=DISTINCT,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
    )
    with plugins.load().backends.get("cpu").open("cpu") as host:
        packer = host.expert_kernel(one, descriptor)
        for index, weights in random_layer(one).items():
            packer.load(index, weights)
        packed = [packer.packed(index).clone() for index in range(DISTINCT)]
    kernels = []
    for _ in range(layers):
        kernel = opened.expert_kernel(spec, descriptor, precision=ActivationPrecision.BF16)
        for expert in range(spec.num_experts):
            kernel.load_packed(expert, packed[expert % DISTINCT])
        kernels.append(kernel)
    return kernels


def routing(spec: MoeSpec, tokens: int, top_k: int, device: torch.device) -> Any:
    """Return hidden states, different random experts for each token, and weights."""
    ids = torch.rand(tokens, spec.num_experts).argsort(dim=1)[:, :top_k]
    hidden = torch.randn(tokens, spec.hidden_size).bfloat16()
    return hidden.to(device), ids.to(device), torch.rand(tokens, top_k).to(device)


def time_calls(kernels: list[ExpertKernel], arguments: list[Any], device: torch.device) -> float:
    """Return seconds of one call, from replays of a graph of all."""

    def run() -> None:
        for index, call in enumerate(arguments):
            kernels[index % len(kernels)].submit(*call).wait()

    with torch.no_grad():
        run()  # compiles
        with capture(device) as graph:
            run()
    graph.replay()
    seconds = seconds_of(graph.replay, 10) / len(arguments)
    graph.reset()
    return seconds


def main() -> int:
    """Measure, print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="a backend of kt")
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    torch.manual_seed(0)
    spec, top_k = SHAPES[options.shape]
    backend = plugins.load().backends.get(options.device)
    info = backend.devices()[0]
    opened = backend.open(info.name)
    device = torch.device(info.torch_device)
    bytes_per_s, operations_per_s = limits(device)
    say(
        f"{info.description}, torch {torch.__version__}: copies {bytes_per_s / 1e12:.2f} TB/s, "
        f"bf16 products {operations_per_s / 1e12:.0f} TFLOP/s; {options.shape}, "
        f"{spec.num_experts} experts, {options.layers} layers"
    )
    say(f"{'format':>12} {'tokens':>6} {'us/layer':>9} {'GB/s':>7} {'TFLOP/s':>8} {'of limit':>8}")
    rows = []
    for name in options.formats.split(","):
        kernels = loaded(opened, spec, name, options.layers)
        for tokens in map(int, options.tokens.split(",")):
            arguments = [routing(spec, tokens, top_k, device) for _ in range(CALLS)]
            active = sum(len(ids.unique()) for _, ids, _ in arguments) / CALLS
            seconds = time_calls(kernels, arguments, device)
            read = active * kernels[0].bytes_per_expert
            operations = 6 * tokens * top_k * spec.hidden_size * spec.intermediate_size
            least = max(read / bytes_per_s, operations / operations_per_s)
            row = Row(
                format=name,
                tokens=tokens,
                us_per_layer=seconds * 1e6,
                gb_per_s=read / seconds / 1e9,
                tflop_per_s=operations / seconds / 1e12,
                percent_of_limit=100 * least / seconds,
            )
            rows.append(row)
            say(
                f"{row.format:>12} {row.tokens:>6} {row.us_per_layer:>9.1f} {row.gb_per_s:>7.0f} "
                f"{row.tflop_per_s:>8.1f} {row.percent_of_limit:>7.0f}%",
            )
        del kernels
    if options.json:
        text = json.dumps([asdict(row) for row in rows], indent=1)
        Path(options.json).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
