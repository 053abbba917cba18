"""How fast are packed dense layers, beside the machine's memory and beside torch?

For each shape, format and number of rows: the median time of one call from Python, the packed
bytes it reads per second and the part of the read bandwidth that is (with few rows that is the
limit), operations per second, and how many times as long ``torch.nn.Linear`` in bf16 takes. As many
layers as weigh four times the last-level cache take turns, so that weights come from memory. Rounds
of kt and of torch alternate; each begins with a pause, in which the other's threads fall asleep,
and with calls that do not count. Bandwidth is measured before every row. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import torch
from torch import nn

from kt_core import __version__, hardware
from kt_core.interfaces import ExpertDevice, WeightFormat
from kt_core.plugins import load
from kt_core.types import LinearSpec

SHAPES = {"attention projection": (2048, 4096), "lm_head": (2048, 151936)}
COLD_FACTOR = 4  # times the last-level cache
UNKNOWN_CACHE_BYTES = 64 << 20
PAUSE_S = 0.01
WARM_CALLS = 2


def calls(work: Iterator[Callable[[], Any]], seconds: float) -> list[float]:
    """Return how many seconds each call took, in turns over the layers."""
    time.sleep(PAUSE_S)
    for _ in range(WARM_CALLS):
        next(work)()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        one = next(work)
        start = time.perf_counter()
        one()
        times.append(time.perf_counter() - start)
    return times


def layers_for(size_bytes: int) -> int:
    """Return how many layers of this size no cache can hold."""
    cache_bytes = hardware.last_level_cache_bytes() or UNKNOWN_CACHE_BYTES
    return max(2, -(-COLD_FACTOR * cache_bytes // size_bytes))


def some_weight(spec: LinearSpec) -> torch.Tensor:
    """Make a matrix; which numbers it holds changes no time."""
    return torch.randn(spec.out_features, 1).bfloat16() * torch.randn(spec.in_features).bfloat16()


def packed_work(
    device: ExpertDevice, spec: LinearSpec, weight_format: WeightFormat, x: torch.Tensor
) -> tuple[Iterator[Callable[[], Any]], int]:
    """Make packed layers; return calls in turns, and the bytes of one layer."""
    weight = some_weight(spec)
    size_bytes = device.linear_bytes(spec, weight_format.descriptor)
    kernels = []
    for _ in range(layers_for(size_bytes)):
        kernels.append(device.linear_kernel(spec, weight_format.descriptor))
        kernels[-1].load(weight)
    return cycle([lambda kernel=kernel: kernel.apply(x) for kernel in kernels]), size_bytes


def torch_work(spec: LinearSpec, x: torch.Tensor) -> Iterator[Callable[[], Any]]:
    """Make torch's layers of the same shape; return calls in turns."""
    size_bytes = 2 * spec.in_features * spec.out_features
    layers = []
    for _ in range(layers_for(size_bytes)):
        layers.append(nn.Linear(spec.in_features, spec.out_features, bias=False, device="meta"))
        layers[-1].weight = nn.Parameter(some_weight(spec), requires_grad=False)
    return cycle([lambda layer=layer: layer(x) for layer in layers])


def measure(
    device: ExpertDevice,
    name: str,
    weight_format: WeightFormat,
    rows: int,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Measure one row of the table."""
    inputs, outputs = SHAPES[name]
    spec = LinearSpec(in_features=inputs, out_features=outputs)
    x = torch.randn(rows, inputs).bfloat16()
    limits = device.measure_limits()
    ours, size_bytes = packed_work(device, spec, weight_format, x)
    theirs = torch_work(spec, x)
    our_times: list[float] = []
    ratios = []
    for _ in range(options.rounds):
        mine = calls(ours, options.seconds)
        other = calls(theirs, options.seconds)
        our_times += mine
        ratios.append(statistics.median(other) / statistics.median(mine))
    seconds = statistics.median(our_times)
    read = size_bytes / seconds
    return {
        "layer": name,
        "in_features": inputs,
        "out_features": outputs,
        "format": weight_format.descriptor.name,
        "rows": rows,
        "us_per_call": round(1e6 * seconds, 1),
        "gb_per_s": round(read / 1e9, 2),
        "fraction_of_read": round(read / limits.read_bytes_per_s, 3) if limits else None,
        "gflop_per_s": round(2e-9 * rows * inputs * outputs / seconds, 1),
        "torch_bf16_ratio": round(statistics.median(ratios), 2),
    }


def overhead(device: ExpertDevice, weight_format: WeightFormat) -> float:
    """Return the microseconds of a call that has next to nothing to compute."""
    spec = LinearSpec(in_features=64, out_features=64)
    kernel = device.linear_kernel(spec, weight_format.descriptor)
    kernel.load(torch.randn(64, 64))
    x = torch.randn(1, 64).bfloat16()
    return round(1e6 * statistics.median(calls(cycle([lambda: kernel.apply(x)]), 0.2)), 2)


def main() -> None:
    """Measure every case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--format", default="int8,int4,bf16")
    parser.add_argument("--layers", default=",".join(SHAPES), help="of: " + ", ".join(SHAPES))
    parser.add_argument("--rows", default="1,16,512")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.1, help="of one side in one round")
    options = parser.parse_args()
    registry = load()
    formats = [registry.formats.get(name) for name in options.format.split(",")]
    found = []
    with (
        registry.backends.get("cpu").open("cpu", threads=options.threads) as device,
        torch.inference_mode(),
    ):
        torch.set_num_threads(device.threads)
        for name in options.layers.split(","):
            for weight_format in formats:
                for rows in map(int, options.rows.split(",")):
                    found.append(measure(device, name, weight_format, rows, options))
                    sys.stderr.write(f"{found[-1]}\n")
        report = {
            "machine": {
                "cpu": hardware.detect(with_accelerators=False).cpu.name,
                "last_level_cache_bytes": hardware.last_level_cache_bytes(),
                "system": platform.platform(),
                "torch": torch.__version__,
                "kt": __version__,
            },
            "threads": device.threads,
            "instruction_set": device.capabilities.instruction_set,
            "overhead_us": overhead(device, formats[0]),
            "results": found,
        }
    sys.stdout.write(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
