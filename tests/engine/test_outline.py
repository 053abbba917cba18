"""What is concluded on the meta device is what a loaded model takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import kt_core
import kt_models
from engine.conftest import SaveTiny
from kt_core import plugins
from kt_core.dense.packed_linear import PackedLinear
from kt_core.engine.model_files import config_from_dict, model_class, parse_config
from kt_core.engine.outline import find_config, outline_model
from kt_core.errors import CheckpointError, ModelSourceError, UnsupportedModelError
from kt_core.plan.fitting import packed_bytes
from kt_core.plugins import Registry

# Attention of every kind: grouped, latent, latent with an indexer, linear, in windows, in chunks.
FAMILIES = ("qwen3_moe", "deepseek_v3", "glm_moe_dsa", "qwen3_next", "gpt_oss", "llama4")
RELEASED = Path(kt_models.__file__).parent / "released.json"


@pytest.fixture(scope="module")
def registry() -> Registry:
    return plugins.load()


def cache_bytes(cache: Any) -> int:
    """Bytes that the cache of a real model holds, found in another way than the outline's."""
    names = ("keys", "values", "indexer_keys", "conv_states", "recurrent_states",
             "_sliding_window_tensor")  # fmt: skip
    found: list[torch.Tensor] = []
    for layer in cache.layers:
        for name in names:
            value = getattr(layer, name, None)
            values = value.values() if isinstance(value, dict) else [value]
            found += [tensor for tensor in values if isinstance(tensor, torch.Tensor)]
    return sum(tensor.nbytes for tensor in found)


@pytest.mark.parametrize("family", FAMILIES)
def test_outline_is_what_a_loaded_model_takes(
    family: str, saved: SaveTiny, registry: Registry
) -> None:
    directory = saved(family)
    outline = outline_model(directory, registry)
    with kt_core.load(directory, format="bf16", registry=registry) as engine:
        stats = engine.stats()
        device = engine._device
        bf16 = registry.formats.get("bf16").descriptor
        specs = [layer.spec for layer in outline.expert_layers]
        assert packed_bytes(specs, bf16, device.expert_bytes) == stats.expert_bytes
        assert outline.total_dense_bytes() == stats.dense_bytes
        assert len(outline.expert_layers) == stats.expert_layers
        for tokens in (3, 40):
            ids = torch.ones((1, tokens), dtype=torch.int64)
            with torch.no_grad():
                cache = engine.model(input_ids=ids, use_cache=True).past_key_values
            assert outline.cache_bytes(tokens) == cache_bytes(cache)


@pytest.mark.parametrize("dense_format", ["bf16", "int4"])
@pytest.mark.parametrize("family", [*FAMILIES, "cohere2_moe", "kimi_k25"])
def test_packed_dense_layers_are_what_a_loaded_model_takes(
    family: str, dense_format: str, saved: SaveTiny, registry: Registry
) -> None:
    outline = outline_model(saved(family), registry)
    with kt_core.load(saved(family), dense_format=dense_format, registry=registry) as engine:
        stats = engine.stats()
        packed = {id(m): m for m in engine.model.modules() if isinstance(m, PackedLinear)}
    weight_format = registry.formats.get(dense_format).descriptor
    assert outline.total_dense_bytes(weight_format) == stats.dense_bytes
    sizes = [layer.kernel.size_bytes for layer in packed.values()]
    assert outline.packed_dense_bytes(weight_format) == sum(sizes)


@pytest.mark.parametrize(("family", "top_k"), [("qwen3_moe", 2), ("llama4", 2)])
def test_experts_of_a_token(family: str, top_k: int, saved: SaveTiny, registry: Registry) -> None:
    outline = outline_model(saved(family), registry)
    assert {layer.top_k for layer in outline.expert_layers} == {top_k}
    assert outline.decode.threaded_calls > 0
    assert outline.decode.token_flops > 0


def test_embeddings_are_not_read_for_a_token(saved: SaveTiny, registry: Registry) -> None:
    outline = outline_model(saved("qwen3_moe"), registry)
    rest = outline.total_dense_bytes() - outline.dense_bytes["embeddings"]
    assert outline.decode_read_bytes == rest


@pytest.mark.parametrize("name", sorted(json.loads(RELEASED.read_text(encoding="utf-8"))))
def test_released_configs_have_the_parameters_that_their_authors_count(
    name: str, registry: Registry
) -> None:
    file = find_config(name, registry)
    config = config_from_dict(parse_config(file), registry, file)
    with torch.device("meta"):
        model = model_class(config)(config)
    counted = sum(parameter.numel() for parameter in model.parameters())
    said = json.loads(RELEASED.read_text(encoding="utf-8"))[name]["parameters"]
    assert counted == pytest.approx(said, rel=0.002)


def test_quantised_checkpoints_are_planned_for(
    saved: SaveTiny, registry: Registry, tmp_path: Path
) -> None:
    config = json.loads((saved("qwen3_moe") / "config.json").read_text(encoding="utf-8"))
    file = tmp_path / "other-name.json"
    file.write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}), encoding="utf-8"
    )
    assert outline_model(file, registry) == outline_model(saved("qwen3_moe"), registry)


def test_dense_models_are_refused(tmp_path: Path, registry: Registry) -> None:
    file = tmp_path / "config.json"
    file.write_text(
        json.dumps({"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1,
                    "intermediate_size": 64, "vocab_size": 64}), encoding="utf-8",
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="it is a dense model"):
        outline_model(tmp_path, registry)


def test_models_that_are_not_there(tmp_path: Path, registry: Registry) -> None:
    with pytest.raises(ModelSourceError, match=r"known name \(known: .*deepseek-v3"):
        outline_model("no-such-model", registry)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        outline_model(tmp_path, registry)


def test_model_that_transformers_cannot_run_on_meta(
    saved: SaveTiny, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        msg = "no kernel\nfor meta"
        raise NotImplementedError(msg)

    monkeypatch.setattr("kt_core.engine.meta_passes.Passes.run", fail)
    with pytest.raises(UnsupportedModelError, match=r"NotImplementedError: no kernel for meta\)"):
        outline_model(saved("qwen3_moe"), registry)
