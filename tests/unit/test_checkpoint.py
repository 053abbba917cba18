"""Directories of safetensors: whole, in shards, and spoilt as downloads are spoilt."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from kt_core.checkpoint import Checkpoint, open_checkpoint
from kt_core.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
MIB = 1 << 20


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "experts": torch.randn(4, 3, 5, generator=generator),
        "norm": torch.randn(7, generator=generator).bfloat16(),
        "count": torch.arange(6).reshape(2, 3),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "thin": torch.zeros(3, 0),
    }


FIRST = ("experts", "norm")  # in the first shard


def sharded(directory: Path) -> Path:
    values = tensors()
    home = {name: SHARDS[name not in FIRST] for name in values}
    for shard in SHARDS:
        save_file({n: v for n, v in values.items() if home[n] == shard}, directory / shard)
    write_index(directory, home)
    return directory


def write_index(directory: Path, weight_map: object) -> None:
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def single(directory: Path) -> Path:
    save_file(tensors(), directory / SINGLE, metadata={"format": "pt"})
    return directory


def expect_all(checkpoint: Checkpoint) -> None:
    values = tensors()
    assert set(checkpoint.tensors) == set(values)
    for name, value in values.items():
        got = checkpoint.read(name)
        assert got.dtype is value.dtype
        assert got.shape == value.shape
        assert torch.equal(got, value)
        assert name in checkpoint
        info = checkpoint.tensors[name]
        assert info.shape == tuple(value.shape)
        assert info.size_bytes == value.numel() * value.element_size()
    assert "nothing" not in checkpoint
    # 4 * 3 * 5 float32, 7 bfloat16, 6 int64, 1 float32
    assert checkpoint.size_bytes == 240 + 14 + 48 + 4


def refused(directory: Path, *parts: str) -> str:
    """Every message says which file it is about, and what to do."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(directory)
    message = str(caught.value)
    for part in parts:
        assert re.search(part, message), f"{part!r} is not in: {message}"
    assert str(directory) in message
    assert re.search(r"Download|save_pretrained", message)
    return message


# ---------------------------------------------------------------- what is whole


def test_single_file(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(single(tmp_path))
    expect_all(checkpoint)
    assert checkpoint.tensors["norm"].file == tmp_path / SINGLE
    assert checkpoint.tensors["norm"].dtype == "BF16"


def test_shards(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(sharded(tmp_path))
    expect_all(checkpoint)
    for name, info in checkpoint.tensors.items():
        assert info.file == tmp_path / SHARDS[name not in FIRST]


def test_the_index_counts_where_there_is_one(tmp_path: Path) -> None:
    """Files it does not name are not looked at: consolidated copies lie beside the shards."""
    save_file({"other": torch.ones(1)}, sharded(tmp_path) / SINGLE)
    (tmp_path / "consolidated.safetensors").write_bytes(b"not read")
    expect_all(open_checkpoint(tmp_path))


@pytest.mark.parametrize("stale", SHARDS)
def test_of_two_tensors_of_one_name_the_promised_one_counts(tmp_path: Path, stale: str) -> None:
    home = {"twice": SHARDS[stale == SHARDS[0]]}
    for shard in SHARDS:
        value = -1.0 if shard == stale else 1.0
        save_file(
            {"twice": torch.tensor([value]), f"only {shard}": torch.zeros(1)}, tmp_path / shard
        )
        home[f"only {shard}"] = shard
    write_index(tmp_path, home)
    assert open_checkpoint(tmp_path).read("twice").item() == 1.0


def test_rows(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(sharded(tmp_path))
    for name in ("experts", "norm", "count", "thin"):
        whole = tensors()[name]
        for row in range(whole.shape[0]):
            got = checkpoint.read_row(name, row)
            assert got.shape == (1, *whole.shape[1:])
            assert torch.equal(got, whole[row : row + 1])


@pytest.mark.parametrize(
    ("name", "row"), [("experts", 4), ("experts", -1), ("count", 2), ("scalar", 0), ("empty", 0)]
)
def test_row_that_is_not_there(tmp_path: Path, name: str, row: int) -> None:
    """An empty slice would only be noticed where it is used."""
    checkpoint = open_checkpoint(single(tmp_path))
    shape = re.escape(str(list(tensors()[name].shape)))
    with pytest.raises(
        CheckpointError, match=f"'{name}' in .* has no row {row}, its shape is {shape}"
    ):
        checkpoint.read_row(name, row)


def resident_bytes() -> int:
    rollup = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    match = re.search(r"^Rss: +(\d+) kB$", rollup, re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024


def test_reading_a_row_reads_nothing_else(tmp_path: Path) -> None:
    """Of 1 GiB in a file with holes. A whole tensor would have to be read into memory."""
    rows, cols = 4096, 65536
    entry = {"dtype": "F32", "shape": [rows, cols], "data_offsets": [0, rows * cols * 4]}
    header = json.dumps({"big": entry}).encode()
    header += b" " * (-len(header) % 8)
    wanted = torch.arange(cols, dtype=torch.float32)
    with (tmp_path / SINGLE).open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + rows * cols * 4)
        stream.seek(8 + len(header) + 1234 * cols * 4)
        stream.write(wanted.numpy().tobytes())
    checkpoint = open_checkpoint(tmp_path)
    before = resident_bytes()
    got = checkpoint.read_row("big", 1234)
    assert torch.equal(got, wanted[None])
    # The row takes 256 KiB; the kernel may map some neighbours.
    assert resident_bytes() - before < 8 * MIB
    checkpoint.close()


def test_any_thread_may_read(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(sharded(tmp_path))
    errors: list[BaseException] = []
    start = threading.Barrier(6)

    def read() -> None:
        try:
            start.wait()
            for _ in range(20):
                expect_all(checkpoint)
                checkpoint.read_row("experts", 2)
                checkpoint.close()  # also while others read
        except BaseException as error:  # noqa: BLE001 - raised below, in the test's thread
            errors.append(error)

    threads = [threading.Thread(target=read) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


# ---------------------------------------------------------------- what is missing


def test_directory_without_weights(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refused(tmp_path, "holds no weights", re.escape(INDEX), "save_pretrained")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_file_without_tensors(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    save_file({}, tmp_path / SINGLE, metadata=metadata)
    refused(tmp_path, "there are no tensors in")


def test_missing_shard_is_named(tmp_path: Path) -> None:
    (sharded(tmp_path) / SHARDS[1]).unlink()
    refused(tmp_path, f"names 1 of 2 files that are not there: {SHARDS[1]}")


def test_a_directory_is_not_a_shard(tmp_path: Path) -> None:
    (sharded(tmp_path) / SHARDS[1]).unlink()
    (tmp_path / SHARDS[1]).mkdir()
    refused(tmp_path, f"not there: {SHARDS[1]}")


def test_index_that_promises_what_is_nowhere(tmp_path: Path) -> None:
    home = {name: SHARDS[name not in FIRST] for name in tensors()}
    write_index(sharded(tmp_path), home | {"ghost": SHARDS[0], "spectre": SHARDS[1]})
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert "2 tensors that the index promises are in no file" in str(caught.value)
    assert f"'ghost', which should be in {SHARDS[0]}" in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": "model.safetensors"}',
        "\ufeff{}",
    ],
)
def test_index_that_is_none(tmp_path: Path, text: str) -> None:
    (sharded(tmp_path) / INDEX).write_text(text, encoding="utf-8")
    refused(tmp_path, "is not a safetensors index|names no tensors", re.escape(INDEX))


def test_index_in_another_encoding(tmp_path: Path) -> None:
    (sharded(tmp_path) / INDEX).write_bytes(b'{"weight_map": {"\xff": "a"}}')
    refused(tmp_path, "is not a safetensors index")


# ---------------------------------------------------------------- what is damaged


def cut_points() -> list[int]:
    """Nothing, within the length, after it, within the header, after it, within the data."""
    return [0, 1, 7, 8, 9, 40, -1000, -55, -54, -9, -8, -1]


@pytest.mark.parametrize("shard", [None, *SHARDS])
@pytest.mark.parametrize("size", cut_points())
def test_truncated_file(tmp_path: Path, shard: str | None, size: int) -> None:
    directory = single(tmp_path) if shard is None else sharded(tmp_path)
    file = directory / (shard or SINGLE)
    data = file.read_bytes()
    assert len(data) > 200
    file.write_bytes(data[:size])
    assert file.stat().st_size < len(data)
    refused(directory, re.escape(str(file)), "is damaged|is cut off")


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    """However many bytes are missing: the last tensor ends with the file."""
    save_file({"a": torch.ones(2, 3), "b": torch.ones(5)}, tmp_path / SINGLE)
    data = (tmp_path / SINGLE).read_bytes()
    start = len(data) - 6 * 4 - 5 * 4
    for size in range(len(data)):
        (tmp_path / SINGLE).write_bytes(data[:size])
        there = f"is cut off: its tensors take 44 bytes, {size - start} are there"
        refused(tmp_path, there if size >= start else "is damaged")
    (tmp_path / SINGLE).write_bytes(data)
    assert open_checkpoint(tmp_path).read("b").tolist() == [1.0] * 5


def write_raw(directory: Path, header: Any, data_bytes: int, *, length: int | None = None) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(raw) if length is None else length
    (directory / SINGLE).write_bytes(size.to_bytes(8, "little") + raw + bytes(data_bytes))


@pytest.mark.parametrize("length", [0, 1, 60, 62, 10_000, 10**8 + 1, 2**63, 2**64 - 1])
def test_header_length_that_lies(tmp_path: Path, length: int) -> None:
    header = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    assert len(json.dumps(header)) == 61
    write_raw(tmp_path, header, 8, length=length)
    refused(tmp_path, re.escape(SINGLE), "is damaged|is cut off")


@pytest.mark.parametrize(
    "content", [b"<html>404: Not Found</html>" * 9, b"version https://git-lfs"]
)
def test_file_that_is_something_else(tmp_path: Path, content: bytes) -> None:
    (tmp_path / SINGLE).write_bytes(content)
    refused(tmp_path, "is damaged: its header should be \\d+ bytes long")


GOOD = {"dtype": "F32", "shape": [3, 2], "data_offsets": [0, 24]}


@pytest.mark.parametrize(
    ("header", "data_bytes"),
    [
        (b"\xff\xfe garbage", 0),
        (b"{" + b" " * 20, 0),
        ([], 0),
        (3, 0),
        (None, 0),
        ({"a": 7}, 0),
        ({"a": {"dtype": "F32"}}, 0),
        ({"a": {**GOOD, "shape": 3}}, 24),
        ({"a": {**GOOD, "shape": ["x"]}}, 24),
        ({"a": {**GOOD, "shape": [-3, -2]}}, 24),
        ({"a": {**GOOD, "shape": [3, 3]}}, 24),
        ({"a": {**GOOD, "dtype": "Q9"}}, 24),
        ({"a": {**GOOD, "data_offsets": [0]}}, 24),
        ({"a": {**GOOD, "data_offsets": [0, 24, 24]}}, 24),
        ({"a": {**GOOD, "data_offsets": ["0", "x"]}}, 24),
        ({"a": {**GOOD, "data_offsets": [24, 0]}}, 24),
        ({"a": {**GOOD, "data_offsets": [-24, 0]}}, 24),
        ({"a": {**GOOD, "data_offsets": [0, 20]}}, 20),
        ({"a": {**GOOD, "data_offsets": [8, 32]}}, 32),  # a gap before it
        ({"a": GOOD}, 30),  # more behind it
        ({"a": GOOD, "b": {**GOOD, "data_offsets": [12, 36]}}, 36),  # overlapping
        ({"a": GOOD, "b": {**GOOD, "data_offsets": [24, 48]}}, 24),  # beyond the end
    ],
)
def test_header_that_lies(tmp_path: Path, header: Any, data_bytes: int) -> None:
    """Found when the checkpoint is opened, not when the tensor is read."""
    write_raw(tmp_path, header, data_bytes)
    refused(tmp_path, re.escape(SINGLE), "is damaged|is cut off")


def test_the_file_of_the_tests_above_is_good_without_the_damage(tmp_path: Path) -> None:
    write_raw(tmp_path, {"a": GOOD}, 24)
    assert open_checkpoint(tmp_path).read("a").tolist() == [[0.0, 0.0]] * 3
