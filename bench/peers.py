"""Compare kt's experts with kt-kernel (KTransformers) and torch, in alternation.

``python bench/peers.py --format int4,int8 --tokens 1,16,64,1024 --threads 1`` starts one process
for kt and one for each peer, all with layers of the same shape, and lets them compute by turns,
round after round: kt, peer, kt, peer ... Whoever is not computing is stopped (SIGSTOP), so that no
idle thread of one spins on the cores of another. A ratio is the median over the rounds of the
peer's time over kt's, so more than 1 means that kt is faster.

kt-kernel is installed without its dependencies into an environment of its own, ``--venv``, which
sees the packages of the Python that runs this.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import site
import subprocess
import sys
import venv
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

KT_KERNEL = "kt-kernel==0.7.2"
KT_KERNEL_NEEDS = "gguf"  # it is imported, whatever is computed
# What a format of ours is compared with: methods of kt-kernel, which weigh as much or less, torch.
PEERS = {
    "int4": ("RAWINT4", "AMXINT4"),
    "int8": ("AMXINT8",),
    "bf16": ("BF16", "torch"),
    "fp8-channel": ("FP8_PERCHANNEL",),
}
# The AMX classes have code for AVX-512, too.
KT_KERNEL_CLASSES = {
    "AMXINT4": "AMXInt4_MOE",
    "AMXINT8": "AMXInt8_MOE",
    "BF16": "AMXBF16_MOE",
    "FP8_PERCHANNEL": "AMXFP8PerChannel_MOE",
    "RAWINT4": "AMXInt4_KGroup_MOE",
}
_DISTINCT_EXPERTS = 4


class Contestant(ABC):
    """One implementation, in a process of its own."""

    @abstractmethod
    def measure(self, tokens: int, seconds: float) -> list[float]:
        """Return the seconds of each call."""


class Kt(Contestant):
    """This project."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Pack layers; what a call is, is what ``kt bench experts`` measures."""
        from kt_core import plugins
        from kt_core.bench.layers import PackedLayers, choose_layers
        from kt_core.types import MoeSpec

        registry = plugins.load()
        weight_format = registry.formats.get(options.contestant.removeprefix("kt:"))
        spec = MoeSpec(
            num_experts=options.experts,
            hidden_size=options.hidden,
            intermediate_size=options.intermediate,
        )
        backend, info = registry.find_device("cpu")
        device = backend.open(info.name, threads=options.threads)
        size = device.expert_bytes(spec, weight_format.descriptor)
        layers = choose_layers(spec, size, None).layers
        self.layers = PackedLayers(device, weight_format, spec, top_k=options.top_k, layers=layers)

    def measure(self, tokens: int, seconds: float) -> list[float]:
        """See ``Contestant.measure``."""
        from kt_core.bench.timing import repeat

        hidden = self.layers.hidden(tokens)
        self.layers.compute(self.layers.next_call(tokens), hidden)
        return repeat(
            lambda: self.layers.next_call(tokens),
            lambda call: self.layers.compute(call, hidden),
            seconds=seconds,
        )


class Other(Contestant):
    """A peer: random weights, and kt's routing."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Make the weights of a few experts."""
        import torch

        from kt_core import hardware
        from kt_core.bench.layers import COLD_FACTOR, UNKNOWN_CACHE_BYTES
        from kt_core.bench.routing import Routing

        torch.manual_seed(0)
        self.options = options
        hidden, inner = options.hidden, options.intermediate
        self.sources = [
            [
                (torch.randn(shape) * shape[1] ** -0.5).bfloat16()
                for shape in ((inner, hidden), (inner, hidden), (hidden, inner))
            ]
            for _ in range(min(_DISTINCT_EXPERTS, options.experts))
        ]
        # Half a byte is the least that a weight takes.
        least_bytes = options.experts * 3 * hidden * inner // 2
        cache_bytes = hardware.last_level_cache_bytes() or UNKNOWN_CACHE_BYTES
        self.num_layers = -(-COLD_FACTOR * cache_bytes // least_bytes)
        self.routing = Routing(options.experts, options.top_k, self.num_layers)

    def source(self, expert: int) -> list[Any]:
        """Return gate, up and down of one expert, bfloat16."""
        return self.sources[expert % len(self.sources)]

    def measure(self, tokens: int, seconds: float) -> list[float]:
        """See ``Contestant.measure``."""
        import torch

        from kt_core.bench.timing import repeat

        hidden = torch.randn(tokens, self.options.hidden).bfloat16()
        out = torch.empty_like(hidden)
        compute = self.compute
        compute(self.routing.next_call(tokens), hidden, out)
        return repeat(
            lambda: self.routing.next_call(tokens),
            lambda call: compute(call, hidden, out),
            seconds=seconds,
        )

    @abstractmethod
    def compute(self, call: Any, hidden: Any, out: Any) -> None:
        """Compute one layer."""


class Torch(Other):
    """Three matrix products for each expert, bfloat16."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Copy the weights into every expert."""
        import torch

        super().__init__(options)
        torch.set_num_threads(options.threads)
        self.layers = [
            [[m.clone() for m in self.source(e)] for e in range(options.experts)]
            for _ in range(self.num_layers)
        ]

    def compute(self, call: Any, hidden: Any, out: Any) -> None:
        """See ``Other.compute``."""
        import torch
        from torch.nn import functional

        with torch.inference_mode():
            out.zero_()
            for expert in call.expert_ids.unique().tolist():
                token, k = torch.where(call.expert_ids == expert)
                gate, up, down = self.layers[call.layer][expert]
                x = hidden[token]
                inner = functional.silu(functional.linear(x, gate)) * functional.linear(x, up)
                scale = call.weights[token, k, None].bfloat16()
                out.index_add_(0, token, functional.linear(inner, down) * scale)


class KtKernel(Other):
    """The kernels of KTransformers, through the bindings of their wheel."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Let the wheel pack its layers."""
        import torch
        from kt_kernel import kt_kernel_ext  # type: ignore[import-not-found]

        super().__init__(options)
        torch.set_num_threads(1)
        method = options.contestant
        kernel_class = getattr(kt_kernel_ext.moe, KT_KERNEL_CLASSES[method])
        self.cpu = kt_kernel_ext.CPUInfer(options.threads)
        experts = range(options.experts)
        order = torch.arange(options.experts, dtype=torch.int64)
        self.layers: list[tuple[Any, Any]] = []
        self.kept: list[Any] = []  # until the wheel has packed it
        for layer in range(self.num_layers):
            config = kt_kernel_ext.moe.MOEConfig(
                options.experts, options.top_k, options.hidden, options.intermediate, 0
            )
            config.layer_idx, config.pool = layer, self.cpu.backend_
            config.max_len = max(options.tokens)
            if method.startswith("AMXINT"):  # quantised by the wheel, from one tensor
                whole = [torch.stack([self.source(e)[j] for e in experts]) for j in range(3)]
                config.gate_proj, config.up_proj, config.down_proj = (m.data_ptr() for m in whole)
                self.kept.append(whole)
            else:
                stored = [[_stored(method, m) for m in source] for source in self.sources]
                data = [
                    [[stored[e % len(stored)][j][part].data_ptr() for e in experts]]
                    for part in (0, 1)
                    for j in range(3)
                ]
                config.gate_projs, config.up_projs, config.down_projs = data[:3]
                if method != "BF16":
                    config.gate_scales, config.up_scales, config.down_scales = data[3:]
                config.quant_config.zero_point = False
                if method == "RAWINT4":
                    config.quant_config.bits, config.quant_config.group_size = 4, 32
                elif method == "FP8_PERCHANNEL":
                    config.quant_config.bits, config.quant_config.per_channel = 8, True
                self.kept.append(stored)
            kernel = kernel_class(config)
            self.cpu.submit(kernel.load_weights_task(order.data_ptr()))
            self.cpu.sync()
            self.kept.clear()
            self.layers.append((kernel, config))
        # Their threads are pinned to the first cores; the caller spins: not on the first one.
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

    def compute(self, call: Any, hidden: Any, out: Any) -> None:
        """See ``Other.compute``."""
        import torch

        count = torch.tensor([len(hidden)], dtype=torch.int32)
        self.layers[call.layer][0].forward(
            count.data_ptr(),
            self.options.top_k,
            call.expert_ids.data_ptr(),
            call.weights.data_ptr(),
            hidden.data_ptr(),
            out.data_ptr(),
            False,
        )


def _stored(method: str, weight: Any) -> tuple[Any, Any]:
    """Return codes and scales as a method of kt-kernel wants them."""
    import torch

    if method == "BF16":
        return weight.contiguous(), weight
    rows, columns = weight.shape
    if method == "FP8_PERCHANNEL":
        scale = weight.float().abs().amax(1, keepdim=True) / 448
        codes = (weight.float() / scale).to(torch.float8_e4m3fn)
        return codes.view(torch.uint8).contiguous(), scale.flatten().contiguous()
    groups = weight.float().view(rows, columns // 32, 32)
    scale = (groups.abs().amax(2, keepdim=True) / 7).bfloat16()
    codes = (groups / scale.float()).round().clamp(-8, 7).to(torch.int64) + 8
    words = (codes.view(rows, columns // 8, 8) << (torch.arange(8) * 4)).sum(2)
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    return words.contiguous(), scale.squeeze(2).contiguous()


def serve(options: argparse.Namespace) -> None:
    """Be a contestant: answer requests on stdin, one line of JSON each."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # kt-kernel prints
    name = options.contestant
    kinds: dict[str, Callable[[argparse.Namespace], Contestant]] = {"torch": Torch}
    kind = Kt if name.startswith("kt:") else kinds.get(name, KtKernel)
    contestant = kind(options)
    answers.write("[]\n")
    answers.flush()
    for line in sys.stdin:
        answers.write(json.dumps(contestant.measure(**json.loads(line))) + "\n")
        answers.flush()
    os._exit(0)  # kt-kernel's threads do not always end


class Player:
    """The parent's side of a contestant; stopped while it is not its turn."""

    def __init__(self, python: str, name: str, threads: int, arguments: Sequence[str]) -> None:
        """Start the process and wait until its weights are packed."""
        self.name = name
        command = [python, __file__, *arguments, "--threads", str(threads), "--contestant", name]
        # Else torch's idle threads spin.
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._answer()
        self._process.send_signal(signal.SIGSTOP)

    def measure(self, tokens: int, seconds: float) -> list[float]:
        """Let it compute, and return the seconds of each call."""
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.write(json.dumps({"tokens": tokens, "seconds": seconds}) + "\n")
        self._process.stdin.flush()
        times = self._answer()
        self._process.send_signal(signal.SIGSTOP)
        return times

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def _answer(self) -> list[float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.close()
            sys.exit(f"{self.name} ended; what it said is above")
        times: list[float] = json.loads(line)
        return times


def peer_python(folder: Path) -> str:
    """Return the Python of the environment with kt-kernel; make it where there is none."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        (packages,) = folder.glob("lib/python*/site-packages")
        paths = [*site.getsitepackages(), *(p for p in sys.path if p.endswith("site-packages"))]
        lines = "\n".join(
            f"import site; site.addsitedir({path!r})" for path in dict.fromkeys(paths)
        )
        (packages / "zz_parent.pth").write_text(lines + "\n", encoding="utf-8")
        pip = [str(python), "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, KT_KERNEL, KT_KERNEL_NEEDS], check=True)
    return str(python)


def compare(options: argparse.Namespace, threads: int, weight_format: str) -> list[dict[str, Any]]:
    """Return one row for each peer and number of tokens."""
    rows = []
    shared = ["--tokens", ",".join(map(str, options.tokens)), "--top-k", str(options.top_k)]
    for name in ("hidden", "intermediate", "experts"):
        shared += [f"--{name}", str(getattr(options, name))]
    names = [n for n in PEERS.get(weight_format, ()) if not options.peer or n in options.peer]
    for name in names:
        python = sys.executable if name == "torch" else peer_python(options.venv)
        with ExitStack() as stack:
            kt = Player(sys.executable, f"kt:{weight_format}", threads, shared)
            stack.callback(kt.close)
            peer = Player(python, name, threads, shared)
            stack.callback(peer.close)
            for tokens in options.tokens:
                pairs = [
                    (kt.measure(tokens, options.seconds), peer.measure(tokens, options.seconds))
                    for _ in range(options.rounds)
                ]
                row = {
                    "format": weight_format,
                    "peer": name,
                    "threads": threads,
                    "tokens": tokens,
                    "kt_us": round(median(t for ours, _ in pairs for t in ours) * 1e6, 1),
                    "peer_us": round(median(t for _, theirs in pairs for t in theirs) * 1e6, 1),
                    "ratio": round(median(median(b) / median(a) for a, b in pairs), 3),
                }
                rows.append(row)
                text = "{format} against {peer}, {threads} threads, {tokens} tokens: {kt_us} us, "
                sys.stderr.write((text + "{peer_us} us, ratio {ratio}\n").format(**row))
    return rows


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    def names(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--format", type=names, default=["int4", "int8"], help=", ".join(PEERS))
    parser.add_argument("--peer", type=names, help="only these peers, such as RAWINT4,torch")
    parser.add_argument("--tokens", type=numbers, default=[1, 16, 64, 1024])
    parser.add_argument("--threads", type=numbers, default=[1])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=768)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="of one contestant in a round")
    parser.add_argument("--venv", type=Path, default=Path("build/peers"), help="for kt-kernel")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)  # this is a child process
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, and print medians and ratios."""
    options = parse(arguments)
    if options.contestant:
        options.threads = options.threads[0]
        serve(options)
        return 0
    if unknown := set(options.format) - set(PEERS):
        sys.exit(f"no peer has format {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}")
    rows = [
        row
        for threads in options.threads
        for name in options.format
        for row in compare(options, threads, name)
    ]
    if options.json:
        report = {"machine": {"system": platform.platform()}, "peer": KT_KERNEL, "results": rows}
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
        return 0
    widths = [max(len(key), *(len(str(row[key])) for row in rows)) for key in rows[0]]
    for cells in (list(rows[0]), *(list(row.values()) for row in rows)):
        texts = (str(cell).rjust(width) for cell, width in zip(cells, widths, strict=True))
        sys.stdout.write("  ".join(texts) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
