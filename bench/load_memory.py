"""Does loading hold more than the packed experts, the dense part and half a gigabyte?

Makes a random bf16 Qwen3-MoE checkpoint in a temporary folder, one shard per layer, loads it in a
process of its own and watches that process' RssAnon (proc(5): resident memory that no file backs;
the peak that the kernel keeps, VmHWM, counts mapped files too). The page cache is warm: before and
after, as many threads read the same files, and their speed is what loading's is compared with.
Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SAMPLE_S = 0.005
ALLOWED_EXCESS_BYTES = 500_000_000
_DTYPE_BYTES = 2  # bfloat16
_READ_BYTES = 1 << 20


def rss_anon_bytes(pid: int) -> int:
    """Return the resident anonymous memory of a process, 0 where it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon")), 0)


def config(options: argparse.Namespace) -> Any:
    """Return the config of the model, with as many layers as make the size asked for."""
    from transformers import Qwen3MoeConfig

    expert_bytes = 3 * options.hidden * options.intermediate * _DTYPE_BYTES
    layers = max(1, round(options.size_gb * 1e9 / (options.experts * expert_bytes)))
    return Qwen3MoeConfig(
        hidden_size=options.hidden,
        moe_intermediate_size=options.intermediate,
        num_experts=options.experts,
        num_experts_per_tok=min(4, options.experts),
        num_hidden_layers=layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=max(1, options.hidden // 256),
        vocab_size=8192,
        dtype="bfloat16",
        architectures=["Qwen3MoeForCausalLM"],
    )


def checkpoint_tensors(model_config: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield names and shapes as released checkpoints have them: every expert by itself."""
    import torch
    from transformers import Qwen3MoeForCausalLM

    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(model_config)
    inner, hidden = model_config.moe_intermediate_size, model_config.hidden_size
    shapes = {
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }
    for name, tensor in model.state_dict().items():
        prefix, found, parameter = name.partition(".experts.")
        if not found:
            yield name, tuple(tensor.shape)
        elif parameter == "gate_up_proj":  # stands for all three
            for expert in range(model_config.num_experts):
                for projection, shape in shapes.items():
                    yield f"{prefix}.experts.{expert}.{projection}.weight", shape


def write_checkpoint(directory: Path, model_config: Any) -> int:
    """Write config, shards and index, holding one shard at a time; return the bytes of weights."""
    import torch
    from safetensors.torch import save_file

    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in checkpoint_tensors(model_config):
        parts = name.split(".")
        layer = parts[2] if parts[:2] == ["model", "layers"] else "other"
        shards.setdefault(f"model-{layer}.safetensors", {})[name] = shape
    generator = torch.Generator().manual_seed(0)
    size = 0
    for file, shapes in shards.items():
        tensors = {}
        for name, shape in shapes.items():
            values = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
            tensors[name] = (values + int("norm" in name)).to(torch.bfloat16)
            size += tensors[name].nbytes
        save_file(tensors, directory / file, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": size},
        "weight_map": {name: file for file, shapes in shards.items() for name in shapes},
    }
    text = json.dumps(index, indent=1)
    (directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    model_config.save_pretrained(directory)
    return size


def load_and_report(directory: str, weight_format: str, threads: int | None) -> None:
    """Load the model and print what it took: the work of the child process."""
    import kt_core
    import kt_core.engine

    before_bytes = rss_anon_bytes(os.getpid())
    cpu_s = time.process_time()
    with kt_core.load(directory, format=weight_format, device="cpu", threads=threads) as engine:
        stats = engine.stats()
        report = {
            "format": stats.format,
            "isa": stats.isa,
            "threads": stats.threads,
            "packed_bytes": stats.expert_bytes,
            "dense_bytes": stats.dense_bytes,
            "before_bytes": before_bytes,
            "after_bytes": rss_anon_bytes(os.getpid()),
            "load_s": round(stats.load_s, 3),
            "load_cpu_s": round(time.process_time() - cpu_s, 3),
        }
    sys.stdout.write(json.dumps(report) + "\n")


def read_s(directory: Path, threads: int) -> float:
    """Return how long threads take to read the shards from the page cache into a small buffer."""

    def read(file: Path) -> None:
        buffer = memoryview(bytearray(_READ_BYTES))
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass

    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, sorted(directory.glob("*.safetensors"))))
    return time.perf_counter() - start


def watch(pid: int, is_done: threading.Event, samples: list[int]) -> None:
    """Append RssAnon until told to stop. From outside: the child's own threads hold its GIL."""
    while not is_done.wait(SAMPLE_S):
        samples.append(rss_anon_bytes(pid))


def measure(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Load the checkpoint in a child process and return its report with the peak."""
    command = [sys.executable, __file__, "--load", str(directory), "--format", options.format]
    if options.threads:
        command += ["--threads", str(options.threads)]
    samples: list[int] = []
    is_done = threading.Event()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        watcher = threading.Thread(target=watch, args=(child.pid, is_done, samples))
        watcher.start()
        output, _ = child.communicate()
        is_done.set()
        watcher.join()
    if child.returncode:
        sys.exit(child.returncode)
    report: dict[str, Any] = json.loads(output.splitlines()[-1])
    return {**report, "peak_anonymous_bytes": max(samples), "samples": len(samples)}


def machine() -> dict[str, Any]:
    """Return what the numbers were measured on."""
    from kt_core import hardware

    found = hardware.detect()
    return {
        "cpu": found.cpu.name,
        "physical_cores": len(found.cpu.physical_cores),
        "memory_bytes": found.memory.total_bytes,
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--format", default="int4", help="what the experts become")
    parser.add_argument("--threads", type=int, help="threads that pack")
    parser.add_argument("--size-gb", type=float, default=1.5, help="bytes of experts / 1e9, bf16")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=512)
    parser.add_argument("--experts", type=int, default=32, help="experts in each layer")
    parser.add_argument("--temporary", type=Path, help="folder for the checkpoint")
    parser.add_argument("--keep", type=Path, help="copy the checkpoint there; must not exist")
    parser.add_argument("--load", help=argparse.SUPPRESS)  # this is the child process
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print JSON, and return 1 if the peak is above what is allowed."""
    options = parse(arguments)
    if options.load:
        load_and_report(options.load, options.format, options.threads)
        return 0
    model_config = config(options)
    with tempfile.TemporaryDirectory(prefix="kt-memory-", dir=options.temporary) as folder:
        start = time.perf_counter()
        source_bytes = write_checkpoint(Path(folder), model_config)
        written_s = time.perf_counter() - start
        threads = options.threads or len(os.sched_getaffinity(0))
        read_s(Path(folder), threads)  # warms it
        reads = [read_s(Path(folder), threads)]
        report = measure(Path(folder), options)
        reads.append(read_s(Path(folder), threads))
        if options.keep:
            shutil.copytree(folder, options.keep)
    over_packed = report["peak_anonymous_bytes"] - report["packed_bytes"]
    excess = over_packed - report["dense_bytes"]
    report = {
        "source_bytes": source_bytes,
        "layers": model_config.num_hidden_layers,
        "write_s": round(written_s, 3),
        **report,
        "over_packed_bytes": over_packed,
        "excess_bytes": excess,
        "allowed_excess_bytes": ALLOWED_EXCESS_BYTES,
        "read_gb_per_s": [round(source_bytes / seconds / 1e9, 3) for seconds in reads],
        "source_gb_per_s": round(source_bytes / report["load_s"] / 1e9, 3),
        # What it would be if nobody else had used the processors.
        "source_gb_per_cpu_s": round(source_bytes / report["load_cpu_s"] / 1e9, 3),
        "machine": machine(),
    }
    sys.stdout.write(json.dumps(report, indent=2) + "\n")
    return int(excess > ALLOWED_EXCESS_BYTES)


if __name__ == "__main__":
    sys.exit(main())
