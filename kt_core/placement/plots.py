"""Pictures of placements: hit rates over residency, and layers by experts.

Needs matplotlib, the extra ``plot``; the HTML heat map needs nothing. No window, no global state:
figures are drawn without pyplot.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kt_core.errors import InvalidRequestError, MissingExtraError, TraceError
from kt_core.interfaces import ExpertGrid, Placement
from kt_core.paths import replacing
from kt_core.placement.simulate import Simulation, mask_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CELL = 12  # pixels of an expert in the HTML heat map
_MARGIN = 30  # for the numbers of layers
_MARKERS = "osd^vx"


def check_plot_file(file: Path, suffixes: Sequence[str]) -> None:
    """Refuse, before hours of work, a file that could not be drawn in the end.

    Raises:
        InvalidRequestError: Its name ends as none of ``suffixes``, or its folder is absent.
        MissingExtraError: It needs matplotlib, which is not installed.
    """
    if file.suffix not in suffixes:
        msg = f"{str(file)!r} must end in {' or '.join(suffixes)}, which says how to draw it"
        raise InvalidRequestError(msg)
    if not file.parent.is_dir():
        msg = f"the folder {str(file.parent)!r} is not there; make it first"
        raise InvalidRequestError(msg)
    if file.suffix != ".html":
        _new_figure(1, 1)


def draw_hit_rates(simulations: Sequence[Simulation], file: Path, *, title: str) -> None:
    """Draw a line for each policy: hit rate, and predicted decode speed, over residency."""
    figure = _new_figure(11, 4.5)
    hits, speed = figure.subplots(1, 2)
    for number, policy in enumerate(dict.fromkeys(s.policy for s in simulations)):
        own = [s for s in simulations if s.policy == policy]
        percent = [100 * s.hot_fraction for s in own]
        # Policies may agree to a pixel: later lines are dashed, and thinner, so that both show.
        dashes: Any = "-" if number == 0 else (0, (4, 2 + number))
        style: dict[str, Any] = {"linestyle": dashes, "marker": _MARKERS[number % len(_MARKERS)]}
        style |= {"linewidth": max(3.5 - number / 2, 1.5), "fillstyle": "none", "label": policy}
        hits.plot(percent, [100 * s.hit_rate() for s in own], **style)
        speed.plot(percent, [s.tokens_per_s(is_decode=True) for s in own], **style)
    figure.suptitle(title, wrap=True)
    hits.set_ylabel("hit rate, %")
    hits.set_ylim(0, 102)
    speed.set_ylim(bottom=0)
    speed.set_ylabel("predicted decode, tokens/s")
    for axes in (hits, speed):
        axes.set_xlabel("experts on the accelerator, %")
        axes.grid(visible=True, alpha=0.3)
    hits.legend()
    _save(figure, file)


def draw_heatmap(
    counts: npt.NDArray[np.int64],
    grid: ExpertGrid,
    file: Path,
    *,
    title: str,
    placement: Placement | None = None,
) -> None:
    """Draw layers by experts, dark where much used, residents marked; PNG or HTML by the name.

    Args:
        counts: ``grid.shape`` pairs.
        grid: Layers and experts.
        file: Ends in ``.png`` or ``.html``.
        title: What is shown.
        placement: What to mark; None for nothing.
    """
    resident = None if placement is None else mask_of(placement, grid)
    if file.suffix == ".html":
        page = heatmap_html(counts, grid, title=title, resident=resident)
        try:
            with replacing(file) as temporary:
                temporary.write_text(page, encoding="utf-8")
        except OSError as error:
            raise _unwritable(file, error) from error
        return
    layers, width = grid.shape
    figure = _new_figure(min(6 + width / 12, 24), min(3 + layers / 6, 24))
    from matplotlib.ticker import MaxNLocator  # it is there: the figure could be made

    axes = figure.subplots()
    is_there = np.arange(width) < np.array(grid.num_experts)[:, None]
    shown = np.ma.masked_array(_share(counts), mask=~is_there)
    image = axes.imshow(shown, aspect="auto", cmap="viridis", interpolation="nearest")
    figure.colorbar(image, label="use, 1 = an even share")
    if resident is not None:
        rows, columns = np.nonzero(resident)
        # Seen on dark and on bright alike.
        dots: dict[str, Any] = {"markersize": 3, "markeredgecolor": "black", "markeredgewidth": 0.6}
        axes.plot(columns, rows, "s", color="white", **dots)
    figure.suptitle(title, wrap=True)
    note = "" if resident is None else " (dots: on the accelerator)"
    axes.set_xlabel(f"expert{note}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("layer")
    _save(figure, file)


def heatmap_html(
    counts: npt.NDArray[np.int64],
    grid: ExpertGrid,
    *,
    title: str,
    resident: npt.NDArray[np.bool_] | None = None,
) -> str:
    """Return a page that needs nothing beside it: an SVG in which each expert tells its use."""
    share = _share(counts)
    top = max(float(share.max()), 1e-9)
    layers, width = grid.shape
    cells = []
    for layer, number in enumerate(grid.num_experts):
        cells.append(f'<text x="-4" y="{layer * _CELL + 9}">{layer}</text>')
        for expert in range(number):
            depth = math.sqrt(share[layer, expert] / top)  # else all but a few look the same
            is_hot = resident is not None and bool(resident[layer, expert])
            where = f'x="{expert * _CELL}" y="{layer * _CELL}"'
            tip = (
                f"layer {layer}, expert {expert}: {int(counts[layer, expert])} pairs, "
                f"{share[layer, expert]:.2f} of an even share"
            )
            cells.append(
                f'<rect {where} width="{_CELL - 1}" height="{_CELL - 1}" '
                f'fill="hsl(215 70% {95 - 75 * depth:.0f}%)"{" class=hot" * is_hot}>'
                f"<title>{tip}{', on the accelerator' * is_hot}</title></rect>"
            )
    note = "Dark: much used. Point at an expert for its numbers." + (
        " Framed: on the accelerator." if resident is not None else ""
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en"><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title>\n"
        "<style>body{font-family:sans-serif;margin:2em}.hot{stroke:#e4572e;stroke-width:2}"
        f"text{{font-size:{_CELL - 3}px;text-anchor:end}}</style>\n"
        f"<h1>{html.escape(title)}</h1>\n<p>{note} Rows: {layers} layers. "
        f"Columns: up to {width} experts.</p>\n"
        f'<svg width="{width * _CELL + _MARGIN}" height="{layers * _CELL}" role="img" '
        f'viewBox="{-_MARGIN} 0 {width * _CELL + _MARGIN} {layers * _CELL}">\n'
        + "\n".join(cells)
        + "\n</svg></html>\n"
    )


def _share(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Use of each expert over that of the average expert which was used at all in its layer."""
    used = np.maximum((counts > 0).sum(axis=1, keepdims=True), 1)
    total = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    share: npt.NDArray[np.float64] = counts * used / total
    return share


def _new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, in inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        msg = (
            f"a picture needs matplotlib, which cannot be imported ({error}): "
            "pip install 'kt-core[plot]'"
        )
        raise MissingExtraError(msg) from error
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, file: Path) -> None:
    try:
        with replacing(file) as temporary:
            figure.savefig(temporary, dpi=150)
    except OSError as error:
        raise _unwritable(file, error) from error


def _unwritable(file: Path, error: OSError) -> TraceError:
    return TraceError(f"cannot write the picture {str(file)!r}: {error}. Choose another file.")
