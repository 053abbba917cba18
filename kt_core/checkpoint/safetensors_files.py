"""A directory of safetensors files, checked against its index before anything is read.

The header of a file is 8 bytes of length (little endian) and that many bytes of JSON: names, types,
shapes and byte ranges (https://huggingface.co/docs/safetensors). Reading the headers alone tells
whether a shard is missing or was cut off, which otherwise shows minutes into loading.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kt_core.errors import CheckpointError
from kt_core.interfaces import QuantizedTensor, StoredMatrix, TensorInfo

if TYPE_CHECKING:
    import torch

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


class Checkpoint:
    """All tensors of a model directory. Reads are memory-mapped; any thread may read."""

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        """Take the tensors that the headers named."""
        self.tensors = dict(tensors)
        self._handles: dict[Path, Any] = {}
        self._lock = threading.Lock()

    def __contains__(self, name: str) -> bool:
        """Whether there is a tensor of that name."""
        return name in self.tensors

    def read(self, name: str) -> torch.Tensor:
        """Return the whole tensor."""
        value: torch.Tensor = self._handle(name).get_tensor(name)
        return value

    def read_row(self, name: str, row: int) -> torch.Tensor:
        """Return ``tensor[row:row + 1]``, reading nothing else of it.

        Raises:
            CheckpointError: The tensor has no such row.
        """
        info = self.tensors[name]
        if not info.shape or not 0 <= row < info.shape[0]:
            msg = (
                f"{name!r} in {info.file} has no row {row}, its shape is {list(info.shape)}: "
                "the weights do not fit the config.json beside them."
            )
            raise CheckpointError(msg)
        value: torch.Tensor = self._handle(name).get_slice(name)[row : row + 1]
        return value

    def read_matrix(self, name: str, row: int | None = None) -> torch.Tensor | QuantizedTensor:
        """Return a matrix, ``[out, in]``, as it is stored.

        Args:
            name: A tensor.
            row: Which matrix of a stack; None where the tensor is one.
        """
        return self.read(name) if row is None else self.read_row(name, row)[0]

    def stored(self, name: str) -> StoredMatrix | None:
        """Return how a quantised tensor is stored; None for one of floating-point numbers."""
        del name
        return None

    @property
    def is_as_on_disk(self) -> bool:
        """Whether the tensors are those of the files, so that others can read them there."""
        return True

    def close(self) -> None:
        """Give the mapped files back. A later read maps them again."""
        with self._lock:
            self._handles.clear()

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.size_bytes for info in self.tensors.values())

    def _handle(self, name: str) -> Any:
        from safetensors import safe_open

        file = self.tensors[name].file
        with self._lock:
            if file not in self._handles:
                self._handles[file] = safe_open(file, "pt")
            return self._handles[file]


def open_checkpoint(directory: Path) -> Checkpoint:
    """Read the index and every header of a model directory.

    Raises:
        CheckpointError: There are no safetensors files, one that the index names is missing or
            damaged, or a tensor that the index promises is in no file.
    """
    index_file = directory / INDEX_NAME
    promised: dict[str, str] = {}
    if index_file.is_file():
        promised = _read_index(index_file)
        files = [directory / name for name in sorted(set(promised.values()))]
        _check_present(files, index_file)
    elif (directory / SINGLE_NAME).is_file():
        files = [directory / SINGLE_NAME]
    else:
        msg = (
            f"{directory} holds no weights: neither {INDEX_NAME} nor {SINGLE_NAME} is there. "
            "kt reads safetensors; convert other files with transformers' save_pretrained."
        )
        raise CheckpointError(msg)
    return open_files(files, promised)


def open_files(files: Sequence[Path], promised: Mapping[str, str] | None = None) -> Checkpoint:
    """Read the headers of these files.

    Args:
        files: safetensors files.
        promised: Tensor names that must be among them, and the file that should hold each.

    Raises:
        CheckpointError: A file is damaged, a promised tensor is missing, or there are none at all.
    """
    promised = promised or {}
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in _read_header(file).items():
            # Where two files hold a tensor of one name, the promised one counts.
            if name not in tensors or promised.get(name) == file.name:
                tensors[name] = info
    if not tensors:
        msg = f"there are no tensors in {', '.join(map(str, files))}. Download it again."
        raise CheckpointError(msg)
    if missing := [name for name in promised if name not in tensors]:
        file_name = promised[missing[0]]
        msg = (
            f"{len(missing)} tensors that the index promises are in no file, such as "
            f"{missing[0]!r}, which should be in {file_name}. Download the checkpoint again."
        )
        raise CheckpointError(msg)
    return Checkpoint(tensors)


def _read_index(file: Path) -> dict[str, str]:
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        weight_map = {str(name): str(shard) for name, shard in index["weight_map"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        msg = f"{file} is not a safetensors index ({error}). Download it again."
        raise CheckpointError(msg) from error
    if not weight_map:
        msg = f"{file} names no tensors. Download it again."
        raise CheckpointError(msg)
    return weight_map


def _check_present(files: list[Path], index_file: Path) -> None:
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        msg = (
            f"{index_file} names {len(missing)} of {len(files)} files that are not there: "
            f"{', '.join(missing[:5])}. Download the missing files to {index_file.parent}."
        )
        raise CheckpointError(msg)


def _read_header(file: Path) -> dict[str, TensorInfo]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
        if size < _LENGTH_BYTES or length > min(size - _LENGTH_BYTES, _MAX_HEADER_BYTES):
            msg = (
                f"{file} is damaged: its header should be {length} bytes long, the file is {size}. "
                "Download it again."
            )
            raise CheckpointError(msg)
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        entries = {}
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = (int(at) for at in entry["data_offsets"])
                entries[name] = (str(entry["dtype"]), tuple(entry["shape"]), begin, end)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        msg = f"{file} is damaged: its header cannot be read ({error}). Download it again."
        raise CheckpointError(msg) from error
    data_bytes = size - _LENGTH_BYTES - length
    wanted = max((end for *_, end in entries.values()), default=0)
    if wanted > data_bytes:
        msg = (
            f"{file} is cut off: its tensors take {wanted} bytes, {data_bytes} are there. "
            "Download it again."
        )
        raise CheckpointError(msg)
    _check_header(file)
    first = _LENGTH_BYTES + length
    return {
        name: TensorInfo(
            file=file, dtype=dtype, shape=shape, size_bytes=end - begin, offset=first + begin
        )
        for name, (dtype, shape, begin, end) in entries.items()
    }


def _check_header(file: Path) -> None:
    """Let safetensors itself judge types, shapes, gaps and overlaps."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt"):
            pass
    except SafetensorError as error:
        msg = f"{file} is damaged: {error}. Download it again."
        raise CheckpointError(msg) from error
