"""Headers and configs of any content are read or refused: nothing else is raised, little is taken.

Each test starts from something valid, since random bytes never get past the first check.
"""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kt_checkpoints.gguf.files import read_model
from kt_checkpoints.gguf.header import read_header
from kt_core import plugins
from kt_core.checkpoint import open_checkpoint
from kt_core.checkpoint.safetensors_files import open_files
from kt_core.engine.stored_checkpoint import open_stored
from kt_core.errors import KtError

REGISTRY = plugins.load()
FUZZ = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
MOST_BYTES_PER_BYTE = 400
"""What a parser may take for a byte of its file: a Python object for its smallest value."""
ALLOWANCE = 2_000_000

Result = TypeVar("Result")


def reads_or_refuses(read: Callable[[Path], object], file: Path) -> None:
    """Check that only our own errors are raised, and that memory stays in proportion."""
    message = str(file)
    tracemalloc.start()
    try:
        read(file)
    except KtError as error:
        message = str(error)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert file.name in message or str(file.parent) in message
    assert peak <= MOST_BYTES_PER_BYTE * file.stat().st_size + ALLOWANCE


# --- GGUF ----------------------------------------------------------------------------------------


def _text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


@st.composite
def gguf_files(draw: st.DrawFn) -> bytes:
    """A file of any valid structure."""
    number = st.integers(0, 2**32 - 1)
    scalar = st.builds(lambda n: struct.pack("<II", 4, n), number)
    string = st.builds(lambda s: struct.pack("<I", 8) + _text(s), st.binary(max_size=9))
    array = st.builds(
        lambda a: struct.pack("<IIQ", 9, 4, len(a)) + struct.pack(f"<{len(a)}I", *a),
        st.lists(number, max_size=5),
    )
    keys = st.binary(max_size=9)
    pairs = draw(st.lists(st.tuples(keys, scalar | string | array), max_size=5))
    entries = draw(
        st.lists(
            st.tuples(
                st.binary(max_size=9),
                st.lists(st.integers(0, 2**40), min_size=1, max_size=4),
                st.integers(0, 41),
                st.integers(0, 2**40),
            ),
            max_size=5,
        )
    )
    content = b"GGUF" + struct.pack("<IQQ", draw(st.sampled_from([2, 3])), len(entries), len(pairs))
    content += b"".join(_text(key) + value for key, value in pairs)
    for name, shape, kind, offset in entries:
        content += _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return content + bytes(draw(st.integers(0, 200)))


@st.composite
def damaged(draw: st.DrawFn, files: st.SearchStrategy[bytes]) -> bytes:
    """A file with some bytes changed, and cut off somewhere."""
    content = bytearray(draw(files))
    for at, value in draw(
        st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6)
    ):
        if at < len(content):
            content[at] = value
    return bytes(content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content)


@FUZZ
@given(content=damaged(gguf_files()))
@pytest.mark.parametrize("read", [read_header, read_model])
def test_gguf(read: Callable[[Path], object], tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    reads_or_refuses(read, file)


# --- safetensors ---------------------------------------------------------------------------------

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=9,
)
_ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "U8", "I64", "F99"]) | _JSON,
        "shape": st.lists(st.integers(-2, 2**40), max_size=4) | _JSON,
        "data_offsets": st.lists(st.integers(-2, 2**63), min_size=1, max_size=3) | _JSON,
    }
)


@st.composite
def safetensors_files(draw: st.DrawFn) -> bytes:
    """A file whose header is JSON of the right form, or of another."""
    content = draw(st.dictionaries(st.text(max_size=9), _ENTRY | _JSON, max_size=5) | _JSON)
    header = json.dumps(content).encode()
    length = draw(st.just(len(header)) | st.integers(0, 2**64 - 1))
    return struct.pack("<Q", length) + header + bytes(draw(st.integers(0, 200)))


@FUZZ
@given(content=damaged(safetensors_files()))
def test_safetensors(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    reads_or_refuses(lambda path: open_files([path]), file)


def test_safetensors_of_deep_nesting(tmp_path: Path) -> None:
    header = b"[" * 200_000
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    reads_or_refuses(lambda path: open_files([path]), file)


@FUZZ
@given(content=_JSON | st.fixed_dictionaries({"weight_map": _JSON}))
def test_index(tmp_path: Path, content: Any) -> None:
    file = tmp_path / "model.safetensors.index.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    reads_or_refuses(lambda path: open_checkpoint(path.parent), file)


# --- what config.json says -----------------------------------------------------------------------

_METHODS = ("awq", "compressed-tensors", "fp8", "gptq", "modelopt", "mxfp4")
_KEYS = st.sampled_from(
    ["bits", "group_size", "desc_act", "sym", "checkpoint_format", "version", "weight_block_size",
     "format", "config_groups", "sparsity_config", "num_bits", "targets", "weights"]
)  # fmt: skip
_LEAVES = (
    "weight", "weight_scale", "weight_scale_inv", "weight_packed", "weight_scale_2", "qweight",
    "qzeros", "scales", "g_idx", "up_blocks", "up_scales", "weight_global_scale",
)  # fmt: skip
_DTYPES = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E8M0": 1}


def _file_of(shapes: dict[str, tuple[str, list[int]]]) -> bytes:
    header: dict[str, Any] = {}
    at = 0
    for leaf, (dtype, shape) in shapes.items():
        size = _DTYPES[dtype]
        for dimension in shape:
            size *= dimension
        header[f"m.{leaf}"] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(at)


@FUZZ
@given(
    method=st.sampled_from(_METHODS),
    config=st.dictionaries(_KEYS, _JSON | st.dictionaries(_KEYS, _JSON)),
    shapes=st.dictionaries(
        st.sampled_from(_LEAVES),
        st.tuples(st.sampled_from(sorted(_DTYPES)), st.lists(st.integers(0, 9), max_size=4)),
        min_size=1,
    ),
)
def test_quantised_checkpoints(
    tmp_path: Path, method: str, config: dict[str, Any], shapes: dict[str, tuple[str, list[int]]]
) -> None:
    """Whatever is refused here, what is left can be read, or says why not."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(_file_of(shapes))
    said = {"model_type": "x", "quantization_config": {**config, "quant_method": method}}
    try:
        checkpoint = open_stored(tmp_path, said, REGISTRY)
    except KtError:
        return
    for name in checkpoint.tensors:
        try:
            value = checkpoint.read(name)
        except KtError:
            continue
        assert value.shape == checkpoint.tensors[name].shape
