"""The config of a released model, for planning without its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedConfig:
    """A config.json that has a name: what ``kt plan NAME`` reads.

    Attributes:
        name: What the user types, such as ``tiny-moe``.
        description: One line about the model.
        file: A config.json as transformers writes it.
    """

    name: str
    description: str
    file: Path
