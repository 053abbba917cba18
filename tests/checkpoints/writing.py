"""Checkpoints of a tiny model, stored as a scheme says, and the same numbers unquantised."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tiny
import torch
from safetensors.torch import load_file, save_file

QUANTISED = re.compile(r"layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\..*(gate|up|down)_proj)\.weight$")
"""What released checkpoints quantise: attention, dense layers and experts; no router, no norm."""


def save_model(model_type: str, directory: Path, **sizes: Any) -> dict[str, torch.Tensor]:
    """Save a tiny model of other sizes in one file; return its tensors."""
    original = tiny.tiny_config

    def resized(name: str) -> Any:
        config = original(name)
        config.update(sizes)
        return config

    tiny.tiny_config = resized
    try:
        model = tiny.build_tiny(model_type)
    finally:
        tiny.tiny_config = original
    model.save_pretrained(directory)
    return load_file(directory / "model.safetensors")


def write_checkpoint(
    directory: Path, config_from: Path, tensors: Mapping[str, torch.Tensor], **config: Any
) -> Path:
    """Write a model directory: tensors, and config.json with further keys."""
    directory.mkdir(parents=True, exist_ok=True)
    values = json.loads((config_from / "config.json").read_text(encoding="utf-8")) | config
    (directory / "config.json").write_text(json.dumps(values), encoding="utf-8")
    save_file({n: t.contiguous() for n, t in tensors.items()}, directory / "model.safetensors")
    return directory


def store_matrices(
    tensors: Mapping[str, torch.Tensor],
    store: Callable[[torch.Tensor], tuple[dict[str, torch.Tensor], torch.Tensor]],
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the tensors with matrices stored, and with matrices as their decoder reads them."""
    stored: dict[str, torch.Tensor] = {}
    numbers: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if QUANTISED.search(name):
            parts, numbers[name] = store(tensor)
            owner = name.removesuffix("weight")
            stored |= {f"{owner}{leaf}": part for leaf, part in parts.items()}
        else:
            stored[name] = numbers[name] = tensor
    return stored, numbers
