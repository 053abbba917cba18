"""Loading what is quantised takes what is packed and an expert per thread, as loading bf16 does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from checkpoints.gguf_writing import make_file, save
from checkpoints.schemes import SCHEMES, Scheme
from checkpoints.test_gguf_models import common, qwen3moe
from checkpoints.writing import QUANTISED, save_model, write_checkpoint

MB = 1_000_000
EXPERTS, SIZE = 160, 512

_MEASURE = """
import sys, threading
import kt_core
from kt_core import hardware

warm, model = sys.argv[1:]
kt_core.load(warm, threads=2).close()  # what is imported and allocated once
before = hardware.process_memory().anonymous_bytes
peak, done = before, threading.Event()

def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, hardware.process_memory().anonymous_bytes)

watcher = threading.Thread(target=watch)
watcher.start()
engine = kt_core.load(model, threads=2)
done.set()
watcher.join()
stats = engine.stats()
print(peak - before, stats.expert_bytes, stats.dense_bytes, stats.format)
"""


def config_and_names() -> tuple[Any, dict[str, torch.Size]]:
    """A model of one layer whose experts take 250 MB in bf16."""
    config = tiny.tiny_config("qwen3_moe")
    config.update({"num_hidden_layers": 1, "num_experts": EXPERTS, "mlp_only_layers": []})
    config.update({"hidden_size": SIZE, "moe_intermediate_size": SIZE, "dtype": "bfloat16"})
    config.update({"norm_topk_prob": True})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {}
    for name, parameter in model.state_dict().items():
        prefix = name.partition(".experts.")[0]
        if ".experts." not in name:
            shapes[name] = parameter.shape
            continue
        for expert in range(EXPERTS):
            for word in ("gate", "up", "down"):
                size = torch.Size((SIZE, SIZE))
                shapes[f"{prefix}.experts.{expert}.{word}_proj.weight"] = size
    return config, shapes


def store(scheme: Scheme, directory: Path) -> Path:
    config, shapes = config_and_names()
    expert, _ = scheme.store(torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0)))
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        if ".experts." in name and QUANTISED.search(name):
            owner = name.removesuffix("weight")
            tensors |= {f"{owner}{leaf}": part.clone() for leaf, part in expert.items()}
        else:
            tensors[name] = torch.zeros(shape, dtype=torch.bfloat16)
    config.save_pretrained(directory)
    return write_checkpoint(directory, directory, tensors, quantization_config=dict(scheme.config))


def store_gguf(directory: Path) -> Path:
    config, shapes = config_and_names()
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    kind = {True: "Q4_K", False: "Q8_0"}
    file = make_file("qwen3moe", config, tensors, lambda name: kind["_exps" in name])

    def metadata(writer: gguf.GGUFWriter) -> None:
        common(config, writer)
        qwen3moe(config, writer)

    return save(file, directory / "model.gguf", metadata)


NAMES = ("fp8 128x128 float32", "pack-quantized 4 bits group 32", "gptq 4 bits 64", "gguf")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_loading_takes_the_packed_size_and_little_more(name: str, tmp_path: Path) -> None:
    save_model("qwen3_moe", tmp_path / "warm")
    if name == "gguf":
        model = store_gguf(tmp_path)
    else:
        (scheme,) = (scheme for scheme in SCHEMES if scheme.name == name)
        model = store(scheme, tmp_path / "model")
    output = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path / "warm"), str(model)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    peak, packed, dense, packed_as = output.split()
    bf16_bytes = 3 * EXPERTS * SIZE * SIZE * 2
    assert bf16_bytes > 250 * MB
    assert packed_as != "bf16"
    assert int(packed) <= int(peak) <= int(packed) + int(dense) + 100 * MB
