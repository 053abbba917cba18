"""Time decoding on an accelerator, eagerly and from graphs, for several shares of hot experts.

Run it where there is one: ``python bench/decode.py --device cuda``. It needs no network and no
tokenizer: it makes a model of random weights with Qwen3-30B-A3B's shape and fewer layers, packed,
whose experts are copies of a few. Tokens are random and the same for every row, so that experts
are chosen anew for each token; the likeliest next token is looked for, and not used.

Eager and replayed steps are timed in turns, on one engine, so what else the machine does meanwhile
meets both alike.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

# Packed once, and copied to all experts: bytes of an expert are like those of any other.
DISTINCT = 4
QWEN3_30B_A3B: dict[str, Any] = {
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
}
TINY: dict[str, Any] = {
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 256,
}
DICE = (1 << 20) + 7  # numbers that large tensors repeat: drawing them takes long
WARM_UP = 4  # steps; the first compiles, the second captures


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One share of hot experts.

    Attributes:
        hot_percent: Of all experts.
        eager_ms: Median of a token: the pass, the choice of the token, and the bookkeeping.
        graph_ms: The same, from graphs.
        after_ms: Median of the bookkeeping between two steps, contained in both.
        speedup: Of graphs over eager steps.
        hit_rate: Part of the pairs that the accelerator computed.
        why_eager: Why nothing was replayed; None where it was.
    """

    hot_percent: float
    eager_ms: float
    graph_ms: float
    after_ms: float
    speedup: float
    hit_rate: float
    why_eager: str | None


def say(line: str) -> None:
    """Print at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def config(options: argparse.Namespace) -> Any:
    """Return the model's config."""
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        **(TINY if options.tiny else QWEN3_30B_A3B),
        intermediate_size=64,  # of dense MLPs, of which there are none
        num_hidden_layers=options.layers,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        dtype="bfloat16",
        architectures=["Qwen3MoeForCausalLM"],
    )


def packed_experts(spec: Any, descriptor: Any) -> list[torch.Tensor]:
    """Pack a few experts of random weights."""
    from kt_core import plugins
    from kt_core.testing.backend_harness import random_layer
    from kt_core.types import MoeSpec

    few = MoeSpec(
        num_experts=DISTINCT,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
    )
    with plugins.load().backends.get("cpu").open("cpu") as host:
        packer = host.expert_kernel(few, descriptor)
        for index, weights in random_layer(few).items():
            packer.load(index, weights)
        return [packer.packed(index).clone() for index in range(DISTINCT)]


def dense_tensors(model_config: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Make every tensor but the experts', of random numbers."""
    from transformers import Qwen3MoeForCausalLM

    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(model_config)
    dice = torch.randn(DICE)
    for name, tensor in model.state_dict().items():
        if ".experts." not in name:
            few = (dice / tensor.shape[-1] ** 0.5).bfloat16()
            values = few.repeat(-(-tensor.numel() // DICE))[: tensor.numel()].view(tensor.shape)
            yield name, torch.ones_like(values) if "norm" in name else values.clone()


def write_model(folder: Path, model_config: Any, format_name: str) -> None:
    """Write a packed model directory: see docs/packed-format.md."""
    from safetensors.torch import save_file

    from kt_core import plugins
    from kt_core.checkpoint.packed_config import PackedConfig, PackedLayer
    from kt_core.checkpoint.packed_directory import file_entry, manifest_text, write_layer
    from kt_core.types import MoeSpec

    descriptor = plugins.load().formats.get(format_name).descriptor
    spec = MoeSpec(
        num_experts=model_config.num_experts,
        hidden_size=model_config.hidden_size,
        intermediate_size=model_config.moe_intermediate_size,
    )
    packed = packed_experts(spec, descriptor)
    files: dict[str, Any] = {}
    weight_map: dict[str, str] = {}
    layers: dict[str, PackedLayer] = {}
    for index in range(model_config.num_hidden_layers):
        file = f"experts-{index:05}.safetensors"
        layer = PackedLayer.of(f"model.layers.{index}.mlp.experts", file, spec, descriptor)
        experts = (packed[expert % DISTINCT] for expert in range(spec.num_experts))
        files[file] = write_layer(folder, layer, experts)
        weight_map |= dict.fromkeys((layer.packed_name, layer.digests_name), file)
        layers[layer.name] = layer
    dense = dict(dense_tensors(model_config))
    save_file(dense, folder / "dense.safetensors", metadata={"format": "pt"})
    weight_map |= dict.fromkeys(dense, "dense.safetensors")
    texts = {
        "model.safetensors.index.json": {"metadata": {}, "weight_map": weight_map},
        "config.json": {
            **model_config.to_dict(),
            "quantization_config": PackedConfig(layers=layers).to_dict(),
        },
    }
    for name, content in texts.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    for name in ("dense.safetensors", *texts):
        files[name] = file_entry(folder / name)
    (folder / "kt-packed.json").write_text(manifest_text(files), encoding="utf-8")


class Decoding:
    """One engine that decodes the tokens it is given, whatever it would say itself."""

    def __init__(self, engine: Any, prompt: Sequence[int], tokens: int) -> None:
        """Read the prompt, and make room for so many tokens behind it."""
        self._engine, self._passes = engine, engine.passes
        cache = self._passes.begin(len(prompt) + tokens, None)
        logits, self._cache = self._passes.run(torch.tensor([prompt]), cache)
        del logits
        self.after_s: list[float] = []

    def step(self, token: int) -> float:
        """Append a token, and return the seconds until the next one could be chosen."""
        start = time.perf_counter()
        logits, self._cache = self._passes.run(torch.tensor([[token]]), self._cache)
        passed = time.perf_counter()
        self._engine.accelerators.after_step(1, passed - start)
        self.after_s.append(time.perf_counter() - passed)
        logits.argmax()
        return time.perf_counter() - start


def measure(directory: Path, hot: float, options: argparse.Namespace) -> Row:
    """Load the model with a share of hot experts, and decode."""
    import kt_core

    with kt_core.load(
        directory,
        format="auto",
        device=options.device,
        threads=options.threads,
        hot_experts=f"{hot}%",
        placement="uniform",  # which stays: what is timed is not a move
    ) as engine:
        dice = torch.Generator().manual_seed(0)
        vocabulary = engine.model.config.vocab_size
        prompt = torch.randint(0, vocabulary, (options.prompt,), generator=dice).tolist()
        rounds = 2 * options.rounds
        steps = rounds * (options.tokens + WARM_UP)
        decoding = Decoding(engine, prompt, steps)
        times: dict[bool, list[float]] = {False: [], True: []}
        for turn in range(rounds):
            engine.passes.is_on = bool(turn % 2)
            tokens = torch.randint(0, vocabulary, (options.tokens + WARM_UP,), generator=dice)
            taken = [decoding.step(token) for token in tokens.tolist()]
            times[engine.passes.is_on] += taken[WARM_UP:]
        stats = engine.stats()
    assert stats.accelerators is not None
    eager, graph = (1e3 * median(times[is_on]) for is_on in (False, True))
    return Row(
        hot_percent=hot,
        eager_ms=eager,
        graph_ms=graph,
        after_ms=1e3 * median(decoding.after_s),
        speedup=eager / graph,
        hit_rate=stats.accelerators.hit_rate or 0.0,
        why_eager=stats.decode.why_eager,
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", help="as of kt run")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--format", default="int4", help="of the experts")
    parser.add_argument("--hot", default="0,25,50,100", help="shares of hot experts, in percent")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=48, help="of a round")
    parser.add_argument("--rounds", type=int, default=3, help="of each kind")
    parser.add_argument("--threads", type=int, help="host threads; one per core if left out")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: to see that it runs")
    parser.add_argument("--temporary", type=Path, help="folder for the model")
    parser.add_argument("--json", metavar="FILE", type=Path)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, and write JSON if asked to."""
    from kt_core.placement.statistics import statistics_file

    options = parse(arguments)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="kt-decode-", dir=options.temporary) as folder:
        model = Path(folder, "model")
        model.mkdir()
        start = time.perf_counter()
        write_model(model, config(options), options.format)
        say(
            f"{options.layers} layers, {options.format}, {options.device}, torch "
            f"{torch.__version__}, {platform.processor() or platform.machine()}, "
            f"{options.threads or 'all'} threads; written in {time.perf_counter() - start:.1f} s"
        )
        say(f"{'hot':>5} {'eager':>18} {'graphs':>18} {'speed-up':>8} {'between':>8} {'hits':>5}")
        rows = []
        for hot in map(float, options.hot.split(",")):
            row = measure(model, hot, options)
            statistics_file(model).unlink(missing_ok=True)  # of a model that nobody has again
            rows.append(row)
            eager, graph = (
                f"{ms:6.2f} ms {1e3 / ms:6.1f}/s" for ms in (row.eager_ms, row.graph_ms)
            )
            say(
                f"{row.hot_percent:>4.0f}% {eager:>18} {graph:>18} {row.speedup:>7.2f}x "
                f"{row.after_ms:>5.2f} ms {row.hit_rate:>4.0%} {row.why_eager or ''}"
            )
    if options.json:
        report = {
            "options": {k: str(v) for k, v in vars(options).items()},
            "torch": torch.__version__,
            "rows": [asdict(row) for row in rows],
        }
        options.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
