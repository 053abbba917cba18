"""From the word a user typed to a directory, a config, an adapter and a class."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import tiny
import transformers
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from torch import nn
from transformers import DeepseekV3Config, PreTrainedConfig, Qwen3MoeConfig

from kt_core import plugins
from kt_core.engine.model_files import (
    adapters_for,
    model_class,
    model_config,
    read_config,
    resolve_model,
)
from kt_core.errors import CheckpointError, ModelSourceError, UnsupportedModelError
from kt_core.hookspecs import Register, hookimpl
from kt_core.interfaces import ExpertsSite, ModelAdapter, ModelSource, Progress, no_progress
from kt_core.paths import cache_dir
from kt_core.plugins import Registry


class Toy(ModelSource):
    """A model that is in the cache at once."""

    name = "toy"
    description = "nothing"

    def resolve(self, cache_dir: Path, progress: Progress = no_progress) -> Path:
        progress("made", 1.0)
        return cache_dir / "models" / "toy"


class ToyAdapter(ModelAdapter):
    """Of an architecture that transformers lacks."""

    model_types = ("toy",)

    def config(self, config_dict: Any) -> PreTrainedConfig:
        return Qwen3MoeConfig(num_experts=config_dict["experts"])

    def sites(self, model: nn.Module) -> Iterator[ExpertsSite]:
        yield from ()


class GenericAdapter(ToyAdapter):
    """Asked about everything else."""

    model_types = ()


class ToyPlugin:
    """Registers them."""

    @hookimpl
    def kt_register_model_sources(self, register: Register[ModelSource]) -> None:
        register(Toy())

    @hookimpl
    def kt_register_model_adapters(self, register: Register[ModelAdapter]) -> None:
        register(ToyAdapter())
        register(GenericAdapter())


@pytest.fixture
def registry() -> Registry:
    return plugins.load(ToyPlugin(), use_entry_points=False)


# --- directories -------------------------------------------------------------------------------


def test_cache_dir_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert cache_dir() == tmp_path / "caches" / "kt"
    for unset in ("", None):
        if unset is None:
            monkeypatch.delenv("XDG_CACHE_HOME")
        else:
            monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert cache_dir() == Path.home() / ".cache" / "kt"
    assert not (tmp_path / "caches").exists()  # asking makes nothing


def test_a_directory_is_itself(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resolve_model(tmp_path, registry) == tmp_path
    assert resolve_model(str(tmp_path), registry) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert resolve_model(f"~/{tmp_path.name}", registry) == tmp_path
    monkeypatch.chdir(tmp_path)
    for name in ("toy", "owner/name"):  # a directory comes before a name
        Path(name).mkdir(parents=True)
        assert resolve_model(name, registry) == Path(name)


def test_a_file_is_no_model(registry: Registry, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(
        ModelSourceError, match=r"is a file that holds no model of a known kind.*give the directory"
    ):
        resolve_model(file, registry)


def test_a_registered_name(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    seen: list[tuple[str, float | None]] = []
    directory = resolve_model("toy", registry, lambda *step: seen.append(step))
    assert directory == tmp_path / "kt" / "models" / "toy"
    assert seen == [("made", 1.0)]


@pytest.mark.parametrize("name", ["toyy", "./owner/name", "/owner/name", "a/b/c", "owner/"])
def test_neither_directory_nor_name(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelSourceError, match=r"neither a directory nor.*known: toy.*hub id"):
        resolve_model(name, registry)


# --- the hub -----------------------------------------------------------------------------------


def test_a_hub_id_is_downloaded(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(hub_id: str, **options: Any) -> str:
        asked[hub_id] = options
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    seen: list[tuple[str, float | None]] = []

    directory = resolve_model("owner/Name-1.5_b", registry, lambda *step: seen.append(step))

    assert directory == tmp_path
    assert seen == [("download owner/Name-1.5_b", None)]
    patterns = asked["owner/Name-1.5_b"]["allow_patterns"]
    wanted = ["config.json", "model-00001-of-00002.safetensors", "chat_template.jinja"]
    unwanted = ["pytorch_model.bin", "modeling_x.py", "model.gguf", "original/consolidated.pth"]
    assert all(any(Path(name).match(p) for p in patterns) for name in wanted)
    assert not any(Path(name).match(p) for p in patterns for name in unwanted)


class TransportError(Exception):
    """Stands for those of huggingface_hub's HTTP client, whatever it is called by now."""


_RESPONSE: Any = SimpleNamespace(headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (LocalEntryNotFoundError("No network\nand more"), "No network. Check"),
        (RepositoryNotFoundError("404 Client Error", response=_RESPONSE), "404 Client Error"),
        (HFValidationError("Cannot have -- in repo_id"), "Cannot have --"),
        (TransportError("timed out"), "timed out"),
        (ConnectionError("refused"), "refused"),
        (OSError(), "OSError"),
    ],
)
def test_a_failed_download_says_why_and_what_to_do(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def snapshot_download(*args: object, **kwargs: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ModelSourceError) as caught:
        resolve_model("owner/name", registry)
    message = str(caught.value)
    assert "'owner/name' is no directory here and could not be downloaded" in message
    assert reason in message
    assert "HF_TOKEN" in message
    assert "or give the path of a directory" in message
    assert "\n" not in message


# --- config, adapter, class --------------------------------------------------------------------


def write_config(directory: Path, **values: object) -> Path:
    (directory / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return directory


def test_config_of_a_family_that_transformers_knows(registry: Registry, tmp_path: Path) -> None:
    tiny.tiny_config("deepseek_v3").save_pretrained(tmp_path)
    values = read_config(tmp_path)
    config = model_config(tmp_path, values, registry)
    assert type(config) is DeepseekV3Config
    assert config.moe_intermediate_size == values["moe_intermediate_size"] == 40


def test_config_through_an_adapter(registry: Registry, tmp_path: Path) -> None:
    write_config(tmp_path, model_type="toy", experts=12)
    config = model_config(tmp_path, read_config(tmp_path), registry)
    assert config.num_experts == 12
    assert config.name_or_path == str(tmp_path)


def test_a_key_that_an_adapter_misses_is_named(registry: Registry, tmp_path: Path) -> None:
    write_config(tmp_path, model_type="toy")
    with pytest.raises(CheckpointError, match=r"config\.json.*'experts'"):
        model_config(tmp_path, read_config(tmp_path), registry)


def test_an_unquantised_config_may_say_so(tmp_path: Path) -> None:
    write_config(tmp_path, model_type="toy", quantization_config=None, text_config={})
    assert read_config(tmp_path)["model_type"] == "toy"


def test_the_familys_own_adapter_is_asked_before_the_generic_ones(registry: Registry) -> None:
    asked = adapters_for("toy", registry)
    assert [type(adapter) for adapter in asked] == [ToyAdapter, GenericAdapter]
    assert [type(adapter) for adapter in adapters_for("mixtral", registry)] == [GenericAdapter]
    assert [type(adapter) for adapter in registry.generic_adapters] == [GenericAdapter]


def test_families_that_have_an_adapter_of_their_own() -> None:
    registry = plugins.load()
    own = {f for f in tiny.CORE_FAMILIES if adapters_for(f, registry)[0].model_types}
    assert own == {"llama4"}


@pytest.mark.parametrize("family", ["qwen3_moe", "kimi_k25", "nllb_moe"])
@pytest.mark.parametrize("architectures", [None, ["NoSuchModel"]])
def test_class_by_config_alone(family: str, architectures: list[str] | None) -> None:
    config = tiny.tiny_config(family)
    config.architectures = architectures
    assert model_class(config) is tiny.auto_class(config)._model_mapping[type(config)]


def test_class_by_the_name_in_the_config() -> None:
    config = tiny.tiny_config("llama4")
    for name in ("Llama4ForCausalLM", "Llama4ForConditionalGeneration"):
        config.architectures = [name]
        assert model_class(config) is getattr(transformers, name)


def test_a_config_without_a_language_model(tmp_path: Path) -> None:
    config = transformers.ViTConfig()
    config.architectures = ["NoSuchModel"]
    with pytest.raises(UnsupportedModelError, match=r"no language model.*'vit'.*NoSuchModel"):
        model_class(config)
