"""Measure this machine once, in some seconds, and remember it.

Nothing here knows a model: the dense rates are those of torch's matrix products, the cost of a call
is that of a block of small operators such as transformer layers are made of.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, TypeVar

from kt_core import __version__, hardware
from kt_core.errors import NotEnoughMemoryError
from kt_core.interfaces import ExpertDevice, ExpertWeights, Progress, WeightFormat, no_progress
from kt_core.paths import replacing
from kt_core.plan.machine import ExpertRates, HostRates
from kt_core.plan.outline import ExpertLayer
from kt_core.types import Element, Format, MoeSpec

if TYPE_CHECKING:
    import torch
    from torch import nn

    from kt_core.bench.routing import Call
    from kt_core.plan.probe import Experts

Rates = TypeVar("Rates", HostRates, ExpertRates)

# Of weights for the single-token product; several matrices, so that no cache holds the next one.
_DENSE_BYTES = 512 << 20
_MATRIX_COLUMNS = 2048
_BATCH = 256
_RUNS = 15
_PROBE_DEPTH = 24
# Clocks and schedulers jitter; a cost below this is none.
_SHORTEST_S = 1e-7
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
    with torch.no_grad():
        read, dense_ops = _dense_rates(torch_dtype)
        threaded_call_s, call_s, expert_call_s = _call_costs(device, torch_dtype)
        attention_read, attention_ops = _attention_rates(torch_dtype, threaded_call_s)
    # The first one meets memory that has rested, which virtual machines serve faster for a while.
    limits = [device.measure_limits() for _ in range(3)][-1]
    return HostRates(
        # A device that knows no limits has those that its host's torch reaches, at least.
        read_bytes_per_s=limits.read_bytes_per_s if limits else read,
        int8_ops_per_s=limits.int8_ops_per_s if limits else dense_ops,
        bf16_ops_per_s=limits.bf16_ops_per_s if limits else dense_ops,
        dense_read_bytes_per_s=read,
        dense_ops_per_s=dense_ops,
        attention_read_bytes_per_s=attention_read,
        attention_ops_per_s=attention_ops,
        threaded_call_s=threaded_call_s,
        call_s=call_s,
        expert_call_s=expert_call_s,
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
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(asdict(rates), indent=2), encoding="utf-8")


def _dense_rates(dtype: torch.dtype) -> tuple[float, float]:
    """Return bytes per second for one token and operations per second for many."""
    import torch
    from torch.nn import functional

    rows = 4 * _MATRIX_COLUMNS
    count = max(2, _DENSE_BYTES // (rows * _MATRIX_COLUMNS * dtype.itemsize))
    shape = (rows, _MATRIX_COLUMNS)
    matrices = [torch.full(shape, 0.5, dtype=dtype) for _ in range(count)]
    one = torch.ones((1, _MATRIX_COLUMNS), dtype=dtype)
    many = torch.ones((_BATCH, _MATRIX_COLUMNS), dtype=dtype)
    turn = itertools.cycle(matrices)
    read_s = _median_s(lambda: functional.linear(one, next(turn)), 2 * count)
    matmul_s = _median_s(lambda: functional.linear(many, matrices[0]), _RUNS)
    size = rows * _MATRIX_COLUMNS
    return size * dtype.itemsize / read_s, 2 * _BATCH * size / matmul_s


def _attention_rates(dtype: torch.dtype, call_s: float) -> tuple[float, float]:
    """Return bytes of keys and values per second for one token, and operations for many."""
    import torch
    from torch.nn import functional

    heads, seen, size = 16, 1024, 64
    keys = [torch.ones((1, heads, seen, size), dtype=dtype) for _ in range(8)]
    one = torch.ones((1, heads, 1, size), dtype=dtype)
    turn = itertools.cycle(keys)
    attend = functional.scaled_dot_product_attention

    read_s = _median_s(lambda: attend(one, next(turn), next(turn)), 4 * _RUNS)
    many_s = _median_s(lambda: attend(keys[0], keys[1], keys[2], is_causal=True), _RUNS)
    operations = 4 * heads * seen**2 * size / 2
    spent_s = max(read_s - call_s, _SHORTEST_S)
    return 2 * keys[0].nbytes / spent_s, operations / max(many_s - call_s, _SHORTEST_S)


def _call_costs(device: ExpertDevice, dtype: torch.dtype) -> tuple[float, float, float]:
    """Return seconds of a call that wakes torch's threads, of another, and of a layer of experts.

    From stacks of the same small layers, of which one has more matrix products and one has experts.
    What Python does around the calls is in the second. The third is what experts cost because
    torch and the device take turns: their own work on next to nothing is not in it.
    """
    import torch

    from kt_core.plan.probe import EXTRA_PRODUCTS, HIDDEN, Stream, large_layers, stack

    large = large_layers(_PROBE_DEPTH, dtype)
    hidden = torch.ones((1, 1, HIDDEN), dtype=dtype)
    experts, alone_call_s = _small_experts(device, dtype)
    few, many, alone = (
        stack(large, dtype), stack(large, dtype, extra_products=EXTRA_PRODUCTS), Stream(large),
    )  # fmt: skip
    modules = (few, many, alone, stack(large, dtype, experts=experts))
    few_s, many_s, alone_s, experts_s = _medians_s([partial(m, hidden) for m in modules], 2 * _RUNS)
    calls, more_calls, alone_calls = (_count_calls(m, hidden) for m in (few, many, alone))
    # many_s - few_s = (more products) p + (more others) c, and so for few_s - alone_s.
    rows = torch.tensor(
        [
            [more_calls[0] - calls[0], more_calls[1] - calls[1]],
            [calls[0] - alone_calls[0], calls[1] - alone_calls[1]],
        ],
        dtype=torch.float64,
    )
    product_s, call_s = torch.linalg.solve(
        rows, torch.tensor([many_s - few_s, few_s - alone_s], dtype=torch.float64)
    ).tolist()
    turn_s = (experts_s - few_s) / _PROBE_DEPTH - alone_call_s
    return max(product_s, _SHORTEST_S), max(call_s, _SHORTEST_S), max(turn_s, _SHORTEST_S)


def _small_experts(device: ExpertDevice, dtype: torch.dtype) -> tuple[Experts, float]:
    """Return a layer of experts that weigh next to nothing, and the seconds of a call."""
    import torch

    from kt_core.moe.hybrid_experts import HybridExperts
    from kt_core.plan.probe import HIDDEN, NUM_EXPERTS

    spec = MoeSpec(num_experts=NUM_EXPERTS, hidden_size=HIDDEN, intermediate_size=HIDDEN)
    kernel = device.expert_kernel(spec, Format(name="bf16", element=Element.BF16))
    ones = torch.ones(HIDDEN, HIDDEN)
    for expert in range(NUM_EXPERTS):
        kernel.load(expert, ExpertWeights(gate=ones, up=ones, down=ones))
    layer = HybridExperts(spec, [kernel]).eval()
    token = torch.ones((1, HIDDEN), dtype=dtype, device=device.info.torch_device)
    ids = torch.tensor([[0, 1, 2, 3]], device=device.info.torch_device)
    weights = torch.full(ids.shape, 0.25, device=device.info.torch_device)
    return layer, _median_s(lambda: layer(token, ids, weights), 10 * _RUNS)


def _count_calls(module: nn.Module, hidden: torch.Tensor) -> tuple[int, int]:
    """Return the matrix products and the other operators that a module dispatches."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
        products = 0
        others = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            is_product = func.overloadpacket.__name__ in ("mm", "addmm", "bmm")
            self.products += is_product
            self.others += not is_product
            return func(*args, **(kwargs or {}))

    counter = Counter()  # type: ignore[no-untyped-call]
    with counter:
        module(hidden)
    return int(counter.products), int(counter.others)


def _median_s(call: Callable[[], object], runs: int) -> float:
    return _medians_s([call], runs)[0]


def _medians_s(calls: Sequence[Callable[[], object]], runs: int) -> list[float]:
    """Time calls by turns, so that what disturbs one of them disturbs all."""
    times: list[list[float]] = [[] for _ in calls]
    for run in range(runs + 2):
        for call, samples in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            if run >= 2:  # the first ones warm up
                samples.append(time.perf_counter() - start)
    return [median(samples) for samples in times]
