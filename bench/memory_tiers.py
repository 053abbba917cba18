"""How fast does a packed model decode that is larger than the memory it may use?

For a directory that `kt quant` made. A control group of its own (cgroup v1 or v2, a child of this
process's) limits a process to some part of the experts' bytes, page cache included. From an empty
page cache it computes random tokens, `--step` at a time and each time without context, so that they
are sent to all experts; and says how long each pass took, how many pages it had to wait for (major
faults: what read-ahead did not bring), how much was read from disk, and what was swapped. A plain
read of a file of experts, outside the group, says what the disk gives. Prints JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # for bench itself
from bench.page_cache import forget, read_ranges

# As the command line sets it, before torch is imported: kt_core.cli.main.
_ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "TRANSFORMERS_VERBOSITY": "error"}
_ROOT = Path("/sys/fs/cgroup")


@contextlib.contextmanager
def limited(limit_bytes: int) -> Iterator[Path]:
    """Make a control group below our own that may use so much memory; yield its folder.

    Raises:
        OSError: This machine does not let us.
    """
    lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
    paths = {line.split(":")[1]: line.split(":")[2] for line in lines}
    if "memory" in paths:
        parent, limit = _ROOT / "memory" / paths["memory"].lstrip("/"), "memory.limit_in_bytes"
    else:
        parent, limit = _ROOT / paths[""].lstrip("/"), "memory.max"
    group = parent / f"kt-memory-tiers-{os.getpid()}"
    group.mkdir()
    try:
        (group / limit).write_text(str(limit_bytes), encoding="ascii")
        yield group
    finally:
        group.rmdir()


def decode(model: str, options: argparse.Namespace) -> None:
    """Decode, and print what it took: the work of the child process."""
    import torch

    import kt_core
    import kt_core.engine

    with kt_core.load(model, threads=options.threads) as engine, torch.inference_mode():
        size = engine.model.config.get_text_config(decoder=True).vocab_size
        generator = torch.Generator().manual_seed(options.seed)
        ids = torch.randint(size, (1, options.passes * options.step), generator=generator)
        times, faults, read = [], _faults(), _read_bytes()
        for step in torch.split(ids, options.step, dim=1):
            start = time.perf_counter()
            engine.model(input_ids=step, use_cache=False)
            times.append(time.perf_counter() - start)
        report = {
            "expert_bytes": engine.stats().expert_bytes,
            "median_pass_s": median(times),
            "mean_pass_s": sum(times) / len(times),
            "slowest_pass_s": max(times),
            "major_faults_per_pass": (_faults() - faults) / len(times),
            "read_bytes_per_pass": (_read_bytes() - read) / len(times),
            "swapped_bytes": _status("VmSwap"),
            "anonymous_bytes": _status("RssAnon"),
        }
    sys.stdout.write(json.dumps(report) + "\n")


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def _read_bytes() -> int:
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(key)), 0)


def run(options: argparse.Namespace, limit_bytes: int) -> dict[str, Any]:
    """Let a child decode in a group of its own."""
    files = sorted(options.model.glob("*.safetensors"))
    command = [sys.executable, __file__, str(options.model), "--child"]
    for name in ("passes", "step", "threads", "seed"):
        command += [f"--{name}", str(getattr(options, name))]
    forget(files)
    with limited(limit_bytes) as group:
        # The child moves itself, so that nothing of it is charged elsewhere.
        script = f'echo $$ > {group / "cgroup.procs"} && exec "$@"'
        done = subprocess.run(
            ["sh", "-c", script, "sh", *command],
            env={**os.environ, **_ENVIRONMENT}, stdout=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            return {"failed": done.returncode}
        report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    forget(files)
    largest = max(files, key=lambda file: file.stat().st_size)
    start = time.perf_counter()
    size = read_ranges([(largest, 0, largest.stat().st_size)])
    report["plain_read_gb_per_s"] = size / (time.perf_counter() - start) / 1e9
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure each limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--limits-gb", default="8,1", help="memory of the group; 1 is 10^9 bytes")
    parser.add_argument("--passes", type=int, default=128)
    parser.add_argument(
        "--step", type=int, default=1, help="tokens of a pass: many meet all experts"
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        decode(str(options.model), options)
        return 0
    rows = []
    for limit in (float(word) for word in options.limits_gb.split(",")):
        rows.append({"limit_gb": limit} | run(options, int(limit * 1e9)))
        sys.stderr.write(json.dumps(rows[-1]) + "\n")
    sys.stdout.write(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
