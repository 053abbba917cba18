"""Tensors on disk: which file holds which, and slices of them without reading the rest."""

from __future__ import annotations

from kt_core.checkpoint.decoded import DecodedCheckpoint
from kt_core.checkpoint.packed_directory import PackedDirectory, open_packed
from kt_core.checkpoint.safetensors_files import Checkpoint, open_checkpoint
from kt_core.interfaces import TensorInfo

__all__ = [
    "Checkpoint",
    "DecodedCheckpoint",
    "PackedDirectory",
    "TensorInfo",
    "open_checkpoint",
    "open_packed",
]
