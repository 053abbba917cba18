"""Packed dense layers on an accelerator that computes none: torch does, and they are unpacked.

The model to compare with is transformers' own with the weights that the packed ones stand for.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from kt_core import hardware
from kt_core.engine.outline import outline_model
from kt_core.errors import CheckpointError, NotEnoughMemoryError, UnsupportedDenseError
from kt_core.plugins import Registry
from sim import target
from sim.dense_models import (
    COMBINATIONS,
    FAMILIES,
    Pack,
    dequantised,
    difference,
    formats_of,
    load,
    pack,
    registry,
    write,
)
from sim.stories import TOLERANCE, kept
from sim.target import NAME, WHERE

pytestmark = pytest.mark.sim
__all__ = ["kept", "pack", "registry"]


@pytest.fixture(autouse=True)
def _leaves_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device leaves dense layers to torch."""
    backend = type(target.BACKEND)
    real = backend.capabilities

    def without_dense(self: Any, device: str) -> Any:
        return replace(real(self, device), computes_dense=False)

    monkeypatch.setattr(backend, "capabilities", without_dense)


@pytest.mark.parametrize(("family", "dense_format"), COMBINATIONS)
def test_logits_are_those_of_the_dequantised_layers(
    family: str, dense_format: str, pack: Pack
) -> None:
    """In float32, where only the order of sums differs; most formats change a lot more."""
    directory = pack(family, dense_format)
    truth = tiny.load_reference(directory.with_name("source"))
    ids = tiny.sample_input_ids(truth.config)
    plain = tiny.logits(truth, ids)
    want = tiny.logits(dequantised(truth, formats_of(directory)), ids)
    with load(directory, hot_experts="50%") as engine, torch.inference_mode():
        got = engine.model(input_ids=ids.to(WHERE)).logits.cpu()
    assert difference(got, want) <= TOLERANCE
    assert dense_format == "bf16" or difference(plain, want) > 100 * TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_is_plain_and_exact(family: str, pack: Pack, registry: Registry) -> None:
    """Bit for bit in the model's own type, biases too; and counted, to the byte."""
    directory = pack(family, "int4", torch.bfloat16)
    formats = formats_of(directory)
    truth = tiny.load_reference(directory.with_name("source")).to(torch.bfloat16)
    dequantised(truth, formats)
    with load(directory) as engine:
        model = engine.model
        assert {parameter.device.type for parameter in model.parameters()} == {target.TYPE}
        for name in formats:
            layer, same = model.get_submodule(name), truth.get_submodule(name)
            assert type(layer) is nn.Linear
            assert torch.equal(layer.weight.cpu(), same.weight), name
            assert (layer.bias is None) == (same.bias is None)
            assert layer.bias is None or torch.equal(layer.bias.cpu(), same.bias), name
        embedding = model.get_input_embeddings().weight.cpu()
        assert torch.equal(embedding, truth.get_input_embeddings().weight)
        stats = engine.stats()
    assert (stats.dense_format, stats.dense_layers) == ("none", 0)
    assert stats.dense_bytes == outline_model(directory, registry).total_dense_bytes()


def test_layers_of_several_formats(pack: Pack, tmp_path: Path, registry: Registry) -> None:
    source = pack("qwen3_moe", "int8").with_name("source")
    overrides = {"lm_head": "none", "*.layers.0.*": "nvfp4", "*.o_proj": "int4-g64-asym"}
    directory = write(source, tmp_path / "packed", registry, "int8", overrides=overrides)
    formats = formats_of(directory)
    assert set(formats.values()) == {"int8", "int4-g64-asym", "nvfp4"}
    truth = dequantised(tiny.load_reference(source), formats)
    ids = tiny.sample_input_ids(truth.config)
    with load(directory) as engine, torch.inference_mode():
        got = engine.model(input_ids=ids.to(WHERE)).logits.cpu()
    assert difference(got, tiny.logits(truth, ids)) <= TOLERANCE


def test_the_user_is_told_what_it_costs(pack: Pack, caplog: pytest.LogCaptureFixture) -> None:
    stages = []

    def progress(stage: str, fraction: float | None) -> None:
        stages.append((stage, fraction))

    with caplog.at_level(logging.WARNING), load(pack("qwen3_moe", "int8"), progress=progress):
        pass
    (message,) = [r.getMessage() for r in caplog.records if "dense layers" in r.getMessage()]
    assert "packed as int8" in message
    assert f"{NAME}:0 leaves dense layers to torch: unpacked they take 0.00 GB there" in message
    assert ("unpacking dense layers", 1.0) in stages


def test_a_format_for_torch_to_compute_is_still_refused(pack: Pack) -> None:
    with pytest.raises(UnsupportedDenseError, match="computes no dense layers"):
        load(pack("qwen3_moe", "int8"), dense_format="int8")
    with pytest.raises(UnsupportedDenseError, match="computes no dense layers"):
        load(pack("qwen3_moe", "int8").with_name("source"), dense_format="int8")


@target.only_sim
def test_a_dense_format_is_not_advised(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    """To whom it would be refused: a model that is too large for host and accelerator."""
    source = pack("qwen3_moe", "int8").with_name("source")
    monkeypatch.setattr(hardware, "available_memory_bytes", lambda: 0)
    with pytest.raises(NotEnoughMemoryError, match=r"smaller format \(--format int4\)"):
        load(source, hot_experts="0")


def test_a_layer_of_another_model_is_refused(
    pack: Pack, tmp_path: Path, registry: Registry
) -> None:
    source = pack("qwen3_moe", "int8").with_name("source")
    directory = write(source, tmp_path / "packed", registry, "int8")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["dense"]["lm_head"]["in_features"] += 1
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="packed dense layer lm_head of LinearSpec"):
        load(directory)


@pytest.mark.parametrize("family", ["cohere2_moe", "qwen3_moe"])
def test_room_is_made_for_the_unpacked_layers(family: str, pack: Pack, registry: Registry) -> None:
    """A model's own bytes, and of a head that was tied one weight more; refused before it loads."""
    directory = pack(family, "int8")
    source = outline_model(directory.with_name("source"), registry)
    packed = outline_model(directory, registry)
    head = packed.vocab_size * packed.hidden_size * packed.dense_element_bytes
    more = head if family == "cohere2_moe" else 0
    assert packed.total_dense_bytes() == source.total_dense_bytes() + more
    with pytest.raises(NotEnoughMemoryError, match="are unpacked there, for torch"):
        load(directory, accelerator_memory=packed.total_dense_bytes())


_MEASURE = """
import sys, threading
from dataclasses import replace

import torch
import kt_core
from kt_core import hardware
from kt_sim.backend import SimBackend

real = SimBackend.capabilities
SimBackend.capabilities = lambda self, name: replace(real(self, name), computes_dense=False)
warm, model = sys.argv[1:]
kt_core.load(warm, device="sim", threads=2).close()  # what is imported and allocated once
def held():
    on_device = torch.accelerator.memory_allocated("sim:0")
    return hardware.process_memory().anonymous_bytes - on_device

before = held()
peak, done = before, threading.Event()

def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, held())

watcher = threading.Thread(target=watch)
watcher.start()
engine = kt_core.load(model, device="sim", threads=2)
done.set()
watcher.join()
model = engine.model
print(peak - before, model.get_input_embeddings().weight.nbytes, model.lm_head.weight.nbytes)
"""


@target.only_sim
def test_the_host_holds_pieces_of_layers(pack: Pack, tmp_path: Path, registry: Registry) -> None:
    """Of a head of 134 MB no copy, packed or not: what is not packed, scratch, two pieces.

    The simulated device's memory is the process's own, and is taken off.
    """
    config = tiny.tiny_config("qwen3_moe")
    config.update({"num_hidden_layers": 1, "mlp_only_layers": [], "vocab_size": 1 << 16})
    config.update({"hidden_size": 1024, "tie_word_embeddings": False})
    model = tiny.auto_class(config).from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    model.save_pretrained(tmp_path / "source")
    directory = write(tmp_path / "source", tmp_path / "packed", registry, "int8")
    machine = target.FAST.replace("memory_gib=0.25", "memory_gib=1")
    output = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(pack("qwen3_moe", "int8")), str(directory)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, target.VARIABLE: machine},
    ).stdout
    peak, embedding, head = map(int, output.split())
    assert head == 2 * 1024 << 16
    assert peak <= embedding + head // 2 - 16_000_000
