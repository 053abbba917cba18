"""How long does the backward pass take, in units of the forward pass?

A layer of Qwen3-30B-A3B's shape (hidden 2048, intermediate 768, 128 experts, 8 per token) with
bf16 hidden states, random routing. Forward and backward alternate, so that what else the machine
does falls on both; the ratio is the median over rounds of one pair's. Prints a line for each
format and precision, then JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from kt_core.interfaces import ExpertKernel, LoraWeights
from kt_core.plugins import load
from kt_core.testing import reference
from kt_core.types import ActivationPrecision, MoeSpec

# Format, precision. int8 activations are never auto's choice in training: see docs/training.md.
CASES = (
    ("bf16", "auto"),
    ("int8", "auto"),
    ("int4-g32", "auto"),
    ("int8", "int8"),
    ("int4-g32", "int8"),
)


def milliseconds(work: Callable[[], Any]) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def lora_for(spec: MoeSpec, rank: int) -> LoraWeights | None:
    """Make matrices for all three projections; None for rank 0."""
    if rank == 0:
        return None
    generator = torch.Generator().manual_seed(1)
    shapes = {"gate": (spec.hidden_size, spec.intermediate_size)}
    shapes |= {"up": shapes["gate"], "down": shapes["gate"][::-1]}
    matrices: dict[str, Any] = {}
    for name, (inputs, outputs) in shapes.items():
        a = torch.randn(spec.num_experts, rank, inputs, generator=generator)
        b = torch.randn(spec.num_experts, outputs, rank, generator=generator)
        matrices |= {f"{name}_a": 0.01 * a, f"{name}_b": 0.01 * b}
    return LoraWeights(scale=1.0, **matrices)


def measure(
    kernel: ExpertKernel, tokens: int, top_k: int, rounds: int, rank: int
) -> dict[str, float]:
    """Return the median times of forward and backward, and the median ratio."""
    spec = kernel.spec
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, spec.hidden_size, generator=generator).bfloat16()
    grad = torch.randn(tokens, spec.hidden_size, generator=generator).bfloat16()
    ids = torch.rand(tokens, spec.num_experts, generator=generator).topk(top_k).indices
    weights = torch.rand(tokens, top_k, generator=generator)
    lora = lora_for(spec, rank)
    pairs = []
    for _ in range(rounds + 1):
        forward = milliseconds(lambda: kernel.submit_training(hidden, ids, weights, lora).wait())
        backward = milliseconds(lambda: kernel.backward(hidden, ids, weights, grad, lora))
        pairs.append((forward, backward))
    forwards, backwards = zip(*pairs[1:], strict=True)  # the first touches new memory
    return {
        "forward_ms": statistics.median(forwards),
        "backward_ms": statistics.median(backwards),
        "ratio": statistics.median(b / f for f, b in pairs[1:]),
    }


def main() -> None:
    """Measure every case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=768)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--lora-rank", type=int, default=0, help="0: no LoRA")
    options = parser.parse_args()
    spec = MoeSpec(
        num_experts=options.experts,
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
    )
    registry = load()
    weights = reference.random_weights(spec, torch.Generator().manual_seed(0))
    found = []
    with registry.backends.get("cpu").open("cpu", threads=options.threads) as device:
        for name, precision in CASES:
            kernel = device.expert_kernel(
                spec,
                registry.formats.get(name).descriptor,
                precision=ActivationPrecision(precision),
            )
            for expert in range(spec.num_experts):
                kernel.load(expert, weights)
            result = measure(
                kernel, options.tokens, options.top_k, options.rounds, options.lora_rank
            )
            found.append({"format": name, "precision": precision, **result})
            sys.stdout.write(
                f"{name:10} {precision:5} forward {result['forward_ms']:7.1f} ms  "
                f"backward {result['backward_ms']:7.1f} ms  ratio {result['ratio']:.2f}\n"
            )
            sys.stdout.flush()
        report = {
            **vars(options),
            "threads": device.threads,
            "instruction_set": device.capabilities.instruction_set,
            "results": found,
        }
    sys.stdout.write(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
