"""``kt quant``: quantise a model once, into a directory that is mapped and used in place."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kt_core.cli.completion import complete_format, complete_model
from kt_core.cli.output import JSON_HELP, print_json, progress_bar, registry_of, remark, show, table
from kt_core.cli.run import silence_transformers
from kt_core.errors import InvalidRequestError

if TYPE_CHECKING:
    from kt_core.engine.quantize_report import QuantReport

EPILOG = """
Examples:

* `kt quant ./Qwen3-30B-A3B ./qwen3-int4 --format int4`
* `kt quant demo ./demo-mxfp4 --format mxfp4 --json`
* `kt quant ./model ./packed --format int4 --calibrate text.txt --eval other.txt`
* `kt quant ./model ./packed --format int4 --overrides layers.yaml`, with lines such as
  `"model.layers.0.*": int8` in layers.yaml
* `kt quant ./model ./packed --format int4 --dense-format int8`
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=EPILOG)(quant)


def quant(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="A model directory, `demo`, or a hub id.",
            autocompletion=complete_model,
        ),
    ],
    target: Annotated[
        Path, typer.Argument(metavar="DST", help="The directory to make; it must not exist.")
    ],
    *,
    weight_format: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="NAME",
            help="What experts become: as of `kt run`.",
            autocompletion=complete_format,
        ),
    ],
    dense_format: Annotated[
        str,
        typer.Option(
            "--dense-format",
            metavar="NAME",
            help="What attention, shared experts and the output head become; none: as they are.",
            autocompletion=complete_format,
        ),
    ] = "none",
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="NAME",
            help="search: scales of least squared error. rtn: to the nearest, faster.",
        ),
    ] = "search",
    overrides: Annotated[
        Path | None,
        typer.Option(
            "--overrides",
            metavar="FILE",
            help="YAML: formats of single layers, by patterns of their paths.",
        ),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            "--calibrate",
            metavar="FILE",
            help="A text that the model reads first: its outputs there stay as they were.",
        ),
    ] = None,
    evaluate: Annotated[
        Path | None,
        typer.Option(
            "--eval",
            metavar="FILE",
            help="A text to compare the result with the source on: perplexity and KL.",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option("--threads", metavar="N", help="CPU threads.", min=1, max=1024),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Quantise a model once and keep it packed.

    DST is a normal model directory whose experts, and dense layers where --dense-format is given,
    need no packing at start: `kt run DST` maps them.
    A run that was killed goes on where it was when it is started again. Exits with 1 after an
    error, 130 after Ctrl-C.
    """
    silence_transformers()
    chosen = _overrides(overrides)
    if calibrate and method != "search":
        msg = f"--calibrate tells the search what to keep; --method {method} has none"
        raise InvalidRequestError(msg)
    with progress_bar("starting", with_rest=True) as progress:
        from kt_core.engine import quantize_command  # seconds: torch and transformers

        report = quantize_command.run(
            source,
            target.expanduser().absolute(),
            registry_of(context),
            quantize_command.Options(
                weight_format=weight_format,
                dense_format=dense_format,
                method=method,
                overrides=chosen,
                calibrate=calibrate,
                evaluate=evaluate,
                threads=threads,
            ),
            progress=progress,
            remark=remark,
        )
    if as_json:
        print_json(report.to_dict())
    else:
        _show(report)


def _overrides(file: Path | None) -> dict[str, str]:
    if file is None:
        return {}
    import yaml  # type: ignore[import-untyped]

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        msg = f"--overrides {file} cannot be read: {' '.join(str(error).split())}"
        raise InvalidRequestError(msg) from error
    if not isinstance(content, dict) or not all(
        isinstance(part, str) for item in content.items() for part in item
    ):
        msg = f'{file} must hold lines of the form "model.layers.0.*": int8'
        raise InvalidRequestError(msg)
    return content


def _show(report: QuantReport) -> None:
    grid = table("layer", "format", "bits per weight", "relative error")
    for layer in (*report.layers, *report.dense_layers):
        grid.add_row(
            layer.name, layer.format, f"{layer.bits_per_weight:.2f}", f"{layer.relative_error:.4f}"
        )
    show(grid)
    facts: dict[str, Any] = {
        "experts": f"{report.expert_bytes / 1e9:.3f} GB",
        "dense part": f"{report.dense_bytes / 1e9:.3f} GB",
        "time": f"{report.seconds:.1f} s",
        "packed model": report.target,
    }
    if report.resumed_files:
        facts["files of an earlier run"] = report.resumed_files
    if report.evaluation is not None:
        found = report.evaluation
        facts |= {
            "perplexity": f"{found.perplexity:.4f} ({found.source_format}: "
            f"{found.source_perplexity:.4f}), {found.tokens} tokens",
            "KL divergence": f"{found.kl:.5f} ({found.kl_error:.5f} standard error) nats, "
            f"99% below {found.kl_p99:.5f}",
            "change of the loss": f"{found.loss_change:+.5f} ({found.loss_change_error:.5f}) nats",
            "same likeliest token": f"{found.same_best:.1%}",
        }
    summary = table()
    for name, value in facts.items():
        summary.add_row(name, str(value))
    show(summary)
