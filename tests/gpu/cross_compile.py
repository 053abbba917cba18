"""Compile the kernels that a call would start, for a GPU that is not there; print what came out.

A program, because Triton either interprets or compiles, for a whole process::

    python tests/gpu/cross_compile.py sm_90,gfx942 int4-g128,bf16

The calls are ``kt_triton.launch``'s own, through Triton's own binding of arguments; only the driver
is replaced, by one that names the target. One line of JSON for each kernel.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from kt_core.packed import LinearLayout
from kt_core.quant import BUILT_IN_FORMATS
from kt_core.types import SILU, Activation, ActivationKind, ActivationPrecision, LinearSpec, MoeSpec
from kt_triton import launch
from kt_triton.layer import DenseLayer, Layer

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
    "gfx1201": GPUTarget("hip", "gfx1201", 32),
}
# Bytes of shared memory that a program may have: CUDA's programming guide, technical
# specifications; AMD's table of accelerator and GPU hardware (LDS).
SHARED_BYTES = {
    "sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10,
    "gfx942": 64 << 10, "gfx950": 160 << 10, "gfx1100": 64 << 10, "gfx1201": 64 << 10,
}  # fmt: skip
KERNELS = (
    "plan_blocks", "gate_up_few", "down_few", "gate_up", "down", "combine", "linear_few", "linear",
)  # fmt: skip
# Qwen3-30B-A3B's experts, and queries.
SHAPE = MoeSpec(num_experts=128, hidden_size=2048, intermediate_size=768)
TOP_K = 8
DENSE = LinearSpec(in_features=2048, out_features=4096, has_bias=True)
FORMATS = {f.descriptor.name: f.descriptor for f in BUILT_IN_FORMATS}
TYPES = {ActivationPrecision.BF16: torch.bfloat16, ActivationPrecision.FLOAT32: torch.float32}

MATRIX_UNIT = re.compile(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma_\w+|v_wmma_\w+")
# 16 bytes at once; `cg` copies no fewer.
WIDE_LOAD = re.compile(r"ld\.global[.\w]*v4\.b32|cp\.async\.cg|(global|buffer)_load_(b128|dwordx4)")
SPILLS = re.compile(r"\.vgpr_spill_count:\s*(\d+)")


@dataclass(frozen=True)
class Compiled:
    """What a kernel became."""

    kernel: str
    target: str
    weight_format: str
    rows: int
    matrix_unit: str | None
    has_wide_loads: bool
    spilled_registers: int | None
    binary_bytes: int
    shared_bytes: int
    shared_limit_bytes: int


class Recorder:
    """Stands in a kernel's place, takes its launches, and compiles them."""

    def __init__(self, kernel: Any, seen: Callable[[str, Any], None]) -> None:
        """Take the kernel, and who is told its name and what it became."""
        self._kernel, self._seen = kernel, seen

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        """Bind the arguments as a launch does, and compile; start nothing."""

        def start(*args: Any, **options: Any) -> None:
            found = self._kernel.run(*args, grid=grid, warmup=True, **options)
            self._seen(self._kernel.__name__, found)

        return start


def expert_call(
    name: str, tokens: int, precision: ActivationPrecision, activation: Activation = SILU
) -> Callable[[], None]:
    """Return a call of a layer's experts."""
    spec = MoeSpec(
        num_experts=SHAPE.num_experts,
        hidden_size=SHAPE.hidden_size,
        intermediate_size=SHAPE.intermediate_size,
        activation=activation,
        has_bias=activation is not SILU,
    )
    hidden = torch.empty(tokens, spec.hidden_size, dtype=TYPES[precision])
    ids = torch.empty(tokens, TOP_K, dtype=torch.int64)
    table = torch.empty(spec.num_experts, dtype=torch.int64)
    call = launch.Call(hidden, ids, torch.empty(tokens, TOP_K), table, torch.empty_like(hidden))
    layer = Layer.of(spec, FORMATS[name])
    return lambda: launch.compute(layer, call, precision)


def dense_call(name: str, rows: int, precision: ActivationPrecision) -> Callable[[], None]:
    """Return a call of a dense layer, with a bias."""
    x = torch.empty(rows, DENSE.in_features, dtype=TYPES[precision])
    out = torch.empty(rows, DENSE.out_features, dtype=TYPES[precision])
    packed = torch.empty(LinearLayout.of(DENSE, FORMATS[name]).size_bytes, dtype=torch.uint8)
    layer = DenseLayer.of(DENSE, FORMATS[name])
    return lambda: launch.compute_dense(layer, x, packed, out)


def compile_call(target: str, name: str, rows: int, call: Callable[[], None]) -> Iterator[Compiled]:
    """Compile what a call needs: of experts of a format with so many tokens, or of a layer."""
    index = list(TARGETS).index(target)
    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: index,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: TARGETS[target],
        )
    )
    found: list[tuple[str, Any]] = []
    originals = {kernel: getattr(launch, kernel) for kernel in KERNELS}
    launch.shared_memory_bytes = lambda _: SHARED_BYTES[target]
    launch.is_nvidia = lambda _: target.startswith("sm_")
    for kernel, original in originals.items():
        setattr(launch, kernel, Recorder(original, lambda *seen: found.append(seen)))
    call()
    for kernel, original in originals.items():
        setattr(launch, kernel, original)
    for kernel, compiled in found:
        text = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
        unit, spills = MATRIX_UNIT.search(text), SPILLS.search(text)
        binary = compiled.asm.get("cubin") or compiled.asm["hsaco"]
        yield Compiled(
            kernel=kernel,
            target=target,
            weight_format=name,
            rows=rows,
            matrix_unit=unit and unit.group(),
            has_wide_loads=bool(WIDE_LOAD.search(text)),
            spilled_registers=int(spills.group(1)) if spills else None,
            binary_bytes=len(binary),
            shared_bytes=compiled.metadata.shared,
            shared_limit_bytes=SHARED_BYTES[target],
        )


def activations() -> list[Activation]:
    """Every formula, with parameters."""
    finite = {"limit": 7.0, "up_limit": 7.0, "alpha": 1.702}
    return [Activation(kind=kind, **finite) for kind in ActivationKind]


def calls_of(word: str) -> Iterator[tuple[str, int, Callable[[], None]]]:
    """Make format, rows and call of everything that a word stands for."""
    bf16, float32 = ActivationPrecision.BF16, ActivationPrecision.FLOAT32
    if word == "activations":
        for activation in activations():
            yield "bf16", 1, expert_call("bf16", 1, bf16, activation)
        return
    name, precision, tokens = word, bf16, (1, 128, 4096)
    if word == "float32":
        name, precision, tokens = "int4-g32-min", float32, (1, 64)
    for rows in tokens:
        yield name, rows, expert_call(name, rows, precision)
    for rows in (1, 16, 32, 64, 512, 4096):  # each may be cut in another way
        yield name, rows, dense_call(name, rows, precision)


def main() -> None:
    """Compile ``formats`` for ``targets``; ``float32`` and ``activations`` are words for those."""
    targets, words = (argument.split(",") for argument in sys.argv[1:3])
    for target in targets:
        for word in words:
            for name, rows, call in calls_of(word):
                for compiled in compile_call(target, name, rows, call):
                    print(json.dumps(asdict(compiled) | {"word": word}), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
