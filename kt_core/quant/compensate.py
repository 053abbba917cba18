"""Quantise so that what one input's rounding does to the outputs, the inputs after it undo.

Rounding weights w to q changes an output by (w - q) x. Over the inputs x that were seen, its mean
square is (w - q) H (w - q)^T with H their second moments. Where inputs are correlated, weights that
are not rounded yet can take back part of the error: column by column, each rounded with what those
before it left to it (GPTQ: Frantar et al. 2022, arXiv:2210.17323). With U upper triangular and
U^T U = H^-1, a column's error e = (w_j - q_j) / U_jj costs e^2 in the end and changes the columns k
behind it by -e U_jk; so the scales of a group are searched with its columns weighted by 1 / U_jj^2,
when everything before it is done.
"""

from __future__ import annotations

import torch

from kt_core.interfaces import QuantizedTensor
from kt_core.quant.grid import Grid
from kt_core.quant.reference import dequantize, output_scales, quantize
from kt_core.quant.search import Groups, best_grid, quantize_searched
from kt_core.types import Format

# Part of the mean of the diagonal that is added to it, as in GPTQ: few samples leave directions
# that none has, where errors are not free.
_DAMPING = 0.01
_MORE_DAMPING = 10.0
# Columns behind these are changed once for all of them: a product of matrices.
_BLOCK_COLUMNS = 128


class Compensator:
    """Quantises matrices that are multiplied with the same inputs."""

    def __init__(self, moments: torch.Tensor) -> None:
        """Factor the second moments of the inputs.

        Args:
            moments: ``[in, in]`` float32: sum, or mean, of x x^T. Positive semidefinite.

        Raises:
            ValueError: They are not finite.
        """
        if not torch.isfinite(moments).all():
            msg = "the second moments of the inputs hold a NaN or an infinity"
            raise ValueError(msg)
        self._moments = moments
        self._factor = inverse_factor(moments)

    def quantize(self, weight: torch.Tensor, weight_format: Format) -> QuantizedTensor:
        """Quantise ``[out, in]`` with little error in the outputs; never more than to the nearest.

        Of each output the best of three is taken, judged by the moments: compensated, searched
        with their diagonal, to the nearest.

        Args:
            weight: Of any floating type.
            weight_format: What it becomes. bf16 has no scales: that is rounded.

        Raises:
            ValueError: As ``reference.quantize``.
        """
        nearest = quantize(weight, weight_format)
        if nearest.scales is None:
            return nearest
        exact = weight.float()
        choices = [
            nearest,
            quantize_searched(weight, weight_format, self._moments.diagonal()),
            _compensated(exact, weight_format, self._factor),
        ]
        errors = [output_errors(dequantize(choice) - exact, self._moments) for choice in choices]
        return _rows_of(choices, torch.stack(errors).argmin(dim=0))


def output_errors(errors: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    """``[out]``: what errors of weights, ``[out, in]``, do to each output, squared and summed."""
    return ((errors @ moments) * errors).sum(dim=1)


def inverse_factor(moments: torch.Tensor) -> torch.Tensor:
    """Return upper triangular U with U^T U = (H + damping)^-1, ``[in, in]``.

    By H = R R^T with R upper triangular, which is a Cholesky factorisation with rows and columns in
    reverse order; U = R^-1. The inverse of H itself is never made.
    """
    damping = _DAMPING * float(moments.diagonal().mean())
    if damping <= 0:  # nothing but zeros came in
        return torch.eye(len(moments))
    while True:
        damped = moments.clone()
        damped.diagonal().add_(damping)
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not int(failed):
            break
        damping *= _MORE_DAMPING
    identity = torch.eye(len(moments), dtype=moments.dtype)
    factor: torch.Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
    return factor


def _compensated(
    exact: torch.Tensor, weight_format: Format, factor: torch.Tensor
) -> QuantizedTensor:
    rows, columns = exact.shape
    size = weight_format.group_size or columns
    worth = factor.diagonal().square().reciprocal()
    whole = Groups.of(exact, worth, weight_format)
    outputs = output_scales(whole.values, weight_format)
    left = exact.T.contiguous()  # [in, out]: what is still to be rounded, a column in one piece
    codes = torch.empty_like(left)
    grids = []
    for first in range(0, columns, size):
        last = min(first + size, columns)
        group = Groups.of(left[first:last].T, worth[first:last], weight_format)
        grids.append(best_grid(group, weight_format, outputs))
        column_grid = _of_columns(grids[-1])
        for start in range(first, last, _BLOCK_COLUMNS):
            end = min(start + _BLOCK_COLUMNS, last)
            errors = torch.empty(end - start, rows)
            for at in range(start, end):
                codes[at] = column_grid.codes(left[at])
                error = (left[at] - column_grid.numbers(codes[at])) / factor[at, at]
                left[at + 1 : end] -= factor[at, at + 1 : end, None] * error
                errors[at - start] = error
            left[end:] -= factor[start:end, end:].T @ errors
    return _together(grids).stored(codes.T)


def _of_columns(grid: Grid) -> Grid:
    """Return the grid of one group for ``[out]`` numbers."""
    parts = (grid.scales, grid.offsets, grid.outputs)
    return Grid(grid.weight_format, *(None if p is None else p.flatten() for p in parts))  # type: ignore[arg-type]


def _together(grids: list[Grid]) -> Grid:
    """Return the grid of all groups of the same outputs."""
    offsets = [grid.offsets for grid in grids if grid.offsets is not None]
    return Grid(
        grids[0].weight_format,
        torch.cat([grid.scales for grid in grids], dim=1),
        torch.cat(offsets, dim=1) if offsets else None,
        grids[0].outputs,
    )


def _rows_of(choices: list[QuantizedTensor], chosen: torch.Tensor) -> QuantizedTensor:
    """Take each output from the choice of that number."""

    def taken(name: str) -> torch.Tensor | None:
        parts = [getattr(choice, name) for choice in choices]
        if parts[0] is None:
            return None
        raw = torch.stack([part.view(torch.uint8).reshape(len(part), -1) for part in parts])
        rows = raw[chosen, torch.arange(len(chosen))]
        result: torch.Tensor = rows.view(parts[0].dtype).reshape(parts[0].shape)
        return result

    names = ("codes", "scales", "zero_points", "minimums", "output_scales")
    parts: dict[str, torch.Tensor | None] = {name: taken(name) for name in names}
    return QuantizedTensor(weight_format=choices[0].weight_format, **parts)  # type: ignore[arg-type]
