"""``kt place``: try placement policies on a recorded routing trace."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kt_core.cli import placement_options as option
from kt_core.cli.completion import complete_policy
from kt_core.cli.output import JSON_HELP, print_json, progress_bar, registry_of, show, table
from kt_core.errors import InvalidRequestError, TraceError

if TYPE_CHECKING:
    from kt_core.interfaces import PlacementPolicy, RoutingStatistics
    from kt_core.placement.simulate import Simulation
    from kt_core.placement.trace import RoutingTrace
    from kt_core.plugins import Registry

EPILOG = """
Examples:

* `kt place trace.safetensors`
* `kt place trace.safetensors --policy adaptive,frequency --hot 10%,25%,50% --plot rates.svg`
* `kt place trace.safetensors --pcie 50GB/s --bandwidth 300GB/s --json | jq .results`
"""
_RUN = "What is tried"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=EPILOG)(place)


def _option(name: str, value: str, help: str, **settings: Any) -> Any:
    return typer.Option(name, metavar=value, rich_help_panel=_RUN, help=help, **settings)


def place(
    context: typer.Context,
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="A file that `kt trace` wrote.")],
    *,
    policy: Annotated[
        str, _option("--policy", "NAMES", "One or several; or all.", autocompletion=complete_policy)
    ] = "all",
    hot: Annotated[
        str, _option("--hot", "PARTS", "Parts of the experts' bytes on the accelerator.")
    ] = "10%,25%,50%,75%,90%",
    train: Annotated[
        str, _option("--train", "PART", "Of the trace: what the policies know at start.")
    ] = "50%",
    statistics: Annotated[
        Path | None, _option("--statistics", "FILE", "What they know instead of --train.")
    ] = None,
    prefill_chunk: Annotated[
        int, _option("--prefill-chunk", "N", "Tokens of a prefill in one step.", min=1)
    ] = 512,
    machine: option.MachineFile = None,
    bandwidth: option.Bandwidth = None,
    pcie: option.Pcie = None,
    link_share: option.LinkShare = "50%",
    plot: Annotated[
        Path | None, _option("--plot", "FILE", "Draw the hit rates: .png or .svg (extra: plot).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Simulate placement policies on a trace: hit rate, bytes moved, predicted speed.

    A hit is a pair of token and expert whose expert is on the accelerator. Policies learn from the
    first part of the trace and are judged on the rest. Speeds are predictions for a machine of the
    given rates, good for comparing policies: docs/placement.md has the formulas.
    """
    policies = _policies(registry_of(context), policy)
    fractions = [option.fraction("--hot", part) for part in hot.split(",")]
    if plot is not None:
        from kt_core.placement.plots import check_plot_file

        check_plot_file(plot, (".png", ".svg"))
    rates = option.machine_of(machine, bandwidth=bandwidth, pcie=pcie, link_share=link_share)
    known, tried = _known(trace, option.fraction("--train", train), statistics)
    settings = {"statistics": known, "machine": rates, "prefill_chunk": prefill_chunk}
    runs = _simulate(policies, tried, fractions, settings)
    if plot is not None:
        from kt_core.placement.plots import draw_hit_rates

        draw_hit_rates(runs, plot, title=f"Placements of {tried.model}")
    results = [describe(run) for run in runs]
    if as_json:
        print_json({"model": tried.model, "machine": asdict(rates), "results": results})
    else:
        _show(results)


def _policies(registry: Registry, names: str) -> list[PlacementPolicy]:
    if names == "all":
        return list(registry.policies)
    return [registry.policies.get(name.strip()) for name in names.split(",")]


def _known(
    file: Path, train: float, statistics: Path | None
) -> tuple[RoutingStatistics | None, RoutingTrace]:
    """Return what the policies know at start, and the trace they are judged on."""
    from kt_core.placement.statistics import load_statistics
    from kt_core.placement.trace import load_trace

    trace = load_trace(file)
    if statistics is not None:
        known = load_statistics(statistics)
        if known is None:
            msg = (
                f"there are no statistics {str(statistics)!r}; `kt trace` says where it keeps them"
            )
            raise TraceError(msg)
        try:
            known.check_fits(trace.grid)
        except ValueError as error:
            msg = f"{str(statistics)!r} and {str(file)!r} are of different models: {error}"
            raise TraceError(msg) from error
        return known, trace
    if train == 0:
        return None, trace
    try:
        first, rest = trace.split(train)
    except ValueError as error:
        msg = f"--train {train:.0%} cuts nothing off: {error}. Record more prompts, or --train 0"
        raise InvalidRequestError(msg) from error
    return first.statistics(), rest


def _simulate(
    policies: list[PlacementPolicy],
    trace: RoutingTrace,
    fractions: list[float],
    settings: dict[str, Any],
) -> list[Simulation]:
    from kt_core.placement.simulate import simulate

    runs: list[Simulation] = []
    with progress_bar("starting") as progress:
        for fraction in fractions:
            for policy in policies:
                done = len(runs) / (len(fractions) * len(policies))
                progress(f"{policy.name}, {fraction:.0%}", done)
                runs.append(simulate(policy, trace, hot_fraction=fraction, **settings))
    return runs


def describe(run: Simulation) -> dict[str, Any]:
    """Return what ``--json`` prints of one policy at one residency; null where there is nothing."""

    def number(value: float, digits: int) -> float | None:
        return None if value != value else round(value, digits)  # noqa: PLR0124 - NaN

    return {
        "policy": run.policy,
        "hot_fraction": run.hot_fraction,
        "budget_bytes": run.budget_bytes,
        "hit_rate": number(run.hit_rate(), 4),
        "prefill_hit_rate": number(run.hit_rate(is_decode=False), 4),
        "decode_hit_rate": number(run.hit_rate(is_decode=True), 4),
        "moved_bytes": int(run.moved_bytes.sum()),
        "moved_bytes_per_step": round(float(run.moved_bytes.mean())),
        "granted_bytes_per_step": round(float(run.granted_bytes.mean())),
        "prefill_tokens_per_s": number(run.tokens_per_s(is_decode=False), 2),
        "decode_tokens_per_s": number(run.tokens_per_s(is_decode=True), 2),
    }


def _show(results: list[dict[str, Any]]) -> None:
    rows = table(
        *("hot", "policy", "hit rate", "prefill", "decode", "MB moved"),
        *("MB/step", "prefill tok/s", "decode tok/s"),
    )
    for column in rows.columns[2:]:
        column.justify = "right"
    for result in results:
        rates = [result[key] for key in ("hit_rate", "prefill_hit_rate", "decode_hit_rate")]
        speeds = [result[key] for key in ("prefill_tokens_per_s", "decode_tokens_per_s")]
        rows.add_row(
            f"{result['hot_fraction']:.0%}",
            result["policy"],
            *("" if rate is None else f"{rate:.1%}" for rate in rates),
            f"{result['moved_bytes'] / 1e6:.1f}",
            f"{result['moved_bytes_per_step'] / 1e6:.2f}",
            *("" if speed is None else f"{speed:.1f}" for speed in speeds),
        )
    show(rows)
