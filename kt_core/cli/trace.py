"""``kt trace``: record which experts a model's tokens are sent to."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kt_core.cli import run_options as option
from kt_core.cli.output import JSON_HELP, print_json, progress_bar, registry_of, show, table
from kt_core.cli.placement_options import HotExperts, PolicyName, hot_fraction
from kt_core.errors import InvalidRequestError, TraceError

if TYPE_CHECKING:
    from kt_core.placement.trace import RoutingTrace
    from kt_core.plugins import Registry

EPILOG = """
Examples:

* `kt trace demo --prompts questions.txt -o trace.safetensors`
* `kt trace ./model --prompts chats.jsonl -o trace.safetensors --predict --max-new-tokens 64`
* `kt trace trace.safetensors --heatmap use.html --placement frequency --hot-experts 25%`
"""
_RECORD, _SHOW = "What is recorded", "What is shown"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=EPILOG)(trace)


def _option(*names: str, value: str, panel: str, help: str, **settings: Any) -> Any:
    return typer.Option(*names, metavar=value, rich_help_panel=panel, help=help, **settings)


def trace(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="As for `kt run`; or a trace, only to show it.")
    ],
    *,
    prompts: Annotated[
        Path | None,
        _option("--prompts", value="FILE", panel=_RECORD, help="A prompt on each line; or .jsonl."),
    ] = None,
    output: Annotated[
        Path | None,
        _option("--output", "-o", value="FILE", panel=_RECORD, help="The trace, .safetensors."),
    ] = None,
    max_new_tokens: option.MaxNewTokens = 128,
    temperature: option.Temperature = 0.7,
    seed: option.Seed = 0,
    raw: option.Raw = False,
    predict: Annotated[
        bool,
        _option("--predict", value="", panel=_RECORD, help="Ask each next router early, too."),
    ] = False,
    weight_format: option.Format = "auto",
    device: option.Device = "auto",
    threads: option.Threads = None,
    heatmap: Annotated[
        Path | None,
        _option("--heatmap", value="FILE", panel=_SHOW, help="Draw use: .html, or .png (plot)."),
    ] = None,
    placement: PolicyName = None,
    hot_experts: HotExperts = "25%",
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Record the routing of a model while it answers prompts.

    For every token, layer by layer: the experts, their weights, and with --predict what the layer
    before foretold. What is learned about their use is also kept for the next start. `kt place`
    tries placements on the trace.
    """
    registry = registry_of(context)
    _check_files(heatmap, output)
    residency = None if placement is None else (placement, hot_fraction(hot_experts))
    if residency is not None:
        registry.policies.get(residency[0])  # an unknown name fails before the work
    where = {"format": weight_format, "device": device, "threads": threads}
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    if _is_trace(model):
        from kt_core.placement.trace import load_trace  # numpy: a tenth of a second

        recorded, report = load_trace(Path(model)), {"trace": model}
    else:
        if prompts is None or output is None:
            msg = "recording needs --prompts FILE and -o FILE; a .safetensors is only shown"
            raise InvalidRequestError(msg)
        asked = {**options, "raw": raw, "predicts": predict}
        recorded, report = _record(registry, model, prompts, output, where=where, asked=asked)
    if heatmap is not None:
        _draw(registry, recorded, heatmap, residency)
    described = {**report, **describe(recorded)}
    print_json(described) if as_json else _show(described)


def _check_files(heatmap: Path | None, output: Path | None) -> None:
    """Refuse what could not be written, before the work."""
    if output is not None and not output.parent.is_dir():
        msg = f"the folder {str(output.parent)!r} is not there; make it first"
        raise TraceError(msg)
    if output is not None and output.suffix != ".safetensors":
        msg = f"the trace {str(output)!r} must end in .safetensors, by which kt knows it again"
        raise InvalidRequestError(msg)
    if heatmap is not None:
        from kt_core.placement.plots import check_plot_file

        check_plot_file(heatmap, (".html", ".png"))


def _is_trace(model: str) -> bool:
    return model.endswith(".safetensors")


def _record(
    registry: Registry,
    model: str,
    prompts: Path,
    output: Path,
    *,
    where: dict[str, Any],
    asked: dict[str, Any],
) -> tuple[RoutingTrace, dict[str, Any]]:
    """Answer the prompts, write the trace, add to the statistics."""
    # Read once, when transformers is imported: so before that.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with progress_bar("starting") as progress:
        from kt_core.engine import load  # seconds: torch and transformers
        from kt_core.engine.prompts import read_prompts
        from kt_core.engine.routing import record, remember
        from kt_core.placement.trace import save_trace

        texts = read_prompts(prompts)
        with load(model, **where, registry=registry, progress=progress) as engine:
            recorded = record(engine, texts, progress=progress, **asked)
            save_trace(recorded, output)
            statistics = remember(engine, recorded)
    return recorded, {"trace": str(output), "statistics": str(statistics)}


def _draw(
    registry: Registry, trace: RoutingTrace, file: Path, residency: tuple[str, float] | None
) -> None:
    from kt_core.placement.plots import draw_heatmap

    title, placement = f"Use of experts: {trace.model}", None
    if residency is not None:
        name, fraction = residency
        budget = round(fraction * trace.grid.total_bytes)
        placement = registry.policies.get(name).place(trace.statistics(), budget, trace.grid)
        title += f"; {fraction:.0%} placed by {name}"
    draw_heatmap(trace.counts(), trace.grid, file, title=title, placement=placement)


def describe(trace: RoutingTrace) -> dict[str, Any]:
    """Return what ``--json`` prints of a trace."""
    import numpy as np

    from kt_core.placement.prediction import chance_recall, prediction_recall

    busiest = np.sort(trace.counts(), axis=1)[:, ::-1]
    quarter = busiest[:, : max(1, busiest.shape[1] // 4)].sum() / busiest.sum()
    described: dict[str, Any] = {
        "model": trace.model,
        "tokens": trace.num_tokens,
        "decode_tokens": int(trace.step_tokens[trace.step_is_decode == 1].sum()),
        "prompts": len(trace.prompt_steps),
        "layers": trace.grid.num_layers,
        "experts": max(trace.grid.num_experts),
        "top_k": trace.top_k,
        "busiest_quarter": round(float(quarter), 4),
    }
    if trace.predicted_ids is not None:
        recall, known = prediction_recall(trace), chance_recall(trace)
        is_known = ~np.isnan(recall)
        described["prediction_recall"] = round(float(recall[is_known].mean()), 4)
        described["most_used_recall"] = round(float(known[is_known].mean()), 4)
        described["prediction_recall_by_layer"] = [
            None if np.isnan(value) else round(float(value), 4) for value in recall
        ]
    return described


def _show(described: dict[str, Any]) -> None:
    rows = table()
    for key in ("trace", "statistics", "model"):
        if key in described:
            rows.add_row(key, described[key])
    numbers = "{tokens} tokens, {decode_tokens} of them decoded; {prompts} prompts"
    rows.add_row("recorded", numbers.format(**described))
    rows.add_row("experts", "{layers} layers of {experts}, {top_k} per token".format(**described))
    rows.add_row("use", f"{described['busiest_quarter']:.1%} of the pairs go to a quarter of them")
    if "prediction_recall" in described:
        recall, known = described["prediction_recall"], described["most_used_recall"]
        text = f"{recall:.1%} of the experts foretold by the layer before"
        rows.add_row("prediction", f"{text}; always foretelling the most used: {known:.1%}")
    show(rows)
