"""Arguments and options of ``kt run``, as types of its parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from kt_core.cli.completion import (
    complete_dense_format,
    complete_device,
    complete_format,
    complete_model,
)
from kt_core.cli.output import JSON_HELP

_EXPERTS, _ACCELERATOR, _DENSE = "Experts", "Accelerator", "Dense part"
_ANSWER, _PROMPT, _OUTPUT = "Answer", "Prompt", "Output"
# More are a slip of the finger, and every thread costs memory.
_MAX_THREADS = 1024


def _option(name: str, value: str, panel: str, help: str, **settings: Any) -> Any:
    return typer.Option(name, metavar=value, rich_help_panel=panel, help=help, **settings)


Model: TypeAlias = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A model directory, `demo`, or a hub id such as Qwen/Qwen3-30B-A3B.",
        autocompletion=complete_model,
    ),
]
Prompt: TypeAlias = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="PROMPT",
        help="Answer this and exit. Without it: answer what is piped in, or chat.",
    ),
]
Format: TypeAlias = Annotated[
    str,
    _option(
        "--format",
        "NAME",
        _EXPERTS,
        "bf16, int8, int4, fp8, mxfp4, nvfp4; of integers also -g32, -g64, -g128 (inputs to a "
        "scale), then -f16 (float16 scales), then -asym (zero points) or -min (minimums): "
        "int4-g128-f16-asym. auto: the first of bf16, int8, int4 that fits.",
        autocompletion=complete_format,
    ),
]
Device: TypeAlias = Annotated[
    str,
    _option(
        "--device",
        "NAME",
        _EXPERTS,
        "Where the model runs: cpu, or an accelerator (cuda, cuda:1, cuda:0,1), which holds "
        "the dense part and hot experts; see `kt backends`. auto: the best there is.",
        autocompletion=complete_device,
    ),
]
HotExperts: TypeAlias = Annotated[
    str,
    _option(
        "--hot-experts",
        "N",
        _ACCELERATOR,
        "Experts it holds: auto (as many as fit), a number such as 96, or a share such as 25%. "
        "The CPU computes the others.",
    ),
]
Placement: TypeAlias = Annotated[
    str,
    _option(
        "--placement",
        "NAME",
        _ACCELERATOR,
        "Chooses them: adaptive, frequency, front-loading, uniform, random; see `kt place`.",
    ),
]
AcceleratorMemory: TypeAlias = Annotated[
    str | None,
    _option(
        "--accelerator-memory", "SIZE", _ACCELERATOR, "Use so much of it, such as 16GiB, or less."
    ),
]
Defer: TypeAlias = Annotated[
    int,
    _option(
        "--defer",
        "N",
        _ACCELERATOR,
        "Let N experts of each token come a layer late, of those that the CPU computes: faster, "
        "and another answer. 0: none.",
        min=0,
    ),
]
Graph: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--graph/--no-graph",
        rich_help_panel=_ACCELERATOR,
        help="Capture a step of decoding once and replay it for each token, where model and "
        "accelerator allow it: --json says so under `decode`.",
    ),
]
Threads: TypeAlias = Annotated[
    int | None,
    _option(
        "--threads",
        "N",
        _EXPERTS,
        "CPU threads; by default one per physical core.",
        min=1,
        max=_MAX_THREADS,
    ),
]
DenseFormat: TypeAlias = Annotated[
    str,
    _option(
        "--dense-format",
        "NAME",
        _DENSE,
        "Pack attention, dense MLPs, shared experts and output head as int8, int4 ... too; "
        "none: as the checkpoint has them.",
        autocompletion=complete_dense_format,
    ),
]
Cache: TypeAlias = Annotated[
    bool,
    _option(
        "--cache",
        "",
        _EXPERTS,
        "Keep the packed experts for the next start, which maps them: see `kt cache`.",
    ),
]
MaxNewTokens: TypeAlias = Annotated[
    int, _option("--max-new-tokens", "N", _ANSWER, "End after N tokens.", min=1)
]
Temperature: TypeAlias = Annotated[
    float, _option("--temperature", "T", _ANSWER, "0 always takes the likeliest token.", min=0)
]
TopP: TypeAlias = Annotated[
    float,
    _option(
        "--top-p",
        "P",
        _ANSWER,
        "Choose among the likeliest tokens that add up to P; 1: among all.",
        min=0,
        max=1,
    ),
]
TopK: TypeAlias = Annotated[
    int, _option("--top-k", "K", _ANSWER, "Choose among the K likeliest tokens; 0: all.", min=0)
]
Seed: TypeAlias = Annotated[
    int | None,
    _option("--seed", "N", _ANSWER, "Same seed, same answer.", min=0, max=2**32 - 1),
]
Stop: TypeAlias = Annotated[
    list[str] | None,
    _option("--stop", "TEXT", _ANSWER, "End before this text; may be given several times."),
]
System: TypeAlias = Annotated[
    str | None, _option("--system", "TEXT", _PROMPT, "System message: how to answer.")
]
Raw: TypeAlias = Annotated[
    bool, _option("--raw", "", _PROMPT, "Continue the text as it is, without chat template.")
]
AsJson: TypeAlias = Annotated[bool, _option("--json", "", _OUTPUT, JSON_HELP)]
Profile: TypeAlias = Annotated[
    Path | None,
    _option(
        "--profile",
        "FILE.json",
        _OUTPUT,
        "Write which device was at what, layer by layer, as a Chrome trace; with --json, report "
        "`overlap` and `time_by_device`, too. Slows the run down a little.",
    ),
]
Verbose: TypeAlias = Annotated[
    bool, _option("--verbose", "", _OUTPUT, "Show what transformers says while it loads.")
]
