"""The dense Llama model of a GGUF file, as transformers' own class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kt_core.errors import ModelSourceError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kt_demo.gguf import GgufFile

_ARCHITECTURE = "llama"
# GGUF name -> transformers name, from llama.cpp's gguf-py/gguf/tensor_mapping.py.
_OUTSIDE_LAYERS = {"token_embd.weight": "embed_tokens.weight", "output_norm.weight": "norm.weight"}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def load_dense(file: GgufFile) -> LlamaForCausalLM:
    """Return the model in float32, in evaluation mode."""
    config = _config(file.metadata)
    heads: dict[str, int] = {
        "attn_q": file.metadata["llama.attention.head_count"],
        "attn_k": file.metadata["llama.attention.head_count_kv"],
    }
    state = {f"model.{new}": file.tensor(old) for old, new in _OUTSIDE_LAYERS.items()}
    for layer in range(config.num_hidden_layers):
        for old, new in _IN_LAYER.items():
            tensor = file.tensor(f"blk.{layer}.{old}.weight")
            if old in heads:
                tensor = _unpermute(tensor, heads[old])
            state[f"model.layers.{layer}.{new}.weight"] = tensor
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # a buffer, not in the file
    model.eval()  # type: ignore[no-untyped-call]
    return model


def _config(metadata: Mapping[str, Any]) -> LlamaConfig:
    if (architecture := metadata["general.architecture"]) != _ARCHITECTURE:
        msg = (
            f"a GGUF file of architecture {architecture!r} cannot become the demo model: "
            f"the conversion knows {_ARCHITECTURE!r}.\nUse the file that kt_demo.fetch names."
        )
        raise ModelSourceError(msg)
    return LlamaConfig(
        vocab_size=metadata["llama.vocab_size"],
        hidden_size=metadata["llama.embedding_length"],
        intermediate_size=metadata["llama.feed_forward_length"],
        num_hidden_layers=metadata["llama.block_count"],
        num_attention_heads=metadata["llama.attention.head_count"],
        num_key_value_heads=metadata["llama.attention.head_count_kv"],
        head_dim=metadata["llama.rope.dimension_count"],
        max_position_embeddings=metadata["llama.context_length"],
        rms_norm_eps=metadata["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": metadata["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=metadata["tokenizer.ggml.bos_token_id"],
        eos_token_id=metadata["tokenizer.ggml.eos_token_id"],
        pad_token_id=metadata["tokenizer.ggml.padding_token_id"],
    )


def _unpermute(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Undo llama.cpp's reordering of query and key rows.

    Its rotary embedding turns neighbouring rows of a head, transformers' turns
    row i with row i + head_dim / 2 (``permute`` in llama.cpp's
    ``convert_hf_to_gguf.py``).
    """
    rows, cols = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, cols)
    return pairs.transpose(1, 2).reshape(rows, cols).contiguous()
