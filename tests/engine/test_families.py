"""Fourteen families, from checkpoints that transformers wrote, against transformers itself.

What can be compared to rounding error is: float32 runs with float32 activations. Where activations
are rounded (bf16, int8), one flipped routing decision changes a logit by more than all roundings
together, so those runs are checked in two ways: every layer of experts against
``tests/reference.py`` on the inputs it really got, with the derived tolerance, and all layers
together with the routing of the exact run imposed.
"""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import kt_core
from kt_core.engine import Engine, GenerationOptions, loading
from kt_core.engine.generation import TokenStream
from kt_core.interfaces import ExpertWeights, WeightFormat
from kt_core.moe.hybrid_experts import HybridExperts
from kt_core.quant import BUILT_IN_FORMATS
from kt_core.testing import reference
from kt_core.types import ActivationPrecision

FORMATS = {f.descriptor.name: f for f in BUILT_IN_FORMATS}
TOLERANCE = 2e-6
"""Largest max|d| / max|logit| between two float32 runs that differ in the order of sums."""

TRANSPOSED = ("gpt_oss", "llama4")
INTERLEAVED = ("gpt_oss",)
EXPERTS = re.compile(r"\.experts\.(gate_up_proj|down_proj)$")
"""Parameters ``[experts, out, in]``, or ``[experts, in, out]`` where the family is transposed."""


@dataclass
class Family:
    """A family's checkpoint, and what transformers says about it in float32."""

    name: str
    directory: Path
    truth: PreTrainedModel
    input_ids: torch.Tensor
    logits: torch.Tensor


@pytest.fixture(scope="module", params=tiny.CORE_FAMILIES)
def family(request: pytest.FixtureRequest, saved: Callable[..., Path]) -> Family:
    directory = saved(request.param)
    truth = tiny.load_reference(directory)
    input_ids = tiny.sample_input_ids(truth.config)
    return Family(request.param, directory, truth, input_ids, tiny.logits(truth, input_ids))


@pytest.fixture(scope="module")
def engine(family: Family) -> Iterator[Engine]:
    with kt_core.load(family.directory, format="bf16", threads=1, dtype=torch.float32) as engine:
        yield engine


def difference(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


# --- float32 activations: equal to rounding ---------------------------------------------------


def test_logits_are_those_of_transformers(family: Family, engine: Engine) -> None:
    got = tiny.logits(engine.model, family.input_ids)
    assert difference(got, family.logits) <= TOLERANCE


def test_experts_matter(family: Family) -> None:
    """Without one expert in eight the logits move a thousand tolerances: the test can fail."""
    model = copy.deepcopy(family.truth)
    experts = [p for n, p in model.named_parameters() if EXPERTS.search(n)]
    assert len(experts) >= 4
    with torch.no_grad():
        for parameter in experts:
            parameter[0].zero_()
    got = tiny.logits(model, family.input_ids)
    assert difference(got, family.logits) > 1000 * TOLERANCE


def test_greedy_tokens_of_our_own_loop(family: Family, engine: Engine) -> None:
    """Two streams in turns, so that nothing of one may rest in the model for the other."""
    prompts = [family.input_ids[0].tolist(), family.input_ids[1, :5].tolist()]
    options = GenerationOptions(max_new_tokens=12, temperature=0)
    want = [_generate(family.truth, prompt, count=12) for prompt in prompts]
    streams = [TokenStream(engine.model, prompt, options) for prompt in prompts]

    steps = list(zip_longest(*streams))

    got = [[step[i] for step in steps if step[i] is not None] for i in range(len(prompts))]
    assert got == want


def _generate(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    """Return what transformers generates greedily, without the end token."""
    output = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=count, do_sample=False)
    end = model.generation_config.eos_token_id
    return [token for token in output[0, len(prompt) :].tolist() if token != end]


@pytest.mark.parametrize("name", ["int8", "int4-g32", "int4-g64-asym"])
def test_quantised_experts_equal_dequantised_ones(family: Family, name: str) -> None:
    want = tiny.logits(_dequantised(family, FORMATS[name]), family.input_ids)
    with kt_core.load(
        family.directory, format=name, threads=1, dtype=torch.float32, precision="float32"
    ) as engine:
        got = tiny.logits(engine.model, family.input_ids)

    assert difference(got, want) <= TOLERANCE
    assert difference(want, family.logits) > 1000 * TOLERANCE  # quantising changes something


def _dequantised(family: Family, weight_format: WeightFormat) -> PreTrainedModel:
    """Return the transformers model whose experts hold what the stored numbers stand for."""
    model = copy.deepcopy(family.truth)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not EXPERTS.search(name):
                continue
            for expert in parameter:  # a view
                matrix = expert.T if family.name in TRANSPOSED else expert
                matrix.copy_(weight_format.dequantize(weight_format.quantize(matrix)))
    return model


# --- rounded activations: layer by layer, then together with the routing imposed ---------------


@pytest.mark.parametrize(
    ("name", "dtype", "precision"),
    [
        ("bf16", torch.bfloat16, ActivationPrecision.BF16),
        ("int8", torch.float32, ActivationPrecision.INT8),
        ("int4-g32", torch.bfloat16, ActivationPrecision.INT8),
    ],
    ids=["bf16", "int8", "int4-g32-in-bf16"],
)
def test_every_layer_as_the_reference_computes_it(
    family: Family, name: str, dtype: torch.dtype, precision: ActivationPrecision
) -> None:
    """The default precision of each format, on the hidden states of a whole forward pass."""
    with kt_core.load(family.directory, format=name, threads=1, dtype=dtype) as engine:
        calls = _calls_of_experts(engine.model, family.input_ids)

    parameters = dict(family.truth.named_parameters())
    assert len(calls) >= 2
    for module_name, (module, inputs, output) in calls.items():
        rows = {n: parameters[f"{module_name}.{n}"] for n in ("gate_up_proj", "down_proj")}
        biases = {n: parameters.get(f"{module_name}.{n}_bias") for n in rows}
        experts = {
            e: _canonical(family.name, e, rows, biases) for e in range(module.spec.num_experts)
        }
        layer = reference.layer(module.spec, FORMATS[name], experts)
        want, allowed = reference.forward(layer, *inputs, precision)
        assert bool(((output.double() - want).abs() <= allowed).all()), module_name


def _calls_of_experts(
    model: PreTrainedModel, input_ids: torch.Tensor
) -> dict[str, tuple[HybridExperts, tuple[torch.Tensor, ...], torch.Tensor]]:
    """Return, for each experts module by its path upstream, what it was given and what it gave."""
    calls = {}
    handles = []
    for name, module in model.named_modules():
        if not isinstance(module, HybridExperts):
            continue

        def remember(module: Any, inputs: Any, output: Any, name: str = name) -> None:
            calls[name] = (module, inputs, output)

        handles.append(module.register_forward_hook(remember))
    tiny.logits(model, input_ids)
    for handle in handles:
        handle.remove()
    return calls


def _canonical(
    family: str,
    expert: int,
    rows: dict[str, torch.Tensor],
    biases: dict[str, torch.Tensor | None],
) -> ExpertWeights:
    """Cut one expert out of the parameters of transformers, without asking any adapter."""
    gate_up, down = (rows[name][expert].detach() for name in ("gate_up_proj", "down_proj"))
    if family in TRANSPOSED:
        gate_up, down = gate_up.T, down.T
    halves = _halves(family, gate_up)
    if biases["down_proj"] is None or biases["gate_up_proj"] is None:
        return ExpertWeights(gate=halves[0], up=halves[1], down=down)
    bias_halves = _halves(family, biases["gate_up_proj"][expert].detach())
    return ExpertWeights(
        gate=halves[0],
        up=halves[1],
        down=down,
        gate_bias=bias_halves[0],
        up_bias=bias_halves[1],
        down_bias=biases["down_proj"][expert].detach(),
    )


def _halves(family: str, fused: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if family in INTERLEAVED:
        return fused[0::2], fused[1::2]
    middle = len(fused) // 2
    return fused[:middle], fused[middle:]


def test_bf16_run_errs_no_more_than_that_of_transformers(family: Family) -> None:
    """Against the float32 run, which both round the same way wherever the code is the same.

    In the experts transformers rounds after each of five operations, we round once. So the ratio of
    the errors is expected at or below 1; it is that of two samples of a random error, taken over
    some thousand dependent numbers, which a quarter more allows for. Measured: 0.82 to 0.99.
    """
    with _recorded_routing(family, family.truth) as routing:
        want = tiny.logits(family.truth, family.input_ids)
    upstream = tiny.auto_class(family.truth.config).from_pretrained(
        family.directory, dtype=torch.bfloat16, experts_implementation="eager"
    )
    with _imposed_routing(family, upstream, routing):
        theirs = tiny.logits(upstream, family.input_ids)
    with (
        kt_core.load(family.directory, format="bf16", threads=1, dtype=torch.bfloat16) as engine,
        _imposed_routing(family, engine.model, routing),
    ):
        ours = tiny.logits(engine.model, family.input_ids)

    assert 0 < _typical_error(ours, want) <= 1.25 * _typical_error(theirs, want)


def _typical_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Root mean square over the vocabulary, median over the tokens: one outlier counts once."""
    return float((got - want).square().mean(dim=-1).sqrt().median())


@pytest.mark.parametrize("name", ["int8", "int4-g32", "int4-g64-asym"])
def test_int8_activations_err_as_their_steps_say(family: Family, name: str) -> None:
    """The default of the integer formats, against float32 activations and the same weights.

    Rounding to steps of max|x| / 127 errs by max|x| / (127 sqrt(12)) in root mean square. Of 128
    normal numbers the largest is some 3 times their root mean square, of products of two such
    numbers 5 times: relative errors of 0.7 % before the first projections and 1.1 % before the
    second. Gate and up both carry the first one: sqrt(2 * 0.7^2 + 1.1^2) = 1.5 % per layer of
    experts. Four layers, independent, in a residual stream they dominate: sqrt(4) * 1.5 % = 3 %.
    A third more for attention, which can enlarge what it gets. Measured: 0.5 % to 2.4 %.
    """
    model = _dequantised(family, FORMATS[name])
    with _recorded_routing(family, model) as routing:
        want = tiny.logits(model, family.input_ids)
    with (
        kt_core.load(family.directory, format=name, threads=1, dtype=torch.float32) as engine,
        _imposed_routing(family, engine.model, routing),
    ):
        got = tiny.logits(engine.model, family.input_ids)

    error = float((got - want).square().mean().sqrt() / want.square().mean().sqrt())
    assert 0.001 < error <= 0.04


@contextmanager
def _recorded_routing(family: Family, model: PreTrainedModel) -> Iterator[list[Any]]:
    """Note what every router of a model decides."""
    routing: list[Any] = []
    handles = []
    for module in _routed_modules(family, model):
        if family.name == "llama4":
            handles.append(module.register_forward_hook(lambda *call: routing.append(call[2])))
        else:
            handles.append(module.register_forward_pre_hook(lambda *c: routing.append(c[1][1:])))
    yield routing
    for handle in handles:
        handle.remove()


@contextmanager
def _imposed_routing(family: Family, model: PreTrainedModel, routing: list[Any]) -> Iterator[None]:
    """Let a model take the decisions that were noted, in the types it uses."""
    handles = []
    for module, decided in zip(_routed_modules(family, model), routing, strict=True):

        def impose(own: Any, decided: Any = decided) -> Any:
            return tuple(d.to(o.dtype) for d, o in zip(decided, own, strict=True))

        def of_router(module: Any, inputs: Any, own: Any, impose: Any = impose) -> Any:
            del module, inputs
            return impose(own)

        def of_experts(module: Any, inputs: Any, impose: Any = impose) -> Any:
            del module
            return inputs[0], *impose(inputs[1:])

        if family.name == "llama4":
            handles.append(module.register_forward_hook(of_router))
        else:
            handles.append(module.register_forward_pre_hook(of_experts))
    yield
    for handle in handles:
        handle.remove()


def _routed_modules(family: Family, model: PreTrainedModel) -> list[torch.nn.Module]:
    """Who gets ``(hidden, expert ids, weights)``; for llama4, who gives ``(scores, logits)``."""
    end = ".feed_forward.router" if family.name == "llama4" else ".experts"
    return [module for name, module in model.named_modules() if name.endswith(end)]


# --- files as they come -----------------------------------------------------------------------


def test_shards_in_any_order(tmp_path: Path) -> None:
    """Twelve experts, so that 10 sorts before 2; the parts of each in different files."""
    config = tiny.tiny_config("qwen3_moe")
    config.num_experts = 12
    model = tiny.auto_class(config).from_config(config, experts_implementation="eager").eval()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = list(tensors)
    random.Random(0).shuffle(names)
    files = ["z.safetensors", "model-00010-of-00003.safetensors", "a b.safetensors"]
    for i, file in enumerate(files):
        save_file({n: tensors[n] for n in names[i :: len(files)]}, tmp_path / file)
    weight_map = {name: files[i % len(files)] for i, name in enumerate(names)}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    input_ids = tiny.sample_input_ids(config)

    with kt_core.load(tmp_path, format="bf16", threads=1, precision="float32") as engine:
        assert engine.stats().placement == {"cpu": 3 * 12}
        got = tiny.logits(engine.model, input_ids)

    rounded = copy.deepcopy(model)  # the weights of this model are not exact in bf16
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            if EXPERTS.search(name):
                parameter.copy_(parameter.bfloat16())
    assert difference(got, tiny.logits(rounded, input_ids)) <= TOLERANCE


def test_no_weight_is_missing_or_unexpected(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}

    def spied_class(config: Any) -> Any:
        cls = real_class(config)

        class Spy:
            @staticmethod
            def from_pretrained(*args: Any, **kwargs: Any) -> Any:
                model, info = cls.from_pretrained(*args, **kwargs)
                seen.update(info)
                return model, info

        return Spy

    real_class = loading.model_class
    monkeypatch.setattr(loading, "model_class", spied_class)
    with kt_core.load(family.directory, format="int4", threads=1):
        pass
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not seen[kind], kind


def test_dtype_auto_is_that_of_the_checkpoint(saved: Callable[..., Path]) -> None:
    directory = saved("gpt_oss", torch.bfloat16)
    with kt_core.load(directory, format="int4", threads=1) as engine:
        assert engine.model.dtype == torch.bfloat16
        assert engine.stats().dtype == "bfloat16"
        assert engine.stats().format == "int4-g32"
