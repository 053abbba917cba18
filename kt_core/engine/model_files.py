"""From the word a user typed to a model directory, its config and its adapter."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kt_core.errors import (
    CheckpointError,
    ModelSourceError,
    UnsupportedModelError,
)
from kt_core.interfaces import ModelAdapter, ModelFiles, Progress, no_progress
from kt_core.paths import cache_dir
from kt_core.plugins import Registry

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve_model(model: str | Path, registry: Registry, progress: Progress = no_progress) -> Path:
    """Return where a model is: a path, a registered name, or a hub id.

    That is a directory, or a file that a plug-in recognises.

    Raises:
        ModelSourceError: Nothing of that name can be had; the message says what was tried.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        if kind_of(path, registry) is None:
            known = ", ".join(registry.model_files.names()) or "none"
            msg = (
                f"{path} is a file that holds no model of a known kind (known: {known}); give the "
                "directory that holds config.json and the weights"
            )
            raise ModelSourceError(msg)
        return path
    name = str(model)
    if name in registry.sources:
        return registry.sources.get(name).resolve(cache_dir(), progress)
    if _HUB_ID.fullmatch(name):
        return _download(name, progress)
    known = ", ".join(registry.sources.names()) or "none"
    msg = (
        f"model {name!r} is neither a directory nor a known name (known: {known}) nor a hub id "
        "of the form owner/name"
    )
    raise ModelSourceError(msg)


def kind_of(path: Path, registry: Registry) -> ModelFiles | None:
    """Return who reads the file, or the files of the directory; None for a config.json.

    Raises:
        ModelSourceError: The files are several models.
    """
    if path.is_dir() and (path / "config.json").exists():
        return None
    return next((kind for kind in registry.model_files if kind.recognises(path)), None)


def _download(hub_id: str, progress: Progress) -> Path:
    from huggingface_hub import snapshot_download

    progress(f"download {hub_id}", None)
    try:
        return Path(
            snapshot_download(
                hub_id, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
            )
        )
    except Exception as error:  # huggingface_hub's, httpx's, the file system's
        reason = first_line(error)
        msg = (
            f"model {hub_id!r} is no directory here and could not be downloaded: {reason}. "
            "Check the name and the network (HF_TOKEN for gated models), or give the path of a "
            "directory you have downloaded."
        )
        raise ModelSourceError(msg) from error


def first_line(error: Exception) -> str:
    """Return the beginning of what an error says, or its type if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def parse_config(file: Path) -> dict[str, Any]:
    """Return the content of a config.json.

    Raises:
        CheckpointError: It is missing or not a JSON object with a ``model_type``.
    """
    try:
        config = json.loads(file.read_text(encoding="utf-8"), object_hook=_number_or_dict)
    except FileNotFoundError as error:
        msg = f"{file.parent} has no {file.name}, so it is no model directory of transformers"
        raise CheckpointError(msg) from error
    except (OSError, RecursionError, ValueError) as error:
        msg = f"{file} cannot be read as a transformers config: {type(error).__name__} {error}"
        raise CheckpointError(msg) from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        msg = f"{file} is no transformers config: it names no model_type"
        raise CheckpointError(msg)
    return config


def _number_or_dict(value: dict[str, Any]) -> Any:
    """JSON has no infinities: transformers saves them as ``{"__float__": "Infinity"}``."""
    return float(value["__float__"]) if set(value) == {"__float__"} else value


def read_config(directory: Path) -> dict[str, Any]:
    """Return config.json; errors as ``parse_config``."""
    return parse_config(directory / "config.json")


def model_config(
    directory: Path, config_dict: dict[str, Any], registry: Registry
) -> PreTrainedConfig:
    """Return the transformers config, through an adapter where transformers lacks the type.

    Raises:
        CheckpointError: transformers refuses a value in it.
        UnsupportedModelError: Nobody knows the ``model_type``.
    """
    file = directory if directory.is_file() else directory / "config.json"
    config = config_from_dict(config_dict, registry, file)
    config.name_or_path = str(directory)
    return config


def config_from_dict(
    config_dict: dict[str, Any], registry: Registry, file: Path
) -> PreTrainedConfig:
    """As ``model_config``; ``file`` is named in errors."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    model_type = config_dict["model_type"]
    adapter = registry.adapters.get(model_type) if model_type in registry.adapters else None
    try:
        config = adapter.config(config_dict) if adapter else None
        if config is None and model_type in CONFIG_MAPPING:
            return CONFIG_MAPPING[model_type].from_dict(config_dict)
    except (StrictDataclassError, AttributeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        msg = f"{file} holds a value that transformers refuses: {reason}"
        raise CheckpointError(msg) from error
    if config is None:
        import transformers

        msg = (
            f"model_type {model_type!r} is known neither to transformers "
            f"{transformers.__version__} nor to a plug-in. Update transformers, install a plug-in "
            "that has an adapter for it, or write one: docs/add-a-model.md."
        )
        raise UnsupportedModelError(msg)
    return config


def adapters_for(model_type: str, registry: Registry) -> list[ModelAdapter]:
    """Return who to ask for the experts: the family's own adapter first, then the generic ones."""
    own = [registry.adapters.get(model_type)] if model_type in registry.adapters else []
    return own + registry.generic_adapters


def model_class(config: PreTrainedConfig) -> Any:
    """Return the transformers class with a head that loads this config.

    Raises:
        UnsupportedModelError: transformers has none.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    for name in config.architectures or ():
        if (cls := getattr(transformers, name, None)) is not None:
            return cls
    for kind in ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SEQ_TO_SEQ_CAUSAL_LM"):
        mapping = getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING")
        if type(config) in mapping:
            return mapping[type(config)]
    msg = (
        f"transformers has no language model class for model_type {config.model_type!r} "
        f"(architectures: {config.architectures})"
    )
    raise UnsupportedModelError(msg)


def model_dtype(config: PreTrainedConfig) -> torch.dtype:
    """Return the type that transformers loads a model in when nobody says another."""
    import torch

    for owner in (config, config.get_text_config(decoder=True)):
        if isinstance(dtype := getattr(owner, "dtype", None), torch.dtype):
            return dtype
    return torch.float32  # what transformers takes where nobody says
