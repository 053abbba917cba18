"""Our model adapters keep the contract that outside ones must keep; every test of it can fail."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from transformers import PreTrainedConfig

from kt_core import plugins
from kt_core.interfaces import ExpertsSite, ExpertWeights, ModelAdapter
from kt_core.moe.hybrid_experts import HybridExperts
from kt_core.testing import ModelAdapterContract
from kt_core.types import Activation, ActivationKind

REGISTRY = plugins.load()


class TinyModels(ModelAdapterContract):
    """Takes the models from ``tests/models/tiny.py``."""

    def make_model(self, model_type: str) -> nn.Module:
        return tiny.build_tiny(model_type)

    def run(self, model: nn.Module) -> None:
        tiny.logits(model, tiny.sample_input_ids(model.config))


class TestGeneric(TinyModels):
    adapter = REGISTRY.generic_adapters[0]
    # Concatenated, interleaved, transposed, with biases, without gates, with limits, with norms.
    model_types = ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v4", "nemotron_h", "minimax_m2")


class TestLlama4(TinyModels):
    adapter = REGISTRY.adapters.get("llama4")


class TestLongcatFlash(TinyModels):
    adapter = REGISTRY.adapters.get("longcat_flash")


class TestStep3p7(TinyModels):
    adapter = REGISTRY.adapters.get("step3p7")
    model_types = ("step3p7",)


class WithGenericSites(ModelAdapter):
    """An adapter of configs alone, as the engine uses it: the generic one finds the experts."""

    def __init__(self, own: ModelAdapter) -> None:
        self.model_types = own.model_types
        self._own = own

    def config(self, config_dict: Mapping[str, Any]) -> PreTrainedConfig | None:
        return self._own.config(config_dict)

    def sites(self, model: nn.Module) -> Iterator[ExpertsSite]:
        assert not list(self._own.sites(model))
        return REGISTRY.generic_adapters[0].sites(model)


class TestKimiK2(TinyModels):
    adapter = WithGenericSites(REGISTRY.adapters.get("kimi_k2"))

    def make_model(self, model_type: str) -> nn.Module:
        config = self.adapter.config(self.config_dict(model_type))
        assert config is not None
        return super().make_model(config.model_type)

    def config_dict(self, model_type: str) -> Mapping[str, Any]:
        return tiny.tiny_config("deepseek_v3").to_dict() | {
            "model_type": model_type,
            "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
        }


def test_every_adapter_of_ours_is_tested() -> None:
    suites = (TestLlama4, TestLongcatFlash, TestStep3p7, TestKimiK2)
    ours = {n for n in REGISTRY.adapters.names() if REGISTRY.adapters.owner(n) == "models"}
    assert ours == {model_type for suite in suites for model_type in suite.adapter.model_types}


# From here on: adapters that are broken on purpose, each in one way.


class Broken(ModelAdapter):
    """The right adapter, with one thing of each site changed."""

    def __init__(self, right: ModelAdapter, **changes: Any) -> None:
        self.model_types = right.model_types
        self._right = right
        self._changes = changes

    def config(self, config_dict: Mapping[str, Any]) -> PreTrainedConfig | None:
        return self._right.config(config_dict)

    def sites(self, model: nn.Module) -> Iterator[ExpertsSite]:
        for site in self._right.sites(model):
            yield self.spoil(site)

    def spoil(self, site: ExpertsSite) -> ExpertsSite:
        return replace(site, **self._changes)


class SwapsGateAndUp(Broken):
    def spoil(self, site: ExpertsSite) -> ExpertsSite:
        def swapped(rows: Mapping[str, torch.Tensor]) -> ExpertWeights:
            right = site.expert_weights(rows)
            assert right.gate is not None
            return replace(right, gate=right.up, up=right.gate)

        return replace(site, expert_weights=swapped)


class CopiesWeights(Broken):
    def spoil(self, site: ExpertsSite) -> ExpertsSite:
        def copied(rows: Mapping[str, torch.Tensor]) -> ExpertWeights:
            return site.expert_weights({name: row.clone() for name, row in rows.items()})

        return replace(site, expert_weights=copied)


class TakesTheGateForUpToo(Broken):
    def spoil(self, site: ExpertsSite) -> ExpertsSite:
        def doubled(rows: Mapping[str, torch.Tensor]) -> ExpertWeights:
            right = site.expert_weights(rows)
            assert right.gate is not None
            return replace(right, up=right.gate)

        return replace(site, expert_weights=doubled)


class NamesTheFirstSiteOnly(Broken):
    def sites(self, model: nn.Module) -> Iterator[ExpertsSite]:
        first = next(iter(super().sites(model)))
        yield from (first, first)


class ReadsAWeight(Broken):
    def sites(self, model: nn.Module) -> Iterator[ExpertsSite]:
        for site in super().sites(model):
            down = model.get_parameter(f"{site.parameter_prefix}.down_proj")
            kind = ActivationKind.SILU if down.is_meta else ActivationKind.GELU
            activation = Activation(kind=kind)
            yield replace(site, spec=replace(site.spec, activation=activation))


class FindsNothing(Broken):
    def sites(self, model: nn.Module) -> Iterator[ExpertsSite]:
        yield from ()


class CountsOneExpertTooMany(Broken):
    def spoil(self, site: ExpertsSite) -> ExpertsSite:
        spec = replace(site.spec, num_experts=site.spec.num_experts + 1)
        return replace(site, spec=spec)


class ChangesTheConfig(Broken):
    def config(self, config_dict: Any) -> PreTrainedConfig | None:
        config_dict.pop("auto_map")
        return super().config(config_dict)


class ModelTypeIsAString(Broken):
    def __init__(self, right: ModelAdapter) -> None:
        super().__init__(right)
        self.model_types = "qwen3_moe"  # type: ignore[assignment]


def _forget_the_rest(module: nn.Module, experts: HybridExperts) -> nn.Module:
    return experts


class ForgetsIdentityExperts(nn.Module):
    def __init__(self, module: nn.Module, experts: HybridExperts) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Any:
        is_identity = ids >= self.experts.spec.num_experts
        return self.experts(hidden, ids.masked_fill(is_identity, -1), weights)


COMPUTES = "test_replacement_computes_the_same"
META = "test_sites_are_found_on_the_meta_device"
CASES: list[tuple[str, type[TinyModels], Broken]] = [
    ("test_model_types", TestGeneric, ModelTypeIsAString(TestGeneric.adapter)),
    ("test_config", TestKimiK2, ChangesTheConfig(TestKimiK2.adapter)),
    (META, TestGeneric, NamesTheFirstSiteOnly(TestGeneric.adapter)),
    (META, TestGeneric, FindsNothing(TestGeneric.adapter)),
    (META, TestGeneric, ReadsAWeight(TestGeneric.adapter)),
    ("test_parameters_hold_all_experts", TestGeneric, CountsOneExpertTooMany(TestGeneric.adapter)),
    ("test_expert_weights_are_views", TestGeneric, CopiesWeights(TestGeneric.adapter)),
    ("test_expert_weights_are_views", TestGeneric, TakesTheGateForUpToo(TestGeneric.adapter)),
    ("test_replacement_keeps_the_other_weights", TestLlama4, Broken(
        TestLlama4.adapter, build=_forget_the_rest
    )),
    (COMPUTES, TestGeneric, SwapsGateAndUp(TestGeneric.adapter)),
    (COMPUTES, TestLongcatFlash, Broken(TestLongcatFlash.adapter, build=ForgetsIdentityExperts)),
]  # fmt: skip


def _id(value: object) -> str:
    return value if isinstance(value, str) else getattr(value, "__name__", type(value).__name__)


@pytest.mark.parametrize(("test", "suite_class", "broken"), CASES, ids=_id)
def test_what_is_broken_is_noticed(
    test: str, suite_class: type[TinyModels], broken: Broken
) -> None:
    suite = suite_class()
    suite.adapter = broken
    model_type = (suite.model_types or broken.model_types)[0]
    arguments = () if test == "test_model_types" else (model_type,)
    with pytest.raises(AssertionError):
        getattr(suite, test)(*arguments)


def test_every_test_of_the_contract_can_fail() -> None:
    tests = inspect.getmembers(ModelAdapterContract, inspect.isfunction)
    assert {test for test, *_ in CASES} == {name for name, _ in tests if name.startswith("test_")}
