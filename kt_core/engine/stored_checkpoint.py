"""A model directory whose weights may be quantised, as whoever loads it sees it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from kt_core.checkpoint import Checkpoint, DecodedCheckpoint, open_checkpoint
from kt_core.checkpoint.packed_config import METHOD
from kt_core.engine.chat import load_tokenizer
from kt_core.engine.model_files import kind_of, read_config
from kt_core.errors import CheckpointError, KtError, UnsupportedFormatError
from kt_core.interfaces import OpenedModel
from kt_core.plugins import Registry

_KEYS = ("quantization_config", "compression_config")
# Where exporters that leave config.json alone put it.
_SEPARATE_FILE = "hf_quant_config.json"


def open_model(path: Path, registry: Registry) -> OpenedModel:
    """Open a model directory, or a file that a plug-in reads.

    Raises:
        KtError: It cannot be opened.
    """
    if (kind := kind_of(path, registry)) is not None:
        return kind.open(path)
    config = read_config(path)
    return OpenedModel(
        config=without_quantization(config),
        checkpoint=open_stored(path, config, registry),
        tokenizer=partial(load_tokenizer, path),
    )


def open_stored(directory: Path, config: Mapping[str, Any], registry: Registry) -> Checkpoint:
    """Open the weights of a model directory.

    Args:
        directory: Holds safetensors files.
        config: Its config.json.
        registry: For the readers.

    Raises:
        CheckpointError: Files are missing or damaged, or parts of what is quantised are.
        UnsupportedFormatError: No reader knows how the weights are quantised.
    """
    stored = quantization(directory, config)
    if stored is None:
        return open_checkpoint(directory)
    method = stored.get("quant_method")
    if method == METHOD:  # experts are packed: see packed_loading
        return open_checkpoint(directory)
    if method not in registry.checkpoint_formats:
        known = ", ".join(sorted(registry.checkpoint_formats.names())) or "none"
        msg = (
            f"the {config['model_type']!r} checkpoint in {directory} is quantised with "
            f"quant_method {method!r}, which no reader is registered for (registered: "
            f"{known}). Use another checkpoint of the model, or a plug-in that reads this one: "
            "docs/checkpoints.md."
        )
        raise UnsupportedFormatError(msg)
    files = open_checkpoint(directory)
    reader = registry.checkpoint_formats.get(str(method))
    try:
        matrices = list(reader.matrices(stored, files.tensors, files.read))
    except KtError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, re.error) as error:
        reason = f"{type(error).__name__}: {error}"
        msg = (
            f"the quantization_config in {directory} says something else than checkpoints of "
            f"{method!r} do ({reason}): it is damaged, or newer than this version"
        )
        raise CheckpointError(msg) from error
    return DecodedCheckpoint(files, matrices)


def quantization(directory: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return how the weights are quantised, with a ``quant_method``; None where they are not.

    Raises:
        CheckpointError: It is said in a file that cannot be read.
    """
    for part in (config, config.get("text_config")):
        for key in _KEYS:
            if isinstance(part, Mapping) and (found := part.get(key)):
                return dict(found) if isinstance(found, Mapping) else {"quant_method": found}
    file = directory / _SEPARATE_FILE
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        found = dict(content["quantization"])
        method = str(content["producer"]["name"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        msg = f"{file} cannot be read: {type(error).__name__} {error}. Download it again."
        raise CheckpointError(msg) from error
    return {"quant_method": method, **found}


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config of the same model, unquantised: what is left for transformers to do."""
    kept = {key: value for key, value in config.items() if key not in _KEYS}
    if isinstance(text := kept.get("text_config"), Mapping):
        kept["text_config"] = {key: value for key, value in text.items() if key not in _KEYS}
    return kept
