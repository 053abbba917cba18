"""Readers of quantised checkpoints: one file for each way of storing them."""

from __future__ import annotations

from kt_checkpoints.awq import Awq
from kt_checkpoints.compressed_tensors import CompressedTensors
from kt_checkpoints.fp8 import Fp8
from kt_checkpoints.gguf import Gguf
from kt_checkpoints.gptq import Gptq
from kt_checkpoints.modelopt import ModelOpt
from kt_checkpoints.mxfp4 import Mxfp4
from kt_core.hookspecs import Register, hookimpl
from kt_core.interfaces import CheckpointFormat, ModelFiles

__all__ = ["kt_register_checkpoint_formats", "kt_register_model_files"]


@hookimpl
def kt_register_checkpoint_formats(register: Register[CheckpointFormat]) -> None:
    """Register them all."""
    for reader in (Awq(), CompressedTensors(), Fp8(), Gptq(), ModelOpt(), Mxfp4()):
        register(reader)


@hookimpl
def kt_register_model_files(register: Register[ModelFiles]) -> None:
    """Register GGUF."""
    register(Gguf())
