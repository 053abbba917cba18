"""A reader from outside, as docs/checkpoints.md tells one to write it; bytes are read once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from checkpoints.schemes import SCHEMES
from checkpoints.test_quantised import TOLERANCE, difference, load
from checkpoints.writing import save_model, store_matrices, write_checkpoint
from kt_core import plugins
from kt_core.checkpoint import Checkpoint
from kt_core.hookspecs import Register, hookimpl
from kt_core.interfaces import CheckpointFormat, ReadTensor, StoredMatrix, TensorInfo
from kt_core.quant.exact import exact_format, quantized
from kt_core.types import Element, ScaleType


class Thirds(CheckpointFormat):
    """Bytes called ``NAME.thirds``: a third of a weight each, with a scale for each output."""

    name = "thirds"

    def matrices(
        self, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], read: ReadTensor
    ) -> Iterator[StoredMatrix]:
        del config, read
        packed = exact_format(Element.INT8, ScaleType.FLOAT32, group_size=None)
        assert packed is not None
        for name, info in tensors.items():
            owner = name.removesuffix(".thirds")
            if owner != name:
                yield StoredMatrix(
                    name=f"{owner}.weight",
                    shape=info.shape,
                    parts={"codes": name, "scales": f"{owner}.scale"},
                    decode=lambda parts: quantized(
                        packed, parts["codes"], parts["scales"][:, None] * 3, group_size=None
                    ),
                    weight_format=packed,
                )


class Plugin:
    @staticmethod
    @hookimpl
    def kt_register_checkpoint_formats(register: Register[CheckpointFormat]) -> None:
        register(Thirds())


def store(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    scale = weight.abs().amax(1) / 127 / 3
    codes = (weight / scale[:, None] / 3).round().to(torch.int8)
    return {"thirds": codes, "scale": scale}, codes.float() * (scale[:, None] * 3)


def test_a_reader_of_a_plugin_from_outside(tmp_path: Path) -> None:
    tensors = save_model("qwen3_moe", tmp_path / "base")
    stored, numbers = store_matrices(tensors, store)
    config = {"quant_method": "thirds"}
    quantised = write_checkpoint(
        tmp_path / "q", tmp_path / "base", stored, quantization_config=config
    )
    truth = tiny.load_reference(write_checkpoint(tmp_path / "d", tmp_path / "base", numbers))
    input_ids = tiny.sample_input_ids(truth.config)
    installed = plugins.load(Plugin())
    with load(quantised, registry=installed) as engine:
        assert engine.stats().format == "int8"
        got = tiny.logits(engine.model, input_ids)
    assert difference(got, tiny.logits(truth, input_ids)) <= TOLERANCE


NAMES = ("fp8 128x128 float32", "pack-quantized 4 bits group 32", "gptq 4 bits 64")


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_is_read_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the dense part by transformers, the experts by us, whatever they are made of."""
    (scheme,) = (scheme for scheme in SCHEMES if scheme.name == name)
    tensors = save_model("qwen3_moe", tmp_path / "base", hidden_size=64, intermediate_size=64,
                         moe_intermediate_size=64)  # fmt: skip
    stored, _ = store_matrices(tensors, scheme.store)
    quantised = write_checkpoint(
        tmp_path / "q", tmp_path / "base", stored, quantization_config=dict(scheme.config)
    )
    read: Counter[str] = Counter()
    original = Checkpoint.read

    def spied(self: Checkpoint, tensor: str) -> torch.Tensor:
        read[tensor] += 1
        return original(self, tensor)

    monkeypatch.setattr(Checkpoint, "read", spied)
    load(quantised).close()
    assert read == dict.fromkeys(stored, 1)
