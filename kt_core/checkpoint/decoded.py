"""A quantised checkpoint, seen under the names and shapes that it would have unquantised."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from kt_core.checkpoint.safetensors_files import Checkpoint
from kt_core.errors import CheckpointError
from kt_core.interfaces import QuantizedTensor, StoredMatrix, TensorInfo

if TYPE_CHECKING:
    import torch

_DECODED = "F32"


class DecodedCheckpoint(Checkpoint):
    """Reads matrices as they are stored, or as float32; any thread may read.

    What its readers did not claim is read as it is.
    """

    def __init__(self, files: Checkpoint, matrices: Iterable[StoredMatrix]) -> None:
        """Take the tensors of the files, and how some of them are to be read.

        Raises:
            CheckpointError: A part of a matrix is in no file.
        """
        self._files = files
        self._matrices: dict[str, StoredMatrix] = {}
        parts: set[str] = set()
        for matrix in matrices:
            if missing := [part for part in matrix.parts.values() if part not in files]:
                msg = (
                    f"{matrix.name} is quantised, but {', '.join(missing)} is in no file. "
                    "A shard may be missing: download the checkpoint again."
                )
                raise CheckpointError(msg)
            self._matrices[matrix.name] = matrix
            parts.update(matrix.parts.values(), matrix.unread)
        tensors = {name: info for name, info in files.tensors.items() if name not in parts}
        for name, matrix in self._matrices.items():
            first = files.tensors[next(iter(matrix.parts.values()))]
            size = math.prod(matrix.shape) * 4
            tensors[name] = TensorInfo(
                file=first.file, dtype=_DECODED, shape=matrix.shape, size_bytes=size
            )
        super().__init__(tensors)

    def read(self, name: str) -> torch.Tensor:
        """Return the whole tensor: what is quantised as float32."""
        matrix = self._matrices.get(name)
        if matrix is None:
            return self._files.read(name)
        if not matrix.is_stack:
            return self._dense(matrix, None)
        import torch

        return torch.stack([self._dense(matrix, row) for row in range(matrix.shape[0])])

    def read_row(self, name: str, row: int) -> torch.Tensor:
        """See ``Checkpoint.read_row``; a row of what is quantised is a matrix."""
        matrix = self._matrices.get(name)
        if matrix is None:
            return self._files.read_row(name, row)
        if not matrix.is_stack:
            return self._dense(matrix, None)[row : row + 1]
        return self._dense(matrix, row)[None]

    def read_matrix(self, name: str, row: int | None = None) -> torch.Tensor | QuantizedTensor:
        """See ``Checkpoint.read_matrix``. Never transposed.

        Raises:
            CheckpointError: Its parts do not fit together.
        """
        matrix = self._matrices.get(name)
        if matrix is None:
            return super().read_matrix(name, row)
        at = matrix.row if row is None else row
        parts = {
            word: self._files.read(part) if at is None else self._files.read_row(part, at)[0]
            for word, part in matrix.parts.items()
        }
        try:
            return matrix.decode(parts)
        except (RuntimeError, ValueError) as error:
            names = ", ".join(matrix.parts.values())
            msg = f"{name} cannot be read: {error} (from {names})"
            raise CheckpointError(msg) from error

    def stored(self, name: str) -> StoredMatrix | None:
        """See ``Checkpoint.stored``."""
        return self._matrices.get(name)

    @property
    def is_as_on_disk(self) -> bool:
        """See ``Checkpoint.is_as_on_disk``."""
        return False

    def close(self) -> None:
        """See ``Checkpoint.close``."""
        self._files.close()

    def _dense(self, matrix: StoredMatrix, row: int | None) -> torch.Tensor:
        from kt_core.quant.reference import dequantize

        stored = self.read_matrix(matrix.name, row)
        values = dequantize(stored) if isinstance(stored, QuantizedTensor) else stored.float()
        return values.T if matrix.is_transposed else values
