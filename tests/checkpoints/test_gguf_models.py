"""Whole models in GGUF files: config, names, numbers and tokenizer come from the file alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import tiny
import torch
from transformers import AutoConfig
from transformers.convert_slow_tokenizer import bytes_to_unicode

from checkpoints.gguf_writing import make_file, save
from checkpoints.test_quantised import TOLERANCE, difference, load
from checkpoints.writing import save_model, write_checkpoint
from kt_core import plugins
from kt_core.engine.model_files import config_from_dict
from kt_core.engine.outline import outline_model
from kt_core.engine.stored_checkpoint import open_model
from kt_core.engine.stored_format import formats_on_disk
from kt_core.errors import CheckpointError, ModelSourceError, UnsupportedModelError


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and how it is stored.

    Attributes:
        family: transformers' name.
        architecture: GGUF's.
        sizes: Of the tiny model, besides those of all.
        experts: Types of the gate, up and down projections.
        packed: What they become.
        others: Type of all other matrices.
        metadata: What the converter writes for this architecture.
    """

    family: str
    architecture: str
    metadata: Callable[[Any, gguf.GGUFWriter], None]
    sizes: dict[str, Any] = field(default_factory=dict)
    experts: Sequence[str] = ("Q8_0", "Q8_0", "Q8_0")
    packed: str = "int8-g32-f16"
    others: str = "Q8_0"


def head_dim(config: Any) -> int:
    own: int | None = getattr(config, "head_dim", None)
    return own or config.hidden_size // config.num_attention_heads


def common(config: Any, writer: gguf.GGUFWriter) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_used_count(config.num_experts_per_tok)


def qwen3moe(config: Any, writer: gguf.GGUFWriter) -> None:
    writer.add_expert_count(config.num_experts)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_key_length(head_dim(config))


def qwen2moe(config: Any, writer: gguf.GGUFWriter) -> None:
    writer.add_expert_count(config.num_experts)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)


def mixtral(config: Any, writer: gguf.GGUFWriter) -> None:
    writer.add_expert_count(config.num_local_experts)
    writer.add_feed_forward_length(config.intermediate_size)


def routed(config: Any, writer: gguf.GGUFWriter) -> None:
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if config.n_group is not None:
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)


def glm4moe(config: Any, writer: gguf.GGUFWriter) -> None:
    routed(config, writer)
    writer.add_key_length(head_dim(config))
    fraction = config.rope_parameters["partial_rotary_factor"]
    writer.add_rope_dimension_count(int(head_dim(config) * fraction))


def deepseek2(config: Any, writer: gguf.GGUFWriter) -> None:
    routed(config, writer)
    writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_nope_head_dim + config.qk_rope_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)


def deepseek2_softmax(config: Any, writer: gguf.GGUFWriter) -> None:
    deepseek2(config, writer)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SOFTMAX)


def minimax_m2(config: Any, writer: gguf.GGUFWriter) -> None:
    writer.add_expert_count(config.num_local_experts)
    writer.add_expert_feed_forward_length(config.intermediate_size)
    writer.add_key_length(head_dim(config))
    fraction = config.rope_parameters.get("partial_rotary_factor", 1.0)
    writer.add_rope_dimension_count(int(head_dim(config) * fraction))
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def gpt_oss(config: Any, writer: gguf.GGUFWriter) -> None:
    writer.add_expert_count(config.num_local_experts)
    writer.add_expert_feed_forward_length(config.intermediate_size)
    writer.add_key_length(head_dim(config))
    writer.add_sliding_window(config.sliding_window)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(config.rope_parameters["factor"])
    writer.add_rope_scaling_orig_ctx_len(config.rope_parameters["original_max_position_embeddings"])


# llama.cpp knows no Qwen3 whose weights are not normed; nor is there one.
QWEN3 = {"norm_topk_prob": True, "mlp_only_layers": [], "num_hidden_layers": 2, "num_experts": 4}
WIDE = {**QWEN3, "hidden_size": 256, "moe_intermediate_size": 256}


def k_quants(packed: str, *experts: str) -> Case:
    return Case(
        family="qwen3_moe",
        architecture="qwen3moe",
        metadata=qwen3moe,
        sizes=WIDE,
        experts=experts,
        packed=packed,
    )


CASES = {
    "Q4_0": Case(family="qwen3_moe", architecture="qwen3moe", metadata=qwen3moe,
                 sizes={**QWEN3, "moe_intermediate_size": 64}, experts=("Q4_0",) * 3,
                 packed="int4-g32-f16"),
    "Q4_1": k_quants("int4-g32-f16-min", "Q4_1", "Q4_1", "Q4_1"),
    "Q4_K": k_quants("int4-g32-f32-min", "Q4_K", "Q4_K", "Q4_K"),
    "Q6_K": k_quants("int8-g16-f32", "Q6_K", "Q6_K", "Q6_K"),
    "IQ4_XS": k_quants("int8-g32-f32", "IQ4_XS", "IQ4_XS", "IQ4_XS"),
    "MXFP4": k_quants("mxfp4", "MXFP4", "MXFP4", "MXFP4"),
    "BF16": k_quants("bf16", "BF16", "BF16", "BF16"),
    "qwen2moe": Case(family="qwen2_moe", architecture="qwen2moe", metadata=qwen2moe,
                     sizes={"mlp_only_layers": [], "moe_intermediate_size": 64}),
    "llama": Case(family="mixtral", architecture="llama", metadata=mixtral,
                  sizes={"intermediate_size": 64, "sliding_window": None}),
    "glm4moe": Case(family="glm4_moe", architecture="glm4moe", metadata=glm4moe,
                    sizes={"moe_intermediate_size": 64, "n_shared_experts": 1}),
    "deepseek2": Case(family="deepseek_v3", architecture="deepseek2", metadata=deepseek2,
                      sizes={"moe_intermediate_size": 64, "q_lora_rank": 32, "kv_lora_rank": 32,
                             "v_head_dim": 32}),
    "deepseek2 softmax": Case(family="deepseek_v2", architecture="deepseek2",
                              metadata=deepseek2_softmax,
                              sizes={"moe_intermediate_size": 64, "q_lora_rank": 32,
                                     "kv_lora_rank": 32, "v_head_dim": 32}),
    "minimax-m2": Case(family="minimax_m2", architecture="minimax-m2", metadata=minimax_m2,
                       sizes={"intermediate_size": 64}),
    "gpt-oss": Case(family="gpt_oss", architecture="gpt-oss", metadata=gpt_oss,
                    sizes={"intermediate_size": 64, "swiglu_limit": 7.0},
                    experts=("MXFP4",) * 3, packed="mxfp4"),
}  # fmt: skip
"""By what the test is about."""


def write(case: Case, directory: Path, **more: Any) -> tuple[Path, Path]:
    """Write the model's GGUF file, and a directory of the same numbers unquantised."""
    base = directory / "base"
    tensors = save_model(case.family, base, **case.sizes)
    config = AutoConfig.from_pretrained(base)
    kinds = dict(zip(("gate", "up", "down"), case.experts, strict=True))

    def kind_of(name: str) -> str:
        return kinds[name.split("_")[1]] if "_exps" in name else case.others

    file = make_file(case.architecture, config, tensors, kind_of)
    dense = write_checkpoint(directory / "dense", base, file.numbers)

    def metadata(writer: gguf.GGUFWriter) -> None:
        common(config, writer)
        case.metadata(config, writer)

    return save(file, directory / "model.gguf", metadata, **more), dense


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers_on_the_same_numbers(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    file, dense = write(case, tmp_path)
    truth = tiny.load_reference(dense)
    input_ids = tiny.sample_input_ids(truth.config)
    with load(file) as engine:
        got = tiny.logits(engine.model, input_ids)
        assert engine.stats().format == case.packed
    stored = formats_on_disk(file, plugins.load()).experts
    assert "+".join(sorted(weight_format.name for weight_format in stored)) == case.packed
    # The bound on a sum grows with its length, TOLERANCE is for sums of 64.
    longer = truth.config.hidden_size / 64
    assert difference(got, tiny.logits(truth, input_ids)) <= TOLERANCE * longer


# --- what a file says besides its numbers -------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in one file."""
    return write(CASES["Q4_0"], tmp_path_factory.mktemp("small"))[0]


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.others == "Q8_0"])
def test_config_is_that_of_the_original(name: str, tmp_path: Path) -> None:
    """What transformers makes of it, sizes and switches, as far as a GGUF file can know."""
    case = CASES[name]
    file, dense = write(case, tmp_path)
    registry = plugins.load()
    got = config_from_dict(dict(open_model(file, registry).config), registry, file).to_dict()
    want = AutoConfig.from_pretrained(dense).to_dict()
    if want.get("n_group", 1) is None:  # a router without groups has one
        want |= {"n_group": 1, "topk_group": 1}
    assert {key for key in want if got.get(key) != want[key]} <= UNSAID[case.architecture] | NEVER


NEVER = {
    "_name_or_path", "architectures", "transformers_version", "dtype", "pad_token_id",
    "bos_token_id", "eos_token_id", "initializer_range",
}  # fmt: skip
"""A file of the tests has no tokenizer, and no file says how a model was initialised."""
UNSAID: dict[str, set[str]] = {
    "qwen3moe": {"intermediate_size", "mlp_only_layers", "head_dim"},  # it has no dense layer
    "qwen2moe": {"intermediate_size", "mlp_only_layers"},
    "llama": {"head_dim"},
    "glm4moe": {"head_dim", "num_mtp_layers"},
    "deepseek2": {"num_mtp_layers"},
    "minimax-m2": set(),
    "gpt-oss": {"rope_parameters"},
}


def test_files_of_a_split_model(tmp_path: Path, small: Path) -> None:
    """As the package splits them; any of them may be named, or their directory."""
    whole, _ = write(CASES["Q4_0"], tmp_path / "a", split_max_tensors=9)
    parts = sorted(whole.parent.glob("*.gguf"))
    assert len(parts) > 2
    assert all("-of-" in part.name for part in parts)
    input_ids = torch.arange(3, 20)[None]
    with load(small) as engine:
        want = tiny.logits(engine.model, input_ids)
    for path in (parts[1], _alone(tmp_path / "b", parts)):
        with load(path) as engine:
            assert torch.equal(tiny.logits(engine.model, input_ids), want)
    missing = _alone(tmp_path / "c", parts[:-1])
    with pytest.raises(CheckpointError, match=f"lacks {parts[-1].name}"):
        load(missing)


def _alone(directory: Path, files: Sequence[Path]) -> Path:
    directory.mkdir()
    for file in files:
        (directory / file.name).symlink_to(file)
    return directory


def test_a_directory_of_several_models(tmp_path: Path, small: Path) -> None:
    (tmp_path / "one.gguf").symlink_to(small)
    (tmp_path / "two.gguf").symlink_to(small)
    with pytest.raises(ModelSourceError, match=r"several models: one\.gguf, two\.gguf\. Give"):
        load(tmp_path)


def test_tokenizer_and_chat_template(tmp_path: Path) -> None:
    """Byte-level BPE, as transformers builds it of the file."""
    alphabet = sorted(bytes_to_unicode().values())
    tokens = [*alphabet, "he", "ll", "<|end|>"]
    case = CASES["Q4_0"]

    def metadata(config: Any, writer: gguf.GGUFWriter) -> None:
        qwen3moe(config, writer)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_list([*tokens, *(f"<unused{i}>" for i in range(512 - len(tokens)))])
        kinds = [gguf.TokenType.NORMAL] * (len(tokens) - 1) + [gguf.TokenType.CONTROL]
        writer.add_token_types([*kinds, *[gguf.TokenType.UNUSED] * (512 - len(tokens))])
        writer.add_token_merges(["h e", "l l"])
        writer.add_eos_token_id(len(tokens) - 1)
        writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}<|end|>")

    sizes = {**case.sizes, "vocab_size": 512}
    file, _ = write(replace(case, metadata=metadata, sizes=sizes), tmp_path)
    with load(file) as engine:
        assert engine.model.config.eos_token_id == len(tokens) - 1
        assert engine.encode("hello", raw=True) == [
            tokens.index(token) for token in ("he", "ll", "o")
        ]
        assert engine.encode("hello")[-1] == len(tokens) - 1
        assert engine.generate("hello", max_new_tokens=3).token_ids


@pytest.mark.parametrize(
    ("experts", "nearest"),
    [(("Q5_K",) * 3, "int8-g32"), (("Q2_K", "Q2_K", "IQ3_S"), "int8-g16+int8-g32")],
)
def test_types_that_no_format_holds_are_quantised_again(
    experts: Sequence[str], nearest: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, dense = write(k_quants("", *experts), tmp_path)
    input_ids = torch.arange(3, 20)[None]
    with load(file) as engine:
        got = tiny.logits(engine.model, input_ids)
        (packed,) = {engine.stats().format}
    assert packed in nearest.split("+")
    assert (
        "no format holds exactly what the checkpoint stores; experts are quantised again, "
        f"as {packed}"
    ) in caplog.text
    with load(dense, format=packed) as engine:
        want = tiny.logits(engine.model, input_ids)
    assert difference(got, want) <= TOLERANCE * 4


def test_experts_of_two_types(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Q4_K_M files have down projections of Q6_K in some layers."""
    file, _ = write(k_quants("", "Q4_K", "Q4_K", "Q6_K"), tmp_path)
    with load(file) as engine:
        assert engine.stats().format == "int8-g16-f32"
    assert "int4-g32-f32-min is quantised again there, as int8-g16-f32" in caplog.text


def test_plan_of_a_file(small: Path) -> None:
    outline = outline_model(small, plugins.load())
    assert [layer.spec.num_experts for layer in outline.expert_layers] == [4, 4]


def test_an_architecture_without_experts(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "gemma3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match=r"architecture 'gemma3'.*qwen3moe.*llama\.cpp"):
        load(tmp_path / "m.gguf")
