"""Is what `kt plan` predicts for this machine what `kt run` then takes?

For one model directory or name: measures the machine, plans, loads the model, decodes greedily
after a prompt of random tokens, and prints predicted and measured bytes and speeds with their
errors, as JSON. Machine and model are measured by turns, in processes of their own, and medians are
compared. Ends
with 1 if the bytes are off by more than 3 % or the decoding speed by more than 20 %.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

ALLOWED_BYTES_ERROR = 0.03
ALLOWED_DECODE_ERROR = 0.20
# As the command line sets it, before torch is imported: kt_core.cli.main.
_ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "TRANSFORMERS_VERBOSITY": "error"}


def predict(model: str, weight_format: str, prompt: int) -> dict[str, Any]:
    """Return what `kt plan` says, with the machine measured anew."""
    command = (
        sys.executable, "-m", "kt_core.cli", "plan", model, "--format", weight_format,
        "--dense-format", "none", "--prompt", str(prompt), "--vram", "0", "--remeasure", "--json",
    )  # fmt: skip
    return _json_of(command)


def measure(model: str, weight_format: str, prompt: int, tokens: int) -> dict[str, Any]:
    """Return what a process of its own takes."""
    command = (
        sys.executable, __file__, model, "--child", "--format", weight_format,
        "--prompt", str(prompt), "--tokens", str(tokens),
    )  # fmt: skip
    return _json_of(command)


def _json_of(command: Sequence[str]) -> dict[str, Any]:
    environment = {**os.environ, **_ENVIRONMENT}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Load, decode, and return what it took: the work of the child process."""
    import torch

    import kt_core
    from kt_core.engine.generation import GenerationOptions, TokenStream

    generator = torch.Generator().manual_seed(0)
    with kt_core.load(options.model, format=options.format, device="cpu") as engine:
        vocabulary = engine.model.config.get_text_config(decoder=True).vocab_size
        prompt = torch.randint(vocabulary, (options.prompt,), generator=generator).tolist()
        chosen = GenerationOptions(max_new_tokens=options.tokens, temperature=0.0)
        for _ in range(2):  # the first one warms up
            stream = TokenStream(engine.model, prompt, chosen)
            for _token in stream:
                pass
        stats = engine.stats()
        return {
            "weight_bytes": stats.expert_bytes + stats.dense_bytes,
            "decode_tokens_per_s": stream.timing.decode_tokens_per_s,
            "prefill_tokens_per_s": stream.timing.prefill_tokens_per_s,
            "new_tokens": stream.timing.new_tokens,
        }


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Plan and run by turns, and return medians and errors."""
    plans, runs = [], []
    for _ in range(options.rounds):
        plans.append(predict(options.model, options.format, options.prompt + options.tokens // 2))
        runs.append(measure(options.model, options.format, options.prompt, options.tokens))
    predicted = {
        "weight_bytes": median(plan["total_weight_bytes"] for plan in plans),
        "decode_tokens_per_s": median(plan["decode_tokens_per_s"] for plan in plans),
        "prefill_tokens_per_s": median(plan["prefill_tokens_per_s"] for plan in plans),
    }
    measured = {key: median(run[key] for run in runs) for key in predicted}
    return {
        "model": Path(options.model).name,
        "format": options.format,
        "prompt_tokens": options.prompt,
        "new_tokens": runs[0]["new_tokens"],
        "predicted": predicted,
        "measured": measured,
        "errors": {key: predicted[key] / measured[key] - 1 for key in predicted},
        "decode_s": plans[-1]["decode_s"],
        "prefill_s": plans[-1]["prefill_s"],
        "decode_samples": [round(run["decode_tokens_per_s"], 2) for run in runs],
        "host": plans[-1]["machine"]["host"],
    }


def is_good(errors: Mapping[str, float]) -> bool:
    """Whether bytes and decoding are within what is promised."""
    return (
        abs(errors["weight_bytes"]) <= ALLOWED_BYTES_ERROR
        and abs(errors["decode_tokens_per_s"]) <= ALLOWED_DECODE_ERROR
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", help="a directory, or a name such as demo")
    parser.add_argument("--format", default="int4")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to decode")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, print JSON, and say whether it is good enough."""
    options = parse(arguments)
    if options.child:
        sys.stdout.write(json.dumps(run(options)) + "\n")
        return 0
    report = compare(options)
    sys.stdout.write(json.dumps(report, indent=2) + "\n")
    return int(not is_good(report["errors"]))


if __name__ == "__main__":
    sys.exit(main())
