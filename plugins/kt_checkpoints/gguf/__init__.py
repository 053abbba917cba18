"""GGUF, the files of llama.cpp: one file, or several parts of one, holds all of a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kt_core.interfaces import ModelFiles

if TYPE_CHECKING:
    from kt_core.interfaces import OpenedModel


class Gguf(ModelFiles):
    """Recognised by how a file begins; a directory by the files in it."""

    name = "gguf"

    def recognises(self, path: Path) -> bool:
        """See ``ModelFiles.recognises``."""
        from kt_checkpoints.gguf.files import find_file

        return find_file(path) is not None

    def config(self, path: Path) -> Mapping[str, Any]:
        """See ``ModelFiles.config``."""
        from kt_checkpoints.gguf.reader import read_config

        return read_config(path)

    def open(self, path: Path) -> OpenedModel:
        """See ``ModelFiles.open``."""
        from kt_checkpoints.gguf.reader import open_model

        return open_model(path)
