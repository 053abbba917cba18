"""How fast are a layer's cold experts brought to an accelerator, for a long prompt?

``python bench/streamed_layers.py`` prints two tables in Markdown, then JSON. *Staging*: how fast
the host puts a layer's packed experts into pinned memory, all threads of its pool at once
(``ExpertKernel.gather_packed``) against an expert at a time, copied by torch with as many threads.
*Layers*: how long it takes until a slot on the accelerator holds the layer, as it is done and an
expert at a time, each with a copy, an allocation and a change of the table of its own, against what
its bytes take on the link. Both ways by turns in one run, medians.

The accelerator is a simulated one unless ``--device`` names another. Its streams are threads, whose
copies would want the host's processors and its memory, as those of a real link do not: here copies
of experts take the time of a link of 25 GB/s, and copy nothing (``ClockedKernel``).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command line: kt_core.cli.main

import torch

from kt_core import plugins
from kt_core.interfaces import ExpertDevice, ExpertKernel
from kt_core.moe.streamed_layers import StreamedLayers
from kt_core.packed import ExpertLayout
from kt_core.testing.backend_harness import random_layer
from kt_core.types import ActivationPrecision, Format, MoeSpec
from kt_sim.decoded import DecodedExperts
from kt_sim.device import launch, start
from kt_sim.kernel import SimExpertKernel
from kt_sim.settings import Settings

SHAPES = {
    "Qwen3-30B-A3B": MoeSpec(num_experts=128, hidden_size=2048, intermediate_size=768),
    # 16 of its 256 experts.
    "DeepSeek-V3": MoeSpec(num_experts=16, hidden_size=7168, intermediate_size=2048),
}
PROBE_BYTES = 256 << 20
LINK_GB_S = 25


class ClockedKernel(SimExpertKernel):
    """Takes experts as the simulated device does, and their time, without a copy."""

    def _put(self, experts: Sequence[int], packed: torch.Tensor) -> None:
        size = packed.numel()
        held = torch.empty(size, dtype=torch.uint8, device=self.device)
        launch(lambda _: (float(size), 0.0, True), [held], "a copy that copies nothing")
        places = held.view(len(experts), -1).unbind()
        self._point(experts, [place.data_ptr() for place in places])
        self._packed.update(zip(experts, places, strict=True))


class ExpertByExpert(StreamedLayers):
    """What there was before layers went in pieces."""

    def _bring(self, host: ExpertKernel, slot: Any, experts: Sequence[int], layer: int) -> int:
        for expert in experts:
            packed = host.packed(expert)
            staged = self._stage(packed.numel())
            staged.copy_(packed)
            with self._copies:
                slot.kernel.load_packed(expert, staged)
            self._stages.append((staged, self._copies.record_event()))
        return len(experts) * packed.numel()


def loaded(host: ExpertDevice, spec: MoeSpec, weight_format: Format) -> ExpertKernel:
    """Make a kernel that holds all experts; the bytes of all are those of one."""
    kernel = host.expert_kernel(spec, weight_format)
    kernel.load(0, random_layer(MoeSpec(
        num_experts=1, hidden_size=spec.hidden_size, intermediate_size=spec.intermediate_size
    ))[0])  # fmt: skip
    for expert in range(1, spec.num_experts):
        kernel.load_packed(expert, kernel.packed(0))
    return kernel


def medians(ways: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Return the seconds of each, warmed up, by turns."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: median(found) for name, found in times.items()}


def staging(kernel: ExpertKernel, repeats: int) -> dict[str, float]:
    """Return bytes per second into pinned memory of four pieces, or of four experts."""
    spec = kernel.spec
    size = ExpertLayout.of(spec, kernel.weight_format).size_bytes
    per_piece = max(1, (32 << 20) // size)
    room = [torch.empty(per_piece * size, dtype=torch.uint8, pin_memory=True) for _ in range(4)]

    def together() -> None:
        for number, first in enumerate(range(0, spec.num_experts, per_piece)):
            experts = range(first, min(first + per_piece, spec.num_experts))
            kernel.gather_packed(experts, room[number % 4][: len(experts) * size])

    def one_by_one() -> None:
        for expert in range(spec.num_experts):
            room[expert % 4][:size].copy_(kernel.packed(expert))

    total = spec.num_experts * size
    found = medians({"before": one_by_one, "now": together}, repeats)
    return {name: total / seconds for name, seconds in found.items()}


def slot_kernel(accelerator: ExpertDevice, spec: MoeSpec, weight_format: Format) -> ExpertKernel:
    """Make an empty kernel of the accelerator, or its clocked stand-in."""
    if accelerator.info.name.startswith("sim"):
        where, precision = torch.device(accelerator.info.torch_device), ActivationPrecision.BF16
        return ClockedKernel(where, spec, weight_format, precision, DecodedExperts(0))
    return accelerator.expert_kernel(spec, weight_format)


def layer_times(kernel: ExpertKernel, accelerator: ExpertDevice, repeats: int) -> dict[str, float]:
    """Return the seconds until a slot holds the layer, in a row of four."""
    where = torch.device(accelerator.info.torch_device)

    def filling(streamed: StreamedLayers) -> Callable[[], None]:
        one, two = (slot_kernel(accelerator, kernel.spec, kernel.weight_format) for _ in range(2))
        for _ in range(4):
            streamed.add(kernel, (one, two))

        def fill_all() -> None:
            for layer in range(4):
                streamed._fill(layer)
            torch.accelerator.synchronize(where)

        return fill_all

    ways = {"before": ExpertByExpert(where), "now": StreamedLayers(where)}
    found = medians({name: filling(streamed) for name, streamed in ways.items()}, repeats)
    return {name: seconds / 4 for name, seconds in found.items()}


def link_rate(accelerator: ExpertDevice) -> float:
    """Return the bytes per second of a large copy of pinned memory, or what is simulated."""
    if accelerator.info.name.startswith("sim"):
        return LINK_GB_S * 1e9
    where = torch.device(accelerator.info.torch_device)
    source = torch.empty(PROBE_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(PROBE_BYTES, dtype=torch.uint8, device=where)

    def copy() -> None:
        target.copy_(source, non_blocking=True)
        torch.accelerator.synchronize(where)

    return PROBE_BYTES / medians({"copy": copy}, 5)["copy"]


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="sim", help="a backend of kt")
    parser.add_argument("--format", default="int4-g32")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    registry = plugins.load()
    weight_format = registry.formats.get(options.format).descriptor
    backend = registry.backends.get(options.device)
    if options.device == "sim":
        # The bytes of a launch count as read from the device's memory: that is the link here.
        start(Settings(memory_gb_s=LINK_GB_S))
    accelerator = backend.open(backend.devices()[0].name)
    link = link_rate(accelerator)
    rows: list[dict[str, Any]] = []
    for shape, spec in SHAPES.items():
        size = ExpertLayout.of(spec, weight_format).size_bytes
        for threads in options.threads:
            torch.set_num_threads(threads)
            with registry.backends.get("cpu").open("cpu", threads=threads) as host:
                kernel = loaded(host, spec, weight_format)
                row: dict[str, Any] = {"shape": shape, "threads": threads}
                row["layer_bytes"] = spec.num_experts * size
                row["staging_bytes_per_s"] = staging(kernel, options.repeats)
                row["layer_s"] = layer_times(kernel, accelerator, options.repeats)
                rows.append(row)
    out = sys.stdout.write
    out("| shape | MB of an expert | threads | staging before, GB/s | now |\n")
    out("|---|---|---|---|---|\n")
    for row in rows:
        rates = [row["staging_bytes_per_s"][way] / 1e9 for way in ("before", "now")]
        size = row["layer_bytes"] / SHAPES[row["shape"]].num_experts / 1e6
        out(f"| {row['shape']} | {size:.2f} | {row['threads']} |")
        out(f" {rates[0]:.2f} | {rates[1]:.2f} |\n")
    out("\n| shape | MB of the layer | threads | before, ms | now | the link alone |\n")
    out("|---|---|---|---|---|---|\n")
    for row in rows:
        times = [row["layer_s"][way] * 1e3 for way in ("before", "now")]
        out(f"| {row['shape']} | {row['layer_bytes'] / 1e6:.0f} | {row['threads']} |")
        out(f" {times[0]:.1f} | {times[1]:.1f} | {row['layer_bytes'] / link * 1e3:.1f} |\n")
    out("\n" + json.dumps({"link_bytes_per_s": link, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
