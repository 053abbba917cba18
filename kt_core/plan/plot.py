"""Tokens per second against the share of hot experts and against the context, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from kt_core.errors import InvalidRequestError
from kt_core.paths import replacing
from kt_core.plan.planner import Formats, Planner
from kt_core.plan.roofline import decode_times, prefill_times

_FORMATS = (".png", ".svg")
_POINTS = 41


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One line of a picture.

    Attributes:
        label: Of the legend.
        x: Share of hot experts, or tokens of context.
        tokens_per_s: At each ``x``.
    """

    label: str
    x: tuple[float, ...]
    tokens_per_s: tuple[float, ...]


def hot_curves(planner: Planner, choices: Sequence[Formats], prompt: int) -> list[Curve]:
    """Return decode speed by the share of hot experts, whether they fit or not."""
    shares = tuple(point / (_POINTS - 1) for point in range(_POINTS))
    curves = []
    for formats in choices:
        speeds = (planner.speed(formats, share) for share in shares)
        times = (decode_times(planner.outline, speed, prompt) for speed in speeds)
        values = tuple(1 / time.total_s for time in times)
        curves.append(Curve(label=formats.experts.name, x=shares, tokens_per_s=values))
    return curves


def context_curves(
    planner: Planner, formats: Formats, hot_fraction: float, longest: int
) -> list[Curve]:
    """Return decode and prefill speed by the tokens before, up to ``longest``."""
    speed = planner.speed(formats, hot_fraction)
    contexts = tuple(
        float(round(longest ** (point / (_POINTS - 1)))) for point in range(1, _POINTS)
    )
    outline = planner.outline
    decode = tuple(1 / decode_times(outline, speed, int(n)).total_s for n in contexts)
    prefill = tuple(n / prefill_times(outline, speed, int(n)).total_s for n in contexts)
    return [
        Curve(label="decode", x=contexts, tokens_per_s=decode),
        Curve(label="prefill", x=contexts, tokens_per_s=prefill),
    ]


def check_plot(file: Path) -> None:
    """Fail before the work, not after it.

    Raises:
        InvalidRequestError: The name is of no picture we write, or matplotlib is not installed.
    """
    if file.suffix not in _FORMATS:
        msg = f"--plot writes {' and '.join(_FORMATS)}, got {str(file)!r}"
        raise InvalidRequestError(msg)
    try:
        import_module("matplotlib")
    except ImportError as error:
        msg = "--plot needs matplotlib, which is not installed: pip install 'kt-core[plot]'"
        raise InvalidRequestError(msg) from error


def draw(file: Path, title: str, hot: Sequence[Curve], context: Sequence[Curve]) -> None:
    """Write the picture, atomically; without ``hot`` curves it has one panel."""
    Figure = import_module("matplotlib.figure").Figure  # an extra: not there for type checks
    panels = [panel for panel in ("hot", "context") if panel == "context" or hot]
    figure = Figure(figsize=(6.0 * len(panels), 4.5), layout="constrained")
    figure.suptitle(title)
    for number, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), number)
        for curve in hot if panel == "hot" else context:
            axes.plot(curve.x, curve.tokens_per_s, label=curve.label)
        axes.set_ylabel("decode, tokens/s" if panel == "hot" else "tokens/s")
        axes.grid(visible=True, alpha=0.3)
        axes.legend()
        if panel == "hot":
            axes.set_ylim(bottom=0)
            axes.set_xlabel("share of experts on the accelerator")
        else:
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xlabel("tokens of context")
    with replacing(file) as temporary:
        figure.savefig(temporary)
