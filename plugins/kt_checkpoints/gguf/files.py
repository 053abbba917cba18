"""Which GGUF files make a model, and their tensors."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kt_checkpoints.gguf.header import GgufTensor, is_gguf, read_header
from kt_checkpoints.gguf.types import GGML_TYPES
from kt_core.checkpoint import Checkpoint
from kt_core.errors import CheckpointError, ModelSourceError
from kt_core.interfaces import TensorInfo

_PART = re.compile(r"(?P<name>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufModel:
    """The headers of all files of a model.

    Attributes:
        file: The first one.
        metadata: Of the first one.
        tensors: Of all, with the file that holds each.
    """

    file: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, tuple[Path, GgufTensor]]


def find_file(path: Path) -> Path | None:
    """Return the first GGUF file of a model; None where there is none.

    Raises:
        ModelSourceError: A directory holds several models.
    """
    if path.is_file():
        return path if is_gguf(path) else None
    if not path.is_dir() or (path / "config.json").exists():
        return None
    found = sorted(path.glob("*.gguf"))
    firsts = {first_part(file) for file in found}
    if len(firsts) > 1:
        names = ", ".join(sorted(file.name for file in firsts))
        msg = f"{path} holds several models: {names}. Give the path of one of these files."
        raise ModelSourceError(msg)
    return firsts.pop() if firsts else None


def first_part(file: Path) -> Path:
    """Return the first file of the model that a file belongs to."""
    part = _PART.fullmatch(file.name)
    return file.with_name(f"{part['name']}-00001-of-{part['count']}.gguf") if part else file


def read_model(file: Path) -> GgufModel:
    """Read the headers of a file, and of those it is the first of.

    Raises:
        CheckpointError: One is missing or damaged, or they do not belong together.
        UnsupportedFormatError: As ``read_header``.
    """
    first = first_part(file)
    part = _PART.fullmatch(first.name)
    files = [first]
    if part:
        count = max(int(part["count"]), 1)
        names = [f"{part['name']}-{n:05}-of-{part['count']}.gguf" for n in range(1, count + 1)]
        files = [first.with_name(name) for name in names]
    if missing := [f.name for f in files if not f.is_file()]:
        msg = f"{first.parent} lacks {', '.join(missing[:5])}. Download the missing files."
        raise CheckpointError(msg)
    headers = {file: read_header(file) for file in files}
    metadata = headers[first].metadata
    tensors: dict[str, tuple[Path, GgufTensor]] = {}
    for holder, header in headers.items():
        for name, tensor in header.tensors.items():
            if name in tensors:
                msg = (
                    f"{name!r} is in {tensors[name][0].name} and in {holder.name}: they belong to "
                    "different models. Download them again."
                )
                raise CheckpointError(msg)
            tensors[name] = (holder, tensor)
    said = metadata.get("split.tensors.count", len(tensors))
    if said != len(tensors) or metadata.get("split.count", len(files)) not in {0, len(files)}:
        msg = (
            f"{first.name} says that there are {said} tensors in {metadata.get('split.count', 1)} "
            f"files, {len(tensors)} are in {len(files)}. Download all of them again."
        )
        raise CheckpointError(msg)
    return GgufModel(file=first, metadata=metadata, tensors=tensors)


class GgufCheckpoint(Checkpoint):
    """Tensors as they lie in the files: plain numbers, or ``[..., row bytes]`` uint8 of blocks.

    Files are read, not mapped: one that is cut off meanwhile is an error, not the end of the
    process.
    """

    def __init__(self, model: GgufModel) -> None:
        """Take the headers."""
        self._places = dict(model.tensors)
        super().__init__({name: _info(*place) for name, place in self._places.items()})
        self._files: dict[Path, int] = {}
        self._files_lock = threading.Lock()

    def read(self, name: str) -> torch.Tensor:
        """See ``Checkpoint.read``."""
        return self._read(name, 0, self.tensors[name].shape)

    def read_row(self, name: str, row: int) -> torch.Tensor:
        """See ``Checkpoint.read_row``."""
        shape = self.tensors[name].shape
        if not 0 <= row < shape[0]:
            msg = f"{name!r} has no row {row}, its shape is {list(shape)}"
            raise CheckpointError(msg)
        size = self._places[name][1].size_bytes // shape[0]
        return self._read(name, row * size, (1, *shape[1:]))

    def close(self) -> None:
        """Close the files. A later read opens them again."""
        with self._files_lock:
            for descriptor in self._files.values():
                os.close(descriptor)
            self._files.clear()

    def _read(self, name: str, skip_bytes: int, shape: tuple[int, ...]) -> torch.Tensor:
        file, place = self._places[name]
        dtype = _DTYPES.get(self.tensors[name].dtype, torch.uint8)
        values = torch.empty(shape, dtype=dtype, device="cpu")
        into = values.view(-1).view(torch.uint8).numpy().data
        offset = place.offset_bytes + skip_bytes
        done = 0
        while done < len(into):
            count = os.preadv(self._descriptor(file), [into[done:]], offset + done)
            if count == 0:
                msg = f"{file} was cut off while it was read: {name!r} reaches beyond its end"
                raise CheckpointError(msg)
            done += count
        return values

    def _descriptor(self, file: Path) -> int:
        with self._files_lock:
            if file not in self._files:
                self._files[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            return self._files[file]

    def __del__(self) -> None:
        """Close what is still open."""
        self.close()


def _info(file: Path, tensor: GgufTensor) -> TensorInfo:
    kind = GGML_TYPES[tensor.ggml_type]
    shape = tensor.shape
    if kind.dtype is None:
        shape = (*shape[:-1], shape[-1] // kind.block_elements * kind.block_bytes)
    return TensorInfo(
        file=file, dtype=kind.dtype or kind.name, shape=shape, size_bytes=tensor.size_bytes
    )
