"""The header of a GGUF file: metadata, and where the tensors are. Nothing of it is believed.

Layout from ggml's ``docs/gguf.md``, versions 2 and 3, little-endian::

    magic "GGUF" | u32 version | u64 tensors | u64 metadata entries
    metadata entry: string key | u32 type | value
    tensor entry:   string name | u32 dims | u64 dim[dims] | u32 type | u64 offset
    padding to general.alignment | tensor data

A string is a u64 length and that many bytes; an array a u32 type, a u64 count and its values. The
first dimension is the one that lies together; shapes here are the other way round, as torch has
them.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kt_checkpoints.gguf.types import GGML_TYPES
from kt_core.errors import CheckpointError, UnsupportedFormatError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32
_MOST_DIMENSIONS = 4  # GGML_MAX_DIMS
_SMALLEST_TENSOR_ENTRY = 8 + 4 + 4 + 8
_SMALLEST_METADATA_ENTRY = 8 + 4 + 1
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
            12: "d"}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """Where one tensor lies.

    Attributes:
        shape: Elements, the dimension that lies together last.
        ggml_type: A key of ``GGML_TYPES``.
        offset_bytes: From the start of the file.
        size_bytes: What it takes.
    """

    shape: tuple[int, ...]
    ggml_type: int
    offset_bytes: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufHeader:
    """What a file says about itself.

    Attributes:
        metadata: By key; arrays are lists.
        tensors: By name.
    """

    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


def is_gguf(file: Path) -> bool:
    """Whether a file begins like a GGUF file."""
    with file.open("rb") as stream:
        return stream.read(len(MAGIC)) == MAGIC


def read_header(file: Path) -> GgufHeader:
    """Read everything before the tensor data.

    Raises:
        CheckpointError: The file is damaged or cut off.
        UnsupportedFormatError: Its version, byte order or a tensor's type is none that is read.
    """
    with file.open("rb") as stream:
        try:
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:  # an empty file
            msg = f"{file} is empty. Download it again."
            raise CheckpointError(msg) from error
    with data:
        cursor = _Cursor(data)
        try:
            return _parse(cursor, file)
        except (struct.error, UnicodeDecodeError, _DamagedError) as error:
            msg = f"{file} is damaged: {error}, at byte {cursor.position}. Download it again."
            raise CheckpointError(msg) from error


class _DamagedError(Exception):
    """What the header says cannot be."""


def _parse(cursor: _Cursor, file: Path) -> GgufHeader:
    if (magic := cursor.take(len(MAGIC))) != MAGIC:
        msg = f"it begins with {magic!r}, not {MAGIC!r}"
        raise _DamagedError(msg)
    version = cursor.number("I")
    if version not in _VERSIONS:
        is_swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
        what = "is big-endian" if is_swapped else f"has GGUF version {version}"
        msg = (
            f"{file} {what}; little-endian files of versions 2 and 3 are read. "
            "Download a newer file, or convert the model again."
        )
        raise UnsupportedFormatError(msg)
    num_tensors = cursor.count(_SMALLEST_TENSOR_ENTRY)
    num_entries = cursor.count(_SMALLEST_METADATA_ENTRY)
    metadata: dict[str, Any] = {}
    for _ in range(num_entries):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.number("I"))
    entries = [_tensor_entry(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        msg = f"its alignment is {alignment!r}, which is no power of two"
        raise _DamagedError(msg)
    start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, shape, ggml_type, offset in entries:
        size = _size_bytes(name, shape, ggml_type, file)
        if name in tensors:
            msg = f"it has two tensors called {name!r}"
            raise _DamagedError(msg)
        if start + offset + size > cursor.size:
            msg = (
                f"tensor {name!r} should end at byte {start + offset + size}, the file does at "
                f"{cursor.size}"
            )
            raise _DamagedError(msg)
        tensors[name] = GgufTensor(
            shape=shape, ggml_type=ggml_type, offset_bytes=start + offset, size_bytes=size
        )
    return GgufHeader(metadata=metadata, tensors=tensors)


def _tensor_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string()
    num_dimensions = cursor.number("I")
    if not 1 <= num_dimensions <= _MOST_DIMENSIONS:
        msg = f"tensor {name!r} has {num_dimensions} dimensions"
        raise _DamagedError(msg)
    dimensions = [cursor.number("Q") for _ in range(num_dimensions)]
    return name, tuple(reversed(dimensions)), cursor.number("I"), cursor.number("Q")


def _size_bytes(name: str, shape: tuple[int, ...], ggml_type: int, file: Path) -> int:
    if ggml_type not in GGML_TYPES:
        known = ", ".join(kind.name for kind in GGML_TYPES.values())
        msg = f"tensor {name!r} of {file} has ggml type {ggml_type}, which is not read; {known} are"
        raise UnsupportedFormatError(msg)
    kind = GGML_TYPES[ggml_type]
    if shape[-1] % kind.block_elements:
        msg = f"rows of {shape[-1]} in tensor {name!r} are no whole blocks of {kind.name}"
        raise _DamagedError(msg)
    return math.prod(shape) // kind.block_elements * kind.block_bytes


class _Cursor:
    """Reads values one after the other; what would reach past the end is refused first."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.size = len(data)
        self.position = 0

    def take(self, size: int) -> bytes:
        end = self.position + size
        if end > self.size:
            msg = f"a value reaches to byte {end}, the file ends at {self.size}"
            raise _DamagedError(msg)
        taken = self._data[self.position : end]
        self.position = end
        return taken

    def number(self, kind: str) -> Any:
        layout = f"<{kind}"
        (value,) = struct.unpack(layout, self.take(struct.calcsize(layout)))
        # 1e-6 was meant, and not the float32 nearest to it.
        return float(f"{value:.7g}") if kind == "f" else value

    def count(self, smallest_bytes: int) -> int:
        """Return how many entries follow, each of which takes at least so many bytes."""
        count: int = self.number("Q")
        if count * smallest_bytes > self.size - self.position:
            msg = f"{count} entries cannot be in the {self.size - self.position} bytes that follow"
            raise _DamagedError(msg)
        return count

    def string(self) -> str:
        return self.take(self.count(1)).decode("utf-8")

    def value(self, kind: int, *, is_element: bool = False) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY and not is_element:
            element = self.number("I")
            if element in _SCALARS:
                width = struct.calcsize(f"<{_SCALARS[element]}")
                count = self.count(width)
                layout = f"<{count}{_SCALARS[element]}"
                return list(struct.unpack(layout, self.take(count * width)))
            return [self.value(element, is_element=True) for _ in range(self.count(8))]
        if kind not in _SCALARS:
            msg = f"a metadata value has type {kind}, which GGUF does not have there"
            raise _DamagedError(msg)
        return self.number(_SCALARS[kind])
