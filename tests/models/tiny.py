"""Tiny random checkpoints of every MoE family that the installed transformers knows.

A family is a folder of ``transformers/models``. Its config class names the sizes, ``_SIZES`` says
how small each becomes, ``_FAMILIES`` holds what a family needs beyond that. Every weight is exact
in bf16, so that a bf16 copy of the experts loses nothing, and large enough for experts to matter.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForTokenClassification,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

CORE_FAMILIES = (
    "qwen3_moe",
    "qwen3_next",
    "qwen3_5_moe",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "deepseek_v4",
    "glm4_moe",
    "glm_moe_dsa",
    "kimi_k25",
    "minimax_m2",
    "gpt_oss",
    "mixtral",
    "llama4",
)
"""The families that must always work; the unit tests use these."""

_SIZES: dict[int, str] = {
    512: "max_position_embeddings max_seq_len",
    256: "vocab_size vocab_size_per_layer_input unpadded_vocab_size",
    112: "image_size",
    96: "intermediate_size dense_intermediate_size intermediate_size_mlp encoder_ffn_dim"
    " decoder_ffn_dim ffn_hidden_size d_ff",
    64: "hidden_size d_model text_hidden_size out_hidden_size output_dim projection_hidden_dim"
    " projector_hidden_size projector_input_dim projector_output_dim vision_output_dim"
    " output_proj_dims adapter_in_dim adapter_out_dim adapter_input_size projection_hidden_size"
    " position_embedding_size num_position_embeddings projection_intermediate_size"
    " thinker_hidden_size audio_hidden_size decoder_dim",
    48: "moe_intermediate_size expert_ffn_hidden_size",
    32: "shared_expert_intermediate_size shared_experts_intermediate_size"
    " moe_shared_expert_intermediate_size shared_intermediate_size share_expert_dim q_lora_rank"
    " router_hidden_size mamba_head_dim downsample_hidden_size rel_extent max_img_size hc_lowrank"
    " output_channels",
    16: "head_dim swa_head_dim kv_channels d_kv kv_lora_rank qk_nope_head_dim v_head_dim"
    " index_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim mamba_d_state"
    " ssm_state_size mamba_chunk_size chunk_size o_lora_rank hidden_size_per_layer_input"
    " num_mel_bins n_mel_bins max_source_positions codebook_size feature_size log_scaling_n_floor",
    8: "num_experts n_routed_experts num_local_experts moe_num_experts qk_rope_head_dim rotary_dim"
    " index_topk index_block_size sliding_window sliding_window_size attention_chunk_size"
    " block_size mamba_dt_rank floor_scale posemb_grid_size pos_emb_height pos_emb_width"
    " window_size canvas_length d_rel",
    4: "num_hidden_layers num_layers n_layers encoder_layers decoder_layers num_decoder_layers"
    " num_attention_heads num_heads n_heads encoder_attention_heads decoder_attention_heads"
    " swa_num_attention_heads linear_num_value_heads linear_num_heads mamba_n_heads mamba_num_heads"
    " index_kpool zero_expert_num num_sliding_attention_heads num_code_groups num_quantizers",
    2: "depth num_key_value_heads swa_num_key_value_heads num_experts_per_tok num_experts_per_token"
    " moe_topk moe_k n_group num_expert_group linear_num_key_heads index_n_heads o_groups"
    " index_topk_blocks layer_group_size attn_layer_period num_sparse_encoder_layers"
    " num_sparse_decoder_layers n_groups",
    1: "first_k_dense_replace num_dense_layers moe_layer_start_index topk_group",
}
_LIMITS = {"swiglu_limit": 1.0, "mlp_gate_softcap": 1.0, "mlp_up_softcap": 1.0}
"""Small enough that tiny activations reach them."""
_SHRUNK: dict[str, Any] = _LIMITS | {n: s for s, names in _SIZES.items() for n in names.split()}
_SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LAYERS = {"mlp_layer_types": ["dense"] + 3 * ["sparse"], "mlp_only_layers": [0]}
"""The first layer is dense wherever the config class can say so."""

_FULL, _LINEAR, _SLIDING = "full_attention", "linear_attention", "sliding_attention"


def _mrope(*section: int) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": list(section)}


_GEMMA = {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 48, "global_head_dim": 32}
_MROPE_QUARTER = _mrope(2, 1, 1) | {"partial_rotary_factor": 0.25}  # of a head_dim of 32
_NEMOTRON_H = {"layers_block_type": [_LINEAR, "moe", _FULL, "moe"]}
_FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": {"global_attn_every_n_layers": 2},
    "aria": {"text_config": {"intermediate_size": 40}},
    "bailing_hybrid": {"head_dim": 16},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10_000.0},
        "ffn_config": {"ffn_hidden_size": 40, "moe_num_experts": 8, "moe_top_k": 2},
    },
    "deepseek_ocr2": {
        "text_config": {"num_experts_per_tok": 2},
        "vision_config": {"sam_config": {"downsample_channels": [32, 64]}},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "moe_intermediate_size": 56},
    "deepseek_v3": {"moe_intermediate_size": 40},
    "deepseek_v4": {
        "head_dim": 32,
        "num_key_value_heads": 1,
        "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    },
    "diffusion_gemma": {"text_config": _GEMMA},
    "dots3_note": {
        "text_config": {
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 4,
            "swa_q_lora_rank": 32,
            "swa_kv_lora_rank": 16,
            "swa_head_dim": 24,
            "swa_qk_nope_head_dim": 16,
            "swa_v_head_dim": 16,
        },
    },
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "ernie4_5_moe": {"moe_layer_end_index": 3},
    "ernie4_5_vl_moe": {
        "text_config": {"moe_intermediate_size": [48, 24], "rope_parameters": _mrope(3, 3, 2)}
    },
    "gemma4": {"text_config": _GEMMA | {"enable_moe_block": True}},
    "glm4v_moe": {
        "text_config": {"rope_parameters": _mrope(1, 1, 2) | {"partial_rotary_factor": 0.5}}
    },
    "glm5_next": {"text_config": {"qk_rope_head_dim": 0, "layer_types": 2 * [_LINEAR, _FULL]}},
    "gpt_oss": {"intermediate_size": 40},
    "granitemoehybrid": {"layer_types": 2 * [_LINEAR, _FULL], "mamba_d_head": 32},
    "hunyuan_v1_moe": {"head_dim": 16},
    "inkling": {"model_type": "inkling_text"},  # the vision tower of inkling_mm_model needs scipy
    "jamba": {"attn_layer_offset": 0, "use_mamba_kernels": False},
    "kimi_linear": {"layer_types": 2 * [_LINEAR, _FULL]},
    "lfm2_moe": {"layer_types": 2 * ["conv", _FULL]},
    "llama4": {"text_config": {"moe_layers": [1, 2, 3], "intermediate_size": 40}},
    "longcat_flash": {"head_dim": 8, "num_layers": 2},
    "minimax_m2": {"intermediate_size": 40},
    "mixtral": {"intermediate_size": 40},
    "muse_spark": {
        "text_config": {"moe_hidden_size": 32},
        "audio_config": {
            "patch_sizes": [2, 2, 2, 2],
            "hidden_sizes": [8, 16, 32, 64],
            "depths": 4 * [1],
        },
    },
    "nemotron3_5_transcribe": {
        "model_type": "nemo_speechlm",
        "text_config": _NEMOTRON_H,
        "word_timestamp_config": {"blank_token_id": 255},
    },
    "nemotron_h": _NEMOTRON_H,
    "nemotron_h_omni": {
        "text_config": _NEMOTRON_H,
        "audio_config": {"projection_hidden_size": 64, "projection_bias": False},
        "vision_config": {"video_temporal_patch_size": 2},
    },
    "nllb_moe": {"model_type": "nllb-moe", "encoder_sparse_step": 2, "decoder_sparse_step": 2},
    "olmoe": {"intermediate_size": 37},
    "phimoe": {"intermediate_size": 33},
    "qwen3_5_moe": {"text_config": {"head_dim": 32, "rope_parameters": _MROPE_QUARTER}},
    "qwen3_omni_moe": {
        "thinker_config": {"vision_start_token_id": 3},
        "talker_config": {
            "text_config": {"shared_expert_intermediate_size": 32},
            "spatial_merge_size": 2,
        },
    },
    "qwen3_vl_moe": {"text_config": {"rope_parameters": _mrope(4, 2, 2)}},
    "qwen4_exp": {
        "text_config": {
            "head_dim": 32,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 8,
            "indexer_compress_ratio": 4,
            "rope_parameters": _MROPE_QUARTER,
        }
    },
    "step3p7": {
        "text_config": {
            "sliding_window": 8,
            "layer_types": 2 * [_FULL, _SLIDING],
            "swiglu_limits": [0.0, 0.0, 0.5, 0.5],
        }
    },
    "unlimited_ocr": {"vision_config": {"sam_config": {"downsample_channels": [32, 64]}}},
    "zaya": {"num_experts_per_tok": 1},
}


_AUTO_CLASSES = {
    "IMAGE_TEXT_TO_TEXT": AutoModelForImageTextToText,
    "MULTIMODAL_LM": AutoModelForMultimodalLM,
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_TO_SEQ_CAUSAL_LM": AutoModelForSeq2SeqLM,
    "TOKEN_CLASSIFICATION": AutoModelForTokenClassification,
}
"""Auto classes by their name in ``modeling_auto``, the one a released checkpoint needs first."""


@cache
def moe_model_types() -> tuple[str, ...]:
    """Find every family of the installed transformers that routes tokens to experts.

    That is each folder whose modeling file defines a class of experts, decorated or not, and each
    whose configuration names such a family as its default language model (``kimi_k25``).
    ``vitpose_backbone`` is left out: it picks its "expert" by data set, and is no language model.
    """
    root = Path(transformers.__file__).parent / "models"
    experts_class = re.compile(r"^class \w*Experts\w*\(", re.MULTILINE)
    default_model = re.compile(r'model_type="(\w+)"')
    own = {
        path.parent.name
        for path in root.glob("*/modeling_*.py")
        if path.parent.name != "vitpose_backbone"
        and experts_class.search(path.read_text(encoding="utf-8"))
    }
    wrapping = {
        path.parent.name
        for path in root.glob("*/configuration_*.py")
        if own.intersection(default_model.findall(path.read_text(encoding="utf-8")))
    }
    return tuple(sorted(own | wrapping))


def tiny_config(model_type: str) -> PreTrainedConfig:
    """Make a valid tiny configuration of a family, or of any ``model_type`` of the same sizes."""
    wrapper = _FAMILIES.get(model_type.removesuffix("_text"), {})
    overrides = dict(_FAMILIES.get(model_type, wrapper.get("text_config", {})))
    config_class = CONFIG_MAPPING[overrides.pop("model_type", model_type)]
    return config_class(**_values(config_class, overrides))


def _values(config_class: type[PreTrainedConfig], overrides: Mapping[str, Any]) -> dict[str, Any]:
    defaults = {field.name: field.default for field in fields(config_class)}
    values = {
        name: _SHRUNK[name]
        for name, default in defaults.items()
        # None means derived from other sizes, or a feature that is off: both stay as they are
        if name in _SHRUNK and default is not None
    }
    values |= {n: value for n, value in (_SPECIAL_TOKENS | _LAYERS).items() if n in defaults}
    if "kv_lora_rank" in defaults:  # latent attention: keys per head, head_dim is derived
        values.pop("head_dim", None)
        values["num_key_value_heads"] = values["num_attention_heads"]
    values |= overrides
    for name, spec in config_class.sub_configs_defaults.items():
        below = overrides.get(name, {})
        if spec.config_class is AutoConfig:
            sub_class = CONFIG_MAPPING[spec.model_type]
            values[name] = {"model_type": spec.model_type} | _values(sub_class, below)
        elif not spec.optional:
            values[name] = _values(spec.config_class, below)
    return values


def auto_class(config: PreTrainedConfig) -> Any:
    """Return the Auto class that builds and loads the model of ``config``."""
    for name, auto in _AUTO_CLASSES.items():
        if type(config) in getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING"):
            return auto
    msg = f"no Auto class with logits for model_type={config.model_type!r}"
    raise LookupError(msg)


def build_tiny(model_type: str, *, seed: int = 0) -> PreTrainedModel:
    """Build a family's tiny model in float32 with eager experts, in evaluation mode.

    The global random state is left as it was.
    """
    config = tiny_config(model_type)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = (
            auto_class(config).from_config(config, experts_implementation="eager").eval()
        )
        _randomise(model)
    if model.can_generate():
        for name, token in _SPECIAL_TOKENS.items():
            setattr(model.generation_config, name, token)
    return model


@torch.no_grad()
def _randomise(model: PreTrainedModel) -> None:
    """Make every weight random, of a size that moves the logits, and exact in bf16."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, parameter in model.named_parameters():
        if parameter.dim() <= 1 or name.endswith("A_log"):
            parameter.add_(torch.randn_like(parameter), alpha=0.1)  # norms stay near 1
        elif id(parameter) in embeddings:
            parameter.normal_(std=0.5)
        else:
            is_large = parameter[0].dim() > 1 or "expert" in name or "router" in name
            parameter.normal_(std=0.16 if is_large else 0.08)
        parameter.copy_(parameter.bfloat16())
    for name, buffer in model.named_buffers():
        if name.endswith("tid2eid"):  # [vocabulary, top_k]: the experts of each token, all distinct
            num_experts, top_k = _SHRUNK["n_routed_experts"], buffer.shape[1]
            buffer.copy_(torch.rand(len(buffer), num_experts).argsort(dim=1)[:, :top_k])
        elif "bias" in name:  # e_score_correction_bias under its several names; 0.2 starves experts
            buffer.uniform_(-0.1, 0.1).copy_(buffer.bfloat16())


def save_tiny(
    model_type: str,
    directory: str | Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """Save a family's tiny model as a checkpoint of several shards and return it, in float32.

    With ``dtype=torch.bfloat16`` the parameters on disk are bf16 and the buffers stay float32, as
    released checkpoints have it. Nothing is lost: the same model loads from either.
    """
    model = build_tiny(model_type, seed=seed)
    parameters = {id(p): p.data.to(dtype) for p in model.parameters()}  # tied stays tied
    state = {n: parameters.get(id(t), t) for n, t in model.state_dict(keep_vars=True).items()}
    model.save_pretrained(directory, state_dict=state, max_shard_size="400KB")
    config = copy.deepcopy(model.config)
    config.dtype = dtype
    config.save_pretrained(directory)
    return model


def load_reference(directory: str | Path) -> PreTrainedModel:
    """Load a checkpoint with transformers alone: float32, eager experts, evaluation mode."""
    auto = auto_class(AutoConfig.from_pretrained(directory))
    model: PreTrainedModel = auto.from_pretrained(
        directory, dtype=torch.float32, experts_implementation="eager"
    )
    return model


def roundtrips(model: PreTrainedModel, directory: str | Path) -> bool:
    """Return whether transformers reads back from ``directory`` exactly the model saved there."""
    input_ids = sample_input_ids(model.config)
    return torch.equal(logits(load_reference(directory), input_ids), logits(model, input_ids))


def sample_input_ids(
    config: PreTrainedConfig, batch: int = 2, length: int = 17, seed: int = 1
) -> Tensor:
    """Draw token ids ``[batch, length]``, none of them a special token of a tiny model."""
    generator = torch.Generator().manual_seed(seed)
    first = max(_SPECIAL_TOKENS.values()) + 1
    vocabulary = config.get_text_config().vocab_size
    return torch.randint(first, vocabulary, (batch, length), generator=generator)


def _text_model(model: PreTrainedModel) -> Any:
    return getattr(model, "thinker", model)  # qwen3_omni_moe: the part that reads and writes text


@torch.no_grad()
def logits(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Run a model of any family on text alone and return its logits in float32."""
    text = _text_model(model)
    inputs = {"input_ids": input_ids}
    if "decoder_input_ids" in inspect.signature(text.forward).parameters:
        inputs["decoder_input_ids"] = input_ids.flip(1)  # a diffusion model's canvas, too
    output: Tensor = text(**inputs).logits
    return output.float()


@torch.no_grad()
def greedy_tokens(model: PreTrainedModel, input_ids: Tensor, count: int = 6) -> Tensor | None:
    """Generate ``count`` tokens; None if the model is not one that writes token after token."""
    text = _text_model(model)
    is_autoregressive = isinstance(text, GenerationMixin)
    if not is_autoregressive:
        return None
    tokens: Tensor = text.generate(
        input_ids=input_ids, min_new_tokens=count, max_new_tokens=count, do_sample=False
    )
    return tokens
