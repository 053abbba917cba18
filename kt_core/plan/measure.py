"""Measure this machine once, in some seconds, and remember it.

Nothing here knows a model: the dense rates are those of torch's matrix products, the cost of a call
is that of a block of small operators such as transformer layers are made of.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, TypeVar

from kt_core import __version__, hardware
from kt_core.errors import NotEnoughMemoryError
from kt_core.interfaces import ExpertDevice, Progress, WeightFormat, no_progress
from kt_core.plan.machine import ExpertRates, HostRates
from kt_core.plan.outline import ExpertLayer

if TYPE_CHECKING:
    import torch
    from torch import nn

    from kt_core.bench.routing import Call

Rates = TypeVar("Rates", HostRates, ExpertRates)

# Of weights for the single-token product; several matrices, so that no cache holds the next one.
_DENSE_BYTES = 512 << 20
_MATRIX_COLUMNS = 2048
_BATCH = 256
_RUNS = 15
# Packed experts to go round in: more than caches hold, on the machines we know.
_EXPERT_BYTES = 384 << 20
_EXPERT_SECONDS = 0.4
_VERSION = 1  # of what is measured; a file of another one is measured again


def host_rates(
    device: ExpertDevice,
    dtype: str,
    cache_folder: Path,
    *,
    is_renewed: bool = False,
    progress: Progress = no_progress,
) -> HostRates:
    """Return what this machine can do, from the cache where it has been measured before.

    Args:
        device: Who computes the experts, with the threads that it will compute them with.
        dtype: Of the dense part, such as ``bfloat16``.
        cache_folder: Where results are kept.
        is_renewed: Measure, whatever is there.
        progress: Told what is being done.

    Raises:
        NotEnoughMemoryError: There is no gigabyte to measure with.
    """
    file = cache_folder / "machine" / f"{_key(device, dtype)}.json"
    known = None if is_renewed else _read(file, HostRates)
    if known is None:
        progress("measuring this machine", None)
        known = measure_host(device, dtype)
        _write(file, known)
    return known


def expert_rates(
    device: ExpertDevice,
    weight_format: WeightFormat,
    layer: ExpertLayer,
    cache_folder: Path,
    *,
    is_renewed: bool = False,
    progress: Progress = no_progress,
) -> ExpertRates:
    """Return how fast this machine computes experts of one shape; arguments as ``host_rates``."""
    facts = (repr(layer.spec), layer.top_k, weight_format.descriptor.name)
    file = cache_folder / "machine" / f"{_key(device, *facts)}.json"
    known = None if is_renewed else _read(file, ExpertRates)
    if known is None:
        progress(f"measuring experts as {weight_format.descriptor.name}", None)
        known = measure_experts(device, weight_format, layer)
        _write(file, known)
    return known


def measure_experts(
    device: ExpertDevice, weight_format: WeightFormat, layer: ExpertLayer
) -> ExpertRates:
    """Time one layer of experts of this shape, as many as caches do not hold."""
    from kt_core.bench.layers import PackedLayers
    from kt_core.bench.timing import repeat

    size = device.expert_bytes(layer.spec, weight_format.descriptor)
    # A call must not find what the one before left: twice what it takes, at least.
    fewest = max(2 * layer.top_k, -(-_EXPERT_BYTES // (size * layer.spec.num_experts)))
    experts = min(max(fewest, -(-_EXPERT_BYTES // size)), layer.spec.num_experts)
    layers = max(1, -(-_EXPERT_BYTES // (size * experts)))
    spec = replace(layer.spec, num_experts=experts)
    top_k = min(layer.top_k, experts)
    packed = PackedLayers(device, weight_format, spec, top_k=top_k, layers=layers)
    rates = []
    for tokens in (1, _BATCH):
        hidden = packed.hidden(tokens)
        active: list[int] = []

        def prepare(tokens: int = tokens, active: list[int] = active) -> Call:
            call = packed.next_call(tokens)
            active.append(call.num_active)
            return call

        def compute(call: Call, hidden: torch.Tensor = hidden) -> object:
            return packed.compute(call, hidden)

        seconds = median(repeat(prepare, compute, seconds=_EXPERT_SECONDS))
        amount = (
            fmean(active) * size if tokens == 1 else tokens * top_k * packed.operations_per_pair
        )
        rates.append(amount / seconds)
    return ExpertRates(read_bytes_per_s=rates[0], ops_per_s=rates[1])


def measure_host(device: ExpertDevice, dtype: str) -> HostRates:
    """Measure, while nothing else is computed; errors as for ``host_rates``."""
    import torch

    needed = _DENSE_BYTES + (1 << 29)
    if (available := hardware.available_memory_bytes()) < needed:
        msg = (
            f"measuring this machine takes {needed / 1e9:.1f} GB, {available / 1e9:.1f} GB are "
            "available; close other programs, or say what it can do: --bandwidth and --cores"
        )
        raise NotEnoughMemoryError(msg)
    torch_dtype: torch.dtype = getattr(torch, dtype)
    with torch.inference_mode():
        read, dense_ops = _dense_rates(torch_dtype)
        matmul_s, call_s = _call_costs(torch_dtype)
    # The first one meets memory that has rested, which virtual machines serve faster for a while.
    limits = [device.measure_limits() for _ in range(3)][-1]
    return HostRates(
        # A device that knows no limits has those that its host's torch reaches, at least.
        read_bytes_per_s=limits.read_bytes_per_s if limits else read,
        int8_ops_per_s=limits.int8_ops_per_s if limits else dense_ops,
        bf16_ops_per_s=limits.bf16_ops_per_s if limits else dense_ops,
        dense_read_bytes_per_s=read,
        dense_ops_per_s=dense_ops,
        matmul_s=matmul_s,
        call_s=call_s,
    )


def _key(device: ExpertDevice, *what: object) -> str:
    """What the result depends on, as a file name."""
    import torch

    machine = hardware.detect(with_accelerators=False)
    facts = (
        _VERSION, __version__, torch.__version__, machine.cpu.name, machine.cpu.logical_cpus,
        machine.memory.total_bytes, device.info.name, device.capabilities.instruction_set,
        device.threads, torch.get_num_threads(), what, os.environ.get("OMP_WAIT_POLICY"),
    )  # fmt: skip
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:24]


def _read(file: Path, kind: type[Rates]) -> Rates | None:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return kind(**{field.name: float(values[field.name]) for field in fields(kind)})
    except (OSError, ValueError, KeyError, TypeError):
        return None  # never measured, or not by us: measure


def _write(file: Path, rates: HostRates | ExpertRates) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}")
    with partial.open("w", encoding="utf-8") as stream:
        json.dump(asdict(rates), stream, indent=2)
        stream.flush()
        os.fsync(stream.fileno())
    partial.rename(file)


def _dense_rates(dtype: torch.dtype) -> tuple[float, float]:
    """Return bytes per second for one token and operations per second for many."""
    import torch
    from torch.nn import functional

    rows = 4 * _MATRIX_COLUMNS
    count = max(2, _DENSE_BYTES // (rows * _MATRIX_COLUMNS * dtype.itemsize))
    generator = torch.Generator().manual_seed(0)
    matrices = [
        torch.randn((rows, _MATRIX_COLUMNS), generator=generator, dtype=torch.float32).to(dtype)
        for _ in range(count)
    ]
    one = torch.ones((1, _MATRIX_COLUMNS), dtype=dtype)
    many = torch.ones((_BATCH, _MATRIX_COLUMNS), dtype=dtype)
    turn = iter(matrices * (2 * _RUNS))
    read_s = _median_s(lambda: functional.linear(one, next(turn)), 2 * count)
    matmul_s = _median_s(lambda: functional.linear(many, matrices[0]), _RUNS)
    size = rows * _MATRIX_COLUMNS
    return size * dtype.itemsize / read_s, 2 * _BATCH * size / matmul_s


def _call_costs(dtype: torch.dtype) -> tuple[float, float]:
    """Return seconds of a matrix product and of another operator, both on next to nothing.

    From two stacks of the same small layers, one of which multiplies more often.
    """
    depth, more = 24, 4
    few, many = (_stack(depth, extra, dtype) for extra in (0, more))
    import torch

    hidden = torch.ones((1, 1, 64), dtype=dtype)
    few_s = _median_s(lambda: few(hidden), _RUNS)
    many_s = _median_s(lambda: many(hidden), _RUNS)
    # A linear layer dispatches a product, and views of its weight and input around it.
    linear_s = max((many_s - few_s) / (depth * more), 1e-7)
    other_calls = _count_calls(few, hidden)
    call_s = max((few_s - depth * linear_s) / (other_calls - depth * _calls_of_linear(dtype)), 1e-7)
    return max(linear_s - (_calls_of_linear(dtype) - 1) * call_s, 1e-7), call_s


def _calls_of_linear(dtype: torch.dtype) -> int:
    import torch

    return _count_calls(
        torch.nn.Linear(64, 64, bias=False, dtype=dtype), torch.ones((1, 1, 64), dtype=dtype)
    )


def _count_calls(module: nn.Module, hidden: torch.Tensor) -> int:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
        calls = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.calls += 1
            return func(*args, **(kwargs or {}))

    counter = Counter()  # type: ignore[no-untyped-call]
    with counter:
        module(hidden)
    return int(counter.calls)


def _stack(depth: int, extra_products: int, dtype: torch.dtype) -> nn.Module:
    """Return small layers made of what transformer layers are made of."""
    import torch
    from torch import nn

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(64, dtype=dtype))
            self.project = nn.Linear(64, 64, bias=False, dtype=dtype)
            self.more = nn.ModuleList(
                nn.Linear(64, 64, bias=False, dtype=dtype) for _ in range(extra_products)
            )

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            wide = hidden.float()
            wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
            heads = self.project(self.weight * wide.to(hidden.dtype)).view(1, 1, 4, 16)
            turned = torch.cat((-heads[..., 8:], heads[..., :8]), dim=-1)
            heads = (heads * turned + turned * heads).transpose(1, 2)
            out = heads.transpose(1, 2).reshape(1, 1, 64)
            for module in self.more:
                out = module(out)
            result: torch.Tensor = hidden + out
            return result

    return nn.Sequential(*(Layer() for _ in range(depth))).eval()


def _median_s(call: Callable[[], object], runs: int) -> float:
    for _ in range(2):
        call()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return median(times)
