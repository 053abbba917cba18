"""``kt bench experts`` without the command line: time layers of experts against the machine."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from statistics import fmean, median

from kt_core.bench.layers import PackedLayers, choose_layers
from kt_core.bench.routing import Call
from kt_core.bench.timing import Clock, repeat
from kt_core.interfaces import Backend, Progress, WeightFormat, no_progress
from kt_core.types import ActivationPrecision, Limits, MoeSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to measure.

    Attributes:
        spec: Shape of a layer.
        top_k: Experts of one token.
        formats: What the experts are packed as.
        tokens: Batch sizes.
        layers: Number of layers; None for enough that the weights come from memory.
        precision: What the hidden states, bf16, are turned into.
        seconds: How long to repeat one measurement.
    """

    spec: MoeSpec
    top_k: int
    formats: Sequence[WeightFormat]
    tokens: Sequence[int]
    layers: int | None = None
    precision: ActivationPrecision = ActivationPrecision.AUTO
    seconds: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One format with one number of tokens.

    Attributes:
        weight_format: Its name.
        tokens: In one call.
        layer_s: Median time of one layer, in seconds.
        weight_bytes: Packed bytes of the experts that were active, on average.
        operations: Of one call; a multiply-add is two.
        rel_error: See ``PackedLayers.relative_error``.
        is_int8: Whether the products are of int8; None where the kernel does not say.
    """

    weight_format: str
    tokens: int
    layer_s: float
    weight_bytes: float
    operations: int
    rel_error: float
    is_int8: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One row of the bench; the fields are the keys of its JSON.

    Attributes:
        format: Name of the weight format.
        threads: Threads that computed.
        isa: Kernel variant; None where the backend has one.
        tokens: In one call.
        us_per_layer: Median time of one layer in microseconds.
        gb_per_s: Packed bytes of the active experts over that time, / 1e9.
        gflop_per_s: Operations over that time, / 1e9.
        rel_error: See ``PackedLayers.relative_error``.
        fraction_of_limit: See ``fraction_of_limit``; None where the limits are not known.
    """

    format: str
    threads: int
    isa: str | None
    tokens: int
    us_per_layer: float
    gb_per_s: float
    gflop_per_s: float
    rel_error: float
    fraction_of_limit: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What one number of threads gave.

    Attributes:
        threads: Their number.
        limits: Medians of what was measured before each row; None where nobody knows.
        results: One for each format and number of tokens.
    """

    threads: int
    limits: Limits | None
    results: tuple[Result, ...]


def measure_experts(
    backend: Backend,
    device_name: str,
    threads: int | None,
    request: Request,
    *,
    progress: Progress = no_progress,
    clock: Clock = time.perf_counter,
) -> Report:
    """Time every format with every number of tokens, and the machine before each.

    Raises:
        kt_core.errors.UnsupportedFormatError: The device cannot compute a format.
        kt_core.errors.NotEnoughMemoryError: The layers do not fit.
    """
    timings: list[Timing] = []
    samples: list[Limits | None] = []
    with backend.open(device_name, threads=threads) as device:
        for weight_format in request.formats:
            name = weight_format.descriptor.name
            size = device.expert_bytes(request.spec, weight_format.descriptor)
            layers = PackedLayers(
                device,
                weight_format,
                request.spec,
                top_k=request.top_k,
                layers=choose_layers(request.spec, size, request.layers).layers,
                precision=request.precision,
                progress=progress,
            )
            for index, tokens in enumerate(request.tokens):
                stage = f"{name}, {device.threads} threads, {tokens} tokens"
                progress(stage, index / len(request.tokens))
                samples.append(device.measure_limits())
                timings.append(time_layers(layers, tokens, seconds=request.seconds, clock=clock))
            del layers  # before the next ones need the memory
        limits = median_limits(samples)
        isa, used_threads = device.capabilities.instruction_set, device.threads
    results = (result(timing, limits, isa=isa, threads=used_threads) for timing in timings)
    return Report(threads=used_threads, limits=limits, results=tuple(results))


def time_layers(
    layers: PackedLayers, tokens: int, *, seconds: float, clock: Clock = time.perf_counter
) -> Timing:
    """Call the layers in turn, with random routing, for about ``seconds``."""
    hidden = layers.hidden(tokens)
    rel_error = layers.relative_error(layers.next_call(tokens), hidden)  # and a call to warm up
    active: list[int] = []

    def prepare() -> Call:
        call = layers.next_call(tokens)
        active.append(call.num_active)
        return call

    times = repeat(prepare, lambda c: layers.compute(c, hidden), seconds=seconds, clock=clock)
    precision = layers.kernels[0].precision_for(hidden.dtype)
    return Timing(
        weight_format=layers.weight_format.descriptor.name,
        tokens=tokens,
        layer_s=median(times),
        weight_bytes=fmean(active) * layers.bytes_per_expert,
        operations=tokens * layers.top_k * layers.operations_per_pair,
        rel_error=rel_error,
        is_int8=None if precision is None else precision is ActivationPrecision.INT8,
    )


def median_limits(samples: Iterable[Limits | None]) -> Limits | None:
    """Return the median of each limit; None if one was not known.

    Machines that others use too are faster and slower by turns: the rows met both, and so must
    what they are compared with.
    """
    known = list(samples)
    if not known or None in known:
        return None
    names = [field.name for field in fields(Limits)]
    return Limits(**{name: median(getattr(sample, name) for sample in known) for name in names})


def fraction_of_limit(timing: Timing, limits: Limits | None) -> float | None:
    """Return the least time that the machine allows, over the time it took.

    The least time is that of reading the active experts at the machine's bandwidth, or that of the
    operations at the peak of the unit that multiplies, whichever is longer: the int8 product where
    the activations are int8, else that of bf16. None where the limits or the unit are not known.
    """
    if limits is None or timing.is_int8 is None:
        return None
    peak = limits.int8_ops_per_s if timing.is_int8 else limits.bf16_ops_per_s
    least_s = max(timing.weight_bytes / limits.read_bytes_per_s, timing.operations / peak)
    return least_s / timing.layer_s


def result(timing: Timing, limits: Limits | None, *, isa: str | None, threads: int) -> Result:
    """Return the row that is printed for a timing, rounded to what can be meant."""
    fraction = fraction_of_limit(timing, limits)
    return Result(
        format=timing.weight_format,
        threads=threads,
        isa=isa,
        tokens=timing.tokens,
        us_per_layer=round(timing.layer_s * 1e6, 1),
        gb_per_s=round(timing.weight_bytes / timing.layer_s / 1e9, 3),
        gflop_per_s=round(timing.operations / timing.layer_s / 1e9, 3),
        rel_error=float(f"{timing.rel_error:.3g}"),
        fraction_of_limit=None if fraction is None else round(fraction, 4),
    )
