"""Options of ``kt place`` and ``kt trace``, as types of their parameters, and how to read them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from kt_core.cli.completion import complete_policy
from kt_core.errors import InvalidRequestError

if TYPE_CHECKING:
    from kt_core.placement.machine import Machine

_MACHINE, _SHOW = "The machine to predict for", "What is shown"


def _rate(name: str, value: str, help: str) -> Any:
    return typer.Option(name, metavar=value, min=0, rich_help_panel=_MACHINE, help=help)


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
# The defaults stand in kt_core.placement.machine, with their sources.
Link: TypeAlias = Annotated[float | None, _rate("--link", "GB/S", "Host memory to accelerator.")]
LinkShare: TypeAlias = Annotated[
    str,
    typer.Option(
        "--link-share", metavar="PART", rich_help_panel=_MACHINE, help="What swaps may use of it."
    ),
]
AcceleratorMemory: TypeAlias = Annotated[
    float | None, _rate("--accelerator-bandwidth", "GB/S", "Reading its memory.")
]
AcceleratorOps: TypeAlias = Annotated[
    float | None, _rate("--accelerator-tops", "N", "Its 10^12 operations per second.")
]
CpuMemory: TypeAlias = Annotated[
    float | None, _rate("--cpu-bandwidth", "GB/S", "Reading host memory.")
]
CpuOps: TypeAlias = Annotated[
    float | None, _rate("--cpu-tops", "N", "The CPU's 10^12 operations per second.")
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
    *,
    link: float | None,
    link_share: str,
    accelerator_bandwidth: float | None,
    accelerator_tops: float | None,
    cpu_bandwidth: float | None,
    cpu_tops: float | None,
) -> Machine:
    """Return the machine the options describe.

    Raises:
        InvalidRequestError: A rate is 0.
    """
    from kt_core.placement.machine import Machine

    given = {
        "link_bytes_per_s": (link, 1e9),
        "accelerator_bytes_per_s": (accelerator_bandwidth, 1e9),
        "accelerator_ops_per_s": (accelerator_tops, 1e12),
        "cpu_bytes_per_s": (cpu_bandwidth, 1e9),
        "cpu_ops_per_s": (cpu_tops, 1e12),
    }
    rates = {name: value * unit for name, (value, unit) in given.items() if value is not None}
    try:
        return Machine(**rates, link_share=fraction("--link-share", link_share))
    except ValueError as error:
        msg = f"no such machine: {error}"
        raise InvalidRequestError(msg) from error
