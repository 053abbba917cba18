"""Write a safetensors file piece by piece, without holding it in memory.

safetensors' own writer takes all tensors at once. The format is a length, a JSON header that blanks
may follow, and the bytes of the tensors without gaps (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kt_core.paths import replacing

if TYPE_CHECKING:
    import torch

ALIGNMENT = 4096
"""Of the first tensor in the file: a page, so that what is mapped begins with it."""
_LENGTH_BYTES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class NewTensor:
    """A tensor that is to be written.

    Attributes:
        name: Its name.
        dtype: The format's own word: ``BF16``, ``U8`` ...
        shape: Its dimensions.
        size_bytes: Bytes that ``pieces`` yields in all.
        pieces: Its bytes, in order; asked for when they are written.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int
    pieces: Iterable[memoryview | bytes]


def write_safetensors(target: Path, tensors: Sequence[NewTensor]) -> None:
    """Write a file whole or not at all; its name appears when everything is on disk.

    Raises:
        OSError: The disk is full, or the folder may not be written to.
        ValueError: A tensor yields another number of bytes than it says.
    """
    with replacing(target) as temporary, temporary.open("wb") as file:
        file.write(_header(tensors))
        for tensor in tensors:
            written = sum(file.write(piece) for piece in tensor.pieces)
            if written != tensor.size_bytes:
                msg = f"{tensor.name} is {written} bytes, {tensor.size_bytes} were to be written"
                raise ValueError(msg)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor on the host, of any type; no copy where it is contiguous."""
    import torch

    raw: memoryview = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return raw


def _header(tensors: Sequence[NewTensor]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        end = at + tensor.size_bytes
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(_LENGTH_BYTES + len(text)) % ALIGNMENT)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text
