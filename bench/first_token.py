"""How long is it to the first token of a packed model, beside reading what that token needs?

For a directory that `kt quant` made. By turns, each time from an empty page cache: a process of its
own loads the model and decodes one token, and says how long that took after its imports; then what
the page cache holds of the model, which is what was needed, is forgotten and read with plain reads.
Prints JSON. `--warm` leaves the page cache alone instead.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # for bench itself
from bench.page_cache import forget, read_ranges, resident_ranges

# As the command line sets it, before torch is imported: kt_core.cli.main.
_ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "TRANSFORMERS_VERBOSITY": "error"}


def first_token(model: str, threads: int | None, prompt_tokens: int) -> None:
    """Load, decode a token, and print what it took: the work of the child process."""
    import torch

    import kt_core
    import kt_core.engine

    start, cpu_s = time.perf_counter(), time.process_time()
    with kt_core.load(model, threads=threads) as engine:
        loaded_s = time.perf_counter() - start
        size = engine.model.config.get_text_config(decoder=True).vocab_size
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(size, (1, prompt_tokens), generator=generator)
        with torch.inference_mode():
            engine.model(input_ids=ids).logits[0, -1].argmax()
        report = {
            "load_s": loaded_s,
            "first_token_s": time.perf_counter() - start,
            "cpu_s": time.process_time() - cpu_s,
            "expert_bytes": engine.stats().expert_bytes,
        }
    sys.stdout.write(json.dumps(report) + "\n")


def one_round(model: Path, files: list[Path], options: argparse.Namespace) -> dict[str, Any]:
    """Measure one start, and one plain read of what it needed."""
    if not options.warm:
        forget(files)
    command = [sys.executable, __file__, str(model), "--child", "--prompt", str(options.prompt)]
    if options.threads:
        command += ["--threads", str(options.threads)]
    done = subprocess.run(
        command, env={**os.environ, **_ENVIRONMENT}, stdout=subprocess.PIPE, text=True, check=True
    )
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    needed = [(file, *part) for file in files for part in resident_ranges(file)]
    if not options.warm:
        forget(files)
    start = time.perf_counter()
    report["needed_bytes"] = read_ranges(needed)
    report["read_s"] = time.perf_counter() - start
    report["ratio"] = report["first_token_s"] / report["read_s"]
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure some rounds and print them with their medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompt", type=int, default=1, help="tokens of the prompt")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        first_token(str(options.model), options.threads, options.prompt)
        return 0
    files = sorted(options.model.glob("*.safetensors"))
    rounds = [one_round(options.model, files, options) for _ in range(options.rounds)]
    medians = {key: median(r[key] for r in rounds) for key in rounds[0]}
    sys.stdout.write(json.dumps({"median": medians, "rounds": rounds}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
