"""Read the parts of a GGUF file that the demo model needs.

Layout from ggml's ``docs/gguf.md``, version 3, little-endian::

    magic "GGUF" | u32 version | u64 tensors | u64 metadata entries
    metadata entries: string key | u32 type | value
    tensor entries:   string name | u32 dims | u64 dim[dims] | u32 type | u64 offset
    padding to general.alignment | tensor data

A string is a u64 length and that many bytes. Dimensions are written innermost
first; this module turns them round, so shapes read as torch writes them.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kt_core.errors import ModelSourceError
from kt_demo.ggml_types import GGML_TYPES

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_MAGIC = b"GGUF"
_VERSION = 3
_DEFAULT_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_U32, _U64 = _SCALARS[4], _SCALARS[10]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """Where one tensor lies in the file.

    Attributes:
        shape: outermost dimension first.
        ggml_type: index into ``GGML_TYPES``.
        offset_bytes: from the start of the file.
    """

    shape: tuple[int, ...]
    ggml_type: int
    offset_bytes: int


class GgufFile:
    """One GGUF file: its metadata, and its tensors on demand.

    The file is mapped, not read: a tensor costs memory only while the caller
    holds the float32 copy that ``tensor`` returns.
    """

    def __init__(self, path: Path) -> None:
        """Map ``path`` and parse everything before the tensor data."""
        self._path = path
        try:
            with path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self.metadata, self.tensors = _parse(self._bytes)
        except (struct.error, ValueError) as err:
            msg = (
                f"{str(path)!r} cannot be read as a GGUF file: {err}.\n"
                "Delete it and run the command again."
            )
            raise ModelSourceError(msg) from err

    def tensor(self, name: str) -> torch.Tensor:
        """Return the tensor ``name``, dequantised to float32."""
        entry = self.tensors[name]
        kind = GGML_TYPES.get(entry.ggml_type)
        if kind is None:
            known = ", ".join(known.name for known in GGML_TYPES.values())
            msg = (
                f"tensor {name!r} of {str(self._path)!r} has ggml type {entry.ggml_type}, "
                f"which this reader does not know.\nConvert the file to one of: {known}."
            )
            raise ModelSourceError(msg)
        num_blocks = prod(entry.shape) // kind.block_elements
        num_bytes = num_blocks * kind.block_bytes
        if (end := entry.offset_bytes + num_bytes) > len(self._bytes):
            msg = (
                f"{str(self._path)!r} is cut short: tensor {name!r} needs bytes up to {end}, the "
                f"file has {len(self._bytes)}.\nDelete it and run the command again."
            )
            raise ModelSourceError(msg)
        raw = np.frombuffer(self._bytes, np.uint8, num_bytes, entry.offset_bytes)
        values = kind.dequantize(raw.reshape(num_blocks, kind.block_bytes))
        return torch.from_numpy(values.reshape(entry.shape))


def _parse(data: mmap.mmap) -> tuple[Mapping[str, Any], Mapping[str, TensorEntry]]:
    cursor = _Cursor(data)
    if (magic := cursor.take(len(_MAGIC))) != _MAGIC:
        msg = f"it begins with {magic!r}, not {_MAGIC!r}"
        raise ValueError(msg)
    if (version := cursor.number(_U32)) != _VERSION:
        msg = f"it has GGUF version {version}, this reader knows {_VERSION}"
        raise ValueError(msg)
    num_tensors, num_entries = cursor.number(_U64), cursor.number(_U64)
    metadata = {cursor.string(): cursor.value(cursor.number(_U32)) for _ in range(num_entries)}
    entries = {cursor.string(): _tensor_entry(cursor) for _ in range(num_tensors)}
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    start = -(-cursor.position // alignment) * alignment
    tensors = {
        name: TensorEntry(shape=shape, ggml_type=ggml_type, offset_bytes=start + offset)
        for name, (shape, ggml_type, offset) in entries.items()
    }
    return metadata, tensors


def _tensor_entry(cursor: _Cursor) -> tuple[tuple[int, ...], int, int]:
    num_dims = cursor.number(_U32)
    dims = [cursor.number(_U64) for _ in range(num_dims)]
    return tuple(reversed(dims)), cursor.number(_U32), cursor.number(_U64)


class _Cursor:
    """Reads values one after the other; running off the end is a ``ValueError``."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.position = 0

    def take(self, size: int) -> bytes:
        end = self.position + size
        if end > len(self._data):
            msg = f"it ends at byte {len(self._data)}, but a value reaches to byte {end}"
            raise ValueError(msg)
        taken = self._data[self.position : end]
        self.position = end
        return taken

    def number(self, layout: struct.Struct) -> Any:
        return layout.unpack(self.take(layout.size))[0]

    def string(self) -> str:
        return self.take(self.number(_U64)).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            element_kind = self.number(_U32)
            length = self.number(_U64)
            return [self.value(element_kind) for _ in range(length)]
        if kind not in _SCALARS:
            msg = f"a metadata value has type {kind}, which GGUF {_VERSION} does not define"
            raise ValueError(msg)
        return self.number(_SCALARS[kind])
