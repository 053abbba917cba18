"""Write a split model as a Glm4Moe checkpoint.

Why this architecture: its attention can be exactly Llama's (no query/key norm, full rotary), its
layers have a shared expert, and its router normalises sigmoid scores and multiplies them by a
factor, so equal scores with factor top_k give every chosen expert the weight 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import GenerationConfig, Glm4MoeConfig

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from kt_demo.recipe import MoeShape
    from kt_demo.split import LayerSplit

_KEPT_SETTINGS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
_SHARD_METADATA = {"format": "pt"}  # transformers refuses a shard without it


def moe_config(dense: LlamaConfig, shape: MoeShape) -> Glm4MoeConfig:
    """Return the config of ``dense`` after the split."""
    kept: dict[str, Any] = {name: getattr(dense, name) for name in _KEPT_SETTINGS}
    return Glm4MoeConfig(
        **kept,
        architectures=["Glm4MoeForCausalLM"],
        dtype=torch.bfloat16,
        rope_parameters={**(dense.rope_parameters or {}), "partial_rotary_factor": 1.0},
        tie_word_embeddings=True,
        use_qk_norm=False,
        attention_bias=False,
        n_routed_experts=shape.num_experts,
        moe_intermediate_size=shape.expert_neurons,
        n_shared_experts=shape.shared_neurons(kept["intermediate_size"]) // shape.expert_neurons,
        num_experts_per_tok=shape.top_k,
        routed_scaling_factor=float(shape.top_k),
        norm_topk_prob=True,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=0,
        num_mtp_layers=0,
    )


def moe_tensors(
    dense: LlamaForCausalLM, splits: Sequence[LayerSplit], *, dtype: torch.dtype = torch.bfloat16
) -> dict[str, torch.Tensor]:
    """Return the tensors of the split model under the names they have on disk."""
    tensors = {
        name: tensor.to(dtype)
        for name, tensor in dense.state_dict().items()
        if ".mlp." not in name and name != "lm_head.weight"  # tied to the embedding
    }
    layers: Any = dense.model.layers
    for index, (layer, split) in enumerate(zip(layers, splits, strict=True)):
        gate, up, down = (
            projection.weight.detach().to(dtype)
            for projection in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj)
        )
        prefix = f"model.layers.{index}.mlp."
        tensors[f"{prefix}gate.weight"] = split.router.to(dtype)
        # Float32 in every model that has one. Zero: the router needs no correction.
        tensors[f"{prefix}gate.e_score_correction_bias"] = torch.zeros(len(split.experts))
        parts = {"shared_experts": split.shared}
        parts |= {f"experts.{expert}": neurons for expert, neurons in enumerate(split.experts)}
        for part, neurons in parts.items():
            tensors[f"{prefix}{part}.gate_proj.weight"] = gate[neurons]
            tensors[f"{prefix}{part}.up_proj.weight"] = up[neurons]
            tensors[f"{prefix}{part}.down_proj.weight"] = down[:, neurons].contiguous()
    return tensors


def write_checkpoint(
    folder: Path,
    config: Glm4MoeConfig,
    tensors: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Write everything that ``from_pretrained`` reads into ``folder``, which must not exist."""
    folder.mkdir()
    config.save_pretrained(folder)
    # A chat turn ends with the tokenizer's end token; plain text ends with the unknown token,
    # <|endoftext|>, which separated documents in training.
    ends = [tokenizer.eos_token_id, tokenizer.unk_token_id]
    generation = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=config.bos_token_id, eos_token_id=ends, pad_token_id=config.pad_token_id
    )
    generation.save_pretrained(folder)
    # One file that holds the chat template too, instead of a .jinja file beside it.
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    shard = folder / "model.safetensors"
    try:
        save_file(tensors, shard, metadata=_SHARD_METADATA)
    except SafetensorError as err:  # a full disk arrives as this
        raise OSError(str(err)) from err
    shard.chmod((folder / "config.json").stat().st_mode)  # safetensors lets only the owner read
