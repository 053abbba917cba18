"""The contract of ``kt_core.interfaces.ModelAdapter``, as tests."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from kt_core.interfaces import ExpertsSite, ExpertWeights, ModelAdapter
from kt_core.moe.hybrid_experts import HybridExperts
from kt_core.testing.common import OneTorchThread
from kt_core.testing.reference_kernel import ExactKernel

# Modules are compared in float64. Sums in another order then differ by some 1e-13 of the largest
# output, a weight in a wrong place by some 1e-1; in between is float32, which routers and norms of
# many models compute in whatever they are given: 16 of its roundoffs.
TOLERANCE = 16 * 2.0**-24


class ModelAdapterContract(OneTorchThread, ABC):
    """What every model adapter must do. Subclass it in a test file::

        class TestMyAdapter(ModelAdapterContract):
            adapter = MyAdapter()

            def make_model(self, model_type):
                return AutoModelForCausalLM.from_config(
                    MyConfig(...), experts_implementation="eager"
                )

    Attributes:
        adapter: The adapter under test.
        model_types: What to test it with; the adapter's own unless it is a generic one.
    """

    adapter: ModelAdapter
    model_types: Sequence[str] = ()

    @abstractmethod
    def make_model(self, model_type: str) -> nn.Module:
        """Make a tiny model in float32 on the CPU, with random weights, in evaluation mode.

        Large enough weights, please, that experts matter: a standard deviation of 0.1 is good.
        """

    def config_dict(self, model_type: str) -> Mapping[str, Any]:
        """Return a config.json of such a model; only asked where transformers lacks the type."""
        msg = f"transformers lacks {model_type!r}: override config_dict() with its config.json"
        raise AssertionError(msg)

    def run(self, model: nn.Module) -> None:
        """Run the model on something, so that the experts see hidden states of their own."""
        config: Any = model.config
        vocabulary = config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(0)
        model(input_ids=torch.randint(3, vocabulary, (2, 17), generator=generator))

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run each test for each model type."""
        if "model_type" in metafunc.fixturenames:
            metafunc.parametrize("model_type", self.model_types or self.adapter.model_types)

    def test_model_types(self) -> None:
        """A tuple of words: what stands in config.json."""
        assert type(self.adapter.model_types) is tuple
        assert all(self.adapter.model_types)
        for model_type, result in self.adapter.proven_families().items():
            assert model_type
            assert result.strip()

    def test_config(self, model_type: str) -> None:
        """A config of a class that transformers has, and only where it has none of that name."""
        from transformers import CONFIG_MAPPING

        if model_type in CONFIG_MAPPING:
            assert self.adapter.config({"model_type": model_type}) is None
            return
        facts = dict(self.config_dict(model_type))
        given = copy.deepcopy(facts)
        config = self.adapter.config(given)
        assert given == facts, "config() changed its argument"
        assert config is not None
        assert config.model_type in CONFIG_MAPPING, f"transformers lacks {config.model_type!r} too"

    def test_sites_are_found_on_the_meta_device(self, model_type: str) -> None:
        """Found without reading a weight, each once, and the same as on the real model."""
        model = self.make_model(model_type)
        sites = list(self.adapter.sites(_on_meta(model)))
        assert sites, "no routed experts found"
        names = [site.module_name for site in sites]
        assert len(set(names)) == len(names), f"a module is named twice: {names}"
        assert [site.spec for site in self.adapter.sites(model)] == [site.spec for site in sites]

    def test_parameters_hold_all_experts(self, model_type: str) -> None:
        """Every parameter that is named exists, with the experts in its first dimension."""
        model = _on_meta(self.make_model(model_type))
        for site in self.adapter.sites(model):
            model.get_submodule(site.module_name)
            inside = f"{site.parameter_prefix}.".startswith(f"{site.module_name}.")
            assert inside, f"{site.parameter_prefix} is outside of {site.module_name}"
            assert site.parameters
            for name in site.parameters:
                shape = model.get_parameter(f"{site.parameter_prefix}.{name}").shape
                # More rows than experts: some models keep room for identity experts.
                assert shape[0] >= site.spec.num_experts, f"{name} is {list(shape)}: {site.spec}"

    def test_expert_weights_are_views(self, model_type: str) -> None:
        """Right shapes, no copies, and every stored number used exactly once."""
        model = self.make_model(model_type)
        for site in self.adapter.sites(_on_meta(model)):
            rows = _rows(model, site, site.spec.num_experts - 1)
            parts = _parts(site.expert_weights(rows))
            assert {name: tuple(part.shape) for name, part in parts.items()} == _shapes(site)
            # Compared outside the assert: pytest would explain how thousands of numbers differ,
            # which takes it hours where it thinks that it runs in CI.
            used, stored = sorted(_addresses(parts.values())), sorted(_addresses(rows.values()))
            each_used_once = used == stored
            assert each_used_once, (
                "the weights are copies, or some number of the checkpoint is unused or used twice"
            )

    def test_replacement_keeps_the_other_weights(self, model_type: str) -> None:
        """Built from a module on the meta device; what is not an expert keeps its name."""
        model = _on_meta(self.make_model(model_type))
        for site in self.adapter.sites(model):
            module = model.get_submodule(site.module_name)
            below = f"{site.parameter_prefix}."[len(site.module_name) + 1 :]
            wanted = set(module.state_dict()) - {f"{below}{name}" for name in site.parameters}
            replacement = site.build(module, HybridExperts(site.spec, [ExactKernel(site.spec)]))
            assert isinstance(replacement, nn.Module)
            assert set(replacement.state_dict()) == wanted

    @torch.no_grad()
    def test_replacement_computes_the_same(self, model_type: str) -> None:
        """On the hidden states it sees in the model, each replacement answers as the original."""
        model = self.make_model(model_type)
        sites = list(self.adapter.sites(_on_meta(model)))
        calls = self._calls(model, sites)
        assert calls, "run() reaches none of the experts"
        for site in sites:
            if site.module_name not in calls:
                continue
            module = copy.deepcopy(model.get_submodule(site.module_name)).double()
            arguments, keywords = _as_double(calls[site.module_name])
            want = module(*arguments, **keywords)
            got = self._replacement(model, site, module)(*arguments, **keywords)
            _check_same(got, want, site.module_name)

    def _replacement(self, model: nn.Module, site: ExpertsSite, module: nn.Module) -> nn.Module:
        kernel = ExactKernel(site.spec)
        for expert in range(site.spec.num_experts):
            kernel.load(expert, site.expert_weights(_rows(model, site, expert)))
        return site.build(module, HybridExperts(site.spec, [kernel])).eval()

    def _calls(self, model: nn.Module, sites: Sequence[ExpertsSite]) -> dict[str, Any]:
        """Arguments of the first call of each site's module while the model runs."""
        calls: dict[str, Any] = {}
        hooks = [
            model.get_submodule(site.module_name).register_forward_pre_hook(
                lambda _, args, kwargs, name=site.module_name: (
                    calls.setdefault(name, copy.deepcopy((args, kwargs))) and None
                ),
                with_kwargs=True,
            )
            for site in sites
        ]
        self.run(model)
        for hook in hooks:
            hook.remove()
        return calls


def _on_meta(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).to("meta")


def _rows(model: nn.Module, site: ExpertsSite, expert: int) -> dict[str, torch.Tensor]:
    return {
        name: model.get_parameter(f"{site.parameter_prefix}.{name}").data[expert]
        for name in site.parameters
    }


def _parts(weights: ExpertWeights) -> dict[str, torch.Tensor]:
    names = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
    parts = {name: getattr(weights, name) for name in names}
    return {name: part for name, part in parts.items() if isinstance(part, torch.Tensor)}


def _shapes(site: ExpertsSite) -> dict[str, tuple[int, ...]]:
    hidden, inner = site.spec.hidden_size, site.spec.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {"up": (inner, hidden), "down": (hidden, inner)}
    if site.spec.has_bias:
        shapes |= {"up_bias": (inner,), "down_bias": (hidden,)}
    if site.spec.activation.is_gated:
        shapes["gate"] = (inner, hidden)
        if site.spec.has_bias:
            shapes["gate_bias"] = (inner,)
    return shapes


def _addresses(tensors: Any) -> list[int]:
    """The address of every element of every tensor."""
    addresses: list[int] = []
    for tensor in tensors:
        at = torch.zeros(tensor.shape, dtype=torch.int64)
        for dimension, stride in enumerate(tensor.stride()):
            steps = torch.arange(tensor.shape[dimension]) * stride
            at += steps.view([-1 if d == dimension else 1 for d in range(tensor.dim())])
        addresses += (tensor.data_ptr() + at.flatten() * tensor.element_size()).tolist()
    return addresses


def _as_double(value: Any) -> Any:
    """Turn float32 tensors, wherever they hide, into float64."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, list | tuple):
        return type(value)(_as_double(item) for item in value)
    if isinstance(value, dict):
        return {key: _as_double(item) for key, item in value.items()}
    return value


def _check_same(got: Any, want: Any, where: str) -> None:
    if isinstance(want, list | tuple):
        assert len(got) == len(want), f"{where} returns {len(got)} values instead of {len(want)}"
        for index, pair in enumerate(zip(got, want, strict=True)):
            _check_same(*pair, f"{where}[{index}]")
        return
    if not isinstance(want, torch.Tensor):
        assert got == want, f"{where}: {got!r} instead of {want!r}"
        return
    assert got.shape == want.shape, f"{where}: {list(got.shape)} instead of {list(want.shape)}"
    if want.is_floating_point():
        largest = float(want.abs().max())
        error = float((got.double() - want.double()).abs().max())
        assert largest > 0, f"{where} is all zero: the test sees nothing"
        assert error <= TOLERANCE * largest, f"{where}: off by {error / largest:.3g} of the largest"
    else:
        assert torch.equal(got, want), f"{where} differs"
