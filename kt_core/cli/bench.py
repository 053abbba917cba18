"""``kt bench``: how fast the kernels are here, and how fast they could be."""

from __future__ import annotations

import platform
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kt_core import __version__, hardware
from kt_core.cli import bench_deferral
from kt_core.cli.app import App
from kt_core.cli.completion import complete_device
from kt_core.cli.output import JSON_HELP, print_json, progress_bar, registry_of, remark, show, table
from kt_core.errors import InvalidRequestError, UnsupportedFormatError
from kt_core.interfaces import Backend, WeightFormat
from kt_core.plugins import Registry
from kt_core.types import ActivationPrecision, Limits, MoeSpec

if TYPE_CHECKING:
    from kt_core.bench.experts import Report, Request

EPILOG = """
Examples:

* `kt bench experts` measures int4 on layers shaped as in Qwen3-30B-A3B
* `kt bench experts --format all --tokens 1,1024 --json | jq .results`
* `kt bench experts --hidden 7168 --intermediate 2048 --experts 32` is the shape of DeepSeek-V3
* `kt bench experts --format int8 --precision bf16 --threads 1,2`
"""
_SHAPE, _RUN = "Shape of a layer", "What is measured"
_MOST_THREADS = 1024


def register(app: typer.Typer) -> None:
    """Add the command."""
    group = App(help="Measure kernels, and what they do to answers.", no_args_is_help=True)
    group.command(epilog=EPILOG)(experts)
    group.command(epilog=bench_deferral.EPILOG)(bench_deferral.deferral)
    app.add_typer(group, name="bench", epilog=EPILOG)


def _size(name: str, value: str, help: str) -> Any:
    return typer.Option(name, metavar=value, min=1, rich_help_panel=_SHAPE, help=help)


def _choice(name: str, value: str, help: str, **settings: Any) -> Any:
    return typer.Option(name, metavar=value, rich_help_panel=_RUN, help=help, **settings)


def experts(
    context: typer.Context,
    *,
    hidden: Annotated[int, _size("--hidden", "H", "Elements of a hidden state.")] = 2048,
    intermediate: Annotated[
        int, _size("--intermediate", "I", "Elements between up and down of one expert.")
    ] = 768,
    num_experts: Annotated[int, _size("--experts", "E", "Experts of a layer.")] = 128,
    top_k: Annotated[int, _size("--top-k", "K", "Experts of a token.")] = 8,
    formats: Annotated[
        str, _choice("--format", "NAMES", "One or several: int4,int8 ... or all.")
    ] = "int4",
    tokens: Annotated[
        str, _choice("--tokens", "NUMBERS", "Tokens in one call.")
    ] = "1,4,16,64,256,1024",
    threads: Annotated[
        str | None, _choice("--threads", "NUMBERS", "By default one per physical core.")
    ] = None,
    layers: Annotated[
        str, _choice("--layers", "N", "auto: so many that weights come from memory.")
    ] = "auto",
    precision: Annotated[
        ActivationPrecision,
        _choice("--precision", "NAME", "Of the activations: auto, int8, bf16 or float32."),
    ] = ActivationPrecision.AUTO,
    device: Annotated[
        str, _choice("--device", "NAME", "See `kt backends`.", autocompletion=complete_device)
    ] = "auto",
    seconds: Annotated[
        float, _choice("--seconds", "S", "How long to repeat one measurement.", min=0)
    ] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Time layers of routed experts, and what the machine could do at most.

    For each number of tokens: the median time of a layer, the weight bytes of the active experts
    per second, operations per second, the relative error against the same layer in float64 (on the
    weights as they are stored), and the part of the machine's limit that is reached. The limit is
    the longer of two times: reading these weights at the memory bandwidth, and doing the products
    at the peak rate of the int8 or bf16 instruction. Both are measured in the same run.
    """
    registry = registry_of(context)
    if top_k > num_experts:
        msg = f"--top-k {top_k} is more than --experts {num_experts}: a token goes to each once"
        raise InvalidRequestError(msg)
    batch_sizes = _numbers("--tokens", tokens)
    thread_counts = [None] if threads is None else _numbers("--threads", threads, _MOST_THREADS)
    spec = MoeSpec(num_experts=num_experts, hidden_size=hidden, intermediate_size=intermediate)
    layer_count = _layer_count(layers)
    backend, info = registry.find_device(device)
    with progress_bar("starting") as progress:
        from kt_core.bench.experts import Request, measure_experts  # torch: seconds

        request = Request(
            spec=spec,
            top_k=top_k,
            formats=_formats(registry, backend, info.name, formats),
            tokens=batch_sizes,
            layers=layer_count,
            precision=precision,
            seconds=seconds,
        )
        request, remarks = _check(backend, info.name, request, is_all=formats == "all")
        reports = [
            measure_experts(backend, info.name, count, request, progress=progress)
            for count in thread_counts
        ]
    for text in remarks:
        remark(text)
    if as_json:
        print_json(describe(reports))
    else:
        _show(reports, request)


def _layer_count(text: str) -> int | None:
    if text == "auto":
        return None
    if text.isascii() and text.isdecimal() and int(text) >= 1:
        return int(text)
    msg = f"--layers takes whole numbers from 1, or auto; got {text!r}"
    raise InvalidRequestError(msg)


def _numbers(option: str, text: str, most: int = 1 << 30) -> list[int]:
    """Read a list such as ``1,16,1024``."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and 1 <= int(part) <= most for part in parts):
        msg = f"{option} takes whole numbers from 1 to {most}, such as 1,16,64; got {text!r}"
        raise InvalidRequestError(msg)
    return list(dict.fromkeys(int(part) for part in parts))


def _formats(registry: Registry, backend: Backend, device: str, text: str) -> list[WeightFormat]:
    """Return the formats of a list of names; for ``all``, those that the device computes."""
    capabilities = backend.capabilities(device)
    computed = [f for f in registry.formats if capabilities.computes(f.descriptor)]
    if text == "all":
        return computed
    chosen = [registry.formats.get(name.strip()) for name in text.split(",")]
    for weight_format in chosen:
        if weight_format not in computed:
            names = ", ".join(f.descriptor.name for f in computed)
            name = weight_format.descriptor.name
            msg = f"device {device!r} does not compute {name!r}; it computes {names}"
            raise UnsupportedFormatError(msg)
    return list(dict.fromkeys(chosen))


def _check(
    backend: Backend, device: str, request: Request, *, is_all: bool
) -> tuple[Request, list[str]]:
    """Return the request, without formats that lack the precision if all are meant, and remarks.

    What cannot be measured is refused here, before an hour of measuring.
    """
    from kt_core.bench.layers import COLD_FACTOR, choose_layers

    possible, remarks = [], []
    with backend.open(device, threads=1) as opened:
        for weight_format in request.formats:
            descriptor = weight_format.descriptor
            try:
                opened.expert_kernel(request.spec, descriptor, precision=request.precision)
            except UnsupportedFormatError as error:
                if not is_all:
                    raise
                remarks.append(f"left out: {error}")
                continue
            possible.append(weight_format)
            size = opened.expert_bytes(request.spec, descriptor)
            sizes = choose_layers(request.spec, size, request.layers)
            if not sizes.is_cold:
                remarks.append(
                    f"{descriptor.name}: {sizes.weight_bytes / 1e6:.1f} MB of weights are less "
                    f"than {COLD_FACTOR} times the cache of {sizes.cache_bytes / 1e6:.1f} MB, "
                    "which may serve some of them"
                )
    return replace(request, formats=possible), remarks


def describe(reports: list[Report]) -> dict[str, Any]:
    """Return what ``--json`` prints: ``limits`` is a list if there are several thread counts."""
    limits = [_limits(report.limits) for report in reports]
    if len(reports) > 1:
        for report, values in zip(reports, limits, strict=True):
            values["threads"] = report.threads
    return {
        "machine": _machine(),
        "limits": limits[0] if len(reports) == 1 else limits,
        "results": [asdict(result) for report in reports for result in report.results],
    }


def _machine() -> dict[str, Any]:
    found = hardware.detect(with_accelerators=False)
    return {
        "cpu": found.cpu.name,
        "physical_cores": len(found.cpu.physical_cores),
        "numa_nodes": len(found.cpu.numa_nodes),
        "last_level_cache_bytes": hardware.last_level_cache_bytes(),
        "memory_bytes": found.memory.total_bytes,
        "system": platform.platform(),
        "kt": __version__,
    }


def _limits(limits: Limits | None) -> dict[str, Any]:
    if limits is None:
        return dict.fromkeys(("read_gb_per_s", "int8_gop_per_s", "bf16_gflop_per_s"))
    return {
        "read_gb_per_s": round(limits.read_bytes_per_s / 1e9, 2),
        "int8_gop_per_s": round(limits.int8_ops_per_s / 1e9, 1),
        "bf16_gflop_per_s": round(limits.bf16_ops_per_s / 1e9, 1),
    }


def _show(reports: list[Report], request: Request) -> None:
    machine, spec = _machine(), request.spec
    rows = table()
    rows.add_row("machine", f"{machine['cpu']}, {machine['physical_cores']} physical cores")
    shape = f"hidden {spec.hidden_size}, intermediate {spec.intermediate_size}"
    rows.add_row("layer", f"{shape}, {spec.num_experts} experts, {request.top_k} of them per token")
    for report in reports:
        rows.add_row(f"limits, threads {report.threads}", _limits_text(report.limits))
    show(rows)
    headers = ("format", "threads", "isa", "tokens", "us/layer", "GB/s", "GFLOP/s")
    rows = table(*headers, "rel. error", "of limit")
    for column in rows.columns[3:]:
        column.justify = "right"
    for row in (row for report in reports for row in report.results):
        part = row.fraction_of_limit
        rows.add_row(
            row.format,
            str(row.threads),
            row.isa or "",
            str(row.tokens),
            f"{row.us_per_layer:.0f}",
            f"{row.gb_per_s:.1f}",
            f"{row.gflop_per_s:.1f}",
            f"{row.rel_error:.2g}",
            "unknown" if part is None else f"{part:.0%}",
        )
    show(rows)


def _limits_text(limits: Limits | None) -> str:
    if limits is None:
        return "unknown: the backend does not measure them"
    values = _limits(limits)
    return (
        f"{values['read_gb_per_s']:.1f} GB/s read, {values['int8_gop_per_s']:.0f} GOP/s int8, "
        f"{values['bf16_gflop_per_s']:.0f} GFLOP/s bf16"
    )
