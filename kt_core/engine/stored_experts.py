"""Experts that are quantised on disk, packed as they are: no number changes.

Between the matrices on disk and the projections of an expert stand transformers' operations and the
adapter's ``expert_weights``: they concatenate, transpose and interleave. All of that moves rows, so
it is run once, on numbers that say where they come from; what moved is then done to the rows of
codes and scales.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch

from kt_core.checkpoint import Checkpoint
from kt_core.engine.transformers_tensors import ExpertTensors
from kt_core.errors import UnsupportedFormatError
from kt_core.interfaces import ExpertsSite, ExpertWeights, QuantizedTensor, StoredMatrix
from kt_core.quant.exact import format_named
from kt_core.types import Format

_PROJECTIONS = ("gate", "up", "down")
_PARTS = ("codes", "scales", "zero_points", "minimums", "output_scales")


def stored_matrices(
    checkpoint: Checkpoint, site: ExpertsSite, tensors: Mapping[str, ExpertTensors]
) -> Iterator[StoredMatrix | None]:
    """Yield how each matrix of a layer is stored; None for one that is not quantised."""
    for parts in tensors.values():
        for expert in range(1 if parts.is_fused else site.spec.num_experts):
            for name in parts.names(expert):
                if len(checkpoint.tensors[name].shape) >= 2 + parts.is_fused:  # else a bias
                    yield checkpoint.stored(name)


def stored_formats(
    checkpoint: Checkpoint, site: ExpertsSite, tensors: Mapping[str, ExpertTensors]
) -> set[Format] | None:
    """Return what the matrices of a layer would be packed as; None where none is quantised."""
    found = list(stored_matrices(checkpoint, site, tensors))
    if not any(found):
        return None
    return {matrix.packed_format if matrix else format_named("bf16") for matrix in found}


def layer_format(formats: set[Format], site: ExpertsSite) -> Format:
    """Return the format of a layer whose matrices are stored in these: the largest of them."""
    size = site.spec.hidden_size
    return max(formats, key=lambda f: (f.bits_per_weight(size), f.name))


@dataclass(frozen=True, slots=True)
class _Rows:
    """Where the rows of one projection come from.

    Attributes:
        parameter: The parameter they are of.
        source: Which of its matrices; None where they are of several, one after the other.
        index: Which rows.
    """

    parameter: str
    source: int | None
    index: slice | torch.Tensor

    def take(self, matrices: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return these rows of one part of the matrices."""
        found = matrices if self.source is None else [matrices[self.source]]
        if isinstance(self.index, slice):
            return found[0][self.index]
        # As bytes: torch cannot index some of the 8-bit types.
        rows = torch.cat([m.contiguous().view(torch.uint8).reshape(len(m), -1) for m in found])
        return rows[self.index].view(found[0].dtype).reshape(-1, *found[0].shape[1:])


RowsByLayout: TypeAlias = "dict[object, dict[str, _Rows]]"
"""Where rows come from, by how a layer is stored: found out once for all layers that are alike."""


class StoredExperts:
    """Reads the experts of one layer as they are stored."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        site: ExpertsSite,
        tensors: Mapping[str, ExpertTensors],
        weight_format: Format,
        known: RowsByLayout,
    ) -> None:
        """Find out which row of which matrix goes where.

        Args:
            checkpoint: Where the matrices are.
            site: The layer.
            tensors: Of its parameters.
            weight_format: Of its kernel.
            known: What was found out for other layers of this model; added to.

        Raises:
            UnsupportedFormatError: The model needs something else of the matrices than their rows.
        """
        self._checkpoint = checkpoint
        self._site = site
        self._tensors = tensors
        self._format = weight_format
        layout = self._layout()
        if layout not in known:
            with torch.device("cpu"):  # transformers prepares models where the default is meta
                known[layout] = self._find_rows()
        self._rows = known[layout]

    def is_exact(self, expert: int) -> bool:
        """Whether every matrix of an expert is stored in the format of the layer."""
        stored = [
            self._checkpoint.stored(name)
            for parameter in {rows.parameter for rows in self._rows.values()}
            for name in self._tensors[parameter].names(expert)
        ]
        return all(matrix and matrix.weight_format == self._format for matrix in stored)

    def read(self, expert: int) -> ExpertWeights:
        """Return an expert whose matrices ``is_exact``."""
        matrices = {
            parameter: [
                self._checkpoint.read_matrix(name, expert if parts.is_fused else None)
                for name in parts.names(expert)
            ]
            for parameter, parts in self._tensors.items()
            if parameter in {rows.parameter for rows in self._rows.values()}
        }
        rows = {
            parameter: torch.empty(parts.shape(expert), device="meta")
            if parameter in matrices
            else parts.read(expert)
            for parameter, parts in self._tensors.items()
        }
        biases = self._site.expert_weights(rows)
        projections: dict[str, Any] = {
            projection: self._projection(where, matrices[where.parameter])
            for projection, where in self._rows.items()
        }
        return replace(biases, **projections)

    def _projection(self, where: _Rows, matrices: Sequence[Any]) -> QuantizedTensor:
        parts: dict[str, torch.Tensor] = {}
        for part in _PARTS:
            values = [getattr(matrix, part) for matrix in matrices]
            if values[0] is not None:
                parts[part] = where.take(values)
        return QuantizedTensor(weight_format=self._format, **parts)

    def _layout(self) -> object:
        """What two layers of a model have in common whose rows lie alike."""
        stored = tuple(
            (name, parts.layout, tuple(self._described(part) for part in parts.names(0)))
            for name, parts in self._tensors.items()
        )
        return self._site.spec, stored

    def _described(self, name: str) -> object:
        matrix = self._checkpoint.stored(name)
        return self._checkpoint.tensors[name].shape, matrix is not None and matrix.is_transposed

    def _find_rows(self) -> dict[str, _Rows]:
        marked = {name: self._marked(parts) for name, parts in self._tensors.items()}
        weights = self._site.expert_weights({name: row for name, (row, _) in marked.items()})
        found = {}
        for projection in _PROJECTIONS:
            marks = getattr(weights, projection)
            if marks is not None:
                found[projection] = self._where(projection, marks, marked)
        return found

    def _marked(self, parts: ExpertTensors) -> tuple[torch.Tensor, list[tuple[int, int]]]:
        """The parameter's row of expert 0, each number being where it came from."""
        sizes: list[tuple[int, int]] = []
        names = parts.names(0)
        starts: dict[str, int] = {}
        at = 0
        for name in names:
            shape = self._checkpoint.tensors[name].shape[1 if parts.is_fused else 0 :]
            if len(shape) != 2:
                shape = (1, *shape)
            matrix = self._checkpoint.stored(name)
            rows, columns = reversed(shape) if matrix and matrix.is_transposed else shape
            starts[name] = at
            sizes.append((rows, columns))
            at += rows * columns

        def marks(name: str, expert: int) -> torch.Tensor:
            del expert
            rows, columns = sizes[names.index(name)]
            end = starts[name] + rows * columns
            values = torch.arange(starts[name], end, dtype=torch.int32)
            values = values.view(rows, columns)
            matrix = self._checkpoint.stored(name)
            if matrix is None:
                shape = self._checkpoint.tensors[name].shape
                return values.view((1, *shape[1:]) if parts.is_fused else shape)
            values = values.T if matrix.is_transposed else values
            return values[None] if parts.is_fused else values

        return parts.convert(0, marks), sizes

    def _where(
        self,
        projection: str,
        marks: torch.Tensor,
        marked: Mapping[str, tuple[torch.Tensor, list[tuple[int, int]]]],
    ) -> _Rows:
        # A projection is a view of one parameter's row, so their storage tells which.
        storage = marks.untyped_storage().data_ptr()
        owners = [n for n, (r, _) in marked.items() if r.untyped_storage().data_ptr() == storage]
        parameter = owners[0] if owners else ""
        sizes = marked[parameter][1] if owners else [(0, 0)]
        columns = sizes[0][1] or 1
        rows = (marks[:, 0] // columns).long()
        is_whole = all(size[1] == marks.shape[1] for size in sizes) and torch.equal(
            marks, rows[:, None] * columns + torch.arange(marks.shape[1], dtype=torch.int32)
        )
        if not is_whole:
            msg = (
                f"the {projection} projections of {self._site.module_name} are cut out of the "
                f"matrices on disk in a way that their groups of inputs do not survive: choose "
                f"another format for them, such as --format int8"
            )
            raise UnsupportedFormatError(msg)
        ends = torch.tensor([size[0] for size in sizes]).cumsum(0)
        sources = torch.searchsorted(ends, rows, right=True)
        if not bool((sources == sources[0]).all()):
            return _Rows(parameter, None, rows)
        source = int(sources[0])
        return _Rows(parameter, source, _as_slice(rows - int(ends[source]) + sizes[source][0]))


def _as_slice(rows: torch.Tensor) -> slice | torch.Tensor:
    """Return evenly spaced rows as a slice, which copies nothing."""
    step = int(rows[1] - rows[0]) if len(rows) > 1 else 1
    start = int(rows[0])
    if step > 0 and torch.equal(rows, torch.arange(len(rows)) * step + start):
        return slice(start, start + step * len(rows), step)
    return rows


def find_stored(
    checkpoint: Checkpoint,
    site: ExpertsSite,
    tensors: Mapping[str, ExpertTensors],
    weight_format: Format,
    known: RowsByLayout,
) -> StoredExperts | None:
    """Return who reads the experts of a layer as they are stored; None where nobody can.

    Arguments are those of ``StoredExperts``.

    Raises:
        UnsupportedFormatError: As ``StoredExperts``.
    """
    stored = stored_formats(checkpoint, site, tensors)
    if stored is None or weight_format not in stored:
        return None
    return StoredExperts(checkpoint, site, tensors, weight_format, known)
