"""Layers of packed experts to be timed, and the float64 truth about what they compute."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn import functional

from kt_core import hardware
from kt_core.bench.routing import Call, Routing
from kt_core.errors import NotEnoughMemoryError
from kt_core.interfaces import (
    ExpertDevice,
    ExpertKernel,
    ExpertWeights,
    Progress,
    WeightFormat,
    no_progress,
)
from kt_core.moe.activations import activate
from kt_core.types import ActivationPrecision, MoeSpec

# A call must not find in the cache what the one before left there.
COLD_FACTOR = 4
UNKNOWN_CACHE_BYTES = 64 << 20
# Experts with weights of their own; the others hold copies, which are as far away in memory.
_DISTINCT_EXPERTS = 4
# Besides weights: Python, torch, hidden states and the scratch of the kernels.
_RESERVE_BYTES = 1 << 30
# Tokens that are compared with float64.
_CHECKED_TOKENS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How many layers there are to be, and why.

    Attributes:
        layers: Their number.
        weight_bytes: Of all experts of all layers, packed.
        cache_bytes: Of the last-level caches; an assumption where the machine does not say.
    """

    layers: int
    weight_bytes: int
    cache_bytes: int

    @property
    def is_cold(self) -> bool:
        """Whether the weights of every call come from memory."""
        return self.weight_bytes >= COLD_FACTOR * self.cache_bytes


def choose_layers(
    spec: MoeSpec, bytes_per_expert: int, layers: int | None, *, available_bytes: int | None = None
) -> Sizes:
    """Say how many layers to make.

    Args:
        spec: Shape of one layer.
        bytes_per_expert: Packed.
        layers: The number asked for; None for as few as are cold, or as fit if that is fewer.
        available_bytes: Free memory; None to ask the machine.

    Raises:
        NotEnoughMemoryError: They do not fit; the message says what is needed.
    """
    cache_bytes = hardware.last_level_cache_bytes() or UNKNOWN_CACHE_BYTES
    if available_bytes is None:
        available_bytes = hardware.available_memory_bytes()
    layer_bytes = spec.num_experts * bytes_per_expert
    # Sources in bf16, the same dequantised in float32, and float32 on the way to both.
    besides = _RESERVE_BYTES + spec.weights_per_expert * (_DISTINCT_EXPERTS * (2 + 4) + 2 * 8)
    wanted = layers or -(-COLD_FACTOR * cache_bytes // layer_bytes)
    fitting = (available_bytes - besides) // layer_bytes
    if layers is None and fitting >= 1:
        wanted = min(wanted, fitting)
    if wanted > fitting:
        needed = wanted * layer_bytes + besides
        msg = (
            f"{wanted} layer{'s' if wanted > 1 else ''} of {spec.num_experts} experts need "
            f"{needed / 1e9:.1f} GB with what measuring takes besides, and "
            f"{available_bytes / 1e9:.1f} GB are free; ask for fewer --layers or --experts, or a "
            "--format with fewer bits"
        )
        raise NotEnoughMemoryError(msg)
    return Sizes(layers=wanted, weight_bytes=wanted * layer_bytes, cache_bytes=cache_bytes)


class PackedLayers:
    """Some layers of one format on one device, and the calls that go through them in turn."""

    def __init__(
        self,
        device: ExpertDevice,
        weight_format: WeightFormat,
        spec: MoeSpec,
        *,
        top_k: int,
        layers: int,
        precision: ActivationPrecision = ActivationPrecision.AUTO,
        progress: Progress = no_progress,
    ) -> None:
        """Make random weights and pack them.

        Raises:
            kt_core.errors.UnsupportedFormatError: The device cannot compute this.
        """
        self.device, self.weight_format, self.spec, self.top_k = device, weight_format, spec, top_k
        self.kernels = [
            device.expert_kernel(spec, weight_format.descriptor, precision=precision)
            for _ in range(layers)
        ]
        self.routing = Routing(spec.num_experts, top_k, layers)
        self._generator = torch.Generator().manual_seed(1)
        self._sources = [
            self._random_expert() for _ in range(min(_DISTINCT_EXPERTS, spec.num_experts))
        ]
        _load_all(self.kernels, self._sources, device.threads, progress)

    @property
    def bytes_per_expert(self) -> int:
        """Packed bytes of one expert."""
        return self.kernels[0].bytes_per_expert

    @property
    def operations_per_pair(self) -> int:
        """Of one token in one expert; a multiply-add is two."""
        return 2 * self.spec.weights_per_expert

    def hidden(self, tokens: int) -> torch.Tensor:
        """Return random hidden states ``[tokens, hidden]``, bfloat16."""
        shape = tokens, self.spec.hidden_size
        return torch.randn(shape, generator=self._generator).bfloat16().to(self._torch_device)

    def compute(self, call: Call, hidden: torch.Tensor) -> torch.Tensor:
        """Return the layer's output, when it is there."""
        return self.kernels[call.layer].submit(hidden, call.expert_ids, call.weights).wait()

    def next_call(self, tokens: int) -> Call:
        """Return the next call of ``routing``, on the device."""
        call = self.routing.next_call(tokens)
        ids, weights = call.expert_ids.to(self._torch_device), call.weights.to(self._torch_device)
        return Call(call.layer, ids, weights, call.num_active)

    def relative_error(self, call: Call, hidden: torch.Tensor) -> float:
        """Return ``|y - y64| / |y64|`` of the first tokens of a call, all of which are computed.

        ``y64`` is the same layer in float64: the weights that the stored numbers stand for, and
        hidden states that nobody rounded further.
        """
        got = self.compute(call, hidden)[:_CHECKED_TOKENS].double().cpu()
        want = torch.zeros_like(got)
        ids = call.expert_ids[:_CHECKED_TOKENS].cpu() % len(self._sources)
        weights = call.weights[:_CHECKED_TOKENS].double().cpu()
        for index, (gate, up, down) in enumerate(self._stored):
            token, k = torch.where(ids == index)
            if not len(token):
                continue
            x = hidden[token].double().cpu()
            inner = activate(
                self.spec.activation,
                functional.linear(x, gate.double()),
                functional.linear(x, up.double()),
            )
            value = functional.linear(inner, down.double())
            want.index_add_(0, token, value * weights[token, k, None])
        return float((got - want).norm() / want.norm())

    @cached_property
    def _stored(self) -> list[list[torch.Tensor]]:
        """Dequantised gate, up and down of each distinct expert, float32."""
        quantize, dequantize = self.weight_format.quantize, self.weight_format.dequantize
        return [[dequantize(quantize(matrix)) for matrix in source] for source in self._sources]

    @property
    def _torch_device(self) -> str:
        return self.device.info.torch_device

    def _random_expert(self) -> list[torch.Tensor]:
        hidden, inner = self.spec.hidden_size, self.spec.intermediate_size
        shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
        return [
            (torch.randn(shape, generator=self._generator) * shape[1] ** -0.5).bfloat16()
            for shape in shapes
        ]


def _load_all(
    kernels: Sequence[ExpertKernel],
    sources: Sequence[Sequence[torch.Tensor]],
    threads: int,
    progress: Progress,
) -> None:
    experts = range(kernels[0].spec.num_experts)
    weights = [ExpertWeights(gate=gate, up=up, down=down) for gate, up, down in sources]
    progress("packing", 0.0)
    with ThreadPoolExecutor(threads, thread_name_prefix="kt-pack") as pool:
        pending = {
            pool.submit(kernel.load, expert, weights[expert % len(weights)])
            for kernel in kernels
            for expert in experts
        }
        total = len(pending)
        try:
            while pending:
                done, pending = wait(pending, timeout=0.1, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                progress("packing", 1 - len(pending) / total)
        except BaseException:  # Ctrl-C too: start no more, then let it through
            pool.shutdown(cancel_futures=True)
            raise
