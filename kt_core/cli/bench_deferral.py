"""``kt bench deferral``: what expert deferral does to a model's answers."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kt_core.cli import run_options as option
from kt_core.cli.output import JSON_HELP, print_json, progress_bar, registry_of, show, table
from kt_core.errors import InvalidRequestError

if TYPE_CHECKING:
    from kt_core.engine.deferral_effect import DeferralEffect

EPILOG = """
Examples:

* `kt bench deferral demo --prompts questions.txt --device sim --hot-experts 25% --defer 1,2,4`
"""


def deferral(
    context: typer.Context,
    model: option.Model,
    *,
    prompts: Annotated[
        Path, typer.Option("--prompts", metavar="FILE", help="A prompt on each line; or .jsonl.")
    ],
    defer: Annotated[
        str, typer.Option("--defer", metavar="N,N", help="Settings to compare with none.")
    ] = "1,2",
    weight_format: option.Format = "auto",
    device: option.Device = "auto",
    hot_experts: option.HotExperts = "auto",
    placement: option.Placement = "frequency",
    threads: option.Threads = None,
    raw: option.Raw = False,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Compare a model's logits with and without experts that come a layer late.

    For each setting: the mean KL divergence of the next token's distribution, how often the
    likeliest token is the same, and the largest difference of two logits.
    """
    settings = _settings(defer)
    with progress_bar("starting") as progress:
        from kt_core.engine import load  # seconds: torch and transformers
        from kt_core.engine.deferral_effect import deferral_effects
        from kt_core.engine.prompts import read_prompts

        texts = read_prompts(prompts)
        with load(
            model,
            format=weight_format,
            device=device,
            hot_experts=hot_experts,
            placement=placement,
            threads=threads,
            registry=registry_of(context),
            progress=progress,
        ) as engine:
            tokens = [engine.encode(text, raw=raw) for text in texts]
            progress("comparing", None)
            effects = deferral_effects(engine, tokens, settings)
    if as_json:
        print_json([asdict(effect) for effect in effects])
    else:
        _show(effects)


def _settings(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        msg = f"--defer {text!r} must be whole numbers above 0, such as 1,2,4"
        raise InvalidRequestError(msg)
    return [int(part) for part in parts]


def _show(effects: list[DeferralEffect]) -> None:
    grid = table("defer", "tokens", "KL divergence", "same choice", "largest difference")
    for effect in effects:
        grid.add_row(
            str(effect.per_token),
            str(effect.tokens),
            f"{effect.kl_divergence:.5f}",
            f"{effect.same_choice:.1%}",
            f"{effect.largest_difference:.3g}",
        )
    show(grid)
