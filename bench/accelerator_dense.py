"""Time packed dense layers on an accelerator, beside torch's own in bfloat16.

Run it where there is one: ``python bench/accelerator_dense.py --device cuda``. Each row is the
median over replays of a graph that calls several layers of one shape in turn, which together are
larger than caches; torch's are timed by turns with ours.

The limit is the longer of two times: reading the packed weights and the rows and writing the
results, at the rate of a large copy on the device (both directions count), and the operations at
the rate of a large product of bfloat16 matrices. Both are measured first.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch.nn.functional import linear

from kt_core import plugins
from kt_core.hardware.graphs import capture
from kt_core.types import ActivationPrecision, LinearSpec

SHAPES = {
    "deepseek-v3 o_proj": LinearSpec(in_features=16384, out_features=7168),
    "deepseek-v3 kv_b_proj": LinearSpec(in_features=512, out_features=32768),
    "qwen3-30b-a3b q_proj": LinearSpec(in_features=2048, out_features=4096),
    "qwen3-30b-a3b lm_head": LinearSpec(in_features=2048, out_features=151936),
}
FORMATS = ("int8", "int4-g128", "int4-g32", "fp8", "mxfp4", "bf16")
ROWS = (1, 2, 8, 16, 64, 512, 4096)
LAYERS_BYTES = 512 << 20  # of all layers in bfloat16: caches hold a tenth


def say(line: str) -> None:
    """Print at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def seconds_of(run: Callable[[], Any]) -> float:
    """Return the device's time for ``run()``."""
    where = torch.accelerator.current_accelerator()
    begin, end = (torch.Event(device=where, enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end) / 1e3)


def limits(device: torch.device) -> tuple[float, float]:
    """Return bytes per second of a large copy, and operations per second of a large product."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device=device).bfloat16() for _ in range(2))
    target.copy_(source)
    torch.mm(a, b)
    copy_s = median(seconds_of(lambda: target.copy_(source)) for _ in range(10))
    product_s = median(seconds_of(lambda: torch.mm(a, b)) for _ in range(10))
    return 2 * source.numel() / copy_s, 2 * 8192**3 / product_s


def captured(calls: Sequence[Callable[[], Any]], device: torch.device) -> Any:
    """Return a graph of all calls, which have been made once: that compiles."""
    with torch.inference_mode():
        for call in calls:
            call()
        with capture(device) as graph:
            for call in calls:
                call()
    graph.replay()
    return graph


def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="a backend of kt")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    options = parser.parse_args()
    torch.manual_seed(0)
    registry = plugins.load()
    backend = registry.backends.get(options.device)
    info = backend.devices()[0]
    device = torch.device(info.torch_device)
    opened = backend.open(info.name)
    bytes_per_s, operations_per_s = limits(device)
    say(
        f"{info.description}, torch {torch.__version__}: copies {bytes_per_s / 1e12:.2f} TB/s, "
        f"bf16 products {operations_per_s / 1e12:.0f} TFLOP/s"
    )
    say(f"{'shape':>22} {'format':>10} {'rows':>5} {'us':>8} {'of limit':>8} {'torch bf16 us':>13}")
    for shape in options.shapes.split(","):
        spec = SHAPES[shape]
        numbers = spec.in_features * spec.out_features
        layers = max(2, LAYERS_BYTES // (2 * numbers))
        source = torch.randn(spec.out_features, spec.in_features).bfloat16() * 0.02
        plain = [source.to(device) for _ in range(layers)]
        for name in options.formats.split(","):
            descriptor = registry.formats.get(name).descriptor
            with registry.backends.get("cpu").open("cpu") as host:
                packer = host.linear_kernel(spec, descriptor)
                packer.load(source)
                packed = packer.packed()
            kernels = []
            for _ in range(layers):
                kernel = opened.linear_kernel(spec, descriptor, precision=ActivationPrecision.BF16)
                kernel.load_packed(packed)
                kernels.append(kernel)
            for rows in map(int, options.rows.split(",")):
                x = torch.randn(rows, spec.in_features, device=device).bfloat16()
                ours = captured([partial(kernel.apply, x) for kernel in kernels], device)
                torchs = captured([partial(linear, x, weight) for weight in plain], device)
                times = [(seconds_of(ours.replay), seconds_of(torchs.replay)) for _ in range(10)]
                ours_s, torchs_s = (median(column) / layers for column in zip(*times, strict=True))
                moved = kernels[0].size_bytes + 2 * rows * (spec.in_features + spec.out_features)
                least = max(moved / bytes_per_s, 2 * rows * numbers / operations_per_s)
                say(
                    f"{shape:>22} {name:>10} {rows:>5} {ours_s * 1e6:>8.1f} "
                    f"{100 * least / ours_s:>7.0f}% {torchs_s * 1e6:>13.1f}"
                )
                ours.reset()
                torchs.reset()
    return 0


if __name__ == "__main__":
    sys.exit(main())
