"""Packed model directories that were damaged on purpose, in every place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from kt_core.checkpoint import open_checkpoint, open_packed
from kt_core.checkpoint.packed_config import VERSION, PackedConfig, PackedLayer
from kt_core.checkpoint.packed_directory import (
    MANIFEST_NAME,
    PackedDirectory,
    file_entry,
    manifest_text,
    write_layer,
)
from kt_core.checkpoint.safetensors_writer import NewTensor, write_safetensors
from kt_core.errors import CheckpointError, KtError, UnsupportedFormatError
from kt_core.quant import BUILT_IN_FORMATS
from kt_core.types import Activation, ActivationKind, MoeSpec

FORMATS = {f.descriptor.name: f.descriptor for f in BUILT_IN_FORMATS}
UNGATED = Activation(kind=ActivationKind.RELU2, is_gated=False)
SPECS = {
    "model.layers.0.mlp.experts": (
        MoeSpec(num_experts=3, hidden_size=40, intermediate_size=24),
        "int4-g32",
    ),
    "model.layers.1.mlp.experts": (
        MoeSpec(
            num_experts=2, hidden_size=40, intermediate_size=24, activation=UNGATED, has_bias=True
        ),
        "nvfp4",
    ),
}


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """A whole one, of random bytes."""
    folder = tmp_path / "packed"
    folder.mkdir()
    layers = {
        name: PackedLayer.of(name, f"experts-{n}.safetensors", spec, FORMATS[form])
        for n, (name, (spec, form)) in enumerate(SPECS.items())
    }
    generator = torch.Generator().manual_seed(0)
    files: dict[str, Any] = {}
    for layer in layers.values():
        size = (layer.num_experts, layer.bytes_per_expert)
        experts = torch.randint(0, 256, size, generator=generator).to(torch.uint8)
        files[layer.file] = write_layer(folder, layer, experts)
    write_config(folder, PackedConfig(layers=layers).to_dict())
    weight_map = {n: la.file for la in layers.values() for n in (la.packed_name, la.digests_name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    files["config.json"] = file_entry(folder / "config.json")
    (folder / MANIFEST_NAME).write_text(manifest_text(files))
    return folder


def write_config(folder: Path, quantization: dict[str, Any]) -> None:
    config = {"model_type": "any", "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))


def read_config(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content


def opened(folder: Path) -> PackedDirectory:
    """Open it and map every layer, as loading does."""
    directory = open_packed(folder, read_config(folder))
    assert directory is not None
    checkpoint = open_checkpoint(folder)
    for name in directory.config.layers:
        directory.experts(name, checkpoint)
    return directory


def damaged(folder: Path) -> list[str]:
    seen: list[float] = []
    problems = opened(folder).verify(open_checkpoint(folder), threads=2, progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 1
    return problems


def test_what_was_written_is_read(packed: Path) -> None:
    directory = opened(packed)
    assert damaged(packed) == []
    for name, (spec, form) in SPECS.items():
        layer = directory.config.layers[name]
        assert layer.describes(spec)
        assert layer.weight_format == FORMATS[form]
        experts = directory.experts(name, open_checkpoint(packed))
        with safe_open(packed / layer.file, "pt") as file:  # somebody else's reader
            theirs = file.get_tensor(layer.packed_name)
        for index in range(layer.num_experts):
            ours = experts.expert(index)
            assert torch.equal(ours, theirs[index])
            assert ours.data_ptr() % 64 == 0
        assert experts.expert(0).data_ptr() % 4096 == 0


def test_others_are_not_ours(tmp_path: Path) -> None:
    assert open_packed(tmp_path, {"model_type": "any"}) is None
    assert open_packed(tmp_path, {"quantization_config": {"quant_method": "gptq"}}) is None


# ---------------------------------------------------------------- damage


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 0x10
    file.write_bytes(content)


EXPERTS = "experts-0.safetensors"


@pytest.mark.parametrize("at", [4096, 5000, 4096 + 3 * 2560 - 1])
def test_a_bit_of_an_expert(packed: Path, at: int) -> None:
    """Opening reads no expert, so it is for `kt verify`."""
    size = opened(packed).config.layers["model.layers.0.mlp.experts"].bytes_per_expert
    flip(packed / EXPERTS, at)
    expert = (at - 4096) // size
    assert damaged(packed) == [
        f"expert {expert} of model.layers.0.mlp.experts in {EXPERTS} is damaged"
    ]


def test_a_bit_of_a_checksum(packed: Path) -> None:
    flip(packed / EXPERTS, (packed / EXPERTS).stat().st_size - 1)
    problems = damaged(packed)
    assert "the checksums in experts-0.safetensors are not those that were written" in problems
    assert "expert 2 of model.layers.0.mlp.experts in experts-0.safetensors is damaged" in problems


def test_an_edited_config(packed: Path) -> None:
    """People edit it, so it opens; but it is said."""
    config = read_config(packed)
    (packed / "config.json").write_text(json.dumps(config | {"bos_token_id": 7}))
    assert damaged(packed) == ["config.json was changed"]


@pytest.mark.parametrize("file", [EXPERTS, "experts-1.safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.999])
def test_cut_off(packed: Path, file: str, kept: float) -> None:
    content = (packed / file).read_bytes()
    (packed / file).write_bytes(content[: int(kept * len(content))])
    with pytest.raises(CheckpointError, match=rf"{file} is cut off: it is \d+ bytes, \d+ were"):
        opened(packed)


def test_too_long(packed: Path) -> None:
    with (packed / EXPERTS).open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(CheckpointError, match="is too long"):
        opened(packed)


@pytest.mark.parametrize("file", [EXPERTS, MANIFEST_NAME])
def test_a_missing_file(packed: Path, file: str) -> None:
    (packed / file).unlink()
    why = "was not finished, or not copied whole" if file == MANIFEST_NAME else "is missing"
    with pytest.raises(CheckpointError, match=why):
        opened(packed)


def test_files_of_another_model(packed: Path) -> None:
    """Same sizes of files, other layers: told from the headers."""
    config = read_config(packed)
    layers = config["quantization_config"]["experts"]
    layers["model.layers.0.mlp.experts"]["hidden_size"] = 41
    (packed / "config.json").write_text(json.dumps(config))
    assert opened(packed)  # 41 inputs are padded to the 64 that 40 are: nothing to tell
    layers["model.layers.0.mlp.experts"]["hidden_size"] = 72
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"packed should be U8 \[3, \d+\] in experts-0"):
        opened(packed)


@pytest.mark.parametrize("place", ["config.json", MANIFEST_NAME])
def test_a_newer_version(packed: Path, place: str) -> None:
    if place == "config.json":
        quantization = read_config(packed)["quantization_config"]
        write_config(packed, quantization | {"version": VERSION + 1})
    else:
        manifest = json.loads((packed / place).read_text())
        (packed / place).write_text(json.dumps(manifest | {"version": VERSION + 1}))
    with pytest.raises(UnsupportedFormatError, match=r"version 3 of kt's packed format.*Update kt"):
        opened(packed)


Change = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    "change",
    [
        lambda q: q.pop("version"),
        lambda q: q.update(version="1"),
        lambda q: q.update(version=0),
        lambda q: q.pop("formats"),
        lambda q: q.update(formats=[]),
        lambda q: q["formats"]["nvfp4"].update(element="fp3"),
        lambda q: q["formats"]["nvfp4"].update(group_size=-16),
        lambda q: q["formats"]["nvfp4"].update(has_minimum=1),
        lambda q: q["formats"].pop("nvfp4"),
        lambda q: q.update(experts="none"),
        lambda q: q["experts"]["model.layers.1.mlp.experts"].update(num_experts=-2),
        lambda q: q["experts"]["model.layers.1.mlp.experts"].update(hidden_size=1.5),
        lambda q: q["experts"]["model.layers.1.mlp.experts"].update(is_gated="no"),
        lambda q: q["experts"]["model.layers.1.mlp.experts"].update(
            file="../experts-1.safetensors"
        ),
        lambda q: q["experts"]["model.layers.1.mlp.experts"].pop("file"),
    ],
)
def test_a_damaged_config(packed: Path, change: Change) -> None:
    quantization = read_config(packed)["quantization_config"]
    change(quantization)
    write_config(packed, quantization)
    with pytest.raises(CheckpointError, match=r"quantization_config in .*config.json is damaged"):
        opened(packed)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"version": 1}', '{"version": 1, "files": {"a": 3}}',
     '{"version": 1, "files": {"../a": {"size_bytes": 3}}}',
     '{"version": 1, "files": {"a": {"size_bytes": "x"}}}'],
)  # fmt: skip
def test_a_damaged_manifest(packed: Path, text: str) -> None:
    (packed / MANIFEST_NAME).write_text(text)
    with pytest.raises(CheckpointError, match=r"kt-packed\.json is damaged"):
        opened(packed)


def test_any_flipped_bit_of_a_header(packed: Path, tmp_path: Path) -> None:
    """Refused in words, or without effect; never a crash, never other bytes."""
    layer = "model.layers.0.mlp.experts"
    want = opened(packed).experts(layer, open_checkpoint(packed)).expert(2).clone()
    original = (packed / EXPERTS).read_bytes()
    broken = tmp_path / "broken"
    shutil.copytree(packed, broken)
    refused = 0
    for at in range(330):
        for bit in (0, 5, 7):
            content = bytearray(original)
            content[at] ^= 1 << bit
            (broken / EXPERTS).write_bytes(content)
            try:
                got = opened(broken).experts(layer, open_checkpoint(broken)).expert(2)
            except KtError:
                refused += 1
                continue
            assert torch.equal(got, want), f"bit {bit} of byte {at}"
    assert refused > 330


# ---------------------------------------------------------------- writing


def test_a_tensor_that_is_shorter_than_it_said(tmp_path: Path) -> None:
    tensor = NewTensor(name="a", dtype="U8", shape=(4,), size_bytes=4, pieces=[b"abc"])
    with pytest.raises(ValueError, match="a is 3 bytes, 4 were to be written"):
        write_safetensors(tmp_path / "a.safetensors", [tensor])
    assert list(tmp_path.iterdir()) == []
