"""Packed dense layers of whole models, against transformers itself.

As in ``test_families``: float32 activations are compared to rounding; where activations are
rounded, every layer is compared with the reference on the inputs it really got.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, modeling_utils

import kt_core
from kt_core import hardware, plugins
from kt_core.checkpoint import open_checkpoint
from kt_core.dense.packed_linear import PackedLinear
from kt_core.engine import Engine, GenerationOptions, direct_reads, loading
from kt_core.engine.generation import TokenStream
from kt_core.errors import (
    CheckpointError,
    NotEnoughMemoryError,
    UnknownNameError,
    UnsupportedDenseError,
)
from kt_core.quant import BUILT_IN_FORMATS
from kt_core.testing import reference_linear
from kt_core.types import ActivationPrecision

FORMATS = {f.descriptor.name: f for f in BUILT_IN_FORMATS}
TOLERANCE = 2e-6
"""As in test_families: two float32 runs that differ in the order of sums."""

FAMILIES = (
    *tiny.CORE_FAMILIES,
    "cohere2_moe",  # tied output head
    "minimax_m3_vl",  # gate and up of shared experts are two tensors on disk
    "diffusion_gemma",  # encoder and decoder share their layers; experts beside attention
    "jamba",  # reads a weight itself
    "zaya",  # a router of several layers, tied output head
    "nemotron_h_omni",  # the head is that of a model inside the model
)


def load(directory: Path, name: str, **options: Any) -> Engine:
    chosen: dict[str, Any] = {"threads": 1, "dtype": torch.float32, "precision": "float32"}
    return kt_core.load(directory, format="bf16", dense_format=name, **{**chosen, **options})


def difference(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear)}


def plain_layers(model: nn.Module) -> set[str]:
    return {n for n, m in model.named_modules() if type(m) is nn.Linear}


@pytest.fixture(scope="module", params=FAMILIES)
def directory(request: pytest.FixtureRequest, saved: Callable[..., Path]) -> Path:
    return saved(request.param)


def dequantised(truth: PreTrainedModel, names: set[str], format_name: str) -> PreTrainedModel:
    """Return the model with what the stored numbers of these layers stand for; ties are cut."""
    model = copy.deepcopy(truth)
    weight_format = FORMATS[format_name]
    with torch.no_grad():
        for name in names:
            layer = model.get_submodule(name)
            weight = weight_format.dequantize(weight_format.quantize(layer.weight))
            layer.weight = nn.Parameter(weight)
    return model


# --- the numbers -------------------------------------------------------------------------------


def test_logits_are_those_of_transformers(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 holds the weights of these models exactly. Nothing is missing or unexpected."""
    truth = tiny.load_reference(directory)
    input_ids = tiny.sample_input_ids(truth.config)
    seen: dict[str, Any] = {}
    real = loading._check_loaded

    def remember(directory: Path, model: Any, info: Any, shapes: Any) -> None:
        seen.update(info)
        real(directory, model, info, shapes)

    monkeypatch.setattr(loading, "_check_loaded", remember)
    with load(directory, "bf16") as engine:
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            assert not seen[kind], kind
        assert len(packed_layers(engine.model)) >= 8
        got = tiny.logits(engine.model, input_ids)
        greedy = tiny.greedy_tokens(engine.model, input_ids)
    assert difference(got, tiny.logits(truth, input_ids)) <= TOLERANCE
    want = tiny.greedy_tokens(truth, input_ids)
    assert (greedy is None) == (want is None)
    assert greedy is None or torch.equal(greedy, want)


@pytest.mark.parametrize("name", ["int8", "int4-g64-asym"])
def test_quantised_layers_equal_dequantised_ones(directory: Path, name: str) -> None:
    truth = tiny.load_reference(directory)
    input_ids = tiny.sample_input_ids(truth.config)
    with load(directory, name) as engine:
        packed = set(packed_layers(engine.model))
        got = tiny.logits(engine.model, input_ids)
    want = tiny.logits(dequantised(truth, packed, name), input_ids)
    assert difference(got, want) <= TOLERANCE
    # Quantising changes something.
    assert difference(want, tiny.logits(truth, input_ids)) > 1000 * TOLERANCE


@pytest.mark.parametrize(
    ("name", "dtype", "precision"),
    [
        ("bf16", torch.bfloat16, ActivationPrecision.BF16),
        ("int8", torch.float32, ActivationPrecision.INT8),
        ("int4-g32", torch.bfloat16, ActivationPrecision.INT8),
    ],
    ids=["bf16", "int8", "int4-g32-in-bf16"],
)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3", "llama4", "zaya"])
def test_every_layer_as_the_reference_computes_it(
    saved: Callable[..., Path],
    family: str,
    name: str,
    dtype: torch.dtype,
    precision: ActivationPrecision,
) -> None:
    """The default precision, on the inputs of a whole forward pass; gpt_oss has biases."""
    truth = tiny.load_reference(saved(family))
    with load(saved(family), name, dtype=dtype, precision="auto") as engine:
        calls: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for path, layer in packed_layers(engine.model).items():
            layer.register_forward_hook(
                lambda _m, given, out, path=path: calls.update({path: (given[0], out)})
            )
        tiny.logits(engine.model, tiny.sample_input_ids(truth.config))
    assert len(calls) >= 8
    for path, (given, out) in calls.items():
        source = truth.get_submodule(path)
        layer = reference_linear.dense(FORMATS[name], source.weight.detach(), source.bias)
        rows = given.reshape(-1, given.shape[-1])
        want = reference_linear.forward(layer, rows, precision)
        error = (out.reshape(len(rows), -1).double() - want.value).abs()
        assert bool((error <= want.error).all()), path


def test_greedy_tokens_of_our_own_loop(saved: Callable[..., Path]) -> None:
    truth = tiny.load_reference(saved("qwen3_next"))
    prompt = tiny.sample_input_ids(truth.config)[0].tolist()
    options = GenerationOptions(max_new_tokens=12, temperature=0)
    with load(saved("qwen3_next"), "bf16") as engine:
        got = list(TokenStream(engine.model, prompt, options))
    assert got == list(TokenStream(truth, prompt, options))


# --- which layers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "stay"),
    [
        ("qwen3_moe", set()),
        ("afmoe", {"mlp.router.gate"}),
        ("gemma4", {"router.proj", "per_layer_input_gate"}),
        ("hunyuan_v1_moe", {"mlp.gate.wg"}),
        ("longcat_flash", {"mlp.router.classifier"}),
        ("qwen3_next", {"mlp.shared_expert_gate"}),
        ("zaya", {"gate.down_proj", "gate.router_mlp.fc1", "gate.router_mlp.out_proj"}),
        ("axk2", {"self_attn.indexer.weights_proj"}),  # kept in float32 by transformers
        ("hy_v4", {"lm_head"}),  # kept in float32 by transformers
    ],
)
def test_what_decides_stays_precise(
    saved: Callable[..., Path], family: str, stay: set[str]
) -> None:
    """Nothing else in the stacks does, but what would grow."""
    with load(saved(family), "bf16") as engine:
        model = engine.model
        plain, packed = plain_layers(model), packed_layers(model)
        grown = {n for n in plain if _would_grow(model.get_submodule(n))}
    assert all(any(name.endswith(suffix) for name in plain) for suffix in stay)
    assert not any(name.endswith(suffix) for name in packed for suffix in stay)
    if not stay - {"mlp.shared_expert_gate"}:
        assert {n for n in plain if ".layers." in n} <= grown


def _would_grow(layer: nn.Module) -> bool:
    """By more than an eighth; all weights are float32 here, and become bf16."""
    rows, columns = layer.weight.shape
    packed_bytes = 2 * (-(-rows // 16) * 16) * (-(-columns // 64) * 64)
    return packed_bytes > 1.125 * 4 * rows * columns


def test_towers_of_other_senses_stay(saved: Callable[..., Path]) -> None:
    with load(saved("kimi_k25"), "int8") as engine:
        assert not any("vision" in name for name in packed_layers(engine.model))
        assert any("vision" in name for name in plain_layers(engine.model))
        assert "lm_head" in packed_layers(engine.model)


def test_a_tied_head_is_packed_and_the_embedding_stays(saved: Callable[..., Path]) -> None:
    with load(saved("cohere2_moe"), "int8") as engine:
        model = engine.model
        truth = tiny.load_reference(saved("cohere2_moe"))
        assert isinstance(model.get_output_embeddings(), PackedLinear)
        embedding = model.get_input_embeddings().weight
        assert torch.equal(embedding, truth.get_input_embeddings().weight)
        assert "lm_head.weight" not in model.state_dict()
        model.tie_weights()  # has nothing to tie any more
        assert isinstance(model.get_output_embeddings(), PackedLinear)


def test_tied_layers_share_a_kernel(saved: Callable[..., Path]) -> None:
    """diffusion_gemma: encoder and decoder."""
    with load(saved("diffusion_gemma"), "int8") as engine:
        layers = packed_layers(engine.model)
        stats = engine.stats()
        kernels = {id(layer.kernel) for layer in layers.values()}
        encoder = "model.encoder.language_model.layers.0.mlp.down_proj"
        assert layers[encoder].kernel is layers["model.decoder.layers.0.mlp.down_proj"].kernel
        assert len(kernels) < len(layers) == stats.dense_layers


@pytest.fixture
def jamba(tmp_path: Path) -> Path:
    """Its code multiplies with ``dt_proj.weight``, here of a size that could be packed."""
    config = tiny.tiny_config("jamba")
    config.mamba_dt_rank = 64
    model = tiny.auto_class(config).from_config(config, experts_implementation="eager")
    model.save_pretrained(tmp_path / "jamba")
    return tmp_path / "jamba"


def test_a_layer_whose_weight_is_read_stays(jamba: Path) -> None:
    with load(jamba, "int8") as engine:
        assert any(name.endswith("mamba.dt_proj") for name in plain_layers(engine.model))
        assert any(name.endswith("mamba.in_proj") for name in packed_layers(engine.model))


def test_a_layer_that_is_read_without_a_trace_in_its_source(
    jamba: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Model code may be made at run time: then the first tokens, tried while loading, tell."""
    monkeypatch.setattr(direct_reads.DirectReads, "has", lambda *_: False)
    message = r"reads the weights of model\.layers\.\d\.mamba\.dt_proj.*--dense-format none"
    with pytest.raises(UnsupportedDenseError, match=message):
        load(jamba, "int8")


def test_reads_are_found_in_the_source() -> None:
    owner = _ReadsWeights()
    reads = direct_reads.DirectReads()
    found = {name for name in ("product", "kind", "setup", "called") if reads.has(owner, name)}
    assert found == {"product"}


class _ReadsWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.setup = nn.Linear(2, 2)
        self.setup.weight.data.zero_()
        for name in ("product", "kind", "called"):
            setattr(self, name, nn.Linear(2, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.kind.weight.dtype) @ self.product.weight
        return self.called(x)


# --- loading -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v4", "minimax_m3_vl", "cohere2_moe"])
def test_every_number_is_read_once(
    family: str, saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By transformers or by us; a tied embedding by both."""
    theirs: Counter[str] = Counter()
    ours: Counter[str] = Counter()
    monkeypatch.setattr(modeling_utils, "safe_open", _spy(theirs))
    monkeypatch.setattr(safetensors, "safe_open", _spy(ours))
    load(saved(family), "int4").close()

    stored = {n: math.prod(t.shape) for n, t in open_checkpoint(saved(family)).tensors.items()}
    tied = {"model.embed_tokens.weight"} if family == "cohere2_moe" else set()
    assert theirs.keys() & ours.keys() == tied
    assert dict(theirs) | dict(ours) == stored
    attention = [name for name in stored if name.endswith("o_proj.weight") and "vision" not in name]
    assert set(attention) <= ours.keys()


def _spy(read: Counter[str]) -> Callable[..., Any]:
    real = safetensors.safe_open

    class Slice:
        def __init__(self, name: str, inner: Any) -> None:
            self._name, self._inner = name, inner

        def __getitem__(self, index: Any) -> torch.Tensor:
            value: torch.Tensor = self._inner[index]
            read[self._name] += value.numel()
            return value

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

    class File:
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self._file = real(*arguments, **options)

        def __enter__(self) -> File:
            return self

        def __exit__(self, *error: object) -> None:
            self._file.__exit__(*error)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def get_slice(self, name: str) -> Slice:
            return Slice(name, self._file.get_slice(name))

        def get_tensor(self, name: str) -> torch.Tensor:
            return self.get_slice(name)[...]

    return File


def test_stats_count_every_byte(saved: Callable[..., Path]) -> None:
    with load(saved("qwen3_moe"), "int8") as packed, load(saved("qwen3_moe"), "none") as plain:
        layers = packed_layers(packed.model)
        stats, before = packed.stats(), plain.stats()
        kept = sum(p.numel() * p.element_size() for p in packed.model.parameters())
    assert (before.dense_format, before.dense_layers) == ("none", 0)
    assert (stats.dense_format, stats.dense_layers) == ("int8", len(layers))
    sizes = [layer.kernel.size_bytes for layer in layers.values()]
    assert stats.dense_bytes == kept + sum(sizes)
    assert stats.dense_bytes < 0.5 * before.dense_bytes  # the embedding stays in float32
    assert stats.expert_bytes == before.expert_bytes


@pytest.mark.parametrize("family", ["qwen3_moe", "cohere2_moe"])
def test_memory_is_checked_with_packed_layers(
    family: str, saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the byte: with what is needed it loads, with one byte less it does not."""
    with load(saved(family), "int8") as engine:
        stats = engine.stats()
    needed = stats.expert_bytes + stats.dense_bytes + 300_000_000
    monkeypatch.setattr(hardware, "available_memory_bytes", lambda: needed - 1)
    with pytest.raises(NotEnoughMemoryError):
        load(saved(family), "int8")
    monkeypatch.setattr(hardware, "available_memory_bytes", lambda: needed)
    load(saved(family), "int8").close()


def test_what_does_not_fit_is_told_of_dense_formats(
    saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "available_memory_bytes", lambda: 1000)
    with pytest.raises(NotEnoughMemoryError, match="--dense-format int8"):
        load(saved("qwen3_moe"), "none")


def test_unknown_formats_and_devices_fail_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(UnknownNameError, match="int5"):
        load(Path("nowhere"), "int5")
    cpu = plugins.load().backends.get("cpu")
    real = type(cpu).capabilities

    def without_dense(self: Any, device: str) -> Any:
        return replace(real(self, device), computes_dense=False)

    monkeypatch.setattr(type(cpu), "capabilities", without_dense)
    with pytest.raises(UnsupportedDenseError, match="'cpu' computes no dense layers"):
        load(Path("nowhere"), "int8")


def _damaged(
    source: Path, target: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]
) -> Path:
    """Copy a checkpoint with one tensor changed, or left out."""
    shutil.copytree(source, target)
    index_file = target / "model.safetensors.index.json"
    index = json.loads(index_file.read_text(encoding="utf-8"))
    file = target / index["weight_map"][name]
    tensors = {n: t.clone() for n, t in load_file(file).items()}
    changed = change(tensors.pop(name))
    if changed is None:
        del index["weight_map"][name]
        index_file.write_text(json.dumps(index), encoding="utf-8")
    else:
        tensors[name] = changed.contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    return target


O_PROJ = "model.layers.1.self_attn.o_proj.weight"


def _with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor[-1, -1] = float("nan")
    return tensor


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_with_nan, r"o_proj\.weight: weight holds a NaN"),
        (lambda t: t[:, 1:], r"o_proj\.weight is \[64, 63\] on disk .*asks for \[64, 64\]"),
        (lambda t: None, r"o_proj\.weight is not in the checkpoint.*shard may be missing"),
    ],
    ids=["nan", "shape", "missing"],
)
def test_damaged_layers_are_refused(
    saved: Callable[..., Path],
    tmp_path: Path,
    change: Callable[[torch.Tensor], torch.Tensor | None],
    message: str,
) -> None:
    directory = _damaged(saved("qwen3_moe"), tmp_path / "model", O_PROJ, change)
    with pytest.raises(CheckpointError, match=message):
        load(directory, "int8")


# --- gradients ---------------------------------------------------------------------------------


def test_gradients_pass_through(saved: Callable[..., Path]) -> None:
    """To the embedded tokens, through experts, packed layers and all the rest.

    Both backward passes are float32 runs of the same formulas; each sums what some ten layers pass
    on, each term as exact as a logit: ten tolerances.
    """
    truth = tiny.load_reference(saved("qwen3_moe"))
    input_ids = tiny.sample_input_ids(truth.config)
    embedded = truth.get_input_embeddings()(input_ids).detach()
    grads = []
    with load(saved("qwen3_moe"), "bf16") as engine:
        for model in (engine.model.train(), truth.train()):
            inputs = embedded.clone().requires_grad_()
            model(inputs_embeds=inputs).logits.square().sum().backward()
            assert inputs.grad is not None
            grads.append(inputs.grad)
    assert difference(*grads) <= 10 * TOLERANCE
