"""Options of ``kt place`` and ``kt trace``, as types of their parameters, and how to read them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from kt_core.cli.completion import complete_policy
from kt_core.errors import InvalidRequestError

if TYPE_CHECKING:
    from kt_core.placement.machine import Machine

_MACHINE, _SHOW = "The machine to predict for", "What is shown"


def _option(name: str, value: str, help: str) -> Any:
    return typer.Option(name, metavar=value, rich_help_panel=_MACHINE, help=help)


PolicyName: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--placement",
        metavar="NAME",
        rich_help_panel=_SHOW,
        help="Mark what this policy would place.",
        autocompletion=complete_policy,
    ),
]
HotExperts: TypeAlias = Annotated[
    str,
    typer.Option(
        "--hot-experts", metavar="PART", rich_help_panel=_SHOW, help="How much of all, as 25%."
    ),
]
# As `kt plan` names them. The defaults stand in kt_core.placement.machine, with their sources.
MachineFile: TypeAlias = Annotated[
    Path | None, _option("--machine", "FILE", "YAML about one, as of `kt plan`; options override.")
]
Bandwidth: TypeAlias = Annotated[
    str | None, _option("--bandwidth", "RATE", "Of host memory: 300GB/s.")
]
Pcie: TypeAlias = Annotated[
    str | None, _option("--pcie", "RATE", "From host to accelerator: 32GB/s.")
]
LinkShare: TypeAlias = Annotated[
    str, _option("--link-share", "PART", "What swaps may use of the link.")
]


def fraction(option: str, text: str) -> float:
    """Read ``25%`` or ``0.25``.

    Raises:
        InvalidRequestError: It is neither, or not within 0 to 100 %.
    """
    number, is_percent = text.strip().removesuffix("%"), text.strip().endswith("%")
    try:
        value = float(number) / (100 if is_percent else 1)
    except ValueError:
        value = -1
    if not 0 <= value <= 1:
        msg = f"{option} takes parts such as 25% or 0.25, from 0 to 100%; got {text!r}"
        raise InvalidRequestError(msg)
    return value


def hot_fraction(text: str) -> float:
    """Read ``--hot-experts``."""
    return fraction("--hot-experts", text)


def machine_of(
    file: Path | None, *, bandwidth: str | None, pcie: str | None, link_share: str
) -> Machine:
    """Return the machine the options describe; accelerators count together.

    Raises:
        InvalidRequestError: The file cannot be read, or a rate is none.
    """
    from kt_core.placement.machine import Machine
    from kt_core.plan.description import Description, read_description
    from kt_core.plan.machine import INT8_OPS_PER_CORE
    from kt_core.plan.units import parse_bytes_per_s

    said = (read_description(file) if file else Description()).overridden_by(
        Description(
            read_bytes_per_s=parse_bytes_per_s(bandwidth, "--bandwidth") if bandwidth else None,
            link_bytes_per_s=parse_bytes_per_s(pcie, "--pcie") if pcie else None,
        )
    )
    count = said.card_count or 1
    given = {
        "cpu_bytes_per_s": (said.read_bytes_per_s, 1),
        "cpu_ops_per_s": (said.int8_ops_per_s or (said.cores or 0) * INT8_OPS_PER_CORE, 1),
        "link_bytes_per_s": (said.link_bytes_per_s, count),
        "accelerator_bytes_per_s": (said.card_read_bytes_per_s, count),
        "accelerator_ops_per_s": (said.card_ops_per_s, count),
    }
    rates = {name: value * factor for name, (value, factor) in given.items() if value}
    share = fraction("--link-share", link_share)
    if share == 0:
        msg = "--link-share 0 leaves nothing for swaps: name a policy that makes none (--policy)"
        raise InvalidRequestError(msg)
    return Machine(**rates, link_share=share)
