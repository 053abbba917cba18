"""Checkpoints whose experts lie in one tensor, or are stored otherwise than the rest."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from checkpoints.schemes import SCHEMES
from checkpoints.test_quantised import TOLERANCE, difference, load
from checkpoints.writing import save_model, store_matrices, write_checkpoint
from kt_core import hardware
from kt_core.engine import loading
from kt_core.errors import UnsupportedFormatError
from kt_core.interfaces import ExpertsSite, ExpertWeights
from kt_core.plan.fitting import RESERVE_BYTES
from kt_core.quant.exact import format_named
from kt_core.quant.reference import dequantize, quantize

BY_NAME = {scheme.name: scheme for scheme in SCHEMES}
EXPERTS = re.compile(r"\.experts\.(gate_up_proj|down_proj)$")


def random_fp4(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Any bytes are fp4: return codes ``[..., in / 2]`` and scales ``[..., in / 32]``, uint8."""
    generator = torch.Generator().manual_seed(seed)
    *rows, columns = shape
    codes = torch.randint(0, 256, (*rows, columns // 2), generator=generator, dtype=torch.uint8)
    scales = torch.randint(119, 124, (*rows, columns // 32), generator=generator, dtype=torch.uint8)
    return codes, scales


def compare(quantised: Path, dense: Path, packed: str) -> None:
    truth = tiny.load_reference(dense)
    input_ids = tiny.sample_input_ids(truth.config)
    with load(quantised) as engine:
        got = tiny.logits(engine.model, input_ids)
        assert engine.stats().format == packed
    assert difference(got, tiny.logits(truth, input_ids)) <= TOLERANCE


def test_mxfp4_experts_of_a_layer_in_one_tensor(tmp_path: Path) -> None:
    """gpt_oss: transposed, gate and up interleaved, biases; as transformers' own code reads it."""
    tensors = save_model("gpt_oss", tmp_path / "base", intermediate_size=96)
    stored, numbers = {}, {}
    for seed, (name, tensor) in enumerate(tensors.items()):
        if not EXPERTS.search(name):
            stored[name] = numbers[name] = tensor
            continue
        experts, columns, rows = tensor.shape
        codes, scales = random_fp4(experts, rows, columns, seed=seed)
        blocks = codes.view(experts, rows, columns // 32, 16)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        numbers[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert len(stored) == len(tensors) + 8
    config = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    compare(
        write_checkpoint(tmp_path / "q", tmp_path / "base", stored, quantization_config=config),
        write_checkpoint(tmp_path / "d", tmp_path / "base", numbers),
        "mxfp4",
    )


def test_fp4_experts_beside_fp8_layers(tmp_path: Path) -> None:
    """deepseek_v4: int8 bytes of two codes, e8m0 scales called ``.scale``, 2-D."""
    sizes = {"moe_intermediate_size": 96}
    tensors = save_model("deepseek_v4", tmp_path / "base", **sizes)
    stored, numbers = {}, {}
    fp8 = BY_NAME["fp8 128x128 e8m0"].store
    count = 0
    for seed, (name, tensor) in enumerate(tensors.items()):
        owner = name.removesuffix("weight")
        if re.search(r"\.experts\.\d+\.w[123]\.weight$", name):
            rows, columns = tensor.shape
            codes, scales = random_fp4(rows, columns, seed=seed)
            e8m0 = scales.view(torch.float8_e8m0fnu)
            stored |= {name: codes.view(torch.int8), f"{owner}scale": e8m0}
            values = unpack_fp4_from_uint8(codes, rows, columns, torch.float32)
            numbers[name] = values * e8m0.float().repeat_interleave(32, 1)
            count += 1
        elif re.search(r"\.(wq_a|wq_b|wkv|shared_experts\.w\d)\.weight$", name):
            parts, numbers[name] = fp8(tensor)
            stored |= {f"{owner}{leaf}": part for leaf, part in parts.items()}
            count += 1
        else:
            stored[name] = numbers[name] = tensor
    assert count > 4 * 8 * 3
    config = {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}
    compare(
        write_checkpoint(tmp_path / "q", tmp_path / "base", stored, quantization_config=config),
        write_checkpoint(tmp_path / "d", tmp_path / "base", numbers),
        "mxfp4",
    )


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "glm4_moe", "minimax_m2"])
def test_fp8_of_other_families(family: str, tmp_path: Path) -> None:
    """Experts by other names, shared experts, latent attention."""
    tensors = save_model(family, tmp_path / "base")
    stored, numbers = {}, {}
    for name, tensor in tensors.items():
        is_linear = re.search(r"(_proj\w*|w[123])\.weight$", name) and tensor.dim() == 2
        if is_linear:
            parts, numbers[name] = BY_NAME["fp8 128x128 float32"].store(tensor)
            owner = name.removesuffix("weight")
            stored |= {f"{owner}{leaf}": part for leaf, part in parts.items()}
        else:
            stored[name] = numbers[name] = tensor
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    compare(
        write_checkpoint(tmp_path / "q", tmp_path / "base", stored, quantization_config=config),
        write_checkpoint(tmp_path / "d", tmp_path / "base", numbers),
        "fp8",
    )


def test_fp8_experts_of_a_layer_in_one_tensor(tmp_path: Path) -> None:
    """As transformers saves fp8 models: ``experts.gate_up_proj`` and ``..._scale_inv``."""
    tensors = save_model("qwen3_moe", tmp_path / "base", hidden_size=128, moe_intermediate_size=96)
    experts = sorted({n.partition(".experts.")[0] for n in tensors if ".experts." in n})
    stored = {n: t for n, t in tensors.items() if ".experts." not in n}
    numbers = dict(stored)
    for block in experts:
        gathered: dict[str, list[torch.Tensor]] = {}
        for expert in range(8):
            gate, up, down = (
                tensors[f"{block}.experts.{expert}.{projection}_proj.weight"]
                for projection in ("gate", "up", "down")
            )
            for name, weight in {"gate_up_proj": torch.cat([gate, up]), "down_proj": down}.items():
                parts, values = BY_NAME["fp8 128x128 float32"].store(weight)
                gathered.setdefault(name, []).append(parts["weight"].view(torch.uint8))
                gathered.setdefault(f"{name}_scale_inv", []).append(parts["weight_scale_inv"])
                split = values.chunk(2) if name == "gate_up_proj" else (values,)
                words = ("gate", "up") if name == "gate_up_proj" else ("down",)
                for word, part in zip(words, split, strict=True):
                    numbers[f"{block}.experts.{expert}.{word}_proj.weight"] = part.clone()
        for name, stack in gathered.items():
            stacked = torch.stack(stack)
            is_codes = stacked.dtype is torch.uint8
            value = stacked.view(torch.float8_e4m3fn) if is_codes else stacked
            stored[f"{block}.experts.{name}"] = value
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    compare(
        write_checkpoint(tmp_path / "q", tmp_path / "base", stored, quantization_config=config),
        write_checkpoint(tmp_path / "d", tmp_path / "base", numbers),
        "fp8",
    )


def test_layers_that_are_stored_in_different_formats(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each has its own; where one layer mixes them, the largest, and the user is told."""
    tensors = save_model(
        "qwen3_moe", tmp_path / "base", hidden_size=64, moe_intermediate_size=64,
        num_hidden_layers=4, num_experts=4,
    )  # fmt: skip
    int4 = BY_NAME["pack-quantized 4 bits group 32"]
    int8 = BY_NAME["pack-quantized 8 bits group 64"]
    stored, numbers = {}, {}
    for name, tensor in tensors.items():
        if not re.search(r"\.experts\.\d+\.", name) or ".layers.1." in name:  # 1 is not quantised
            stored[name] = numbers[name] = tensor
            continue
        is_int8 = ".layers.2." in name or (".layers.3." in name and ".down_proj." in name)
        parts, numbers[name] = (int8 if is_int8 else int4).store(tensor)
        owner = name.removesuffix("weight")
        stored |= {f"{owner}{leaf}": part for leaf, part in parts.items()}
        if not is_int8:  # beside down projections of int8
            numbers[name] = dequantize(quantize(numbers[name], format_named("int8-g64")))
    base = int4.config
    (four,), (eight,) = base["config_groups"].values(), int8.config["config_groups"].values()
    config = {
        **base,
        "config_groups": {
            "4": four,
            "8": eight | {"targets": ["re:.*layers.2.mlp.experts", "re:.*layers.3.*down_proj"]},
        },
    }
    quantised = write_checkpoint(
        tmp_path / "q", tmp_path / "base", stored, quantization_config=config
    )
    dense = write_checkpoint(tmp_path / "d", tmp_path / "base", numbers)
    with load(quantised) as engine:
        formats = engine.stats().format
        got = tiny.logits(engine.model, tiny.sample_input_ids(engine.model.config))
    assert formats == "bf16+int8-g64"
    assert "int4-g32 is quantised again there, as int8-g64" in caplog.text
    truth = tiny.load_reference(dense)
    want = tiny.logits(truth, tiny.sample_input_ids(truth.config))
    assert difference(got, want) <= TOLERANCE


def test_a_layout_that_cuts_groups_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter may do anything with a matrix; with codes and scales only what moves rows."""
    tensors = save_model("qwen3_moe", tmp_path / "base", moe_intermediate_size=64)
    stored, _ = store_matrices(tensors, BY_NAME["pack-quantized 4 bits group 32"].store)
    config = dict(BY_NAME["pack-quantized 4 bits group 32"].config)
    quantised = write_checkpoint(
        tmp_path / "q", tmp_path / "base", stored, quantization_config=config
    )

    def reversed_inputs(sites: list[ExpertsSite]) -> list[ExpertsSite]:
        def changed(site: ExpertsSite) -> ExpertsSite:
            def weights(rows: Mapping[str, torch.Tensor]) -> ExpertWeights:
                plain = site.expert_weights(rows)
                assert isinstance(plain.down, torch.Tensor)
                return replace(plain, down=plain.down.flip(1))

            return replace(site, expert_weights=weights)

        return [changed(site) for site in sites]

    find = loading.find_sites
    monkeypatch.setattr(loading, "find_sites", lambda *a: reversed_inputs(find(*a)))
    with pytest.raises(UnsupportedFormatError, match=r"down projections .* --format int8"):
        load(quantised)
    load(quantised, format="int8").close()


def test_dense_layers_can_be_packed(tmp_path: Path) -> None:
    tensors = save_model("qwen3_moe", tmp_path / "base", moe_intermediate_size=64)
    scheme = BY_NAME["pack-quantized 4 bits group 32"]
    stored, numbers = store_matrices(tensors, scheme.store)
    quantised = write_checkpoint(
        tmp_path / "q", tmp_path / "base", stored, quantization_config=dict(scheme.config)
    )
    dense = write_checkpoint(tmp_path / "d", tmp_path / "base", numbers)
    with load(dense, format="bf16", dense_format="int8") as engine:
        input_ids = tiny.sample_input_ids(engine.model.config)
        want = tiny.logits(engine.model, input_ids)
    with load(quantised, format="bf16", dense_format="int8") as engine:
        assert engine.stats().dense_layers > 0
        got = tiny.logits(engine.model, input_ids)
    assert difference(got, want) <= TOLERANCE


def test_too_little_memory_takes_a_smaller_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Never a larger one, though it comes earlier among those that auto tries."""
    tensors = save_model("qwen3_moe", tmp_path / "base", hidden_size=128, moe_intermediate_size=128)
    scheme = BY_NAME["fp8 128x128 float32"]
    stored, _ = store_matrices(tensors, scheme.store)
    quantised = write_checkpoint(
        tmp_path / "q", tmp_path / "base", stored, quantization_config=dict(scheme.config)
    )
    with load(quantised) as engine:
        stats = engine.stats()
    assert stats.format == "fp8"
    needed = stats.expert_bytes + stats.dense_bytes + RESERVE_BYTES
    monkeypatch.setattr(hardware, "available_memory_bytes", lambda: needed)
    with load(quantised) as engine:
        assert engine.stats().format == "fp8"
    monkeypatch.setattr(hardware, "available_memory_bytes", lambda: needed - 1)
    caplog.clear()
    with load(quantised) as engine:
        assert engine.stats().format == "int4-g32"
    assert "holds experts as fp8; they are quantised again, as int4-g32" in caplog.text
