"""The GGUF reader, against bytes assembled by hand and against the ``gguf`` package."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from demo import tiny_dense as tiny
from kt_core.errors import ModelSourceError
from kt_demo.dense import load_dense
from kt_demo.ggml_types import GGML_TYPES
from kt_demo.gguf import GgufFile

# scale 0.5, minimum -1; element i has quant i % 16, element i + 16 has 15 - i
Q4_1_BLOCK = struct.pack("<ee", 0.5, -1.0) + bytes(i | (15 - i) << 4 for i in range(16))
Q4_1_VALUES = [0.5 * i - 1 for i in range(16)] + [0.5 * (15 - i) - 1 for i in range(16)]
# scale 0.25; quants -16 .. 15
Q8_0_BLOCK = struct.pack("<e32b", 0.25, *range(-16, 16))
Q8_0_VALUES = [0.25 * quant for quant in range(-16, 16)]


def written(path: Path, raw: bytes) -> Path:
    path.write_bytes(raw)
    return path


def test_reads_every_metadata_type(tmp_path: Path) -> None:
    metadata = {
        "u8": struct.pack("<IB", 0, 200),
        "i8": struct.pack("<Ib", 1, -100),
        "u16": struct.pack("<IH", 2, 60000),
        "i16": struct.pack("<Ih", 3, -30000),
        "u32": tiny.value(tiny.U32, 4_000_000_000),
        "i32": struct.pack("<Ii", 5, -2_000_000_000),
        "f32": tiny.value(tiny.F32, 0.5),
        "bool": tiny.value(tiny.BOOL, True),
        "string": tiny.value(tiny.STRING, "größer"),
        "array": tiny.array(tiny.STRING, ["a", "", "Ġb"]),
        "nested": struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IQi", 5, 1, -7),
        "u64": struct.pack("<IQ", 10, 2**63),
        "i64": struct.pack("<Iq", 11, -(2**62)),
        "f64": struct.pack("<Id", 12, 0.1),
    }
    file = GgufFile(written(tmp_path / "m.gguf", tiny.gguf_bytes(metadata, {})))
    assert file.metadata == {
        "u8": 200,
        "i8": -100,
        "u16": 60000,
        "i16": -30000,
        "u32": 4_000_000_000,
        "i32": -2_000_000_000,
        "f32": 0.5,
        "bool": True,
        "string": "größer",
        "array": ["a", "", "Ġb"],
        "nested": [[-7]],
        "u64": 2**63,
        "i64": -(2**62),
        "f64": 0.1,
    }


def test_dequantises_every_tensor_type(tmp_path: Path) -> None:
    tensors = {
        "f32": ((3,), 0, struct.pack("<3f", 1.5, -2.0, 3.25)),
        "f16": ((1, 3), 1, struct.pack("<3e", 1.5, -2.0, 3.25)),
        "q4_1": ((2, 32), 3, Q4_1_BLOCK + Q4_1_BLOCK),
        "q8_0": ((1, 64), 8, Q8_0_BLOCK + Q8_0_BLOCK),
    }
    file = GgufFile(written(tmp_path / "t.gguf", tiny.gguf_bytes({}, tensors)))
    assert file.tensor("f32").tolist() == [1.5, -2.0, 3.25]
    assert file.tensor("f16").tolist() == [[1.5, -2.0, 3.25]]
    assert file.tensor("q4_1").tolist() == [Q4_1_VALUES, Q4_1_VALUES]
    assert file.tensor("q8_0").tolist() == [Q8_0_VALUES + Q8_0_VALUES]


def test_alignment_is_read_from_the_file(tmp_path: Path) -> None:
    raw = tiny.gguf_bytes(
        {"general.alignment": tiny.value(tiny.U32, 64)}, {"one": ((1,), 0, struct.pack("<f", 7.0))}
    )
    end_of_entries = raw.index(b"one") + len(b"one") + 4 + 8 + 4 + 8  # dims, dim, type, offset
    head, data = raw[:end_of_entries], raw[-4:]
    padding = -len(head) % 64
    assert padding >= 32, "the default alignment would find the data too"
    file = GgufFile(written(tmp_path / "a.gguf", head + bytes(padding) + data))
    assert file.tensor("one").tolist() == [7.0]


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "cannot mmap an empty file"),
        (b"PK\x03\x04" + bytes(60), "not b'GGUF'"),
        (b"GGUF" + struct.pack("<IQQ", 2, 0, 0), "GGUF version 2"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + tiny.string("key"), "it ends at byte"),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + tiny.string("k") + struct.pack("<I", 77),
            "type 77",
        ),
    ],
)
def test_a_broken_file_is_an_error_that_names_it(tmp_path: Path, raw: bytes, reason: str) -> None:
    path = written(tmp_path / "broken.gguf", raw)
    with pytest.raises(ModelSourceError, match="Delete it and run the command again") as caught:
        GgufFile(path)
    assert reason in str(caught.value)
    assert repr(str(path)) in str(caught.value)


def test_a_truncated_tensor_is_an_error(tmp_path: Path) -> None:
    raw = tiny.gguf_bytes({}, {"q8_0": ((1, 64), 8, Q8_0_BLOCK + Q8_0_BLOCK)})
    file = GgufFile(written(tmp_path / "t.gguf", raw[:-1]))
    with pytest.raises(ModelSourceError, match="'q8_0' needs bytes"):
        file.tensor("q8_0")


def test_an_unknown_tensor_type_is_an_error(tmp_path: Path) -> None:
    raw = tiny.gguf_bytes({}, {"odd": ((32,), 39, bytes(17))})
    file = GgufFile(written(tmp_path / "t.gguf", raw))
    with pytest.raises(ModelSourceError, match="ggml type 39"):
        file.tensor("odd")


def test_the_dense_model_survives_the_round_trip(tmp_path: Path) -> None:
    dense = tiny.model()
    again = load_dense(GgufFile(written(tmp_path / "d.gguf", tiny.gguf_of(dense))))
    assert again.config.eos_token_id == 2
    for name, tensor in dense.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    token_ids = torch.arange(50)[None]
    with torch.no_grad():
        assert torch.equal(again(token_ids).logits, dense(token_ids).logits)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    metadata = {"general.architecture": tiny.value(tiny.STRING, "gemma")}
    file = GgufFile(written(tmp_path / "g.gguf", tiny.gguf_bytes(metadata, {})))
    with pytest.raises(ModelSourceError, match="'gemma'"):
        load_dense(file)


@pytest.mark.parametrize("kind", sorted(GGML_TYPES))
def test_dequantisation_equals_the_gguf_package(kind: int) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package is only an oracle here")
    ours = GGML_TYPES[kind]
    raw = np.random.default_rng(kind).integers(0, 256, (64, ours.block_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):  # random scales are sometimes infinite
        theirs = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(kind))
        assert np.array_equal(ours.dequantize(raw), theirs, equal_nan=True)


def test_parsing_equals_the_gguf_package(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package is only an oracle here")
    path = written(tmp_path / "d.gguf", tiny.gguf_of(tiny.model()))
    ours, theirs = GgufFile(path), gguf.GGUFReader(path)
    expected = {
        name: field.contents() for name, field in theirs.fields.items() if name[:5] != "GGUF."
    }
    assert ours.metadata == expected
    for tensor in theirs.tensors:
        assert np.array_equal(ours.tensor(tensor.name).numpy(), tensor.data), tensor.name
