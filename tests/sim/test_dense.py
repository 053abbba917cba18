"""Packed dense layers on an accelerator that computes them: they stay packed.

The model to compare with is transformers' own with the weights that the packed ones stand for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import kt_core
from kt_core.cli.main import run_cli
from kt_core.dense.packed_linear import PackedLinear
from kt_core.engine import Engine
from kt_core.engine.outline import outline_model
from kt_core.errors import NotEnoughMemoryError, UnsupportedFormatError
from kt_core.plugins import Registry
from sim import target
from sim.dense_models import (
    COMBINATIONS,
    FORMATS,
    Pack,
    dequantised,
    difference,
    formats_of,
    load,
    pack,
    registry,
    write,
)
from sim.stories import STORIES, TOLERANCE, kept
from sim.target import NAME, WHERE

pytestmark = pytest.mark.sim
__all__ = ["kept", "pack", "registry"]


def packed_layers(engine: Engine) -> dict[str, PackedLinear]:
    modules = engine.model.named_modules(remove_duplicate=False)
    return {name: module for name, module in modules if isinstance(module, PackedLinear)}


def logits(engine: Engine, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return engine.model(input_ids=ids.to(WHERE)).logits.cpu()


@pytest.mark.parametrize(("family", "dense_format"), COMBINATIONS)
def test_logits_are_those_of_the_dequantised_layers(
    family: str, dense_format: str, pack: Pack, registry: Registry
) -> None:
    """In float32, where only the order of sums differs; packed on disk, or while it is loaded."""
    directory = pack(family, dense_format)
    source = directory.with_name("source")
    truth = dequantised(tiny.load_reference(source), formats_of(directory))
    ids = tiny.sample_input_ids(truth.config)
    want = tiny.logits(truth, ids)
    name = registry.formats.get(dense_format).descriptor.name
    found = []
    for model, options in ((directory, {}), (source, {"dense_format": dense_format})):
        with load(model, hot_experts="50%", format="bf16", **options) as engine:
            assert engine.stats().dense_format == name
            assert difference(logits(engine, ids), want) <= TOLERANCE
            found.append({n: m.kernel.packed().cpu() for n, m in packed_layers(engine).items()})
    assert found[0].keys() == found[1].keys() >= formats_of(directory).keys()
    assert all(torch.equal(found[0][layer], found[1][layer]) for layer in found[0])


def test_layers_of_several_formats(pack: Pack, tmp_path: Path, registry: Registry) -> None:
    source = pack("qwen3_moe", "int8").with_name("source")
    overrides = {"lm_head": "none", "*.layers.0.*": "nvfp4", "*.o_proj": "int4-g64-asym"}
    directory = write(source, tmp_path / "packed", registry, "int8", overrides=overrides)
    formats = formats_of(directory)
    truth = dequantised(tiny.load_reference(source), formats)
    ids = tiny.sample_input_ids(truth.config)
    with load(directory) as engine:
        kinds = {n: m.kernel.weight_format.name for n, m in packed_layers(engine).items()}
        assert kinds == formats
        assert difference(logits(engine, ids), tiny.logits(truth, ids)) <= TOLERANCE


@pytest.mark.parametrize("graph", [True, False])
def test_greedy_tokens_are_those_of_the_host(graph: bool, kept: None) -> None:
    del kept
    options: dict[str, Any] = {"format": "bf16", "dense_format": "int8", "dtype": torch.float32}
    options |= {"threads": 1, "precision": "float32"}
    asked: dict[str, Any] = {"temperature": 0, "max_new_tokens": 24, "raw": True}
    prompt = "Once upon a time there was"
    with kt_core.load(STORIES, device="cpu", **options) as engine:
        want = engine.generate(prompt, **asked).token_ids
    with kt_core.load(STORIES, device=NAME, hot_experts="50%", graph=graph, **options) as engine:
        assert engine.generate(prompt, **asked).token_ids == want
        stats = engine.stats()
    assert stats.dense_format == "int8"
    assert (stats.decode.from_graphs > 0) == graph
    assert stats.accelerators is not None
    assert stats.accelerators.tokens == 5 + len(want)  # and not what was tried out


def test_weights_say_where_they_would_be(pack: Pack) -> None:
    with load(pack("qwen3_moe", "int8")) as engine:
        for layer in packed_layers(engine).values():
            assert layer.weight.device == torch.device(WHERE)
            assert layer.kernel.packed().device == torch.device(WHERE)


@pytest.mark.parametrize("family", ["cohere2_moe", "qwen3_moe"])
def test_room_is_made_for_the_packed_layers(family: str, pack: Pack, registry: Registry) -> None:
    """Counted to the byte, packed on disk or while it is loaded; refused before it loads."""
    directory = pack(family, "int8")
    source = outline_model(directory.with_name("source"), registry)
    int8 = FORMATS["int8"].descriptor
    with load(directory) as engine:
        assert engine.stats().dense_bytes == source.total_dense_bytes(int8)
    with load(directory.with_name("source"), dense_format="int8") as engine:
        assert engine.stats().dense_bytes == source.total_dense_bytes(int8)
    with pytest.raises(NotEnoughMemoryError, match=r"pack it \(--dense-format int8\)"):
        load(directory.with_name("source"), accelerator_memory=source.total_dense_bytes())


def test_another_format_than_the_packed_one_is_refused(pack: Pack) -> None:
    with pytest.raises(UnsupportedFormatError, match="packed as int8, not int4"):
        load(pack("qwen3_moe", "int8"), dense_format="int4")


def test_the_plan_says_what_is_loaded(
    tmp_path: Path, registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = write(STORIES, tmp_path / "packed", registry, "int8")
    machine = ["--ram", "8GiB", "--bandwidth", "50GB/s", "--cores", "4", "--vram", "4GiB"]
    for model, options in ((directory, []), (STORIES, ["--dense-format", "int8"])):
        assert run_cli(["plan", str(model), *machine, *options, "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        chosen = {"dense_format": options[1]} if options else {}
        with load(model, **chosen) as engine:
            stats = engine.stats()
        assert report["dense_format"] == stats.dense_format == "int8"
        assert report["bytes_by_tier"]["accelerator"]["dense_weights"] == stats.dense_bytes


@target.only_sim
def test_a_second_accelerator_holds_no_dense_layer(pack: Pack) -> None:
    with load(pack("qwen3_moe", "int8"), device="sim:0,1", hot_experts="100%") as engine:
        assert {m.kernel.packed().device.index for m in packed_layers(engine).values()} == {0}
        tokens = list(engine.stream_tokens([1, 2, 3], temperature=0, max_new_tokens=4))
    assert len(tokens) == 4
