"""Models in files of their own kind, which hold weights, config and tokenizer together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from kt_core.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedModel:
    """A model, none of whose weights has been read yet.

    Attributes:
        config: What a config.json of it would say, unquantised.
        checkpoint: The weights, under the names that transformers' own checkpoints have.
        tokenizer: Given the config, makes the tokenizer; None where there is none.
    """

    config: Mapping[str, Any]
    checkpoint: Checkpoint
    tokenizer: Callable[[PreTrainedConfig], PreTrainedTokenizerBase | None]


class ModelFiles(ABC):
    """A kind of file that holds a whole model.

    Attributes:
        name: What it is called.
    """

    name: str

    @abstractmethod
    def recognises(self, path: Path) -> bool:
        """Whether a file, or a directory without a config.json, is of this kind."""

    @abstractmethod
    def config(self, path: Path) -> Mapping[str, Any]:
        """Return what ``open`` would give as the config, from the headers.

        Raises:
            KtError: As ``open``.
        """

    @abstractmethod
    def open(self, path: Path) -> OpenedModel:
        """Read the headers.

        Raises:
            KtError: A file is missing or damaged, or holds a model or a type that is not read.
        """
