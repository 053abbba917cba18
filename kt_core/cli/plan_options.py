"""Arguments and options of ``kt plan``, as types of its parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from kt_core.cli.completion import complete_format, complete_plannable
from kt_core.cli.output import JSON_HELP

_MACHINE, _USE, _TRAINING, _OUTPUT = "Machine (by default this one)", "Use", "Fine-tuning", "Output"


def _option(name: str, value: str, panel: str, help: str, **settings: Any) -> Any:
    return typer.Option(name, metavar=value, rich_help_panel=panel, help=help, **settings)


Model: TypeAlias = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A directory, a config.json, a name such as `deepseek-v3` or `demo`, or a hub id.",
        autocompletion=complete_plannable,
    ),
]
MachineFile: TypeAlias = Annotated[
    Path | None,
    _option("--machine", "FILE", _MACHINE, "YAML about one; options override it."),
]
Ram: TypeAlias = Annotated[
    str | None, _option("--ram", "SIZE", _MACHINE, "Host memory for the model: 512GiB.")
]
Vram: TypeAlias = Annotated[
    str | None, _option("--vram", "SIZE", _MACHINE, "Accelerator memory, 24GiB; 0: none.")
]
Bandwidth: TypeAlias = Annotated[
    str | None, _option("--bandwidth", "RATE", _MACHINE, "Of host memory, as measured: 200GB/s.")
]
Pcie: TypeAlias = Annotated[
    str | None, _option("--pcie", "RATE", _MACHINE, "From host to accelerator: 32GB/s.")
]
Cores: TypeAlias = Annotated[
    int | None, _option("--cores", "N", _MACHINE, "Physical cores.", min=1)
]
Remeasure: TypeAlias = Annotated[
    bool, _option("--remeasure", "", _MACHINE, "Measure this machine again.")
]
Format: TypeAlias = Annotated[
    str,
    _option(
        "--format",
        "NAME",
        _USE,
        "bf16, int8, int4, ...; auto: the first of bf16, int8, int4 that fits.",
        autocompletion=complete_format,
    ),
]
DenseFormat: TypeAlias = Annotated[
    str,
    _option(
        "--dense-format",
        "NAME",
        _USE,
        "Linear layers of the rest: int8, int4, ...; none: as they are; auto: int8 if need be.",
    ),
]
Context: TypeAlias = Annotated[
    int | None, _option("--context", "N", _USE, "Tokens the cache must hold.", min=1)
]
PromptTokens: TypeAlias = Annotated[
    int | None, _option("--prompt", "N", _USE, "Tokens of a prompt, for the speeds.", min=1)
]
HotExperts: TypeAlias = Annotated[
    int | None,
    _option("--hot-experts", "N", _USE, "Experts on the accelerator, of all layers.", min=0),
]
LoraRank: TypeAlias = Annotated[int, _option("--lora-rank", "R", _TRAINING, "Of adapters.", min=1)]
SequenceLength: TypeAlias = Annotated[
    int, _option("--sequence-length", "N", _TRAINING, "Tokens of a sequence.", min=1)
]
Plot: TypeAlias = Annotated[
    Path | None, _option("--plot", "FILE", _OUTPUT, "Draw tokens/s into a .png or .svg.")
]
AsJson: TypeAlias = Annotated[bool, _option("--json", "", _OUTPUT, JSON_HELP)]
