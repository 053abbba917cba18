"""`kt quant`, end to end: what is written runs as what was loaded; kills, full disks, bad input."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file

import kt_core
from kt_core import hardware, plugins
from kt_core.engine import quantize as module
from kt_core.engine.packed_cache import cached_models, remove_cached
from kt_core.engine.quantize import open_finished, quantize, unfinished
from kt_core.engine.quantize_expert import Method
from kt_core.engine.quantize_plan import plan_quantization
from kt_core.engine.quantize_report import QuantReport
from kt_core.errors import (
    CheckpointError,
    InvalidRequestError,
    KtError,
    NotEnoughDiskError,
    NotEnoughMemoryError,
    UnknownNameError,
    UnsupportedFormatError,
)
from kt_core.interfaces import Progress, no_progress
from kt_core.packed.codec import unpack
from kt_core.plan import fitting
from kt_core.quant.reference import dequantize

Saved = Callable[..., Path]
FAMILIES = ("qwen3_moe", "gpt_oss", "llama4", "deepseek_v3", "mixtral", "kimi_k25")


@pytest.fixture(scope="module")
def registry() -> plugins.Registry:
    return plugins.load()


def pack(
    source: Path,
    target: Path,
    registry: plugins.Registry,
    *,
    form: str = "int4",
    method: Method = Method.RTN,
    progress: Progress = no_progress,
    threads: int = 2,
    **options: Any,
) -> QuantReport:
    plan = plan_quantization(source, registry, weight_format=form, method=method, **options)
    return quantize(plan, target, method=method, threads=threads, progress=progress)


def logits(directory: Path, form: str = "auto", **options: Any) -> torch.Tensor:
    with kt_core.load(directory, format=form, threads=2, **options) as engine:
        ids = tiny.sample_input_ids(engine.model.config)
        with torch.inference_mode():
            result: torch.Tensor = engine.model(input_ids=ids).logits
        return result


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}


# ---------------------------------------------------------------- what is written


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["int4", "nvfp4", "bf16"])
def test_runs_as_what_was_loaded(
    family: str, form: str, saved: Saved, tmp_path: Path, registry: plugins.Registry
) -> None:
    """Bit for bit: fused, transposed, with biases, with shared experts, in a composite model."""
    source = saved(family)
    report = pack(source, tmp_path / "packed", registry, form=form)
    assert report.resumed_files == 0
    assert torch.equal(logits(tmp_path / "packed"), logits(source, form))
    assert not unfinished(tmp_path / "packed").exists()


def test_the_directory_is_a_normal_one(
    saved: Saved, tmp_path: Path, registry: plugins.Registry
) -> None:
    source = saved("qwen3_moe")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    target = tmp_path / "packed"
    pack(source, target, registry)
    assert (target / "chat_template.jinja").read_bytes() == b"{{ messages }}"
    config = json.loads((target / "config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] == "kt"
    assert config == json.loads((source / "config.json").read_text())
    index = json.loads((target / "model.safetensors.index.json").read_text())["weight_map"]
    found = {name: file.name for file in target.glob("*.safetensors") for name in load_file(file)}
    assert index == found
    original: dict[str, torch.Tensor] = {}
    for file in source.glob("*.safetensors"):
        original |= load_file(file)
    for name, tensor in load_file(target / "dense-00001-of-00001.safetensors").items():
        assert tensor.dtype is original[name].dtype
        assert torch.equal(tensor, original.pop(name))
    assert all(".mlp.experts." in name for name in original)
    with pytest.raises(CheckpointError, match="packed by kt, which transformers cannot read alone"):
        transformers.AutoModelForCausalLM.from_pretrained(target)


def test_experts_are_used_in_the_file(
    saved: Saved, tmp_path: Path, registry: plugins.Registry
) -> None:
    pack(saved("qwen3_moe"), tmp_path / "packed", registry)
    with kt_core.load(tmp_path / "packed", threads=2) as engine:
        (loaded, *_) = engine._loader.sites
        assert loaded.mapped is not None
        for expert in range(loaded.site.spec.num_experts):
            place = loaded.mapped.expert(expert).data_ptr()
            assert loaded.kernel.packed(expert).data_ptr() == place


def test_the_report_is_true(saved: Saved, tmp_path: Path, registry: plugins.Registry) -> None:
    """Errors and bits, taken from the files again; and the search errs less."""
    source = saved("qwen3_moe")
    reports = {m: pack(source, tmp_path / m, registry, method=m) for m in Method}
    directory, checkpoint = open_finished(tmp_path / "search")
    report = reports[Method.SEARCH].layers[0]
    plan = plan_quantization(source, registry, weight_format="int4", method="search").layers[0]
    experts = directory.experts(report.name, checkpoint)
    error = square = 0.0
    for index in range(plan.site.spec.num_experts):
        rows = {name: tensors.read(index) for name, tensors in plan.tensors.items()}
        want = plan.site.expert_weights(rows)
        got = unpack(experts.expert(index), plan.site.spec, plan.weight_format.descriptor)
        for name in ("gate", "up", "down"):
            exact: Any = getattr(want, name).double()
            error += float((dequantize(getattr(got, name)).double() - exact).square().sum())
            square += float(exact.square().sum())
    assert report.relative_error == pytest.approx((error / square) ** 0.5, rel=1e-4)
    bits = 8 * plan.layer.bytes_per_expert / plan.site.spec.weights_per_expert
    assert report.bits_per_weight == bits
    for searched, nearest in zip(
        reports[Method.SEARCH].layers, reports[Method.RTN].layers, strict=True
    ):
        assert searched.relative_error < 0.95 * nearest.relative_error


def test_layers_of_different_formats(
    saved: Saved, tmp_path: Path, registry: plugins.Registry
) -> None:
    source = saved("qwen3_moe")
    overrides = {"*.layers.1.*": "bf16", "*.layers.[12].*": "int8"}
    report = pack(source, tmp_path / "packed", registry, overrides=overrides)
    assert [layer.format for layer in report.layers] == ["bf16", "int8", "int4-g32"]
    with kt_core.load(tmp_path / "packed", threads=1) as engine:
        formats = [site.kernel.weight_format.name for site in engine._loader.sites]
    assert formats == ["bf16", "int8", "int4-g32"]
    with pytest.raises(InvalidRequestError, match=r"override '\*.layer.9' matches no experts"):
        plan_quantization(
            source, registry, weight_format="int4", method="rtn", overrides={"*.layer.9": "int8"}
        )


def test_a_format_that_is_asked_for(
    saved: Saved, tmp_path: Path, registry: plugins.Registry
) -> None:
    pack(saved("qwen3_moe"), tmp_path / "packed", registry)
    kt_core.load(tmp_path / "packed", format="int4", threads=1).close()
    with pytest.raises(UnsupportedFormatError, match="is packed as int4-g32, not int8: leave"):
        kt_core.load(tmp_path / "packed", format="int8", threads=1)
    with pytest.raises(UnsupportedFormatError, match="packed by kt already"):
        pack(tmp_path / "packed", tmp_path / "again", registry)


@pytest.mark.parametrize(
    "changes",
    [
        {"moe_intermediate_size": 47},
        {"hidden_size": 63},
        {"num_local_experts": 7},
    ],
)
def test_a_config_of_another_model(
    changes: dict[str, int], saved: Saved, tmp_path: Path, registry: plugins.Registry
) -> None:
    target = tmp_path / "packed"
    pack(saved("qwen3_moe"), target, registry)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(CheckpointError, match="its packed files have others"):
        kt_core.load(target, threads=1)


# ---------------------------------------------------------------- dense layers


@pytest.mark.parametrize("family", [*FAMILIES, "cohere2_moe", "jamba"])
@pytest.mark.parametrize("form", ["int8", "nvfp4"])
def test_dense_layers_run_as_what_was_loaded(
    family: str, form: str, saved: Saved, tmp_path: Path, registry: plugins.Registry
) -> None:
    """Bit for bit, without a flag; the same layers, so none that the model reads itself."""
    source, target = saved(family), tmp_path / "packed"
    report = pack(source, target, registry, dense_format=form)
    assert torch.equal(logits(target), logits(source, "int4", dense_format=form))
    with kt_core.load(source, format="int4", dense_format=form, threads=1) as engine:
        want = engine.stats()
    with kt_core.load(target, threads=1) as engine:
        got = engine.stats()
    assert (got.dense_format, got.dense_layers) == (want.dense_format, want.dense_layers)
    assert got.dense_bytes == want.dense_bytes
    assert {layer.format for layer in report.dense_layers} == {form}
    assert all(0 < layer.relative_error < 0.2 for layer in report.dense_layers)


def test_packed_dense_tensors_are_nowhere_else(
    saved: Saved, tmp_path: Path, registry: plugins.Registry
) -> None:
    """And an embedding that a packed head is tied to stays."""
    target = tmp_path / "packed"
    pack(saved("cohere2_moe"), target, registry, dense_format="int8")
    config = json.loads((target / "config.json").read_text())["quantization_config"]
    assert config["version"] == 2
    assert "lm_head" in config["dense"]
    left = load_file(target / "dense-00001-of-00001.safetensors")
    assert "model.embed_tokens.weight" in left
    assert not [name for name in left if name.rpartition(".")[0] in config["dense"]]
    index = json.loads((target / "model.safetensors.index.json").read_text())["weight_map"]
    found = {name: file.name for file in target.glob("*.safetensors") for name in load_file(file)}
    assert index == found
    pack(saved("cohere2_moe"), tmp_path / "other", registry)
    config = json.loads((tmp_path / "other" / "config.json").read_text())["quantization_config"]
    assert config["version"] == 1  # an older kt may read it


def test_dense_overrides(saved: Saved, tmp_path: Path, registry: plugins.Registry) -> None:
    source, target = saved("qwen3_moe"), tmp_path / "packed"
    overrides = {"lm_head": "none", "*.layers.0.*": "bf16", "*.o_proj": "int4"}
    report = pack(source, target, registry, dense_format="int8", overrides=overrides)
    found = {layer.name: layer.format for layer in report.dense_layers}
    assert "lm_head" not in found
    assert found["model.layers.0.self_attn.o_proj"] == "bf16"
    assert found["model.layers.1.self_attn.o_proj"] == "int4-g32"
    assert found["model.layers.1.self_attn.q_proj"] == "int8"
    assert [layer.format for layer in report.layers] == ["int4-g32"] * 3
    with kt_core.load(target, threads=1) as engine:
        assert engine.stats().dense_format == "bf16+int4-g32+int8"
        assert type(engine.model.lm_head) is torch.nn.Linear
        kernel = engine.model.model.layers[1].self_attn.q_proj.kernel
        assert kernel.weight_format.name == "int8"


def test_a_damaged_dense_layer_is_found(
    saved: Saved, tmp_path: Path, registry: plugins.Registry
) -> None:
    target = tmp_path / "packed"
    pack(saved("qwen3_moe"), target, registry, dense_format="int8")
    file = target / "packed-dense-00001-of-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    directory, checkpoint = open_finished(target)
    assert directory.verify(checkpoint, threads=1, progress=lambda _: None) == [
        f"{file.name} was changed"
    ]
    file.unlink()
    with pytest.raises(CheckpointError, match=r"packed-dense-00001.*is missing"):
        kt_core.load(target, threads=1)


def test_what_packed_dense_layers_cannot_do(
    saved: Saved, tmp_path: Path, registry: plugins.Registry
) -> None:
    target = tmp_path / "packed"
    pack(saved("qwen3_moe"), target, registry, dense_format="int8")
    kt_core.load(target, dense_format="int8", threads=1).close()
    with pytest.raises(UnsupportedFormatError, match="are packed as int8, not int4-g32: leave"):
        kt_core.load(target, dense_format="int4", threads=1)
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"]["dense"]["lm_head"]["in_features"] += 1
    (target / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="packed dense layer lm_head of LinearSpec"):
        kt_core.load(target, threads=1)


def test_a_dense_part_that_does_not_fit(
    saved: Saved, tmp_path: Path, registry: plugins.Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts need no room, being mapped; everything else does. Refused before it is read."""
    target = tmp_path / "packed"
    pack(saved("qwen3_moe"), target, registry)
    with kt_core.load(target, threads=1) as engine:
        needed = engine.stats().dense_bytes + fitting.RESERVE_BYTES
    monkeypatch.setattr(hardware, "available_memory_bytes", lambda: needed)
    kt_core.load(target, threads=1).close()
    monkeypatch.setattr(hardware, "available_memory_bytes", lambda: needed - 1)
    with pytest.raises(NotEnoughMemoryError, match="its experts stay in their files"):
        kt_core.load(target, threads=1)


def test_killed_between_dense_layers(
    saved: Saved, tmp_path: Path, registry: plugins.Registry
) -> None:
    source, target = saved("qwen3_moe"), tmp_path / "packed"
    pack(source, tmp_path / "whole", registry, dense_format="int8")

    def stop(stage: str, fraction: float | None) -> None:
        if stage == "quantising dense layers" and fraction is not None and fraction > 0.4:
            raise Killed

    with pytest.raises(Killed):
        pack(source, target, registry, dense_format="int8", progress=stop)
    report = pack(source, target, registry, dense_format="int8")
    assert report.resumed_files == 1  # what was copied
    assert contents(target) == contents(tmp_path / "whole")


# ---------------------------------------------------------------- killed, and other accidents


class Killed(BaseException):
    """In place of a signal, where only the files count."""


def stop_at(part: float) -> Progress:
    def progress(stage: str, fraction: float | None) -> None:
        if stage == "quantising experts" and fraction is not None and fraction >= part:
            raise Killed

    return progress


@pytest.mark.parametrize("part", [0.0, 0.4, 0.7, 1.0])
def test_goes_on_where_it_was(
    part: float, saved: Saved, tmp_path: Path, registry: plugins.Registry
) -> None:
    source, target = saved("qwen3_moe"), tmp_path / "packed"
    pack(source, tmp_path / "whole", registry)
    with pytest.raises(Killed):
        pack(source, target, registry, progress=stop_at(part))
    assert not target.exists()
    with pytest.raises(KtError):  # nobody takes it for a model
        kt_core.load(unfinished(target), threads=1)
    kept = {f: f.stat().st_mtime_ns for f in unfinished(target).glob("*.safetensors")}
    report = pack(source, target, registry)
    assert report.resumed_files == len(kept)
    for file, changed in kept.items():
        assert (target / file.name).stat().st_mtime_ns == changed, f"{file.name} was made again"
    assert contents(target) == contents(tmp_path / "whole")


@pytest.mark.parametrize("delay_s", [0.0, 0.05, 0.15, 0.3])
def test_kill_9(delay_s: float, saved: Saved, tmp_path: Path, registry: plugins.Registry) -> None:
    """A signal at any time, by the clock: a real process, real leftovers; then equal hashes."""
    source, target = saved("qwen3_moe"), tmp_path / "packed"
    same = {"method": Method.SEARCH, "dense_format": "int8"}
    pack(source, tmp_path / "whole", registry, **same)  # type: ignore[arg-type]
    options = ("--format", "int4", "--dense-format", "int8", "--threads", "1")
    command = ["quant", str(source), str(target), *options]
    process = subprocess.Popen(
        [sys.executable, "-m", "kt_core.cli", *command], stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not any(unfinished(target).glob("kt-quant-state.json")):
        time.sleep(0.005)
    time.sleep(delay_s)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert target.exists() == (not unfinished(target).exists())
    if not target.exists():
        pack(source, target, registry, **same)  # type: ignore[arg-type]
    assert contents(target) == contents(tmp_path / "whole")


def test_a_file_that_was_damaged_meanwhile(
    saved: Saved, tmp_path: Path, registry: plugins.Registry
) -> None:
    """Of another size: made again. With a flipped bit: found when it is read back."""
    source, target = saved("qwen3_moe"), tmp_path / "packed"
    with pytest.raises(Killed):
        pack(source, target, registry, progress=stop_at(1.0))
    first, second, *_ = sorted(unfinished(target).glob("experts-*.safetensors"))
    first.write_bytes(first.read_bytes()[:-1])
    pack_progress: list[str] = []
    content = bytearray(second.read_bytes())
    content[5000] ^= 1
    second.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"reads back otherwise: expert 0 of .*layers\.2"):
        pack(source, target, registry, progress=lambda stage, _: pack_progress.append(stage))
    assert not target.exists()
    assert "reading it back" in pack_progress


def test_another_job_in_the_same_place(
    saved: Saved, tmp_path: Path, registry: plugins.Registry
) -> None:
    source, target = tmp_path / "source", tmp_path / "packed"
    shutil.copytree(saved("qwen3_moe"), source)
    with pytest.raises(Killed):
        pack(source, target, registry, progress=stop_at(0.4))
    for options in ({"form": "int8"}, {"method": Method.SEARCH}):
        with pytest.raises(InvalidRequestError, match="from another source or with other options"):
            pack(source, target, registry, **options)  # type: ignore[arg-type]
    file = sorted(source.glob("*.safetensors"))[0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(InvalidRequestError, match="from another source or with other options"):
        pack(source, target, registry)


def test_two_at_once(saved: Saved, tmp_path: Path, registry: plugins.Registry) -> None:
    source, target = saved("qwen3_moe"), tmp_path / "packed"

    def second(stage: str, fraction: float | None) -> None:
        del stage, fraction
        with pytest.raises(InvalidRequestError, match="another kt quant works on"):
            pack(source, target, registry)

    pack(source, target, registry, progress=second)


def test_never_over_anything(saved: Saved, tmp_path: Path, registry: plugins.Registry) -> None:
    target = tmp_path / "packed"
    target.mkdir()
    pack(saved("qwen3_moe"), target, registry)  # an empty folder is nothing
    before = contents(target)
    with pytest.raises(InvalidRequestError, match="exists already"):
        pack(saved("qwen3_moe"), target, registry)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InvalidRequestError, match="exists already"):
        pack(saved("qwen3_moe"), tmp_path / "file", registry)
    assert contents(target) == before


def test_too_little_room(
    saved: Saved, tmp_path: Path, registry: plugins.Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil._ntuple_diskusage(1 << 30, 1 << 30, 1000)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(NotEnoughDiskError, match=r"has room for 0\.00 GB, .* are needed"):
        pack(saved("qwen3_moe"), tmp_path / "packed", registry)
    assert not list(unfinished(tmp_path / "packed").glob("*.safetensors"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 700 KiB; needs the right to mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(folder)],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_full_after_all(
    small_disk: Path, saved: Saved, tmp_path: Path, registry: plugins.Registry,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Somebody else filled it meanwhile; with room again it goes on."""
    source, target = saved("qwen3_moe"), small_disk / "packed"
    monkeypatch.setattr(module, "check_room", lambda *_: None)
    with pytest.raises(NotEnoughDiskError, match=r"is full\. Make room and run the same"):
        pack(source, target, registry, form="bf16")
    written = list(unfinished(target).glob("*.safetensors"))
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    report = pack(source, target, registry, form="bf16")
    assert report.resumed_files == len(written) > 0
    pack(source, tmp_path / "whole", registry, form="bf16")
    assert contents(target) == contents(tmp_path / "whole")


def test_another_error_of_the_disk_is_not_called_full(
    saved: Saved, tmp_path: Path, registry: plugins.Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(module, "write_layer", fail)
    with pytest.raises(OSError, match="Input/output error"):
        pack(saved("qwen3_moe"), tmp_path / "packed", registry)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_to(
    saved: Saved, tmp_path: Path, registry: plugins.Registry
) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        pack(saved("qwen3_moe"), tmp_path / "packed", registry)


def test_bad_weights_end_it(saved: Saved, tmp_path: Path, registry: plugins.Registry) -> None:
    from safetensors.torch import save_file

    source = tmp_path / "source"
    shutil.copytree(saved("qwen3_moe"), source)
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    for file in source.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name][0, 0] = float("nan")
            save_file(tensors, file)
    for method in Method:
        with pytest.raises(CheckpointError, match=rf"expert 3 of .*layers\.2.* NaN.*{name}"):
            pack(source, tmp_path / method, registry, method=method)
        assert not (tmp_path / method).exists()


# ---------------------------------------------------------------- the cache


@pytest.fixture
def source(saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    copy = tmp_path / "tiny-model"
    shutil.copytree(saved("qwen3_moe"), copy)
    return copy


def stages(source: Path, **options: Any) -> list[str]:
    seen: list[str] = []
    settings = {"format": "int4", "threads": 1, "cache": True} | options
    kt_core.load(source, progress=lambda stage, _: seen.append(stage), **settings).close()
    return seen


def test_the_second_start_packs_nothing(source: Path) -> None:
    assert "quantising experts" in stages(source)
    assert "quantising experts" not in stages(source)
    (model,) = cached_models()
    assert model.name.startswith("tiny-model-int4-")
    assert torch.equal(logits(model.path), logits(source, "int4"))
    assert "quantising experts" in stages(source, format="int8")
    assert len(list(cached_models())) == 2


def test_another_content_is_another_model(source: Path) -> None:
    stages(source)
    file = sorted(source.glob("*.safetensors"))[0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "quantising experts" in stages(source)
    assert len(list(cached_models())) == 2


def test_a_cache_that_was_interrupted(source: Path) -> None:
    with pytest.raises(Killed):
        kt_core.load(source, format="int4", threads=1, cache=True, progress=stop_at(0.5))
    (left,) = cached_models()
    assert not left.is_finished
    assert "quantising experts" in stages(source)
    (model,) = cached_models()
    assert model.is_finished


def test_clearing_the_cache(source: Path) -> None:
    stages(source)
    stages(source, format="int8")
    first, second = cached_models()
    with pytest.raises(UnknownNameError, match="'nothing' is not in the cache"):
        remove_cached([first.name, "nothing"])
    assert remove_cached([first.name]) == [first]
    assert list(cached_models()) == [second]
    remove_cached([])
    assert list(cached_models()) == []


def test_the_cache_must_know_the_format(source: Path) -> None:
    with pytest.raises(InvalidRequestError, match="a cache needs to know what the experts become"):
        stages(source, format="auto")
