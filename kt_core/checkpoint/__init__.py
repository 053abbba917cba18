"""Tensors on disk: which file holds which, and slices of them without reading the rest."""

from __future__ import annotations

from kt_core.checkpoint.packed_directory import PackedDirectory, open_packed
from kt_core.checkpoint.safetensors_files import Checkpoint, TensorInfo, open_checkpoint

__all__ = ["Checkpoint", "PackedDirectory", "TensorInfo", "open_checkpoint", "open_packed"]
