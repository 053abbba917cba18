"""GGUF architectures with routed experts: their config.json, and what their tensors are called.

Keys from ``gguf/constants.py`` of gguf 0.19; what they mean from llama.cpp's
``convert_hf_to_gguf.py``, which writes them from a config.json.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

from kt_checkpoints.gguf.names import Names

Values: TypeAlias = Mapping[str, Any]

_SIGMOID = 2  # llama.cpp's expert_gating_func: 1 is softmax


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One of them.

    Attributes:
        config: Makes what config.json would say of metadata without the architecture's name before
            its keys, besides what ``common_config`` knows. ``tensors`` are the names in a layer.
        names: Of the tensors.
    """

    config: Callable[[Values], dict[str, Any]]
    names: Names


def common_config(values: Values) -> dict[str, Any]:
    """Return what all of them have.

    Raises:
        KeyError: The metadata lack something.
    """
    heads = values["attention.head_count"]
    config = {
        "hidden_size": values["embedding_length"],
        "num_hidden_layers": values["block_count"] - values.get("nextn_predict_layers", 0),
        "num_attention_heads": heads,
        "num_key_value_heads": values.get("attention.head_count_kv", heads),
        "max_position_embeddings": values["context_length"],
        "rms_norm_eps": values["attention.layer_norm_rms_epsilon"],
        "num_experts_per_tok": values["expert_used_count"],
        "rope_parameters": _rope(values),
    }
    if "attention.key_length" in values:
        config["head_dim"] = values["attention.key_length"]
    return config


def _rope(values: Values) -> dict[str, Any]:
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": values.get("rope.freq_base", 10000.0),
    }
    kind = values.get("rope.scaling.type", "none")
    if kind == "none":
        return rope
    if kind not in {"linear", "yarn"}:
        msg = f"rope.scaling.type {kind!r}"
        raise KeyError(msg)
    rope |= {"rope_type": kind, "factor": values["rope.scaling.factor"]}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = values["rope.scaling.original_context_length"]
        optional = {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}
        for name, key in optional.items():
            if (value := values.get(f"rope.scaling.{key}")) is not None:
                rope[name] = value
    return rope


def _partial_rotary(values: Values) -> dict[str, Any]:
    """Some families rotate only the first dimensions of a head."""
    fraction = values["rope.dimension_count"] / values["attention.key_length"]
    partial = {} if fraction == 1 else {"partial_rotary_factor": fraction}
    return {"rope_parameters": _rope(values) | partial}


def _qwen3moe(values: Values) -> dict[str, Any]:
    return {
        "model_type": "qwen3_moe",
        "num_experts": values["expert_count"],
        "moe_intermediate_size": values["expert_feed_forward_length"],
        "intermediate_size": values.get("feed_forward_length", 0),
        "norm_topk_prob": True,
    }


def _qwen2moe(values: Values) -> dict[str, Any]:
    return {
        "model_type": "qwen2_moe",
        "num_experts": values["expert_count"],
        "moe_intermediate_size": values["expert_feed_forward_length"],
        "shared_expert_intermediate_size": values["expert_shared_feed_forward_length"],
        "intermediate_size": values.get("feed_forward_length", 0),
        "norm_topk_prob": False,
    }


def _llama(values: Values) -> dict[str, Any]:
    return {
        "model_type": "mixtral",
        "num_local_experts": values["expert_count"],
        "intermediate_size": values["feed_forward_length"],
        "sliding_window": values.get("attention.sliding_window"),
    }


def _routed(values: Values) -> dict[str, Any]:
    """What DeepSeek-V3's router, and those that took after it, want to know."""
    return {
        "n_routed_experts": values["expert_count"],
        "n_shared_experts": values["expert_shared_count"],
        "moe_intermediate_size": values["expert_feed_forward_length"],
        "intermediate_size": values["feed_forward_length"],
        "first_k_dense_replace": values["leading_dense_block_count"],
        "routed_scaling_factor": values.get("expert_weights_scale", 1.0),
        "norm_topk_prob": values.get("expert_weights_norm", False),
        "n_group": values.get("expert_group_count", 1),
        "topk_group": values.get("expert_group_used_count", 1),
    }


def _glm4moe(values: Values) -> dict[str, Any]:
    return {
        "model_type": "glm4_moe",
        **_routed(values),
        **_partial_rotary(values),
        "use_qk_norm": "attn_q_norm.weight" in values["tensors"],
        "attention_bias": "attn_q.bias" in values["tensors"],
    }


def _deepseek2(values: Values) -> dict[str, Any]:
    rotary = values["rope.dimension_count"]
    key = values.get("attention.key_length_mla", values["attention.key_length"])
    rope = _rope(values)
    if "rope.scaling.yarn_log_multiplier" in values:
        # llama.cpp stores a tenth of it.
        scale = values["rope.scaling.yarn_log_multiplier"] * 10
        rope |= {"mscale": scale, "mscale_all_dim": scale}
    is_sigmoid = values.get("expert_gating_func", 1) == _SIGMOID
    config = {
        "model_type": "deepseek_v3" if is_sigmoid else "deepseek_v2",
        **_routed(values),
        "rope_parameters": rope,
        "q_lora_rank": values.get("attention.q_lora_rank") or None,
        "kv_lora_rank": values["attention.kv_lora_rank"],
        "qk_rope_head_dim": rotary,
        "qk_nope_head_dim": key - rotary,
        "v_head_dim": values.get("attention.value_length_mla", values["attention.value_length"]),
        "num_key_value_heads": values["attention.head_count"],
        "head_dim": rotary,
    }
    if not is_sigmoid:
        grouped = config["n_group"] > 1
        config["topk_method"] = "group_limited_greedy" if grouped else "greedy"
    return config


def _minimax_m2(values: Values) -> dict[str, Any]:
    return {
        "model_type": "minimax_m2",
        "num_local_experts": values["expert_count"],
        "intermediate_size": values["expert_feed_forward_length"],
        **_partial_rotary(values),
    }


def _gpt_oss(values: Values) -> dict[str, Any]:
    return {
        "model_type": "gpt_oss",
        "num_local_experts": values["expert_count"],
        "intermediate_size": values["expert_feed_forward_length"],
        "sliding_window": values["attention.sliding_window"],
        "rope_parameters": _rope(values) | {"truncate": False},
    }


_SEPARATE = {
    "gate": "mlp.experts.{}.gate_proj",
    "up": "mlp.experts.{}.up_proj",
    "down": "mlp.experts.{}.down_proj",
}
_BLOCK_SPARSE = {
    "gate": "block_sparse_moe.experts.{}.w1",
    "up": "block_sparse_moe.experts.{}.w3",
    "down": "block_sparse_moe.experts.{}.w2",
}
_SHARED = {
    f"ffn_{word}_shexp": f"mlp.shared_experts.{word}_proj" for word in ("gate", "up", "down")
}
_CORRECTION = {"exp_probs_b.bias": "mlp.gate.e_score_correction_bias"}

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "qwen3moe": Architecture(config=_qwen3moe, names=Names(experts=_SEPARATE)),
        "qwen2moe": Architecture(
            config=_qwen2moe,
            names=Names(
                experts=_SEPARATE,
                in_layer={
                    **{k: v.replace("experts", "expert") for k, v in _SHARED.items()},
                    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
                },
            ),
        ),
        "llama": Architecture(
            config=_llama,
            names=Names(
                experts=_BLOCK_SPARSE,
                in_layer={"ffn_gate_inp": "block_sparse_moe.gate"},
                permuted={"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"},
            ),
        ),
        "glm4moe": Architecture(
            config=_glm4moe,
            names=Names(
                experts=_SEPARATE,
                in_layer={**_SHARED, "post_attention_norm": "post_attention_layernorm"},
                biases=_CORRECTION,
            ),
        ),
        "deepseek2": Architecture(
            config=_deepseek2,
            names=Names(
                experts=_SEPARATE,
                in_layer={
                    **_SHARED,
                    "attn_q_a": "self_attn.q_a_proj",
                    "attn_q_b": "self_attn.q_b_proj",
                    "attn_q_a_norm": "self_attn.q_a_layernorm",
                    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
                    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
                    "attn_kv_b": "self_attn.kv_b_proj",
                },
                biases=_CORRECTION,
            ),
        ),
        "minimax-m2": Architecture(
            config=_minimax_m2,
            names=Names(
                experts=_BLOCK_SPARSE,
                in_layer={"ffn_gate_inp": "block_sparse_moe.gate"},
                biases={"exp_probs_b.bias": "block_sparse_moe.e_score_correction_bias"},
            ),
        ),
        "gpt-oss": Architecture(
            config=_gpt_oss,
            names=Names(
                in_layer={
                    "post_attention_norm": "post_attention_layernorm",
                    "ffn_gate_inp": "mlp.router",
                },
                biases={"attn_sinks.weight": "self_attn.sinks"},
                is_interleaved=True,
            ),
        ),
    }
)
"""By ``general.architecture``."""
