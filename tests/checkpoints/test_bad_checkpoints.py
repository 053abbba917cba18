"""Damaged and contradictory quantised checkpoints are refused, with what is wrong and where."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import kt_core
from checkpoints.schemes import SCHEMES
from checkpoints.writing import save_model, store_matrices, write_checkpoint
from kt_checkpoints.gguf.header import read_header
from kt_core.errors import CheckpointError, KtError, UnsupportedFormatError

BY_NAME = {scheme.name: scheme for scheme in SCHEMES}
SIZES = {
    "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64,
    "num_hidden_layers": 2, "num_experts": 4,
}  # fmt: skip
EXPERT = "model.layers.1.mlp.experts.2.up_proj."

Tensors = dict[str, torch.Tensor]
Write = Callable[..., Path]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensors]:
    directory = tmp_path_factory.mktemp("base")
    return directory, save_model("qwen3_moe", directory, **SIZES)


@pytest.fixture
def write(tmp_path: Path, base: tuple[Path, Tensors]) -> Write:
    """Return a function that writes a scheme's checkpoint, its tensors and config edited."""

    def written(
        name: str, edit: Callable[[Tensors], object] = len, config: dict[str, Any] | None = None
    ) -> Path:
        directory, tensors = base
        scheme = BY_NAME[name]
        stored, _ = store_matrices(tensors, scheme.store)
        edit(stored)
        quantization = {**scheme.config, **(config or {})}
        return write_checkpoint(tmp_path / "q", directory, stored, quantization_config=quantization)

    return written


def fails(path: Path, error: type[KtError], *parts: str, **options: Any) -> None:
    with pytest.raises(error) as caught:
        kt_core.load(path, threads=1, **options)
    message = str(caught.value)
    for part in parts:
        assert re.search(part, message), f"{part!r} is not in {message!r}"
    assert "\n" not in message


def without(leaf: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(EXPERT + leaf)


def replaced(leaf: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Any]:
    def edit(tensors: Tensors) -> None:
        tensors[EXPERT + leaf] = make(tensors[EXPERT + leaf]).contiguous()

    return edit


FP8, CT = "fp8 128x128 float32", "pack-quantized 4 bits group 32"
CT_ASYMMETRIC = "pack-quantized 4 bits group 32 asymmetric"
GPTQ, AWQ = "gptq 4 bits 64", "awq 64"
NVFP4, MODELOPT = "nvfp4-pack-quantized 4 bits tensor_group 16", "modelopt nvfp4"


@pytest.mark.parametrize(
    ("name", "leaf"),
    [
        (FP8, "weight_scale_inv"),
        (CT, "weight_scale"),
        (CT_ASYMMETRIC, "weight_zero_point"),
        (NVFP4, "weight_scale"),
        (MODELOPT, "weight_scale"),
        (GPTQ, "scales"),
        (GPTQ, "qzeros"),
        (AWQ, "scales"),
        (AWQ, "qzeros"),
    ],
)
def test_a_part_is_missing(name: str, leaf: str, write: Write) -> None:
    owner = re.escape(EXPERT.removesuffix("."))
    error = UnsupportedFormatError if name == MODELOPT else CheckpointError
    if name == MODELOPT:  # bytes without scales are no weights
        fails(write(name, without(leaf)), error, owner, "U8")
    else:
        fails(write(name, without(leaf)), error, owner, leaf, "shard may be missing")


@pytest.mark.parametrize("leaf", ["weight_packed", "qweight", "weight"])
def test_the_codes_are_missing(leaf: str, write: Write) -> None:
    name = {"weight_packed": CT, "qweight": GPTQ, "weight": FP8}[leaf]
    fails(write(name, without(leaf)), CheckpointError, "needs 4 experts", "3")


@pytest.mark.parametrize(
    ("name", "leaf", "make", "parts"),
    [
        (FP8, "weight_scale_inv", lambda s: s.int(), ["scales I32", "not read"]),
        (FP8, "weight_scale_inv", lambda s: s.expand(3, 1), [r"\[3, 1\]", "does not fit"]),
        (FP8, "weight", lambda w: w.view(torch.float8_e5m2), ["F8_E5M2"]),
        (FP8, "weight", lambda w: w[0], ["matrices"]),
        (CT, "weight_scale", lambda s: s.int(), ["stored as I32"]),
        (CT, "weight_scale", lambda s: s[:, :1], ["do not fit together"]),
        (CT, "weight_packed", lambda w: w[None], [r"\[1, 64, 8\]", "matrices"]),
        (GPTQ, "qweight", lambda w: w.long(), ["I64"]),
        (GPTQ, "scales", lambda s: s[:, :32], ["do not fit"]),
        (GPTQ, "g_idx", lambda g: g[:7], ["bits"]),
        (AWQ, "qweight", lambda w: w.float(), ["F32"]),
        (AWQ, "scales", lambda s: s[:, :8], ["do not fit"]),
        (NVFP4, "weight_scale", lambda s: s[:, :3], ["does not fit"]),
        (MODELOPT, "weight_scale", lambda s: s.float(), ["neither fp8 nor fp4"]),
    ],
)
def test_a_part_of_another_type_or_shape(
    name: str,
    leaf: str,
    make: Callable[[torch.Tensor], torch.Tensor],
    parts: list[str],
    write: Write,
) -> None:
    fails(write(name, replaced(leaf, make)), KtError, re.escape(EXPERT)[:-2], *parts)


@pytest.mark.parametrize(
    ("name", "leaf", "make", "parts"),
    [
        (GPTQ, "g_idx", lambda g: g + 1, ["not in the order of their groups", "config.json"]),
        (GPTQ, "qzeros", lambda z: z * 0, ["not in the middle", "symmetric"]),
        (CT, "weight_shape", lambda s: s + 1, [r"should be \[65, 65\]"]),
        (CT, "weight_scale", lambda s: s * float("nan"), ["NaN or an infinity"]),
        (FP8, "weight_scale_inv", lambda s: s * float("inf"), ["NaN or an infinity"]),
        (FP8, "weight", lambda w: (w.view(torch.uint8) | 127).view(w.dtype), ["NaN"]),
        (NVFP4, "weight_scale", lambda s: (-s.float()).to(s.dtype), ["numbers of the type e4m3"]),
        (NVFP4, "weight_global_scale", lambda s: s * 0, ["NaN or an infinity"]),
    ],
)
def test_numbers_that_cannot_be(
    name: str,
    leaf: str,
    make: Callable[[torch.Tensor], torch.Tensor],
    parts: list[str],
    write: Write,
) -> None:
    directory = write(name, replaced(leaf, make))
    fails(directory, CheckpointError, r"experts\.2|expert 2", *parts)


@pytest.mark.parametrize(
    ("name", "config", "parts"),
    [
        (GPTQ, {"checkpoint_format": "marlin"}, ["marlin", "gptq_v2"]),
        (GPTQ, {"bits": 0}, ["quantization_config", "ZeroDivisionError"]),
        (GPTQ, {"bits": "many"}, ["quantization_config", "ValueError"]),
        (GPTQ, {"group_size": 7}, []),  # the scales say otherwise
        (AWQ, {"version": "gemv"}, ["gemv", "gemm"]),
        (AWQ, {"group_size": 48}, ["do not fit groups of 48"]),
        (CT, {"config_groups": {}}, ["no group of quantization_config names it"]),
        (CT, {"config_groups": {"g": {"targets": ["re:("], "weights": {"a": 1}}}}, ["error"]),
        (CT, {"config_groups": [1]}, ["quantization_config"]),
        (CT, {"format": "marlin-24"}, ["sparse", "marlin-24"]),
        (FP8, {"weight_block_size": [128]}, ["rows and one of columns"]),
    ],
)
def test_a_config_that_cannot_be(
    name: str, config: dict[str, Any], parts: list[str], write: Write
) -> None:
    directory = write(name, config=config)
    if parts:
        fails(directory, KtError, *parts)
    else:
        kt_core.load(directory, threads=1).close()


def test_a_shard_that_is_cut_off(write: Write) -> None:
    file = write(CT) / "model.safetensors"
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 100)
    fails(file.parent, CheckpointError, "cut off", "Download it again")


def test_a_config_of_its_own_file_that_is_damaged(write: Write) -> None:
    directory = write(MODELOPT)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    del config["quantization_config"]
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    own = directory / "hf_quant_config.json"
    own.write_text("{", encoding="utf-8")
    fails(directory, CheckpointError, "hf_quant_config.json cannot be read")
    content = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}
    own.write_text(json.dumps(content), encoding="utf-8")
    with kt_core.load(directory, threads=1) as engine:
        assert engine.stats().format == "nvfp4"


def test_a_scale_of_the_dense_part(write: Write) -> None:
    """What transformers is given is checked, too."""
    directory = write(CT)
    tensors = load_file(directory / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight_shape"
    tensors[name] = tensors[name] + 1
    save_file(tensors, directory / "model.safetensors")
    fails(directory, CheckpointError, r"q_proj", r"should be \[65, 65\]")


# --- GGUF headers --------------------------------------------------------------------------------


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(
    *entries: bytes,
    version: int = 3,
    tensors: int | None = None,
    metadata: bytes = b"",
    keys: int = 0,
) -> bytes:
    count = len(entries) if tensors is None else tensors
    return b"GGUF" + struct.pack("<IQQ", version, count, keys) + metadata + b"".join(entries)


def entry(name: str = "a", shape: tuple[int, ...] = (32,), kind: int = 2, at: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, at)


HUGE = 1 << 62
DAMAGED, UNSUPPORTED = CheckpointError, UnsupportedFormatError


@pytest.mark.parametrize(
    ("content", "error", "parts"),
    [
        (b"", DAMAGED, ["is empty"]),
        (b"GGUF", DAMAGED, ["damaged", "ends at 4"]),
        (b"GGML" + bytes(60), DAMAGED, ["begins with b'GGML'"]),
        (header(version=1), UNSUPPORTED, ["version 1", "versions 2 and 3"]),
        (header(version=9), UNSUPPORTED, ["version 9"]),
        (header(version=3 << 24), UNSUPPORTED, ["big-endian"]),
        (header(tensors=HUGE), DAMAGED, [f"{HUGE} entries cannot be"]),
        (header(keys=HUGE), DAMAGED, [f"{HUGE} entries cannot be"]),
        (header(metadata=struct.pack("<Q", HUGE), keys=1) + bytes(16), DAMAGED, ["entries"]),
        (
            header(metadata=text("k") + struct.pack("<IIQ", 9, 4, HUGE), keys=1) + bytes(16),
            DAMAGED,
            ["entries cannot be"],
        ),
        (
            header(metadata=text("k") + struct.pack("<IIQI", 9, 9, 1, 4), keys=1) + bytes(16),
            DAMAGED,
            ["type 9"],
        ),
        (header(metadata=text("k") + struct.pack("<I", 77), keys=1), DAMAGED, ["type 77"]),
        (
            header(metadata=text("general.alignment") + struct.pack("<II", 4, 24), keys=1),
            DAMAGED,
            ["alignment is 24"],
        ),
        (header(entry(kind=99)), UNSUPPORTED, ["'a'", "ggml type 99", "Q4_K"]),
        (header(entry(shape=(33,))), DAMAGED, ["rows of 33", "whole blocks of Q4_0"]),
        (header(entry(shape=())), DAMAGED, ["0 dimensions"]),
        (header(entry(shape=(1,) * 5)), DAMAGED, ["5 dimensions"]),
        (header(entry(shape=(HUGE, HUGE))), DAMAGED, ["should end at byte"]),
        (header(entry(at=HUGE)), DAMAGED, ["should end at byte"]),
        (header(entry(), entry()) + bytes(64), DAMAGED, ["two tensors called 'a'"]),
        (header(struct.pack("<Q", 2) + b"\xff\xff" + bytes(40)), DAMAGED, ["utf-8"]),
    ],
)
def test_gguf_header(
    content: bytes, error: type[KtError], parts: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(content)
    with pytest.raises(error) as caught:
        read_header(file)
    for part in (*parts, "m.gguf"):
        assert part in str(caught.value)
