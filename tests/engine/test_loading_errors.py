"""Bad input: each kind ends in one clear error, and leaves no thread and no memory behind."""

from __future__ import annotations

import gc
import json
import logging
import re
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import kt_core
from kt_core import hardware, plugins
from kt_core.engine import loading
from kt_core.errors import (
    BackendUnavailableError,
    CheckpointError,
    InvalidRequestError,
    KtError,
    ModelSourceError,
    NotEnoughMemoryError,
    TokenizerError,
    UnknownNameError,
    UnsupportedFormatError,
    UnsupportedModelError,
)
from kt_core.interfaces import ExpertWeights, QuantizedTensor
from kt_core.plan import fitting
from kt_core.quant import BUILT_IN_FORMATS
from kt_core.types import Capabilities, Element, MoeSpec
from kt_cpu import _kernels
from kt_cpu.backend import CpuBackend, CpuDevice

FORMATS = {f.descriptor.name: f for f in BUILT_IN_FORMATS}
INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00004.safetensors"
UP = "model.layers.2.mlp.experts.3.up_proj.weight"  # [48, 64]
Edit = Callable[[Path], object]


def native_threads() -> set[str]:
    return {path.name for path in Path("/proc/self/task").iterdir()}


def new_threads(before: set[str]) -> set[str]:
    """Threads that were not there; one that was joined stays listed for a moment."""
    for _ in range(100):
        if not native_threads() - before:
            break
        time.sleep(0.01)
    return native_threads() - before


@pytest.fixture(scope="module", autouse=True)
def _warm(saved: Callable[..., Path]) -> Iterator[None]:
    """Import what starts threads of its own (numpy's OpenBLAS), and make collecting fast."""
    kt_core.load(saved("qwen3_moe"), format="int8", threads=1).close()
    gc.collect()
    gc.freeze()  # what is there now need not be looked at after each test
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def torch_threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What torch was told; not done, because the threads of its own pool never end."""
    told: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    return told


@pytest.fixture(autouse=True)
def reserved(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[weakref.ref[Any]]]:
    """All kernels, which own the packed memory, of a test; afterwards none of them may live.

    No device either, each closed by whoever opened it, and no thread.
    """
    kernels: list[weakref.ref[Any]] = []
    devices: list[weakref.ref[Any]] = []
    not_closed: list[weakref.ref[Any]] = []
    init, expert_kernel, close = CpuDevice.__init__, CpuDevice.expert_kernel, CpuDevice.close

    def spied_init(self: CpuDevice, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        devices.append(weakref.ref(self))
        not_closed.append(weakref.ref(self))

    def spied_expert_kernel(self: CpuDevice, *args: Any, **kwargs: Any) -> Any:
        kernel = expert_kernel(self, *args, **kwargs)
        kernels.append(weakref.ref(kernel))
        return kernel

    def spied_close(self: CpuDevice) -> None:
        not_closed[:] = [ref for ref in not_closed if ref() is not self]
        close(self)

    monkeypatch.setattr(CpuDevice, "__init__", spied_init)
    monkeypatch.setattr(CpuDevice, "expert_kernel", spied_expert_kernel)
    monkeypatch.setattr(CpuDevice, "close", spied_close)
    threads = native_threads()
    yield kernels
    gc.collect()
    assert not_closed == []
    assert [ref() for ref in (*kernels, *devices) if ref() is not None] == []
    assert new_threads(threads) == set()
    assert [t.name for t in threading.enumerate() if t.name.startswith("kt-")] == []


@pytest.fixture
def checkpoint(saved: Callable[..., Path], tmp_path: Path) -> Path:
    """Return a copy of a good checkpoint, to be spoilt."""
    directory: Path = shutil.copytree(saved("qwen3_moe"), tmp_path / "model")
    assert (directory / SHARD).is_file()
    return directory


def load(directory: Path, **options: Any) -> kt_core.Engine:
    return kt_core.load(directory, **({"format": "int8", "threads": 2} | options))


def fails(directory: Path, error: type[KtError], *parts: str, **options: Any) -> str:
    """Load and expect this very error, each of ``parts`` (regular expressions) in its message."""
    with pytest.raises(KtError) as caught:
        load(directory, **options)
    message = str(caught.value)
    assert type(caught.value) is error, message
    for part in parts:
        assert re.search(part, message), f"{part!r} is not in: {message}"
    assert "\n" not in message
    return message


def config(**changes: Any) -> Edit:
    def edit(directory: Path) -> None:
        file = directory / "config.json"
        values = json.loads(file.read_text(encoding="utf-8")) | changes
        file.write_text(json.dumps(values), encoding="utf-8")

    return edit


def text(name: str, content: str) -> Edit:
    return lambda directory: (directory / name).write_text(content, encoding="utf-8")


def without(name: str) -> Edit:
    return lambda directory: (directory / name).unlink()


def cut(size: int) -> Edit:
    """Keep that many bytes of a shard; negative: all but that many."""

    def edit(directory: Path) -> None:
        data = (directory / SHARD).read_bytes()
        (directory / SHARD).write_bytes(data[:size])

    return edit


def tensors(changes: dict[str, torch.Tensor | None]) -> Edit:
    """Replace tensors in whichever shard holds them; None takes one away, from the index too."""

    def edit(directory: Path) -> None:
        index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
        for name, value in changes.items():
            file = directory / index["weight_map"][name]
            held = {key: tensor.clone() for key, tensor in load_file(file).items()}
            del held[name], index["weight_map"][name]
            if value is not None:
                held[name] = value
                index["weight_map"][name] = file.name
            save_file(held, file)
        (directory / INDEX).write_text(json.dumps(index), encoding="utf-8")

    return edit


def unlisted_shard(directory: Path) -> None:
    index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
    kept = {name: file for name, file in index["weight_map"].items() if file != SHARD}
    (directory / INDEX).write_text(json.dumps(index | {"weight_map": kept}), encoding="utf-8")


def with_value(value: float, shape: tuple[int, ...] = (48, 64)) -> torch.Tensor:
    weight = torch.zeros(shape)
    weight[3, 4] = value
    return weight


# --- the model directory -----------------------------------------------------------------------


def test_missing_directory(tmp_path: Path) -> None:
    fails(tmp_path / "absent", ModelSourceError, "absent", "neither a directory nor")


@pytest.mark.parametrize(
    ("edit", "error", "parts"),
    [
        (without("config.json"), CheckpointError, ["no config.json"]),
        (text("config.json", ""), CheckpointError, ["config.json cannot be read"]),
        (text("config.json", "[]"), CheckpointError, ["names no model_type"]),
        (text("config.json", "{}"), CheckpointError, ["names no model_type"]),
        (config(model_type=["x"]), CheckpointError, ["names no model_type"]),
        (
            config(num_hidden_layers="many"),
            CheckpointError,
            ["config.json", "num_hidden_layers", "many"],
        ),
        (config(hidden_act="swoosh"), CheckpointError, ["could not load", "swoosh"]),
        (
            config(model_type="swoosh"),
            UnsupportedModelError,
            ["'swoosh'", "transformers 5", "Update transformers", "docs/add-a-model.md"],
        ),
        (
            config(quantization_config={"quant_method": "swoosh"}),
            UnsupportedFormatError,
            ["quant_method 'swoosh'", "registered: ", "awq, ", "docs/checkpoints.md"],
        ),
        (config(quantization_config="swoosh"), UnsupportedFormatError, ["'swoosh'"]),
        (config(quantization_config={"bits": 4}), UnsupportedFormatError, ["None"]),
        (
            config(num_local_experts=4),
            CheckpointError,
            ["needs 4 experts", "8", "another checkpoint"],
        ),
        (config(num_local_experts=16), CheckpointError, ["needs 16 experts"]),
        (config(num_hidden_layers=9), CheckpointError, [r"layers\.4\.", "needs 8 experts", "none"]),
        (
            config(moe_intermediate_size=24),
            CheckpointError,
            [r"\[96, 64\] on disk", r"asks for \[48, 64\]", r"layers\.1\.mlp\.experts\.0\.up_proj"],
        ),
    ],
)
def test_config(checkpoint: Path, edit: Edit, error: type[KtError], parts: list[str]) -> None:
    edit(checkpoint)
    fails(checkpoint, error, *parts)


def test_dense_model(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 64}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).save_pretrained(tmp_path)
    fails(
        tmp_path,
        UnsupportedModelError,
        "LlamaForCausalLM has no routed experts",
        "dense model",
        r"run in plain\s+transformers, vLLM or llama.cpp",
    )


# --- the files ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "parts"),
    [
        (without(SHARD), [SHARD, "1 of 4 files", "Download the missing"]),
        (without(INDEX), ["no weights", "save_pretrained"]),
        (text(INDEX, "{"), ["not a safetensors index"]),
        (text(INDEX, "[]"), ["not a safetensors index"]),
        (text(INDEX, '{"weight_map": []}'), ["not a safetensors index"]),
        (text(INDEX, '{"weight_map": {}}'), ["names no tensors"]),
        (cut(0), [SHARD, "damaged"]),
        (cut(4), [SHARD, "damaged"]),
        (cut(8), [SHARD, "damaged"]),
        (cut(1000), [SHARD, "damaged", "the file is 1000"]),
        (cut(-1), [SHARD, "cut off", "Download it again"]),
        (text(SHARD, "nonsense"), [SHARD, "damaged"]),
        (
            lambda d: (d / SHARD).write_bytes(b"\2\0\0\0\0\0\0\0[]"),
            [SHARD, "header cannot be read"],
        ),
        (unlisted_shard, ["needs 8 experts", "A shard may be missing"]),
        (tensors({UP: None}), [r"layers\.2\.mlp\.experts", r"up_proj\.weight': 7"]),
        (
            tensors({"model.layers.2.input_layernorm.weight": None}),
            ["missing from the files", r"layers\.2\.input_layernorm"],
        ),
        (
            tensors({"model.layers.2.self_attn.q_proj.weight": torch.zeros(3, 3)}),
            ["1 weights of .* another shape", r"as model\.layers\.2\.self_attn\.q_proj\.weight\."],
        ),
        (tensors({UP: torch.zeros(24, 64)}), [r"\[72, 64\]", re.escape(UP)]),
        (tensors({UP: torch.zeros(64, 48)}), ["do not fit together", re.escape(UP)]),
        (tensors({UP: torch.zeros(48 * 64)}), ["do not fit together", re.escape(UP)]),
        (tensors({UP: with_value(float("nan"))}), ["NaN", "up projection", re.escape(UP)]),
        (tensors({UP: with_value(float("-inf"))}), ["infinity", "expert 3", re.escape(UP)]),
        (
            tensors({UP.replace("up", "down"): with_value(float("inf"), (64, 48))}),
            ["infinity", "down projection"],
        ),
    ],
)
def test_files(checkpoint: Path, edit: Edit, parts: list[str]) -> None:
    edit(checkpoint)
    fails(checkpoint, CheckpointError, *parts)


@pytest.mark.parametrize("name", ["bf16", "int4", "int4-g128-asym"])
def test_a_nan_is_found_in_every_format(checkpoint: Path, name: str) -> None:
    tensors({UP: with_value(float("nan"))})(checkpoint)
    fails(checkpoint, CheckpointError, "NaN", re.escape(UP), format=name)


def test_a_nan_in_a_bias(saved: Callable[..., Path], tmp_path: Path) -> None:
    directory: Path = shutil.copytree(saved("gpt_oss"), tmp_path / "model")
    name = "model.layers.1.mlp.experts.down_proj_bias"
    index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
    bias = load_file(directory / index["weight_map"][name])[name].clone()
    bias[5, 0] = float("nan")
    tensors({name: bias})(directory)
    fails(directory, CheckpointError, "expert 5 of", "down_bias holds a NaN", re.escape(name))


@pytest.mark.parametrize("stored", [7, 9])
def test_all_experts_in_one_tensor_but_not_the_right_number(
    saved: Callable[..., Path], tmp_path: Path, stored: int
) -> None:
    directory: Path = shutil.copytree(saved("gpt_oss"), tmp_path / "model")
    name = "model.layers.1.mlp.experts.down_proj"
    tensors({name: torch.zeros(stored, 40, 64)})(directory)
    fails(directory, CheckpointError, "needs 8 experts", rf"{re.escape(name)}': {stored}\b")


def test_experts_stored_as_integers(checkpoint: Path) -> None:
    tensors({UP: torch.zeros(48, 64, dtype=torch.int8)})(checkpoint)
    fails(checkpoint, UnsupportedFormatError, re.escape(UP), "stored as I8", "BF16, F16 and F32")


@pytest.mark.parametrize("name", ["int8", "int4-g32", "int4-g32-asym"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_scale_of_quantised_weights(name: str, value: float) -> None:
    """No checkpoint of this version holds scales; a kernel that is given them checks them."""
    generator = torch.Generator().manual_seed(0)
    parts = {
        part: FORMATS[name].quantize(torch.randn(32, 32, generator=generator))
        for part in ("gate", "up", "down")
    }
    scales = parts["down"].scales
    assert scales is not None
    spec = MoeSpec(num_experts=1, hidden_size=32, intermediate_size=32)
    registry = plugins.load()
    backend, info = registry.find_device("cpu")
    with backend.open(info.name, threads=1) as device:
        kernel = device.expert_kernel(spec, FORMATS[name].descriptor)
        kernel.load(0, ExpertWeights(**parts))
        scales[7, 0] = value
        with pytest.raises(ValueError, match="down projection of expert 0 holds a NaN or an inf"):
            kernel.load(0, ExpertWeights(**parts))
        assert isinstance(parts["down"], QuantizedTensor)
        del kernel


# --- what was asked for ------------------------------------------------------------------------


def test_unknown_format_is_named_before_anything_is_read(tmp_path: Path) -> None:
    fails(tmp_path / "absent", UnknownNameError, "format 'int3'", "int4-g32", format="int3")


def test_unknown_device(checkpoint: Path) -> None:
    fails(checkpoint, UnknownNameError, "'tpu:7'", "cpu", device="tpu:7")


def test_a_format_that_the_device_cannot_compute(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    capabilities = CpuBackend.capabilities

    def bf16_only(self: CpuBackend, device: str) -> Capabilities:
        return replace(capabilities(self, device), elements=frozenset({Element.BF16}))

    monkeypatch.setattr(CpuBackend, "capabilities", bf16_only)
    fails(
        checkpoint,
        UnsupportedFormatError,
        "'cpu' computes no experts of format 'int4'; it computes: bf16$",
        format="int4",
    )
    with load(checkpoint, format="auto", threads=1) as engine:
        assert engine.stats().format == "bf16"


def test_unknown_precision(checkpoint: Path) -> None:
    fails(checkpoint, InvalidRequestError, "'fp7'", "bf16", precision="fp7")


def test_a_precision_that_the_format_lacks(checkpoint: Path) -> None:
    options = {"format": "bf16", "precision": "int8"}
    fails(checkpoint, UnsupportedFormatError, "no int8 activations", **options)


def test_a_dtype_that_is_none(checkpoint: Path) -> None:
    fails(checkpoint, CheckpointError, "dtype", dtype="float7")


@pytest.mark.parametrize("threads", [0, -1])
def test_too_few_threads(checkpoint: Path, threads: int) -> None:
    fails(checkpoint, InvalidRequestError, f"threads must be >= 1, got {threads}", threads=threads)


def test_more_threads_than_cores_are_warned_of(
    checkpoint: Path, caplog: pytest.LogCaptureFixture, torch_threads: list[int]
) -> None:
    cores = len(hardware.detect().cpu.physical_cores)
    with caplog.at_level(logging.WARNING), load(checkpoint, threads=cores) as engine:
        assert engine.stats().threads == cores
        assert caplog.text == ""
    with caplog.at_level(logging.WARNING), load(checkpoint, threads=cores + 1) as engine:
        assert engine.stats().threads == cores + 1
    assert f"{cores + 1} threads were asked for, {cores} physical cores" in caplog.text
    assert torch_threads == [cores, cores + 1]


def test_a_failed_load_does_not_change_torch(checkpoint: Path, torch_threads: list[int]) -> None:
    tensors({UP: with_value(float("nan"))})(checkpoint)
    fails(checkpoint, CheckpointError)
    assert torch_threads == []


def test_unknown_isa(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KT_FORCE_ISA", "neon9")
    fails(checkpoint, BackendUnavailableError, "KT_FORCE_ISA=neon9", "avx2", device="cpu")
    fails(checkpoint, BackendUnavailableError, "KT_FORCE_ISA=neon9", device="auto")


def test_absent_isa(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = [name for name, is_supported in _kernels.isas() if not is_supported]
    if not absent:

        def select_isa(name: str) -> str:
            msg = f"this CPU lacks {name}"
            raise RuntimeError(msg)

        monkeypatch.setattr(_kernels, "select_isa", select_isa)
        absent = ["avx512"]
    monkeypatch.setenv("KT_FORCE_ISA", absent[0])
    fails(checkpoint, BackendUnavailableError, f"KT_FORCE_ISA={absent[0]}", device="cpu")


def test_forced_isa_is_used(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KT_FORCE_ISA", "scalar")
    with load(checkpoint, threads=1) as engine:
        assert engine.stats().isa == "scalar"


# --- memory ------------------------------------------------------------------------------------


def needed_bytes(directory: Path, name: str) -> int:
    with load(directory, format=name, threads=1) as engine:
        stats = engine.stats()
    return stats.expert_bytes + stats.dense_bytes + fitting.RESERVE_BYTES


def test_not_enough_memory(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, reserved: list[Any]
) -> None:
    needed = needed_bytes(checkpoint, "int8")
    reserved.clear()
    monkeypatch.setattr(hardware, "available_memory_bytes", lambda: needed)
    load(checkpoint).close()
    assert len(reserved) > 0
    reserved.clear()

    monkeypatch.setattr(hardware, "available_memory_bytes", lambda: needed - 1)
    message = fails(checkpoint, NotEnoughMemoryError, "smaller format")

    assert reserved == []  # refused before any memory was taken
    assert f"needs {needed / 1e9:.2f} GB as int8" in message
    assert f"{(needed - 1) / 1e9:.2f} GB are available" in message


def test_auto_takes_the_best_format_that_fits(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = {name: needed_bytes(checkpoint, name) for name in ("bf16", "int8", "int4-g32")}
    assert sorted(needed, key=needed.__getitem__, reverse=True) == list(needed)
    available = {
        needed["bf16"]: "bf16",
        needed["bf16"] - 1: "int8",
        needed["int8"]: "int8",
        needed["int8"] - 1: "int4-g32",
        needed["int4-g32"]: "int4-g32",
    }
    for size, name in available.items():
        monkeypatch.setattr(hardware, "available_memory_bytes", lambda size=size: size)
        with load(checkpoint, format="auto", threads=1) as engine:
            assert engine.stats().format == name
    monkeypatch.setattr(hardware, "available_memory_bytes", lambda: needed["int4-g32"] - 1)
    fails(checkpoint, NotEnoughMemoryError, "as bf16, .* as int8, .* as int4-g32", format="auto")


# --- tokenizer ---------------------------------------------------------------------------------


def test_without_tokenizer_the_model_still_works(checkpoint: Path) -> None:
    with load(checkpoint, threads=1) as engine:
        assert engine.tokenizer is None
        for ask in (engine.generate, engine.stream, engine.encode):
            with pytest.raises(TokenizerError, match=r"has no tokenizer \(tokenizer.json"):
                ask("hello")
        assert engine.model(input_ids=torch.tensor([[5, 6]])).logits.shape == (1, 2, 256)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "{}"),
        ("tokenizer_config.json", "{"),
        (
            "tokenizer_config.json",
            '{"auto_map": {"AutoTokenizer": ["tokenization_x.X", null]}, "tokenizer_class": "X"}',
        ),
    ],
)
def test_broken_tokenizer_is_found_before_the_weights_are_read(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str
) -> None:
    def forbidden(*args: object) -> None:
        msg = f"the tokenizer comes first, and asks nobody: {args}"
        raise AssertionError(msg)

    monkeypatch.setattr("kt_core.engine.engine.load_model", forbidden)
    monkeypatch.setattr("builtins.input", forbidden)
    (checkpoint / name).write_text(content, encoding="utf-8")
    fails(checkpoint, TokenizerError, "the tokenizer in", "cannot be loaded", "Download its files")


# --- interrupted -------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["dense weights", "experts"])
def test_ctrl_c_while_loading(checkpoint: Path, stage: str, reserved: list[Any]) -> None:
    def interrupt(now: str, fraction: float | None) -> None:
        del fraction
        if now == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(checkpoint, progress=interrupt)
    assert bool(reserved) == (stage == "experts")
    load(checkpoint, threads=1).close()  # a second try starts afresh


def test_ctrl_c_starts_no_more_experts(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []

    def slow(loaded: Any, expert: int) -> None:
        started.append(expert)
        time.sleep(0.05)
        del loaded

    def interrupt(stage: str, fraction: float | None) -> None:
        if stage == "experts":
            assert fraction is not None
            assert fraction < 1
            raise KeyboardInterrupt

    monkeypatch.setattr(loading.LoadedSite, "load", slow)
    with pytest.raises(KeyboardInterrupt):
        load(checkpoint, progress=interrupt)
    assert 0 < len(started) < 3 * 8


def test_progress_reaches_the_end(checkpoint: Path) -> None:
    seen: list[tuple[str, float | None]] = []
    load(checkpoint, threads=1, progress=lambda *step: seen.append(step)).close()
    fractions = [fraction for stage, fraction in seen if stage == "experts"]
    assert seen[0] == ("dense weights", None)
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1


# --- afterwards --------------------------------------------------------------------------------


def test_closing_frees_experts_and_threads_at_once(checkpoint: Path, reserved: list[Any]) -> None:
    """While the engine itself is still held, and without the garbage collector's help."""
    before = native_threads()
    gc.collect()
    gc.disable()
    try:
        engine = load(checkpoint, threads=3)
        engine.model(input_ids=torch.tensor([[5, 6]]))
        assert len(native_threads() - before) >= 2
        engine.close()
        assert [ref() for ref in reserved if ref() is not None] == []
    finally:
        gc.enable()
    assert new_threads(before) == set()
    engine.close()  # twice does nothing
