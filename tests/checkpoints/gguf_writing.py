"""GGUF files of tiny models, written by the package ``gguf`` as llama.cpp's converter calls it.

Names of tensors come from the package's own ``TensorNameMap``; what the converter does to some of
them (permuting, splitting) is done here as ``convert_hf_to_gguf.py`` does it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from checkpoints.test_gguf_blocks import random_blocks

_EXPERT = re.compile(r"(?P<block>.*\.experts)\.(?P<number>\d+)\.(?P<projection>\w+)\.weight")
_QUANTISABLE = {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"}


@dataclass
class GgufFile:
    """A file in the making.

    Attributes:
        architecture: Its name.
        layers: How many.
        tensors: Raw rows and their type, by GGUF's names.
        numbers: What the package says they are, by transformers' names.
    """

    architecture: str
    layers: int
    tensors: dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]] = field(default_factory=dict)
    numbers: dict[str, torch.Tensor] = field(default_factory=dict)

    def gguf_name(self, name: str) -> str:
        stem, _, leaf = name.rpartition(".")
        numbered = {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}
        names = gguf.get_tensor_name_map(numbered[self.architecture], self.layers)
        if leaf not in {"weight", "bias"}:  # such as e_score_correction_bias
            stem, leaf = (name, "weight") if name.endswith("sinks") else (
                name.removesuffix("_bias"), "bias")  # fmt: skip
        found = names.get_name(stem)
        assert found is not None, name
        return f"{found}.{leaf}"

    def add(self, name: str, weight: np.ndarray, kind: str) -> np.ndarray:
        """Store a tensor; return what it then is."""
        ggml_type = gguf.GGMLQuantizationType[kind]
        rows = weight.reshape(-1, weight.shape[-1])
        if kind in _QUANTISABLE:
            raw = gguf.quants.quantize(rows, ggml_type)
        else:  # the package only reads these: any bytes are some numbers
            raw = random_blocks(kind, *rows.shape, seed=len(self.tensors))
        self.tensors[name] = (raw.reshape(*weight.shape[:-1], -1), ggml_type)
        values: np.ndarray = gguf.quants.dequantize(raw, ggml_type).reshape(weight.shape)
        return values


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Return what llama.cpp's converter makes of rotary projections."""
    split = weight.reshape(heads, 2, len(weight) // heads // 2, *weight.shape[1:])
    return split.swapaxes(1, 2).reshape(weight.shape)


def undo_permute(weight: np.ndarray, heads: int) -> np.ndarray:
    split = weight.reshape(heads, len(weight) // heads // 2, 2, *weight.shape[1:])
    return split.swapaxes(1, 2).reshape(weight.shape)


def make_file(
    architecture: str,
    config: Any,
    tensors: Mapping[str, torch.Tensor],
    kind_of: Callable[[str], str],
) -> GgufFile:
    """Convert a checkpoint of transformers.

    Args:
        architecture: GGUF's name.
        config: Of the model.
        tensors: By transformers' names.
        kind_of: Gives the type of a matrix by GGUF's name; vectors and routers are F32.
    """
    file = GgufFile(architecture, config.num_hidden_layers)
    stacks: dict[tuple[str, str], dict[int, torch.Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        if found := _EXPERT.fullmatch(name):
            stacks[found["block"], found["projection"]][int(found["number"])] = tensor
            continue
        if ".experts." in name:  # gpt-oss: all experts in one, gate and up taking turns
            _split_fused(file, name, tensor, kind_of)
            continue
        target = file.gguf_name(name)
        weight = tensor.float().numpy()
        if architecture == "deepseek2" and target.endswith("attn_kv_b.weight"):
            _split_latent(file, config, name, target, weight, kind_of(target))
            continue
        heads = 0
        if architecture == "llama" and re.search(r"attn_[qk]\.weight", target):
            heads = config.num_attention_heads
            heads = heads if "attn_q" in target else config.num_key_value_heads
            weight = permute(weight, heads)
        if target.endswith("ffn_gate_inp_shexp.weight"):
            weight = weight[0]
        is_plain = weight.ndim == 1 or "ffn_gate_inp" in target
        values = file.add(
            target, np.ascontiguousarray(weight), "F32" if is_plain else kind_of(target)
        )
        values = undo_permute(values, heads) if heads else values
        file.numbers[name] = torch.from_numpy(np.ascontiguousarray(values)).reshape(tensor.shape)
    for (block, projection), found in stacks.items():
        target = file.gguf_name(f"{block}.{projection}.weight")
        stack = np.stack([found[number].float().numpy() for number in range(len(found))])
        for number, values in enumerate(file.add(target, stack, kind_of(target))):
            name = f"{block}.{number}.{projection}.weight"
            file.numbers[name] = torch.from_numpy(values.copy())
    return file


def _split_latent(  # noqa: PLR0917 - as the caller has them
    file: GgufFile, config: Any, name: str, target: str, weight: np.ndarray, kind: str
) -> None:
    heads, key, value = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
    split = weight.reshape(heads, key + value, -1)
    keys = np.ascontiguousarray(split[:, :key].transpose(0, 2, 1))
    values = np.ascontiguousarray(split[:, key:])
    keys = file.add(target.replace("kv_b", "k_b"), keys, "F16")  # its rows are short
    values = file.add(target.replace("kv_b", "v_b"), values, kind)
    joined = np.concatenate((keys.transpose(0, 2, 1), values), axis=1)
    file.numbers[name] = torch.from_numpy(joined.reshape(weight.shape).copy())


def _split_fused(
    file: GgufFile, name: str, tensor: torch.Tensor, kind_of: Callable[[str], str]
) -> None:
    block, _, leaf = name.rpartition(".")
    is_bias = leaf.endswith("_bias")
    weight = tensor.float() if is_bias else tensor.float().transpose(1, 2)
    is_down = leaf.startswith("down")
    parts = {"down": weight} if is_down else {"gate": weight[:, 0::2], "up": weight[:, 1::2]}
    numbers = torch.empty_like(weight)
    for i, (word, part) in enumerate(parts.items()):
        layer = re.search(r"\.(\d+)\.", block)
        assert layer is not None
        target = f"blk.{layer[1]}.ffn_{word}_exps.{'bias' if is_bias else 'weight'}"
        kind = "F32" if is_bias else kind_of(target)
        values = torch.from_numpy(file.add(target, part.contiguous().numpy(), kind).copy())
        numbers[:, i :: len(parts)] = values
    file.numbers[name] = numbers if is_bias else numbers.transpose(1, 2).contiguous()


def save(
    file: GgufFile, path: Path, metadata: Callable[[gguf.GGUFWriter], None], **more: Any
) -> Path:
    """Write it; further arguments are those of ``GGUFWriter``."""
    writer = gguf.GGUFWriter(path, file.architecture, **more)
    metadata(writer)
    for name, (raw, ggml_type) in file.tensors.items():
        writer.add_tensor(name, raw, raw_dtype=ggml_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
