"""A place models come from by name: it brings a directory onto this machine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Protocol


class Progress(Protocol):
    """Told how far a long job has come."""

    def __call__(self, stage: str, fraction: float | None) -> None:
        """Report ``fraction`` (0 to 1, None when unknown) of the stage called ``stage``."""


def no_progress(stage: str, fraction: float | None) -> None:
    """Report to nobody."""


class ModelSource(ABC):
    """One model that has a name of its own, such as ``demo``.

    Attributes:
        name: What the user types instead of a directory.
        description: One line for ``kt models``.
    """

    name: str
    description: str

    @abstractmethod
    def resolve(self, cache_dir: Path, progress: Progress = no_progress) -> Path:
        """Return the model directory, making it under ``cache_dir/models`` where it is absent.

        Atomic: a run that is killed half-way leaves nothing that looks finished.

        Raises:
            kt_core.errors.ModelSourceError: It cannot be had; the message says what to do.
        """
