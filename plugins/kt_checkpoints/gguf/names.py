"""What a GGUF tensor is called in transformers' checkpoints, and what was done to its rows.

Names from ``MODEL_TENSORS`` and ``TensorNameMap`` of gguf 0.19, and from llama.cpp's
``convert_hf_to_gguf.py``, which writes such files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch

from kt_checkpoints.gguf.blocks import decode
from kt_checkpoints.gguf.files import GgufModel
from kt_checkpoints.gguf.header import GgufTensor
from kt_checkpoints.gguf.types import GGML_TYPES
from kt_core.interfaces import Decode, QuantizedTensor, StoredMatrix
from kt_core.quant.exact import format_named
from kt_core.types import Format

_LAYER = re.compile(r"blk\.(?P<layer>\d+)\.(?P<rest>.*)")
_BASE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """How the tensors of an architecture are called.

    Attributes:
        in_layer: By GGUF's name within a layer, without ``weight`` or ``bias``: besides the usual.
        experts: By projection (``gate``, ``up``, ``down``), with ``{}`` for the expert's number.
        biases: Whole names within a layer that end otherwise.
        permuted: GGUF's names of matrices whose rows llama.cpp permutes for its rotary embedding,
            and the key of metadata that has the number of heads.
        is_interleaved: Whether gate and up are one parameter whose rows take turns.
    """

    in_layer: Mapping[str, str] = field(default_factory=dict)
    experts: Mapping[str, str] = field(default_factory=dict)
    biases: Mapping[str, str] = field(default_factory=dict)
    permuted: Mapping[str, str] = field(default_factory=dict)
    is_interleaved: bool = False


def matrices(model: GgufModel, names: Names, metadata: Mapping[str, Any]) -> Iterator[StoredMatrix]:
    """Yield every tensor that transformers' model has a place for.

    Args:
        model: The files.
        names: Of the architecture.
        metadata: Its own, without the architecture's name before each key.
    """
    known = {**_IN_LAYER, **names.in_layer}
    for name, (_, tensor) in model.tensors.items():
        if name in _BASE:
            yield _one(_BASE[name], name, tensor)
            continue
        found = _LAYER.fullmatch(name)
        if found is None:
            continue
        layer, rest = f"model.layers.{found['layer']}.", found["rest"]
        stem, _, leaf = rest.rpartition(".")
        if rest in names.biases:
            yield _one(layer + names.biases[rest], name, tensor)
        elif stem.endswith("_exps"):
            projection = stem.removeprefix("ffn_").removesuffix("_exps")
            if names.is_interleaved:
                yield from _interleaved(layer, projection, leaf, name, model)
            else:
                yield from _experts(layer + names.experts[projection], leaf, name, tensor)
        elif stem == "attn_k_b":
            yield _latent(layer, name, model)
        elif stem in known:
            heads = metadata[names.permuted[stem]] if stem in names.permuted else None
            yield _one(f"{layer}{known[stem]}.{leaf}", name, tensor, heads=heads)


class _Formats(TypedDict):
    weight_format: Format | None
    nearest: Format | None


def _formats(kind: int, *, is_changed: bool = False) -> _Formats:
    packed, nearest = GGML_TYPES[kind].packed, GGML_TYPES[kind].nearest
    if packed is None or is_changed:
        return {"weight_format": None, "nearest": format_named(packed or nearest)}
    return {"weight_format": format_named(packed), "nearest": None}


def _one(name: str, part: str, tensor: GgufTensor, *, heads: int | None = None) -> StoredMatrix:
    shape = tensor.shape
    if name.endswith("shared_expert_gate.weight"):  # a vector there, a matrix here
        shape = (1, *shape[-1:])

    def decode_one(parts: Mapping[str, torch.Tensor]) -> QuantizedTensor | torch.Tensor:
        raw = parts["blocks"]
        if heads is not None:
            # llama.cpp: [heads, 2, half] became [heads, half, 2].
            raw = raw.view(heads, len(raw) // heads // 2, 2, -1).transpose(1, 2).reshape(raw.shape)
        kind = GGML_TYPES[tensor.ggml_type]
        if kind.dtype is not None:
            raw = raw.view(shape)
        return decode(raw, tensor.ggml_type)

    is_vector = len(shape) == 1
    return StoredMatrix(
        name=name,
        shape=shape,
        parts={"blocks": part},
        decode=decode_one,
        **_formats(tensor.ggml_type, is_changed=is_vector),
    )


def _experts(name: str, leaf: str, part: str, tensor: GgufTensor) -> Iterator[StoredMatrix]:
    decode_row = _decoder(tensor.ggml_type)
    formats = _formats(tensor.ggml_type)
    for expert in range(tensor.shape[0]):
        yield StoredMatrix(
            name=f"{name.format(expert)}.{leaf}",
            shape=tensor.shape[1:],
            parts={"blocks": part},
            decode=decode_row,
            row=expert,
            **formats,
        )


def _decoder(ggml_type: int) -> Decode:
    def decode_row(parts: Mapping[str, torch.Tensor]) -> QuantizedTensor | torch.Tensor:
        return decode(parts["blocks"], ggml_type)

    return decode_row


def _interleaved(
    layer: str, projection: str, leaf: str, name: str, model: GgufModel
) -> Iterator[StoredMatrix]:
    """One parameter for all experts, transposed; gate and up take turns in it."""
    if projection == "up":
        return
    parts = {"blocks": name}
    stem = "down_proj"
    if projection == "gate":
        parts["second"] = name.replace("ffn_gate_exps", "ffn_up_exps")
        stem = "gate_up_proj"
    tensor = model.tensors[name][1]

    def join(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if "second" not in parts:
            return parts["blocks"]
        # Of a matrix the rows take turns, whatever a row holds; of biases the numbers.
        dimension = 0 if leaf == "weight" else 1
        return torch.stack((parts["blocks"], parts["second"]), dim=dimension + 1).flatten(
            dimension, dimension + 1
        )

    if leaf == "bias":
        experts, size = tensor.shape
        yield StoredMatrix(
            name=f"{layer}mlp.experts.{stem}_bias",
            shape=(experts, size * len(parts)),
            parts=parts,
            decode=join,
            weight_format=None,
            nearest=format_named("bf16"),
        )
        return
    experts, out_features, in_features = tensor.shape
    yield StoredMatrix(
        name=f"{layer}mlp.experts.{stem}",
        shape=(experts, in_features, out_features * len(parts)),
        parts=parts,
        decode=lambda found: decode(join(found), tensor.ggml_type),
        is_transposed=True,
        **_formats(tensor.ggml_type),
    )


def _latent(layer: str, name: str, model: GgufModel) -> StoredMatrix:
    """``kv_b_proj`` of latent attention, which llama.cpp splits into keys and values by head.

    ``attn_k_b`` is ``[heads, rank, key]``, ``attn_v_b`` ``[heads, value, rank]``.
    """
    second = name.replace("attn_k_b", "attn_v_b")
    keys, values = model.tensors[name][1], model.tensors[second][1]
    heads, rank, key_size = keys.shape
    value_size = values.shape[1]

    def decode_both(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        key = _dense(parts["keys"], keys).transpose(1, 2)
        value = _dense(parts["values"], values)
        return torch.cat((key, value), dim=1).flatten(0, 1)

    return StoredMatrix(
        name=f"{layer}self_attn.kv_b_proj.weight",
        shape=(heads * (key_size + value_size), rank),
        parts={"keys": name, "values": second},
        decode=decode_both,
        weight_format=None,
        nearest=format_named("bf16"),
    )


def _dense(raw: torch.Tensor, tensor: GgufTensor) -> torch.Tensor:
    from kt_core.quant.reference import dequantize

    found = decode(raw.flatten(0, -2), tensor.ggml_type)
    numbers = dequantize(found) if isinstance(found, QuantizedTensor) else found.float()
    return numbers.reshape(tensor.shape)
