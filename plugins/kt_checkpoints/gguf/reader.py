"""A GGUF file as a model: its config, its weights under transformers' names, its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from kt_checkpoints.gguf.architectures import ARCHITECTURES, Architecture, common_config
from kt_checkpoints.gguf.files import GgufCheckpoint, GgufModel, find_file, read_model
from kt_checkpoints.gguf.names import matrices
from kt_core.checkpoint import DecodedCheckpoint
from kt_core.errors import CheckpointError, TokenizerError, UnsupportedModelError
from kt_core.interfaces import OpenedModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

_TOKENS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}


def open_model(path: Path) -> OpenedModel:
    """See ``ModelFiles.open``."""
    model, architecture, values = _read(path)
    found = list(matrices(model, architecture.names, values))
    parts = {part for matrix in found for part in matrix.parts.values()}
    kept = {name: place for name, place in model.tensors.items() if name in parts}
    files = GgufCheckpoint(GgufModel(file=model.file, metadata=model.metadata, tensors=kept))

    def tokenizer(config: PreTrainedConfig) -> PreTrainedTokenizerBase | None:
        return _tokenizer(model, config)

    return OpenedModel(
        config=_config(model, architecture, values),
        checkpoint=DecodedCheckpoint(files, found),
        tokenizer=tokenizer,
    )


def read_config(path: Path) -> dict[str, Any]:
    """See ``ModelFiles.config``."""
    return _config(*_read(path))


def _read(path: Path) -> tuple[GgufModel, Architecture, dict[str, Any]]:
    file = find_file(path)
    assert file is not None, "it was recognised"
    model = read_model(file)
    name = str(model.metadata.get("general.architecture"))
    if name not in ARCHITECTURES:
        msg = (
            f"{file} holds a model of architecture {name!r}; with routed experts kt reads "
            f"{', '.join(ARCHITECTURES)}. Use the model's safetensors, or a program that runs GGUF "
            "files of any kind, such as llama.cpp."
        )
        raise UnsupportedModelError(msg)
    start = f"{name}."
    values = {k.removeprefix(start): v for k, v in model.metadata.items() if k.startswith(start)}
    stems = {tensor.split(".", 2)[-1] for tensor in model.tensors if tensor.startswith("blk.")}
    values["tensors"] = frozenset(stems)
    return model, ARCHITECTURES[name], values


def _config(
    model: GgufModel, architecture: Architecture, values: Mapping[str, Any]
) -> dict[str, Any]:
    try:
        config = common_config(values) | architecture.config(values)
        embedding = model.tensors["token_embd.weight"][1]
    except (KeyError, TypeError) as error:
        msg = (
            f"the metadata of {model.file} do not say what a config.json would ({error}): it is "
            "damaged, or was written by another version of llama.cpp than this one reads"
        )
        raise CheckpointError(msg) from error
    config |= {
        name: model.metadata[f"tokenizer.ggml.{word}_token_id"]
        for name, word in _TOKENS.items()
        if f"tokenizer.ggml.{word}_token_id" in model.metadata
    }
    config["vocab_size"] = embedding.shape[0]
    config["tie_word_embeddings"] = "output.weight" not in model.tensors
    config.setdefault("dtype", "bfloat16")
    return config


def _tokenizer(model: GgufModel, config: PreTrainedConfig) -> PreTrainedTokenizerBase | None:
    """Let transformers make it: it reads the file's vocabulary itself."""
    from transformers import AutoTokenizer

    if "tokenizer.ggml.tokens" not in model.metadata:
        return None
    try:
        made = AutoTokenizer.from_pretrained(
            model.file.parent, gguf_file=model.file.name, config=config, trust_remote_code=False
        )
    except Exception as error:  # the tokenizers library raises plain Exception
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        msg = (
            f"transformers cannot make a tokenizer of {model.file}: {reason}. Put the tokenizer's "
            "files of the original model and its config.json beside the weights as safetensors."
        )
        raise TokenizerError(msg) from error
    return cast("PreTrainedTokenizerBase", made)
