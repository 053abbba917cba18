"""What the loading hook relies on in transformers, and what it promises: experts are read once."""

from __future__ import annotations

import inspect
import json
import math
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import tiny
import torch
import transformers
from packaging.requirements import Requirement
from packaging.version import Version
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3Config, PreTrainedModel, modeling_utils
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.quantizers.base import HfQuantizer

import kt_core
from kt_core.checkpoint import open_checkpoint
from kt_core.moe.hybrid_experts import HybridExperts

ROOT = Path(__file__).parents[2]
TOLERANCE = 2e-6
MB = 1_000_000


def difference(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


# --- what we use of transformers, some of it private -------------------------------------------


def test_installed_transformers_is_one_we_allow() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = {r.name: r for r in map(Requirement, project["dependencies"])}
    assert Version(transformers.__version__) in requirements["transformers"].specifier


@pytest.mark.parametrize(
    ("function", "arguments", "keywords"),
    [
        (get_model_conversion_mapping, 1, []),
        (rename_source_key, 5, []),
        (dot_natural_key, 1, []),
        (HfQuantizer.__init__, 2, []),
        (HfQuantizer._process_model_before_weight_loading, 2, []),
        (ConversionOps.convert, 2, ["source_patterns", "target_patterns", "model", "config"]),
        (ConversionOps.convert, 2, ["source_patterns", "target_patterns", "missing_keys"]),
    ],
)
def test_functions_can_be_called_as_we_do(
    function: Callable[..., Any], arguments: int, keywords: list[str]
) -> None:
    inspect.signature(function).bind(*range(arguments), **dict.fromkeys(keywords))


def test_models_have_the_attributes_we_change(saved: Callable[..., Path]) -> None:
    model = tiny.load_reference(saved("qwen3_moe"))
    assert isinstance(model._keys_to_ignore_on_load_unexpected, set)
    assert isinstance(model.all_tied_weights_keys, dict)
    assert type(model)._keys_to_ignore_on_load_unexpected is None  # the model's own, not shared
    mapping = get_model_conversion_mapping(model)
    assert all(isinstance(entry, WeightRenaming | WeightConverter) for entry in mapping)
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    assert {type(c.source_patterns) for c in converters} == {list}
    assert all(
        isinstance(operation, ConversionOps) for c in converters for operation in c.operations
    )


def test_a_key_is_renamed_to_the_parameter_and_the_converters_pattern(
    saved: Callable[..., Path],
) -> None:
    model = tiny.load_reference(saved("qwen3_moe"))
    mapping = get_model_conversion_mapping(model)
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    got = rename_source_key(
        "model.layers.1.mlp.experts.7.up_proj.weight",
        renamings,
        converters,
        model.base_model_prefix,
        model.state_dict(),
    )
    assert got == ("model.layers.1.mlp.experts.gate_up_proj", "mlp.experts.*.up_proj.weight")


def test_experts_sort_by_number() -> None:
    names = [f"experts.{i}.up" for i in (10, 2, 1)]
    assert sorted(names, key=dot_natural_key) == [f"experts.{i}.up" for i in (1, 2, 10)]


# --- bytes are read once -----------------------------------------------------------------------


class _SpiedFile:
    """A safetensors file that counts the numbers that are read of each tensor."""

    def __init__(self, read: Counter[str], *args: Any, **kwargs: Any) -> None:
        self._read = read
        self._file = safe_open(*args, **kwargs)

    def __enter__(self) -> _SpiedFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def get_tensor(self, name: str) -> torch.Tensor:
        return _SpiedSlice(self._read, name, self._file.get_slice(name))[...]

    def get_slice(self, name: str) -> _SpiedSlice:
        return _SpiedSlice(self._read, name, self._file.get_slice(name))


class _SpiedSlice:
    def __init__(self, read: Counter[str], name: str, inner: Any) -> None:
        self._read, self._name, self._inner = read, name, inner

    def __getitem__(self, index: Any) -> torch.Tensor:
        value: torch.Tensor = self._inner[index]
        self._read[self._name] += value.numel()
        return value

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4", "deepseek_v4"])
def test_every_number_is_read_once(
    family: str, saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dense part by transformers, the experts by us."""
    theirs: Counter[str] = Counter()
    ours: Counter[str] = Counter()
    monkeypatch.setattr(modeling_utils, "safe_open", lambda *a, **k: _SpiedFile(theirs, *a, **k))
    monkeypatch.setattr(safetensors, "safe_open", lambda *a, **k: _SpiedFile(ours, *a, **k))
    kt_core.load(saved(family), format="int4", threads=1).close()

    stored = {n: math.prod(t.shape) for n, t in open_checkpoint(saved(family)).tensors.items()}
    is_expert = re.compile(r"\.experts\.(\d|gate_up_proj|down_proj)")
    assert ours == {name: size for name, size in stored.items() if is_expert.search(name)}
    assert theirs == {name: size for name, size in stored.items() if not is_expert.search(name)}


_MEASURE = """
import sys, threading
import torch
import kt_core
from kt_core import hardware

def load(directory):
    return kt_core.load(directory, format="int4", threads=2)

warm, directory = sys.argv[1:]
load(warm).close()  # what is imported and allocated once
before = hardware.process_memory().anonymous_bytes
peak, done = before, threading.Event()

def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, hardware.process_memory().anonymous_bytes)

watcher = threading.Thread(target=watch)
watcher.start()
engine = load(directory)
done.set()
watcher.join()
stats = engine.stats()
print(peak - before, stats.expert_bytes, stats.dense_bytes)
"""


def test_loading_takes_the_packed_size_and_little_more(
    saved: Callable[..., Path], tmp_path: Path
) -> None:
    """200 MB of experts in one layer: to hold them once, as bf16, would break the bound."""
    config = tiny.tiny_config("qwen3_moe")
    config.update({"num_hidden_layers": 1, "num_experts": 128, "mlp_only_layers": []})
    config.update({"hidden_size": 512, "moe_intermediate_size": 512, "dtype": "bfloat16"})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expert = torch.randn(512, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    tensors = {}
    for name, parameter in model.state_dict().items():
        if name.endswith("gate_up_proj"):
            prefix = name.removesuffix("gate_up_proj")
            for i in range(config.num_experts):
                for projection in ("gate_proj", "up_proj", "down_proj"):
                    tensors[f"{prefix}{i}.{projection}.weight"] = expert.clone()
        elif not name.endswith("down_proj"):
            tensors[name] = torch.zeros(parameter.shape, dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "model.safetensors")
    config.save_pretrained(tmp_path)
    bf16_bytes = 3 * 128 * 512 * 512 * 2
    assert bf16_bytes > 200 * MB

    output = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(saved("qwen3_moe")), str(tmp_path)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout

    peak, packed, dense = map(int, output.split())
    assert packed < 0.35 * bf16_bytes  # so that the bound below is far from the size in bf16
    assert packed <= peak <= packed + dense + 100 * MB


def test_files_are_unmapped_after_loading(saved: Callable[..., Path], tmp_path: Path) -> None:
    """Those that hold experts only: of the others transformers keeps the dense part mapped."""
    directory: Path = shutil.copytree(saved("qwen3_moe"), tmp_path / "model")
    index = json.loads((directory / "model.safetensors.index.json").read_text(encoding="utf-8"))
    experts: dict[str, torch.Tensor] = {}
    for file in set(index["weight_map"].values()):
        tensors = {name: t.clone() for name, t in load_file(directory / file).items()}
        experts |= {name: tensor for name, tensor in tensors.items() if ".experts." in name}
        save_file({n: t for n, t in tensors.items() if n not in experts}, directory / file)
    save_file(experts, directory / "experts.safetensors")
    index["weight_map"] |= dict.fromkeys(experts, "experts.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    mapped: list[bool] = []

    def look(stage: str, fraction: float | None) -> None:
        del stage, fraction
        mapped.append("experts.safetensors" in Path("/proc/self/maps").read_text(encoding="utf-8"))

    with kt_core.load(directory, format="int8", threads=1, progress=look):
        look("loaded", None)
    assert mapped[0] is mapped[-1] is False
    assert any(mapped)


# --- what the loaded model is ------------------------------------------------------------------


def test_tied_experts_are_packed_once(saved: Callable[..., Path]) -> None:
    """diffusion_gemma: encoder and decoder share their experts."""
    with kt_core.load(saved("diffusion_gemma"), format="bf16", threads=1) as engine:
        experts = [m for m in engine.model.modules() if isinstance(m, HybridExperts)]
        kernels = {id(kernel) for module in experts for kernel in module.kernels}
        stats = engine.stats()
    assert len(experts) == 2 * len(kernels) == 2 * stats.expert_layers > 0


def test_text_and_vision_experts_that_share_their_names(saved: Callable[..., Path]) -> None:
    """ernie4_5_vl_moe: one converter with two targets; the first half of the names are text."""
    truth = tiny.load_reference(saved("ernie4_5_vl_moe"))
    generator = torch.Generator().manual_seed(0)
    seen = []
    with kt_core.load(
        saved("ernie4_5_vl_moe"), format="bf16", threads=1, dtype=torch.float32
    ) as engine:
        for name, module in engine.model.named_modules():
            if isinstance(module, HybridExperts):
                hidden = torch.randn(9, 64, generator=generator)
                ids = torch.randint(0, 8, (9, 2), generator=generator)
                weights = torch.rand(9, 2, generator=generator)
                with torch.no_grad():
                    got = module(hidden, ids, weights)
                    want = truth.get_submodule(name)(hidden, ids, weights)
                assert difference(got, want) <= TOLERANCE, name
                seen.append(name.split(".")[-2])
    assert sorted(set(seen)) == ["text_moe", "vision_moe"]
    assert seen.count("text_moe") == seen.count("vision_moe") > 1


def test_blocks_that_want_to_initialise_their_experts(saved: Callable[..., Path]) -> None:
    """qwen3_omni_moe: ``_init_weights`` of the block reaches into the experts' parameters."""
    with kt_core.load(saved("qwen3_omni_moe"), format="int4", threads=1) as engine:
        assert engine.stats().expert_layers > 0


KIMI_K2 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
    "aux_loss_alpha": 0.001,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.2,
    "intermediate_size": 96,
    "kv_lora_rank": 16,
    "max_position_embeddings": 512,
    "model_type": "kimi_k2",
    "moe_intermediate_size": 40,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 12,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 0,
    "pretraining_tp": 1,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 16,
        "type": "yarn",
    },
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 16,
    "vocab_size": 256,
}
"""config.json of moonshotai/Kimi-K2-Instruct with small sizes and without its fp8."""


def test_kimi_k2_is_read_as_deepseek_v3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nobody is asked whether to run the code that ``auto_map`` names."""

    def forbidden(question: str) -> str:
        raise AssertionError(question)

    monkeypatch.setattr("builtins.input", forbidden)
    names = {"model_type": "deepseek_v3", "auto_map": {}}
    config = DeepseekV3Config.from_dict(KIMI_K2 | names)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        truth = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, experts_implementation="eager"
        ).eval()
    with torch.no_grad():
        for parameter in truth.parameters():
            parameter.copy_(parameter.bfloat16())
    truth.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(KIMI_K2), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "tests" / "data" / "stories-moe" / name, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "model.layers.1.mlp.experts.11.down_proj.weight" in set(file.keys())
    input_ids = tiny.sample_input_ids(config)

    with kt_core.load(tmp_path, format="bf16", threads=1, dtype=torch.float32) as engine:
        got = tiny.logits(engine.model, input_ids)
        assert engine.stats().placement == {"cpu": 2 * 12}
        assert engine.model.config.rope_parameters["rope_type"] == "yarn"
        assert engine.tokenizer is not None

    assert difference(got, tiny.logits(truth, input_ids)) <= TOLERANCE


def test_save_pretrained_refuses_and_says_why(
    saved: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with kt_core.load(saved("qwen3_moe"), format="int8", threads=1) as engine:
        with pytest.raises(ValueError, match="quantized with kt and is not serializable"):
            engine.model.save_pretrained(tmp_path / "copy")
        json.dumps(engine.model.config.to_dict())  # the config can be written all the same
    assert "experts are packed" in caplog.text
    assert not (tmp_path / "copy").exists()


def test_a_gradient_passes_through_packed_experts(saved: Callable[..., Path]) -> None:
    with kt_core.load(saved("qwen3_moe"), format="int8", threads=1) as engine:
        assert not any(p.requires_grad for p in engine.model.parameters())
        assert not engine.model.training
        embedded = engine.model.get_input_embeddings()(torch.tensor([[5, 6]]))
        engine.model(inputs_embeds=embedded.requires_grad_()).logits.sum().backward()
        assert embedded.grad is not None
        assert bool(torch.isfinite(embedded.grad).all())
        assert bool((embedded.grad != 0).any())


def test_transformers_itself_is_left_as_it_was(saved: Callable[..., Path]) -> None:
    before = tiny.load_reference(saved("qwen3_moe"))
    input_ids = tiny.sample_input_ids(before.config)
    with kt_core.load(saved("qwen3_moe"), format="int8", threads=1):
        after: PreTrainedModel = tiny.load_reference(saved("qwen3_moe"))
    assert not any(isinstance(module, HybridExperts) for module in after.modules())
    assert torch.equal(tiny.logits(before, input_ids), tiny.logits(after, input_ids))
